"""Preparation of training text: tokenizers are learnt, text is tokenised, pairs are filtered."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax_transformer.data.batching import Mixture, TokenizedPairs
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.parallel_text import ParallelText, TextPart
from flax_transformer.data.token_cache import tokenized_parts
from flax_transformer.data.tokenizer import (
    SubwordSample,
    SubwordSamplingConfig,
    TokenizedText,
    TokenizerConfig,
)
from flax_transformer.data.tokenizer_pair import TokenizerPair, learnt_kind
from flax_transformer.errors import RunFolderError, writing
from flax_transformer.progress import progress, tracked
from flax_transformer.small_files import write_atomically
from flax_transformer.user_cache import user_cache

# File beside cached tokenizers with the fingerprint that they were learnt with.
FINGERPRINT = "fingerprint.txt"

# Number of pairs that show what normalisation changes. They are normalised once more, at each start.
MAX_PAIRS_LOOKED_AT = 10_000


def prepare_tokenizers(parts: Sequence[TextPart], config: TokenizerConfig) -> TokenizerPair:
    """Returns tokenizers learnt from the training text.

    They are kept in the user's cache, and learnt once for the same text and configuration.

    Raises:
        InputError: bad text; see also `LearntKind.train`.
    """
    content = [[part.fingerprint for part in parts], dataclasses.asdict(config), learnt_kind(config).version]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    folder = user_cache("tokenizers")
    if (folder / key).is_dir():
        with contextlib.suppress(RunFolderError, OSError, ValueError):  # a damaged tokenizer is learnt again
            tokenizers = TokenizerPair.load(folder / key)
            if (folder / key / FINGERPRINT).read_text(encoding="utf-8") == tokenizers.fingerprint:
                return tokenizers
        shutil.rmtree(folder / key, ignore_errors=True)
    names = ", ".join(part.name for part in parts)
    sample = _sample(parts, config.max_training_pairs)
    with progress(f"learning the tokenizer from {len(sample[0]):,} pairs", unit="tokenizers", only_on_terminals=True):
        tokenizers = TokenizerPair.train(*sample, config, names)
    partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=folder))
    try:
        with writing(partial):
            tokenizers.save(partial)
            write_atomically(partial / FINGERPRINT, tokenizers.fingerprint)
        partial.rename(folder / key)
    except OSError:
        if not (folder / key).is_dir():  # else another process has made the same folder
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tokenizers


def _sample(parts: Sequence[TextPart], most: int) -> tuple[list[str], list[str]]:
    """Returns the two sides of at most `most` pairs, spread evenly over the text.

    If the text has more pairs, more than half of `most` are returned.
    """
    chosen, stride, number = [], 1, 0
    for part in parts:
        for pair in tracked(part.pairs(), f"reading {part.name} for the tokenizer", unit="pairs"):
            if number % stride == 0:
                if len(chosen) == most:
                    chosen, stride = chosen[::2], 2 * stride
                if number % stride == 0 and len(chosen) < most:
                    chosen.append(pair)
            number += 1
    return [source for source, _ in chosen], [target for _, target in chosen]


class NormalizedLines(NamedTuple):
    """The lines of training text that normalisation changes, in more than their spaces.

    Attributes:
        num_changed: number of changed lines.
        num_lines: number of lines that were looked at, of both sides.
        before: part of the first changed line; empty without one.
        after: the same part after normalisation.
    """

    num_changed: int
    num_lines: int
    before: str = ""
    after: str = ""


def normalized_lines(parts: Sequence[TextPart], tokenizers: TokenizerPair) -> NormalizedLines:
    """Returns how many lines normalisation changes, among the first ones of each part."""
    pairs = [
        pair for part in parts for pair in itertools.islice(part.pairs(), max(1, MAX_PAIRS_LOOKED_AT // len(parts)))
    ]
    found = NormalizedLines(0, 2 * len(pairs))
    for side, tokenizer in enumerate((tokenizers.source, tokenizers.target)):
        # Normalisation leaves other lines as they are.
        lines = [pair[side] for pair in pairs if not (pair[side].isascii() and pair[side].isprintable())]
        for line, normal in zip(lines, tokenizer.normalized(lines), strict=True):
            before, after = "".join(line.split()), "".join(normal.split())
            if before != after:
                found = found._replace(num_changed=found.num_changed + 1)
                if found.num_changed == 1:
                    place = len(os.path.commonprefix([before, after]))
                    part = slice(max(0, place - 10), place + 10)
                    found = found._replace(before=before[part], after=after[part])
    return found


def prepare_training_pairs(
    parts: Sequence[TextPart],
    tokenizers: TokenizerPair,
    filters: FilterConfig,
    max_source_length: int,
    max_target_length: int,
    sampling: SubwordSamplingConfig | None = None,
) -> list[TokenizedPairs]:
    """Returns the training pairs, with tokenised text from the user's cache, where it is written if need be.

    Args:
        parts: the text.
        tokenizers: tokenizers of both sides.
        filters: which pairs are left out.
        max_source_length, max_target_length: limits of the model, in tokens.
        sampling: random segmentation; None or an alpha of 0 turns it off.

    Returns:
        One item for each variant of the random segmentation; one item without it.

    Raises:
        InputError: bad text, a damaged cache, or no pair left.
    """
    samples: list[SubwordSample | None] = [None]
    if sampling is not None and sampling.alpha:
        samples = [SubwordSample(sampling.alpha, number) for number in range(sampling.variants)]
    variants = []
    for sample in samples:
        with writing(folder := user_cache("tokens")):
            tokens = tokenized_parts(parts, tokenizers, folder, sample)
        mixture = Mixture(tokens.ends, tuple(float(part.weight) for part in parts), tuple(part.name for part in parts))
        variants.append(
            TokenizedPairs(
                tokens.source, tokens.target, max_source_length, max_target_length, filters, tokens.marks, mixture
            )
        )
    return variants


def held_out_pairs(
    text: ParallelText, tokenizers: TokenizerPair, max_source_length: int, max_target_length: int
) -> TokenizedPairs:
    """Returns the pairs of validation or test text that have a loss.

    Empty pairs and pairs beyond the model's lengths have none; `dropped` counts them.

    Raises:
        InputError: no pair is left.
    """
    return TokenizedPairs(
        TokenizedText.from_lines(text.source, tokenizers.source),
        TokenizedText.from_lines(text.target, tokenizers.target),
        max_source_length,
        max_target_length,
        mixture=Mixture((len(text.source),), (1.0,), (text.name,)),
    )
