"""Conversion between section `decoding` and the settings of Hugging Face's `generate`.

Each direction also returns the settings that the other side lacks, so no loss goes unreported.
"""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.stop_rules import StopRule

# Fields of `DecodingConfig` that Hugging Face's beam search lacks.
NOT_THEIRS = (
    "method", "temperature", "top_k", "top_p", "min_p", "mbr_samples", "coverage_penalty",
)  # fmt: skip

# `decoding.stop` -> Hugging Face's `early_stopping`.
EARLY_STOPPING: dict[StopRule, bool | str] = {"exact": "never", "heuristic": False, "first_finished": True}

# Settings of Hugging Face that change outputs and that this project lacks, each with its neutral value.
NOT_OURS = {
    "do_sample": False,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
}
# Settings of the same kind that Hugging Face reads only when it samples.
NOT_OURS_OF_SAMPLING = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


class Generation(NamedTuple):
    """Hugging Face's settings in the terms of this project.

    Attributes:
        decoding: section `decoding`.
        start_excluded: whether the start token gets no share of the probabilities. No output contains it in any case.
        lost: settings that the other fields cannot express, each as "name: value".
    """

    decoding: DecodingConfig
    start_excluded: bool
    lost: list[str]


def named(settings: dict[str, Any]) -> list[str]:
    """Returns each setting as "name: value". Long values are shortened."""
    return [f"{name}: {value if isinstance(value, str) else reprlib.repr(value)}" for name, value in settings.items()]


def export_generation(
    decoding: DecodingConfig, order: np.ndarray, target: Tokenizer, longest: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the contents of Hugging Face's generation_config.json, and the settings of this project that it lacks.

    Args:
        decoding: section `decoding` of the run.
        order: this project's id of each MarianMT id.
        target: tokenizer of the outputs.
        longest: most tokens of an output of the model, end token included.
    """
    theirs, special = {ours: number for number, ours in enumerate(order.tolist())}, target.special
    defaults = DecodingConfig()
    penalty = LengthPenalty.parse(decoding.length_penalty)
    lost: dict[str, Any] = {}
    if penalty.name == "gnmt" and decoding.beam_size > 1:
        lost["length_penalty"] = decoding.length_penalty
    most = longest
    if decoding.max_length_factor:
        lost["max_length_factor"] = decoding.max_length_factor
    else:
        most = min(max(decoding.max_length_offset, decoding.min_length) + 1, longest)
    lost |= {name: getattr(decoding, name) for name in NOT_THEIRS if getattr(decoding, name) != getattr(defaults, name)}

    never = [special.start, special.pad] + [special.unknown] * decoding.suppress_unknown
    suppressed = [[number] for number in never if number in theirs]
    suppressed += [ids for ids in target.encode(decoding.suppress_sequences) if ids]
    suppressed += [[number] for name in decoding.suppress_tokens if (number := target.id_of(name)) is not None]
    values: dict[str, Any] = {
        "eos_token_id": theirs[special.end],
        "pad_token_id": theirs[special.start],
        "decoder_start_token_id": theirs[special.start],
        "bad_words_ids": [[theirs[i] for i in ids] for ids in suppressed],
        "num_beams": decoding.beam_size,
        "early_stopping": EARLY_STOPPING[decoding.stop],
        "max_length": most + 1,  # Hugging Face counts the start token
    }
    if penalty.name != "gnmt":
        values["length_penalty"] = penalty.exponent
    if decoding.min_length:
        values["min_length"] = decoding.min_length + 1
    if decoding.force_eos:
        values["forced_eos_token_id"] = theirs[special.end]
    if decoding.no_repeat_ngram:
        values["no_repeat_ngram_size"] = decoding.no_repeat_ngram
    if decoding.repetition_penalty != 1.0:
        if decoding.beam_size > 1:
            values["repetition_penalty"] = decoding.repetition_penalty
        else:  # without a beam Hugging Face multiplies logits
            lost["repetition_penalty"] = decoding.repetition_penalty
    return values, named(lost)


class BadWords(NamedTuple):
    """The contents of Hugging Face's `bad_words_ids`.

    Attributes:
        start, unknown: whether the start token and the unknown token are suppressed.
        phrases: suppressed texts of several tokens.
        tokens: names of suppressed single pieces.
        others: suppressed lists of MarianMT ids that neither a text nor a piece expresses.
    """

    start: bool
    unknown: bool
    phrases: list[str]
    tokens: list[str]
    others: list[list[int]]

    @property
    def others_than_start(self) -> bool:
        """Whether anything but the start token is suppressed."""
        return bool(self.unknown or self.phrases or self.tokens or self.others)


def read_bad_words(bad_words_ids: Sequence[list[int]], order: np.ndarray, target: Tokenizer) -> BadWords:
    """Returns what `bad_words_ids` suppresses; see `read_generation` for `order` and `target`."""
    special = target.special
    start, unknown, phrases, tokens, others = False, False, [], [], []
    for ids in bad_words_ids:
        ours = order[ids].tolist() if ids and max(ids) < len(order) else []
        if ours == [special.start]:
            start = True
        elif ours == [special.unknown]:
            unknown = True
        elif len(ours) == 1 and target.id_of(piece := target.pieces(ours)[0]) is not None:
            tokens.append(piece)
        elif ours and (text := target.decode(ours)).strip() and target.encode([text]) == [ours]:
            phrases.append(text)
        elif ours not in ([special.pad], [special.end]):  # neither system outputs padding or suppresses the end
            others.append(ids)
    return BadWords(start, unknown, phrases, tokens, others)


def read_generation(theirs: dict[str, Any], order: np.ndarray, target: Tokenizer, longest: int) -> Generation:
    """Returns Hugging Face's settings in the terms of this project.

    Settings without a maximum length get this project's default, and `lost` says so.

    MarianMT's padding is the start token. Settings may suppress it and give its probability to the other tokens
    (`renormalize_logits`). Then `start_excluded` is True, and the model behaves as in Marian's training, which does not
    know the token.

    Args:
        theirs: contents of Hugging Face's generation_config.json, or of config.json in a folder without it.
        order: this project's id of each MarianMT id.
        target: tokenizer of the outputs.
        longest: most tokens of an output of the model, end token included.
    """
    given = {name: value for name, value in theirs.items() if value is not None}
    neutral = NOT_OURS | (NOT_OURS_OF_SAMPLING if given.get("do_sample") else {})
    lost = {name: given[name] for name, value in neutral.items() if given.get(name, value) not in (value, [], {})}

    bad_words = _read_tokens(given, order, target, lost)
    decoding = _read_numbers(given, bad_words, longest, lost)
    renormalize = given.get("renormalize_logits") is True
    others_suppressed = bad_words.others_than_start or decoding.min_length or decoding.no_repeat_ngram
    if renormalize and (others_suppressed or decoding.repetition_penalty != 1.0):
        lost["renormalize_logits"] = True  # this project suppresses these without renormalising
    return Generation(decoding, renormalize and bad_words.start, named(lost))


def _read_tokens(given: dict[str, Any], order: np.ndarray, target: Tokenizer, lost: dict[str, Any]) -> BadWords:
    """Returns what the settings suppress. Special tokens other than this project's are added to `lost`."""
    special = target.special
    end, start = (int(np.flatnonzero(order == token)[0]) for token in (special.end, special.start))
    for name, token in (("eos_token_id", end), ("decoder_start_token_id", start), ("forced_eos_token_id", end)):
        if given.get(name, token) not in (token, [token]):
            lost[name] = given[name]
    if (bad_words := read_bad_words(given.get("bad_words_ids", ()), order, target)).others:
        lost["bad_words_ids"] = bad_words.others
    return bad_words


def _read_numbers(given: dict[str, Any], bad_words: BadWords, longest: int, lost: dict[str, Any]) -> DecodingConfig:
    """Returns the settings of the search. Values that it does not have are added to `lost`."""
    stops = [ours for ours, value in EARLY_STOPPING.items() if value == given.get("early_stopping", False)]
    if not stops:
        lost["early_stopping"] = given["early_stopping"]
    beam_size, exponent = given.get("num_beams") or 1, given.get("length_penalty", 1.0)
    penalty = given.get("repetition_penalty", 1.0)
    if exponent < 0:
        lost["length_penalty"], exponent = exponent, 0.0
    if penalty < 1 or (penalty != 1 and beam_size == 1):  # without a beam Hugging Face multiplies logits
        lost["repetition_penalty"], penalty = penalty, 1.0
    # Hugging Face's limits count the start token. Its maximum counts the end token, its minimum does not. This
    # project's limits count neither.
    most = given.get("max_new_tokens", given.get("max_length", 1) - 1)
    fewest = given.get("min_new_tokens", given.get("min_length", 1) - 1)
    decoding = DecodingConfig(
        beam_size=beam_size,
        length_penalty=f"average:{float(exponent)}",
        stop=stops[0] if stops else "exact",
        min_length=max(0, min(fewest, longest - 1)),
        force_eos=given.get("forced_eos_token_id") is not None and "forced_eos_token_id" not in lost,
        no_repeat_ngram=given.get("no_repeat_ngram_size", 0),
        repetition_penalty=float(penalty),
        suppress_unknown=bad_words.unknown,
        suppress_sequences=tuple(bad_words.phrases),
        suppress_tokens=tuple(bad_words.tokens),
    )
    if most > 1:
        return dataclasses.replace(decoding, max_length_factor=0.0, max_length_offset=min(most, longest) - 1)
    if most == 1:
        lost["max_length"] = "one token, which is the end token"
    else:
        lost["max_length"] = "none given; generate makes 20 tokens then, this run has its own default"
    return decoding
