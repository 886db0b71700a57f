"""From training text to what batches are made of: tokenizers learnt, text tokenised, pairs filtered."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flax_transformer.data.batching import Mixture, TokenizedPairs
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.parallel_text import ParallelText, TextPart
from flax_transformer.data.sentencepiece_tokenizer import VERSION
from flax_transformer.data.token_cache import tokenized_parts
from flax_transformer.data.tokenizer import (
    SubwordSample,
    SubwordSamplingConfig,
    TokenizedText,
    TokenizerConfig,
)
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.user_cache import user_cache


def prepare_tokenizers(parts: Sequence[TextPart], config: TokenizerConfig) -> TokenizerPair:
    """Returns tokenizers learnt from the training text, or those that were learnt from it before in the same way.

    Raises:
        InputError: bad text, or as `SentencePieceTokenizer.train`.
    """
    content = [[part.fingerprint for part in parts], dataclasses.asdict(config), VERSION]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    folder = user_cache("tokenizers")
    if (folder / key).is_dir():
        with contextlib.suppress(RunFolderError):  # damaged: it is learnt again
            return TokenizerPair.load(folder / key)
        shutil.rmtree(folder / key, ignore_errors=True)
    names = ", ".join(part.name for part in parts)
    tokenizers = TokenizerPair.train(*_sample(parts, config.max_training_pairs), config, names)
    partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=folder))
    try:
        tokenizers.save(partial)
        partial.rename(folder / key)
    except OSError:
        if not (folder / key).is_dir():  # else another process was quicker, and made the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tokenizers


def _sample(parts: Sequence[TextPart], most: int) -> tuple[list[str], list[str]]:
    """Returns the two sides of at most `most` pairs, spread evenly: all, or more than half as many."""
    chosen, stride, number = [], 1, 0
    for part in parts:
        for pair in part.pairs():
            if number % stride == 0:
                if len(chosen) == most:
                    chosen, stride = chosen[::2], 2 * stride
                if number % stride == 0 and len(chosen) < most:
                    chosen.append(pair)
            number += 1
    return [source for source, _ in chosen], [target for _, target in chosen]


def prepare_training_pairs(
    parts: Sequence[TextPart],
    tokenizers: TokenizerPair,
    filters: FilterConfig,
    max_source_length: int,
    max_target_length: int,
    sampling: SubwordSamplingConfig | None = None,
) -> list[TokenizedPairs]:
    """Returns the training pairs, from the user's cache, where they are put if need be.

    Args:
        parts: the text.
        tokenizers: of the two sides.
        filters: which pairs are left out.
        max_source_length, max_target_length: of the model.
        sampling: of subwords; none when left out.

    Returns:
        As many times as there are variants of the segmentation; once when subwords are not sampled.

    Raises:
        InputError: bad text, a damaged cache, or no pair that is left.
    """
    samples: list[SubwordSample | None] = [None]
    if sampling is not None and sampling.alpha:
        samples = [SubwordSample(sampling.alpha, number) for number in range(sampling.variants)]
    variants = []
    for sample in samples:
        tokens = tokenized_parts(parts, tokenizers, user_cache("tokens"), sample)
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
    """Returns pairs of validation or test text; of its loss alone, empty and too long ones are no part (`dropped`).

    Raises:
        InputError: no pair that is left.
    """
    return TokenizedPairs(
        TokenizedText.from_lines(text.source, tokenizers.source),
        TokenizedText.from_lines(text.target, tokenizers.target),
        max_source_length,
        max_target_length,
        mixture=Mixture((len(text.source),), (1.0,), (text.name,)),
    )
