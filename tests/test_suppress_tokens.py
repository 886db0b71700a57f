"""Tokens that no output holds, by the names of their pieces."""

import collections

import jax
import pytest
import tyro

from flax_transformer.cli.translate import TranslateOptions
from flax_transformer.config.reading import read_config, write_config
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.errors import ConfigError
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from tests.small_models import ALIKE, DECODING, MODELS, TOKENIZERS, params_of

MODEL = MODELS["transformer"]
EVERY = TOKENIZERS.target.pieces(range(len(SPECIAL.ids), TOKENIZERS.target.vocab_size))


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.from_params(
        MODEL, TOKENIZERS, params_of(MODEL, 1), DECODING, make_mesh(MeshConfig(), jax.devices()[:1])
    )


def tokens_of(translations) -> collections.Counter[str]:
    """How often each token occurs in all hypotheses."""
    return collections.Counter(token for t in translations for h in t.hypotheses for token in h.tokens)


@pytest.mark.parametrize("method", ["beam", "sampling"])
def test_no_output_holds_a_suppressed_token(translator, method):
    usual = tokens_of(translator.translate(ALIKE[:8], num_hypotheses=3, method=method))
    inner, first = (
        next(token for token, _ in usual.most_common() if token in EVERY and token.startswith("\u2581") == begins)
        for begins in (False, True)
    )
    found = tokens_of(translator.translate(ALIKE[:8], num_hypotheses=3, method=method, suppress_tokens=(inner, first)))
    assert usual[inner] > 2 and usual[first] > 2 and not found[inner] and not found[first] and len(found) > 5


@pytest.mark.parametrize(
    "name, message",
    [
        ("hundred", r"'hundred' is no piece that outputs are made of. Did you mean '\u2581hundred'\? Name pieces as"),
        ("_hundred", r"'_hundred' is no piece .* Did you mean '\u2581hundred'\?"),
        (
            "hundreds",
            "'hundreds' is no piece that outputs are made of. Name pieces as translate --json does,",
        ),
        ("", "'' is no piece"),
        ("</s>", "'</s>' is no piece"),
        ("<unk>", r"'<unk>' is no piece .*\(decoding.suppress_unknown excludes what is unknown\)"),
        ("\ud800", r"'\\ud800' is no piece"),
    ],
)
def test_a_token_that_is_no_piece_is_named(translator, name, message):
    with pytest.raises(ConfigError, match=f"decoding.suppress_tokens: {message}"):
        translator.translate(ALIKE[:1], suppress_tokens=("neun", name))


@pytest.mark.parametrize(
    "asked, named",
    [({"prefixes": ["neun"]}, "prefix 'neun'"), ({"required": [["neun"]]}, "phrase 'neun'")],
)
def test_what_is_required_holds_no_suppressed_token(translator, asked, named):
    message = rf"{named} and decoding.suppress_tokens \('neun'\) contradict each other: leave out one of them."
    with pytest.raises(ConfigError, match=message):
        _ = translator.translate(ALIKE[:1], **asked, suppress_tokens=("neun",))[0].text


def test_bans_that_leave_no_output_are_explained(translator):
    bans = {"suppress_unknown": True, "suppress_tokens": tuple(EVERY), "min_length": 1, "method": "sampling"}
    with pytest.raises(ConfigError, match=r"the rules that are set .*decoding.suppress_tokens: .* leave no token"):
        _ = translator.translate(ALIKE[:1], **bans)[0].text


def test_the_recipe_and_the_command_take_suppressed_tokens(tmp_path):
    names = ("neun", "\u2581hundred")
    write_config(Config(decoding=DecodingConfig(suppress_tokens=names)), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").decoding.suppress_tokens == names
    options = tyro.cli(TranslateOptions, args=["--run", "runs/mine", "--suppress-tokens", *names])
    assert options.decoding == DecodingConfig(suppress_tokens=names)
