"""Tokenised training text on disk, memory-mapped.

A cache is a folder, named by a hash of the text and of the tokenizers. It is written under another name, and renamed
when it is complete. So a process that is killed never leaves a partial cache under the final name. Each file has a
checksum, which is checked when a cache is opened. A damaged cache is made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformer.data.filters import PairMarks
from flax_transformer.data.parallel_text import TextPart
from flax_transformer.data.text_files import chunks_of
from flax_transformer.data.tokenizer import SubwordSample, TokenizedText, Tokenizer
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import InputError
from flax_transformer.progress import progress
from flax_transformer.small_files import parse_object, sealed, unsealed, write_atomically

# Version of the files in a cache. A new number makes older caches unused.
FORMAT = 2

# Most pairs that are tokenised together, on all CPU cores. Long pairs are fewer (see `chunks_of`).
PAIRS_AT_ONCE = 16_384

# A killed process leaves a partial cache. It is removed when it has not changed for this time.
ABANDONED_SECONDS = 3_600

DTYPES = {
    "source_ids": np.int32,
    "source_offsets": np.int64,
    "target_ids": np.int32,
    "target_offsets": np.int64,
    "identical": np.bool_,
    "digests": np.uint64,
}


@dataclass(frozen=True)
class TokenizedParts:
    """The tokenised training text; its parts follow one another.

    Attributes:
        source, target: the two sides.
        marks: properties of the text that filters read.
        ends: for each part, the index after its last pair.
        folder: folder of the cache.
    """

    source: TokenizedText
    target: TokenizedText
    marks: PairMarks
    ends: tuple[int, ...]
    folder: Path


def cache_key(parts: Sequence[TextPart], tokenizers: TokenizerPair, sample: SubwordSample | None) -> str:
    """Returns a hash of the text, the tokenizers and the random segmentation."""
    content: list[Any] = [
        FORMAT,
        [part.fingerprint for part in parts],
        tokenizers.source.fingerprint,
        tokenizers.target.fingerprint,
    ]
    if sample is not None:
        content.append([sample.alpha, sample.seed, sample.num_lines])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def tokenized_parts(
    parts: Sequence[TextPart], tokenizers: TokenizerPair, folder: Path, sample: SubwordSample | None = None
) -> TokenizedParts:
    """Returns the tokenised text from its cache in `folder`. The cache is made if it does not exist.

    Args:
        parts: the text.
        tokenizers: tokenizers of both sides.
        folder: folder of all caches.
        sample: a random segmentation; None means the best one.

    Raises:
        InputError: bad text, or a cache that is damaged as soon as it is made.
    """
    made = folder / cache_key(parts, tokenizers, sample)
    if made.is_dir():
        try:
            return _open(made)
        except (FileNotFoundError, ValueError) as error:
            print(f"warning: {made} is damaged ({error}), so the text is tokenised again", file=sys.stderr, flush=True)
            shutil.rmtree(made, ignore_errors=True)
    _make(parts, tokenizers, sample, made)
    try:
        return _open(made)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"the cache of tokenised text in {made} is damaged, though it has just been made: {error}. Check that "
            "disk, or set XDG_CACHE_HOME to a folder on another one."
        ) from error


def _make(parts: Sequence[TextPart], tokenizers: TokenizerPair, sample: SubwordSample | None, made: Path) -> None:
    """Writes a cache to the folder `made`, unless another process has written it in the meantime."""
    made.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(made.parent)
    partial = Path(tempfile.mkdtemp(prefix=f"{made.name}.partial-", dir=made.parent))
    try:
        _write(parts, tokenizers, sample, partial)
        try:
            partial.rename(made)
        except OSError:
            if not made.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for partial in folder.glob("*.partial-*"):
        try:
            newest = max(f.stat().st_mtime for f in (partial, *partial.glob("*")))
        except OSError:  # its writer has just finished
            continue
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _write(parts: Sequence[TextPart], tokenizers: TokenizerPair, sample: SubwordSample | None, folder: Path) -> None:
    """Writes the arrays as flat files, and then `meta.json` with their checksums."""
    digests = {name: hashlib.sha256() for name in DTYPES}
    ends, pairs_done = [], 0
    files = {name: (folder / name).open("wb") for name in DTYPES}

    def write(name: str, values: np.ndarray) -> None:
        array = np.ascontiguousarray(values, DTYPES[name])
        files[name].write(array.data)
        digests[name].update(array.data)

    try:
        with progress("tokenising", unit="pairs") as advance:
            starts = {"source": 0, "target": 0}
            for side in starts:
                write(f"{side}_offsets", np.zeros(1))
            for part in parts:
                pairs = iter(part.pairs())
                for group in chunks_of(pairs, PAIRS_AT_ONCE, lambda pair: len(pair[0]) + len(pair[1]), _is_there):
                    for number, (side, tokenizer, lines) in enumerate(
                        (
                            ("source", tokenizers.source, [source for source, _ in group]),
                            ("target", tokenizers.target, [target for _, target in group]),
                        )
                    ):
                        here = None if sample is None else sample.at(number, pairs_done)
                        ids, lengths = _encode(tokenizer, lines, here)
                        write(f"{side}_ids", ids)
                        write(f"{side}_offsets", starts[side] + np.cumsum(lengths))
                        starts[side] += len(ids)
                    write("identical", np.array([source == target for source, target in group]))
                    write("digests", np.array([_digest(pair) for pair in group], np.uint64))
                    pairs_done += len(group)
                    advance(len(group))
                ends.append(pairs_done)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.ExitStack() as stack:  # closes every file, also if a full disk makes one fail
            for file in files.values():
                stack.callback(file.close)
    checksums = {name: digest.hexdigest() for name, digest in digests.items()}
    write_atomically(folder / "meta.json", json.dumps(sealed({"ends": ends, "checksums": checksums})))


def _is_there(_deadline: float) -> bool:
    """Returns that the next pair can be read without waiting. Training text lies in files."""
    return True


def _encode(tokenizer: Tokenizer, lines: list[str], sample: SubwordSample | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of all lines in one array, with an end token after each line, and the lengths."""
    text = TokenizedText.from_lines(lines, tokenizer, sample)
    return text.ids, text.lengths


def _digest(pair: tuple[str, str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(pair).encode(), digest_size=8).digest(), "little")


def _open(folder: Path) -> TokenizedParts:
    """Maps the arrays of a cache into memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not have the content that it was written with.
    """
    meta = unsealed(parse_object((folder / "meta.json").read_bytes()))
    arrays = {}
    for name, dtype in DTYPES.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != meta["checksums"][name]:
                raise ValueError(f"{name} does not have the checksum that it was written with")
        arrays[name] = np.memmap(folder / name, dtype, mode="r")
    return TokenizedParts(
        TokenizedText(arrays["source_ids"], arrays["source_offsets"]),
        TokenizedText(arrays["target_ids"], arrays["target_offsets"]),
        PairMarks(arrays["identical"], arrays["digests"]),
        tuple(meta["ends"]),
        folder,
    )
