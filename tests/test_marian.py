"""Conversion to Hugging Face's MarianMT: names, layouts, vocabulary; the live comparison is test_marian_parity.py."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from flax_transformer.data.tokenizer import TokenizerConfig, TokenizerPair
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import export_weights, pieces_to_marian, vocabulary, write_marian
from flax_transformer.models.rnn import RecurrentConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from tests.test_decoding_contract import ALIKE, DECODING, MODELS, SOURCES, TARGETS, TOKENIZERS, params_of

MODEL = MODELS["transformer"]
SEPARATE = TokenizerPair.train(SOURCES, TARGETS, TokenizerConfig(vocab_size=45, joint=False))


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator(MODEL, TOKENIZERS, params_of(MODEL, 1), DECODING, make_mesh(MeshConfig()))


def test_every_parameter_has_its_place(translator):
    params = translator.params
    weights = export_weights(MODEL, TOKENIZERS, params)
    layer = ["self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    layer += [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    cross = ["encoder_attn_layer_norm", *(f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out"))]
    expected = {f"model.encoder.layers.0.{n}.{kind}" for n in layer for kind in ("weight", "bias")}
    expected |= {f"model.decoder.layers.0.{n}.{kind}" for n in (*layer, *cross) for kind in ("weight", "bias")}
    expected |= {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "final_logits_bias"}
    assert set(weights) == expected
    ours = params["encoder"]["layers"]["self_attention"]
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    query = np.einsum("d,dnh->nh", x, np.asarray(ours["query"]["kernel"][0])).reshape(-1)
    np.testing.assert_allclose(weights["model.encoder.layers.0.self_attn.q_proj.weight"] @ x, query, rtol=1e-5)
    heads = query.reshape(2, 8)
    output = np.einsum("nh,nhd->d", heads, np.asarray(ours["output"]["kernel"][0]))
    np.testing.assert_allclose(weights["model.encoder.layers.0.self_attn.out_proj.weight"] @ query, output, rtol=1e-4)
    # A token's embedding is found by its id there.
    (ids,) = TOKENIZERS.target.encode(TARGETS[:1])
    table = np.asarray(params["target_embedding"]["table"])
    np.testing.assert_array_equal(
        weights["model.decoder.embed_tokens.weight"][pieces_to_marian(TOKENIZERS.target, ids)], table[ids]
    )


def test_the_vocabulary_is_in_marians_order():
    words = vocabulary(TOKENIZERS.target)
    assert len(words) == TOKENIZERS.target.vocab_size == 60
    assert (words["</s>"], words["<unk>"], words["<unused>"], words["<pad>"]) == (0, 1, 58, 59)
    (ids,) = TOKENIZERS.target.encode(TARGETS[:1])
    assert pieces_to_marian(TOKENIZERS.target, ids) == [words[p] for p in TOKENIZERS.target.pieces(ids)]


def test_a_folder_is_written_whole(translator, tmp_path):
    write_marian(translator, MODEL, tmp_path / "made" / "marian")
    names = {p.name for p in (tmp_path / "made" / "marian").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "source.spm", "target.spm", "vocab.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["marian"]
    config = json.loads((tmp_path / "made" / "marian" / "config.json").read_text())
    assert config["vocab_size"] == 60 and config["decoder_start_token_id"] == 59 and config["scale_embedding"]
    assert len(load_file(tmp_path / "made" / "marian" / "model.safetensors")) == 16 + 26 + 3
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / 'made' / 'marian'))} is there already"):
        write_marian(translator, MODEL, tmp_path / "made" / "marian")


def test_separate_vocabularies_are_written_apart(tmp_path):
    params = params_of(MODEL, 1)
    separate = Translator(MODEL, TOKENIZERS, params, DECODING, make_mesh(MeshConfig()))
    separate.tokenizers = SEPARATE
    write_marian(separate, MODEL, tmp_path / "marian")
    source, target = (json.loads((tmp_path / "marian" / f).read_text()) for f in ("vocab.json", "target_vocab.json"))
    assert len(source) == len(target) == 45 and source != target
    assert json.loads((tmp_path / "marian" / "tokenizer_config.json").read_text())["separate_vocabs"] is True


@pytest.mark.parametrize(
    "model, message",
    [
        (dataclasses.replace(MODEL, norm_order="pre"), "model.norm_order: pre cannot be written as a MarianMT model"),
        (dataclasses.replace(MODEL, positions="learned"), "model.positions: learned cannot be written"),
        (dataclasses.replace(MODEL, norm_epsilon=1e-6), "model.norm_epsilon: 1e-06 cannot be written"),
        (RecurrentConfig(), "model.kind: rnn cannot be written as a MarianMT model, which is a Transformer"),
    ],
)
def test_options_that_marian_does_not_have_are_named(translator, tmp_path, model, message):
    with pytest.raises(ConfigError, match=message):
        write_marian(translator, model, tmp_path / "marian")
    assert not list(tmp_path.iterdir())


def test_sentences_for_the_live_comparison_are_there():
    assert len(ALIKE) >= 50
