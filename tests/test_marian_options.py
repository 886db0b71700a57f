"""Which options of a Transformer a MarianMT folder keeps: none is lost without a word."""

import dataclasses
from typing import Any

import pytest

from flax_transformer.errors import ConfigError
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import check_expressible, export_config, options_left_out, write_marian
from flax_transformer.interop.marian_reader import read_marian, read_model_config
from flax_transformer.models.transformer_config import TransformerConfig
from tests.small_models import DECODING, MODELS, TOKENIZERS, params_of

MODEL = MODELS["transformer"]

# For each option of a model a value, and what becomes of it: "kept" by config.json, or by the "parameters"; "refused",
# since Marian has one way alone; "named" as left out; or "dropped", as neither outputs nor the learning depend on it.
WHAT_BECOMES_OF: dict[str, tuple[Any, str]] = {
    "model_dim": (32, "kept"),
    "num_heads": (4, "kept"),
    "feed_forward_dim": (64, "kept"),
    "num_encoder_layers": (3, "kept"),
    "num_decoder_layers": (3, "kept"),
    "max_source_length": (96, "kept"),  # as the longer of both
    "max_target_length": (96, "kept"),
    "positions": ("learned", "refused"),
    "norm_order": ("pre", "refused"),
    "norm_epsilon": (1e-6, "refused"),
    "activation": ("gelu", "kept"),
    "share_embeddings": ("none", "kept"),
    "dropout": (0.3, "kept"),
    "embedding_dropout": (0.3, "named"),
    "attention_dropout": (0.3, "kept"),
    "activation_dropout": (0.3, "kept"),
    "vocab_multiple": (1, "dropped"),
    "output_bias": (True, "parameters"),
    "zero_start": (True, "parameters"),
    "scan_layers": (True, "dropped"),
    "rematerialize": (True, "dropped"),
    "param_dtype": ("bfloat16", "dropped"),  # it is written in float32, which holds the same
    "compute_dtype": ("bfloat16", "named"),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TransformerConfig)])
def test_no_option_of_a_model_is_lost_without_a_word(name, tmp_path, one_device):
    value, expected = WHAT_BECOMES_OF[name]
    default, model = getattr(MODEL, name), dataclasses.replace(MODEL, **{name: value})
    assert value != default
    if expected == "refused":
        with pytest.raises(ConfigError, match=f"model.{name}: {value} cannot be written as a MarianMT model"):
            check_expressible(model)
        return
    back = read_model_config(export_config(check_expressible(model), TOKENIZERS, with_unused=True))
    if expected == "parameters":
        write_marian(
            Translator.from_params(model, TOKENIZERS, params_of(model, 1), DECODING, one_device), model, tmp_path / "to"
        )
        back = read_marian(tmp_path / "to", tmp_path / "run")[0].read_config().model
    assert getattr(back, name) == (value if expected in ("kept", "parameters") else default)
    left_out = options_left_out(model)
    assert [option.partition(" (")[0] for option in left_out] == [f"{name}: {value}"] * (expected == "named")


def test_dropout_of_embeddings_that_is_the_others_is_not_left_out():
    assert options_left_out(dataclasses.replace(MODEL, dropout=0.3, embedding_dropout=0.3)) == []
