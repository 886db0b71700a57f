"""Conversion to Hugging Face's MarianMT: names, layouts, vocabulary; the live comparison is test_marian_parity.py."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as made_by_protobuf

from flax_transformer.data.sentencepiece_tokenizer import SPECIAL, SentencePieceTokenizer
from flax_transformer.data.tokenizer import SubwordSample, Tokenizer, TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.scorer import Scorer
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import (
    export_weights,
    marian_order,
    vocabulary,
    write_marian,
)
from flax_transformer.interop.marian_reader import read_marian
from flax_transformer.interop.marian_vocabulary import our_order, renumbered
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.shapes import Batch
from tests.small_models import ALIKE, DECODING, MODELS, SOURCES, TARGETS, TOKENIZERS, params_of
from tests.small_run import command

sentencepiece_model_pb2: Any = made_by_protobuf  # a checker sees nothing of what it holds
MODEL = MODELS["transformer"]
SEPARATE = TokenizerPair.train(SOURCES, TARGETS, TokenizerConfig(vocab_size=45, joint=False))


def convert(*arguments: str | Path) -> int:
    """The exit code of `flax-transformer convert`."""
    return command("convert", *map(str, arguments))


def pieces_to_marian(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Our ids as theirs."""
    return np.argsort(marian_order(tokenizer))[np.asarray(ids, np.int64)].tolist()


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.from_params(MODEL, TOKENIZERS, params_of(MODEL, 1), DECODING, make_mesh(MeshConfig()))


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
        "target_vocab.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["marian"]
    config = json.loads((tmp_path / "made" / "marian" / "config.json").read_text())
    assert config["vocab_size"] == 60 and config["decoder_start_token_id"] == 59 and config["scale_embedding"]
    assert len(load_file(tmp_path / "made" / "marian" / "model.safetensors")) == 16 + 26 + 3
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / 'made' / 'marian'))} is there already"):
        write_marian(translator, MODEL, tmp_path / "made" / "marian")


def test_separate_vocabularies_are_written_apart(tmp_path):
    params = params_of(MODEL, 1)
    separate = Translator.from_params(MODEL, TOKENIZERS, params, DECODING, make_mesh(MeshConfig()))
    separate = dataclasses.replace(separate, tokenizers=SEPARATE)
    write_marian(separate, MODEL, tmp_path / "marian")
    source, target = (json.loads((tmp_path / "marian" / f).read_text()) for f in ("vocab.json", "target_vocab.json"))
    assert len(source) == len(target) == 45 and source != target
    assert json.loads((tmp_path / "marian" / "tokenizer_config.json").read_text())["separate_vocabs"] is True


def test_vocabularies_of_two_sizes_are_refused(tmp_path, one_device):
    smaller = TokenizerPair(SEPARATE.source, TOKENIZERS.target)
    translator = Translator.from_params(MODEL, smaller, params_of(MODEL, 1), DECODING, one_device)
    with pytest.raises(ConfigError, match=r"vocabularies of different sizes \(45 and 60\) cannot be written"):
        write_marian(translator, MODEL, tmp_path / "marian")


@pytest.mark.parametrize(
    "model, message",
    [
        (dataclasses.replace(MODEL, norm_order="pre"), "model.norm_order: pre cannot be written as a MarianMT model"),
        (RecurrentConfig(), "model.kind: rnn cannot be written as a MarianMT model, which is a Transformer"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(translator, tmp_path, model, message):
    with pytest.raises(ConfigError, match=message):
        write_marian(translator, model, tmp_path / "marian")
    assert not list(tmp_path.iterdir())


# --- and back


@pytest.mark.parametrize(
    "share, tokenizers, zero_start",
    [
        ("all", TOKENIZERS, True),
        ("target_output", TOKENIZERS, True),
        ("none", TOKENIZERS, True),
        ("target_output", SEPARATE, False),
    ],
)
def test_a_run_comes_back_to_the_bit_in_all_that_is_read(share, tokenizers, zero_start, tmp_path, one_device):
    """Rows that nothing reads come back as zeros: those that pad a vocabulary, and the start token's if it is zero."""
    model = dataclasses.replace(MODEL, share_embeddings=share, num_encoder_layers=2, zero_start=zero_start)
    params: Any = params_of(model, 2, tokenizers)
    ours = Translator.from_params(model, tokenizers, params, DECODING, one_device)
    write_marian(ours, model, tmp_path / "marian")
    run, lost = read_marian(tmp_path / "marian", tmp_path / "run")
    back = Translator.load(run.path, one_device)
    if share == "all":
        same = ours.with_params(back.params).translate(ALIKE[:4], num_hypotheses=3)
        assert same == ours.translate(ALIKE[:4], num_hypotheses=3)
    size = tokenizers.target.vocab_size
    assert size % model.vocab_multiple
    for name in ("source_embedding", "target_embedding", "output_embedding"):
        if name in params:
            unread = [SPECIAL.start] if zero_start and name == "target_embedding" else []
            read = np.delete(np.arange(size), unread)
            found, table = np.array(back.params.pop(name)["table"]), np.array(params.pop(name)["table"])
            np.testing.assert_array_equal(found[read], table[read])
            assert found.shape == table.shape and not np.delete(found, read, axis=0).any()
    chex.assert_trees_all_equal(back.params, params)
    assert back.tokenizers.fingerprint == tokenizers.fingerprint and back.tokenizers.joint == tokenizers.joint
    assert (tmp_path / "marian" / "target_vocab.json").exists() == (share != "all") and lost == []
    changed = {"max_source_length": 48, "max_target_length": 48, "vocab_multiple": 8}
    assert dataclasses.replace(run.read_config().model, **changed) == model


def test_a_model_that_knows_no_unused_token_is_written_as_it_was(tmp_path, one_device, capsys):
    """Made by hand: no <unused>, an output bias, a language token, a zero start, one vocabulary over two models."""
    folder = foreign_marian(tmp_path / "theirs")
    run, lost = read_marian(folder, tmp_path / "run")
    config: Any = run.read_config()
    assert config.model.output_bias and config.model.zero_start and config.tokenizer.joint
    assert config.decoding.force_eos and lost == []
    words = json.loads((folder / "vocab.json").read_text())
    translator = Translator.load(run.path, one_device)
    tokens = {token for found in translator.translate(SOURCES[:9], min_length=3) for token in found.tokens}
    assert tokens and not {"<pad>", "<s>"} & tokens
    write_marian(translator, config.model, tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert set(second) == set(first)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    assert json.loads((tmp_path / "again" / "vocab.json").read_text()) == words
    assert convert("from-hf", folder, "--output", run.path) == 2
    assert "already holds a run" in capsys.readouterr().err


def as_published(folder: Path) -> Path:
    """Gives a folder what published OPUS-MT models have: padding that is likelier than most tokens, and excluded."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    weights["final_logits_bias"] -= 12.0
    weights["final_logits_bias"][0, config["pad_token_id"]] = 0.0  # its row of the table is zeros, too
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "bad_words_ids": [[config["pad_token_id"]]], "decoder_start_token_id": config["pad_token_id"],
        "eos_token_id": 0, "forced_eos_token_id": 0, "max_length": 25, "num_beams": 4,
        "pad_token_id": config["pad_token_id"], "renormalize_logits": True,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_padding_that_their_settings_exclude_has_no_share_in_the_probabilities(tmp_path, one_device):
    folder = as_published(foreign_marian(tmp_path / "theirs"))
    run, lost = read_marian(folder, tmp_path / "run")
    assert lost == []
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"renormalize_logits": False}))
    with_share, lost = read_marian(folder, tmp_path / "with_share")
    assert lost == []

    # Without its share all others are more probable by what that was, token by token.
    translators = [Translator.load(path, one_device) for path in (run.path, with_share.path)]
    text = SOURCES[:4], TARGETS[:4]
    without, with_it = ([s.token_scores for s in Scorer(t).score(*text)] for t in translators)
    differences = [a - b for x, y in zip(without, with_it, strict=True) for a, b in zip(x, y, strict=True)]
    assert min(differences) > 0 and max(differences) > 1.0

    # It is written with the bias that says so, also when a training has moved that a little.
    config: Any = run.read_config()
    params = translators[0].params
    moved = params | {"output_bias": params["output_bias"] + 0.25}
    trained = Translator.from_params(config.model, translators[0].tokenizers, moved, config.decoding, one_device)
    for translator, change, name in ((translators[0], 0.0, "again"), (trained, 0.25, "trained")):
        assert write_marian(translator, config.model, tmp_path / name) == []
        first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / name))
        first["final_logits_bias"] += np.float32(change)
        first["final_logits_bias"][0, -1] = -100.0 + change
        for key, value in first.items():
            np.testing.assert_array_equal(second[key], value, err_msg=key)
    back, lost = read_marian(tmp_path / "again", tmp_path / "back")
    chex.assert_trees_all_equal(Translator.load(back.path, one_device).params, params)
    assert lost == []


def test_a_language_token_is_taken_off_before_the_text_is_cut(tmp_path):
    folder = foreign_marian(tmp_path / "theirs")
    words = json.loads((folder / "vocab.json").read_text())
    order, pieces = our_order(words, words["<pad>"], words["</s>"])
    tokenizer = renumbered((folder / "source.spm").read_bytes(), pieces)
    (plain,) = tokenizer.encode([SOURCES[0]])
    german = int(order[words[">>deu<<"]])
    for code, first in ((">>deu<< ", german), (">>deu<<", german), (">>x<<", SPECIAL.unknown)):
        text = [code + SOURCES[0], SOURCES[0], ">>deu<<"]
        assert tokenizer.encode(text) == [[first, *plain], plain, [german]]
        assert tokenizer.encode(text[:1], SubwordSample(0.5, 1))[0][0] == first
    assert tokenizer.pieces([german]) == [">>deu<<"] and tokenizer.decode([german, *plain]) == f">>deu<< {SOURCES[0]}"
    assert german not in tokenizer.encode([f"{SOURCES[0]} >>deu<<"])[0]
    # A tokenizer of our own, which knows no languages, cuts the same text as any other.
    assert TOKENIZERS.source.encode([f">>deu<< {SOURCES[0]}"])[0][:2] != [SPECIAL.unknown, *plain][:2]


def without_pieces(folder: Path, dropped: int) -> tuple[dict[str, int], list[str]]:
    """Takes the last pieces that source text is cut into out of vocab.json; returns that, and what was taken out."""
    words = json.loads((folder / "vocab.json").read_text())
    tokenizer = SentencePieceTokenizer((folder / "source.spm").read_bytes())
    cut = {piece for ids in tokenizer.encode(SOURCES) for piece in tokenizer.pieces(ids)}
    gone = [name for name in words if name in cut][-dropped:]
    names = [name for name in words if name not in gone]
    words = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(words))
    return words, gone


def test_pieces_that_the_vocabulary_lacks_are_cut_and_unknown(tmp_path):
    folder = foreign_marian(tmp_path / "theirs")
    words, gone = without_pieces(folder, 5)
    with pytest.raises(InputError, match="padding and the end token must have different ids in a MarianMT folder"):
        our_order(words, words["</s>"], words["</s>"])
    _, pieces = our_order(words, words["<pad>"], words["</s>"])
    before = SentencePieceTokenizer((folder / "source.spm").read_bytes())
    after = renumbered(before.model, pieces)
    assert after.vocab_size == len(words) + 1  # and our padding
    number_unknown = 0
    for text in SOURCES:
        cut = before.pieces(before.encode([text])[0])
        expected = ["<unk>" if piece in gone else piece for piece in cut]
        (ids,) = after.encode([text])
        assert after.pieces(ids) == expected and max(ids) < after.vocab_size
        number_unknown += expected.count("<unk>")
    assert len(gone) == 5 and number_unknown > 5
    assert renumbered(after.model, pieces).encode(SOURCES) == after.encode(SOURCES)


def foreign_marian(folder: Path) -> Path:
    """A MarianMT folder as transformers makes them, of random parameters that make different outputs of all lengths."""
    folder.mkdir()
    sides = {"source": SOURCES, "target": TARGETS}
    pieces: list[str] = []
    for side, text in sides.items():
        model = SentencePieceTokenizer.train(text, TokenizerConfig(vocab_size=40))
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model.model)
        del proto.pieces[:2]  # theirs have no padding and no start: <unk> and </s> alone
        proto.trainer_spec.pad_id = proto.trainer_spec.bos_id = -1
        proto.trainer_spec.eos_id, proto.trainer_spec.unk_id = 0, 1
        (folder / f"{side}.spm").write_bytes(proto.SerializeToString())
        pieces += [p.piece for p in proto.pieces[2:] if p.piece not in pieces]
    names = ["</s>", "<unk>", *pieces, ">>deu<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    size = len(names)
    rng = np.random.default_rng(0)

    def draw(*shape: int, deviation: float = 0.3) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * np.float32(deviation)

    weights = {"model.shared.weight": draw(size, 16, deviation=0.6), "final_logits_bias": draw(1, size)}
    weights["model.shared.weight"][-1] = 0.0
    weights["final_logits_bias"][0, 0] = 3.0  # random models hardly ever end
    for stack in ("encoder", "decoder"):
        prefix = f"model.{stack}.layers.0"
        attentions = ["self_attn"] + ["encoder_attn"] * (stack == "decoder")
        for attention in attentions:
            for part in ("q", "k", "v", "out"):
                weights[f"{prefix}.{attention}.{part}_proj.weight"] = draw(16, 16, deviation=0.9)
                weights[f"{prefix}.{attention}.{part}_proj.bias"] = draw(16)
            weights[f"{prefix}.{attention}_layer_norm.weight"] = 1 + draw(16)
            weights[f"{prefix}.{attention}_layer_norm.bias"] = draw(16)
        for name, shape in (("fc1", (32, 16)), ("fc2", (16, 32))):
            weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"] = draw(*shape), draw(shape[0])
        weights[f"{prefix}.final_layer_norm.weight"] = 1 + draw(16)
        weights[f"{prefix}.final_layer_norm.bias"] = draw(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MarianMTModel"], "model_type": "marian", "is_encoder_decoder": True, "vocab_size": size,
        "decoder_vocab_size": size, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "activation_function": "swish", "scale_embedding": True, "max_position_embeddings": 64, "eos_token_id": 0,
        "pad_token_id": size - 1, "decoder_start_token_id": size - 1, "forced_eos_token_id": 0,
        "max_length": 64, "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": None}, "config.json lacks d_model"),
        ({"scale_embedding": None}, "config.json lacks scale_embedding"),
        ({"d_model": "16"}, "config.json: d_model must be of type int, got '16'"),
        ({"max_length": "20"}, "a setting of generate in .* is of another type than expected"),
        ({"bad_words_ids": 5}, "a setting of generate in .* is of another type than expected"),
        ({"model_type": "bart"}, "config.json has model_type 'bart'"),
        ({"normalize_before": True}, "config.json: normalize_before: True cannot be imported"),
        ({"encoder_ffn_dim": 64}, "encoder_ffn_dim and decoder_ffn_dim differ"),
        (
            {"activation_function": "tanh"},
            "activation_function 'tanh' cannot be imported; relu, gelu, swish, silu can",
        ),
        ({"decoder_start_token_id": 0}, "decoder_start_token_id is not pad_token_id"),
        (
            {"encoder_layers": 2},
            "do not fit its config.json: model.encoder.layers.1.self_attn.q_proj.weight is missing",
        ),
        ({"decoder_layers": 0}, "must be at least 1"),
        ({"d_model": 32}, r"model.shared.weight has shape .*fc2.weight has shape"),
    ],
)
def test_models_that_cannot_be_taken_over_are_explained(tmp_path, changes, message):
    folder = foreign_marian(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    changed = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises((ConfigError, InputError), match=message):
        read_marian(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_on_either_side_is_in_one_error(tmp_path):
    folder = foreign_marian(tmp_path / "theirs")
    weights = load_file(folder / "model.safetensors")
    del weights["model.encoder.layers.0.fc1.bias"], weights["model.decoder.layers.0.encoder_attn.q_proj.weight"]
    weights["model.encoder.layers.0.fc2.weight"] = np.zeros((16, 30), np.float32)
    weights["model.decoder.layers.0.gate.weight"] = np.zeros((16, 16), np.float32)
    weights["lm_head.weight"] = weights["model.shared.weight"] + 1  # not the copy that older files hold
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        read_marian(folder, tmp_path / "run")
    said = re.fullmatch(r"the model's parameters do not fit its config.json: (.*)\.", str(caught.value))
    assert said and said[1].split("; ") == [
        "model.encoder.layers.0.fc1.bias is missing",
        "model.encoder.layers.0.fc2.weight has shape (16, 30), which does not fit (32, 16)",
        "model.decoder.layers.0.encoder_attn.q_proj.weight is missing",
        "lm_head.weight has no place",
        "model.decoder.layers.0.gate.weight has no place",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_verb_takes_a_run_that_was_taken_over_and_a_training_starts_from_it(tmp_path, capsys):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    files = {"source": tmp_path / "en", "target": tmp_path / "de"}
    for side, lines in (("source", SOURCES[:24]), ("target", TARGETS[:24])):
        files[side].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def done(*arguments: str | Path) -> list[str]:
        assert command(*map(str, arguments)) == 0
        return capsys.readouterr().out.splitlines()

    done("convert", "from-hf", foreign_marian(tmp_path / "theirs"), "--output", run)
    hypotheses = tmp_path / "hypotheses"
    done("translate", "--run", run, "--input", files["source"], "--output", hypotheses, "--no-force-eos")
    translations = Translator.load(run).translate(SOURCES[:24], force_eos=False)
    assert hypotheses.read_text(encoding="utf-8").splitlines() == [t.text for t in translations]
    scores = done("score", "--run", run, "--source", files["source"], "--target", files["target"])
    assert len(scores) == 24 and all(float(score) < 0 for score in scores)
    evaluated = done("evaluate", "--run", run, "--source", files["source"], "--reference", files["target"])
    assert "of 24 sentences" in evaluated[-1]

    parts = [(f"--data.{part}-{s}", file) for part in ("train", "validation", "test") for s, file in files.items()]
    done(
        "train", "--config", run / "config.yaml", "--run", tuned, "--init-from", run, *sum(parts, ()),
        "--training.steps", "2", "--batching.tokens-per-batch", "512", "--batching.num-buckets", "1",
        "--optimizer.learning-rate-scale", "1e-6", "--decoding.batch-size", "8",
    )  # fmt: skip
    before, after = Translator.load(run), Translator.load(tuned)
    assert before.tokenizers.fingerprint == after.tokenizers.fingerprint
    chex.assert_trees_all_close(before.params, after.params, atol=1e-5)  # it went on from theirs, by tiny steps
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(before.params, after.params, atol=0)
    done("convert", "to-hf", tuned, "--output", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_a_table_may_lie_under_the_name_of_a_copy(tmp_path):
    folder = foreign_marian(tmp_path / "theirs")
    expected = read_marian(folder, tmp_path / "first")[0]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.shared.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"]]}))
    found = read_marian(folder, tmp_path / "second")[0]
    chex.assert_trees_all_equal(*(Translator.load(run.path).params for run in (expected, found)))
    assert expected.read_config().model == found.read_config().model


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1", "source.spm is damaged, or no SentencePiece model"),
        (b"", "source.spm has no piece that text could be cut into"),
    ],
)
def test_a_sentencepiece_model_that_was_not_fetched_is_named(tmp_path, content, message):
    folder = foreign_marian(tmp_path / "theirs")
    (folder / "source.spm").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_marian(folder, tmp_path / "run")


def test_two_bpe_models_of_one_vocabulary_are_refused(tmp_path):
    """Pieces that one of them lacks would take part in its merges."""
    folder = foreign_marian(tmp_path / "theirs")
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "source.spm").read_bytes())
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    (folder / "source.spm").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"source.spm is a BPE model, and lacks \d+ pieces of the vocabulary"):
        read_marian(folder, tmp_path / "run")


@pytest.mark.parametrize("size", [0, 20, -5])
def test_weights_that_are_not_whole_are_explained(tmp_path, size):
    folder = foreign_marian(tmp_path / "theirs")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model.safetensors is damaged or not whole \(.*\). Copy or download"):
        read_marian(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_weights_of_16_bits_are_read_in_float32(tmp_path, one_device, dtype):
    folder = foreign_marian(tmp_path / "theirs")
    weights = {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    runs = []
    for name, as_saved in (("short", weights), ("long", {n: v.astype(np.float32) for n, v in weights.items()})):
        save_file(as_saved, folder / "model.safetensors", metadata={"format": "pt"})
        runs.append(Translator.load(read_marian(folder, tmp_path / name)[0].path, one_device).params)
    chex.assert_trees_all_equal(*runs)
    assert {leaf.dtype for leaf in jax.tree.leaves(runs[0])} == {np.dtype(np.float32)}


def test_weights_of_a_type_that_is_not_read_are_explained(tmp_path):
    folder = foreign_marian(tmp_path / "theirs")
    weights = load_file(folder / "model.safetensors")
    weights["final_logits_bias"] = weights["final_logits_bias"].astype(jnp.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"holds tensors of an unsupported type \(.*float8.*\). Save the model in"):
        read_marian(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "source.spm", "model.safetensors"])
def test_files_that_are_missing_are_named(tmp_path, name):
    folder = foreign_marian(tmp_path / "theirs")
    (folder / name).unlink()
    with pytest.raises(InputError, match=name.replace("model.", "neither model.")):
        read_marian(folder, tmp_path / "run")


# --- what transformers makes of a small model of its own, from files that it wrote

REFERENCE = Path(__file__).parent / "reference" / "marian"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    expected = json.loads((REFERENCE / "expected.json").read_text(encoding="utf-8"))
    run, _ = read_marian(REFERENCE, tmp_path_factory.mktemp("reference") / "run")
    ours = Translator.load(run.path)
    words = json.loads((REFERENCE / "vocab.json").read_text(encoding="utf-8"))
    order, _ = our_order(words, words["<pad>"], words["</s>"])
    return ours, expected, order


def test_token_ids_are_those_of_transformers(reference):
    ours, expected, order = reference
    for side, tokenizer in (("source", ours.tokenizers.source), ("target", ours.tokenizers.target)):
        found = [[*ids, SPECIAL.end] for ids in tokenizer.encode(expected[f"{side}s"])]
        assert found == [order[ids].tolist() for ids in expected[f"{side}_ids"]]


def test_logits_are_those_of_transformers(reference):
    ours, expected, order = reference
    model = nnx.merge(ours.parameters.graphdef, ours.params)
    run = jax.jit(lambda model, batch: model.output_projection().logits(model(batch)))
    for source, target, logits in zip(expected["source_ids"], expected["target_ids"], expected["logits"], strict=False):
        tokens = [np.asarray([order[ids]], np.int32) for ids in (source, target)]
        places = [np.arange(x.shape[1], dtype=np.int32)[None] for x in tokens]
        batch = Batch(tokens[0], places[0], np.ones_like(tokens[0]), tokens[1], places[1], np.ones_like(tokens[1]))
        found = np.asarray(run(model, batch))[0]
        np.testing.assert_allclose(found[:, order], logits, rtol=1e-4, atol=1e-4)
    assert len(expected["logits"]) == 5


@pytest.mark.parametrize(
    "stop, enough",
    [*(pytest.param(stop, 100, marks=pytest.mark.slow) for stop in ("exact", "heuristic")), ("first_finished", 200)],
)
def test_a_beam_of_four_finds_what_transformers_does(reference, stop, enough):
    """Under the same stop rule; what is cut at its limit is left out, since theirs ranks it with what has ended."""
    ours, expected, order = reference
    settings = {"beam_size": 4, "length_penalty": "average:1.0", "max_length_factor": 0.0, "max_length_offset": 23}
    compared = []
    found = ours.translate(expected["sources"], stop=stop, force_eos=False, **settings)
    for translation, row in zip(found, expected["outputs"][stop], strict=True):
        best = translation.hypotheses[0]
        if best.finished and row is not None:
            assert best.tokens == ours.tokenizers.target.pieces(order[row[:-1]].tolist())
            compared.append(tuple(best.tokens))
    ended = sum(row is not None for row in expected["outputs"][stop])
    assert len(compared) >= max(enough, 0.95 * ended) and len(set(compared)) >= 20
