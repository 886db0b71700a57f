"""Settings of Hugging Face's `generate` and of a run, both ways."""

import dataclasses
import json
import re

import pytest

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.interop.marian import marian_order, vocabulary
from flax_transformer.interop.marian_generation import export_generation, read_generation
from flax_transformer.run_folder import RunFolder
from tests.small_models import TOKENIZERS, make_run
from tests.test_marian import MODEL, convert, foreign_marian, pieces_to_marian

ORDER = marian_order(TOKENIZERS.target)
INSIDE = vocabulary(TOKENIZERS.target)["neun"]
LONGEST = 48
LIMIT = {"max_length": LONGEST + 1}  # without one of theirs, which counts the start token, it is said


def ids_of(text: str) -> list[int]:
    """Their ids of a text."""
    return pieces_to_marian(TOKENIZERS.target, TOKENIZERS.target.encode([text])[0])


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({}, {}),
        ({"num_beams": 6, "length_penalty": 0.5}, {"beam_size": 6, "length_penalty": "average:0.5"}),
        ({"early_stopping": True}, {"stop": "first_finished"}),
        ({"early_stopping": "never"}, {"stop": "exact"}),
        ({"max_length": 20}, {"max_length_offset": 18}),
        ({"max_length": 512}, {"max_length_offset": LONGEST - 1}),
        ({"max_length": 512, "max_new_tokens": 19}, {"max_length_offset": 18}),
        ({"max_length": None, "max_new_tokens": 19}, {"max_length_offset": 18}),
        ({"min_length": 5}, {"min_length": 4}),
        ({"min_length": 0}, {"min_length": 0}),
        ({"min_length": 9, "min_new_tokens": 4}, {"min_length": 4}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram": 3}),
        ({"num_beams": 2, "repetition_penalty": 1.5}, {"beam_size": 2, "repetition_penalty": 1.5}),
        ({"forced_eos_token_id": 0}, {"force_eos": True}),
        ({"forced_eos_token_id": [0], "eos_token_id": [0]}, {"force_eos": True}),
        ({"bad_words_ids": [[59], [58], [0]]}, {}),  # padding, <unused>, and the end, which they leave out themselves
        (
            {"bad_words_ids": [[59], [1], ids_of("neun"), ids_of("thirty"), [INSIDE]]},
            {"suppress_unknown": True, "suppress_sequences": ("neun",), "suppress_tokens": ("\u2581thirty", "neun")},
        ),
        ({"temperature": 0.5, "do_sample": False, "forced_bos_token_id": None, "suppress_tokens": []}, {}),
        ({"renormalize_logits": True}, {}),  # nothing is suppressed whose probability could be shared out
    ],
)
def test_settings_of_generate_become_those_of_a_run(theirs, ours):
    neutral = DecodingConfig(
        beam_size=1,
        length_penalty="average:1.0",
        stop="heuristic",
        max_length_factor=0.0,
        max_length_offset=LONGEST - 1,
    )
    expected = dataclasses.replace(neutral, **ours)
    assert read_generation(LIMIT | theirs, ORDER, TOKENIZERS.target, LONGEST) == (expected, False, [])


@pytest.mark.parametrize(
    "more, phrases, lost",
    [
        ({}, [], False),
        ({"forced_eos_token_id": 0}, [], False),
        ({"min_length": 3}, [], True),
        ({"no_repeat_ngram_size": 2}, [], True),
        ({"num_beams": 2, "repetition_penalty": 1.5}, [], True),
        ({}, [[1]], True),
        ({}, [ids_of("neun")], True),
        ({}, [[INSIDE]], True),
    ],
)
def test_suppressed_padding_is_excluded_where_its_probability_is_shared_out(more, phrases, lost):
    """What other rules take away is shared out there, too, and not here."""
    theirs = (
        {"bad_words_ids": [[ORDER.tolist().index(SPECIAL.start)], *phrases], "renormalize_logits": True} | LIMIT | more
    )
    expected = (True, ["renormalize_logits: True"] if lost else [])
    assert read_generation(theirs, ORDER, TOKENIZERS.target, LONGEST)[1:] == expected
    theirs["renormalize_logits"] = False
    assert read_generation(theirs, ORDER, TOKENIZERS.target, LONGEST)[1:] == (False, [])


@pytest.mark.parametrize(
    "theirs, lost",
    [
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            ["num_beam_groups: 2", "diversity_penalty: 0.5"],
        ),
        ({"do_sample": True, "top_k": 5, "top_p": 1.0}, ["do_sample: True", "top_k: 5"]),
        ({"forced_bos_token_id": 7}, ["forced_bos_token_id: 7"]),
        ({"forced_eos_token_id": 7, "eos_token_id": [0, 7]}, ["eos_token_id: [0, 7]", "forced_eos_token_id: 7"]),
        ({"decoder_start_token_id": 0}, ["decoder_start_token_id: 0"]),
        ({"num_beams": 2, "repetition_penalty": 0.5}, ["repetition_penalty: 0.5"]),
        ({"early_stopping": "soon"}, ["early_stopping: soon"]),
        ({"repetition_penalty": 1.5}, ["repetition_penalty: 1.5"]),  # of logits, where there is no beam
        ({"length_penalty": -1.0}, ["length_penalty: -1.0"]),
        ({"exponential_decay_length_penalty": [9, 1.1]}, ["exponential_decay_length_penalty: [9, 1.1]"]),
        # No text is cut into the inside of a word alone, nor into padding, and there is no token 60.
        (
            {"bad_words_ids": [[59], [INSIDE, INSIDE], [59, 5], [60]]},
            [f"bad_words_ids: [[{INSIDE}, {INSIDE}], [59, 5], [60]]"],
        ),
    ],
)
def test_settings_of_generate_without_an_equivalent_are_named(theirs, lost):
    decoding, start_excluded, found = read_generation(LIMIT | theirs, ORDER, TOKENIZERS.target, LONGEST)
    assert found == lost and not start_excluded
    neutral = DecodingConfig(
        beam_size=theirs.get("num_beams", 1), length_penalty=decoding.length_penalty,
        stop="exact" if "early_stopping" in theirs else "heuristic", max_length_factor=0.0,
        max_length_offset=LONGEST - 1,
    )  # fmt: skip
    assert decoding == neutral and decoding.length_penalty in ("average:1.0", "average:0.0")


@pytest.mark.parametrize("theirs", [{}, {"max_length": None, "num_beams": 4}])
def test_a_maximum_length_that_is_not_given_is_ours_and_named(theirs):
    """Theirs then make 20 tokens."""
    decoding, _, lost = read_generation(theirs, ORDER, TOKENIZERS.target, LONGEST)
    ours = DecodingConfig()
    assert decoding.max_length_factor == ours.max_length_factor
    assert decoding.max_length_offset == ours.max_length_offset
    assert lost == ["max_length: none given; generate makes 20 tokens then, this run has its own default"]


@pytest.mark.parametrize(
    "changes, lost",
    [
        ({}, []),
        (
            {
                "stop": "first_finished",
                "min_length": 3,
                "force_eos": True,
                "no_repeat_ngram": 2,
                "repetition_penalty": 1.2,
            },
            [],
        ),
        ({"suppress_unknown": True, "suppress_sequences": ("neun", "einhundert"), "length_penalty": "average:0.5"}, []),
        ({"suppress_tokens": ("neun", "\u2581hundred")}, []),
        ({"stop": "heuristic"}, []),
        (
            {"length_penalty": "gnmt:0.6", "max_length_factor": 2.0, "coverage_penalty": 0.2},
            ["length_penalty: gnmt:0.6", "max_length_factor: 2.0", "coverage_penalty: 0.2"],
        ),
        ({"length_penalty": "gnmt:0.6", "beam_size": 1, "repetition_penalty": 1.2}, ["repetition_penalty: 1.2"]),
        ({"method": "sampling", "top_k": 5, "beam_size": 5}, ["method: sampling", "top_k: 5"]),
    ],
)
def test_settings_of_a_run_become_those_of_generate_or_are_named(changes, lost):
    plain = DecodingConfig(beam_size=3, length_penalty="average:1.0", max_length_factor=0.0, max_length_offset=19)
    decoding = dataclasses.replace(plain, **changes)
    made, found = export_generation(decoding, ORDER, TOKENIZERS.target, LONGEST)
    assert found == lost and made["max_length"] == (49 if decoding.max_length_factor else 21)
    if not lost:
        assert read_generation(made, ORDER, TOKENIZERS.target, LONGEST) == (decoding, False, [])


def test_what_is_left_out_is_said_by_the_command(tmp_path, capsys):
    """Settings are taken from generation_config.json alone where it is there, else from config.json."""
    folder = foreign_marian(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text()) | {"max_length": 9, "num_beam_groups": 2}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert("from-hf", folder, "--output", tmp_path / "first") == 0
    warning = "warning: outputs may be other than Hugging Face's, since these settings of .* have no equivalent here: "
    assert re.fullmatch(f"{warning}num_beam_groups: 2.\n", capsys.readouterr().err)
    assert RunFolder.open(tmp_path / "first").read_config().decoding.max_length_offset == 7

    (folder / "generation_config.json").write_text('{"num_beams": 2, "top_p": 0.5, "max_length": 7}')
    assert convert("from-hf", folder, "--output", tmp_path / "second") == 0
    assert not capsys.readouterr().err
    decoding = RunFolder.open(tmp_path / "second").read_config().decoding
    assert (decoding.beam_size, decoding.max_length_offset, decoding.force_eos) == (2, 5, False)

    run = make_run(tmp_path / "ours", MODEL, 1)
    assert convert("to-hf", run, "--output", tmp_path / "marian") == 0
    warning = "warning: Hugging Face's generate may give other outputs than this run, since it does not have: "
    expected = f"{warning}length_penalty: gnmt:0.6; max_length_factor: 0.5 (of section 'decoding').\n"
    said = capsys.readouterr().err
    assert said.startswith(f"{expected}warning: CTranslate2 begins every output with a vector of zeros, and this run")
    assert said.endswith("For CTranslate2 train with model.zero_start: true.\n")
    started = make_run(tmp_path / "zeros", dataclasses.replace(MODEL, zero_start=True, embedding_dropout=0.4), 1)
    assert convert("to-hf", started, "--output", tmp_path / "for_ctranslate2") == 0
    expected += "warning: a MarianMT model has no place for embedding_dropout: 0.4 (a training from that folder uses "
    assert capsys.readouterr().err == f"{expected}0.1) (of section 'model').\n"
