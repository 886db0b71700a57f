"""A run that was converted, in Hugging Face's own MarianMT: token ids, logits, and what a beam search finds."""

import collections
import dataclasses
import json
import pathlib
import shutil
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.data.synthetic import english_number_words
from flax_transformer.errors import InputError
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import marian_order, write_marian
from flax_transformer.interop.marian_reader import read_marian
from flax_transformer.interop.marian_vocabulary import our_order, renumbered
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.shapes import Batch
from tests.small_models import DECODING, MODELS, SOURCES, TARGETS, TOKENIZERS, params_of
from tests.test_marian import SEPARATE, as_published, foreign_marian, pieces_to_marian, without_pieces

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # of libraries that this project does not choose
]

MODEL = dataclasses.replace(MODELS["transformer"], num_encoder_layers=2, num_decoder_layers=2, share_embeddings="all")
LONGEST = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(MODEL, output_bias=True)
    params = params_of(model, 3)
    # Random models hardly ever end: a bias makes them, at many lengths.
    params = params | {"output_bias": params["output_bias"].at[SPECIAL.end].set(3.0)}
    decoding = dataclasses.replace(
        DECODING, beam_size=4, length_penalty="average:1.0", max_length_factor=0.0, max_length_offset=LONGEST - 1,
        force_eos=True,
    )  # fmt: skip
    ours = Translator.from_params(model, TOKENIZERS, params, decoding, make_mesh(MeshConfig()))
    folder = tmp_path_factory.mktemp("marian") / "model"
    assert write_marian(ours, model, folder) == []
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    return ours, theirs, transformers.MarianTokenizer.from_pretrained(folder)


def processor(tokenizer: Any) -> Any:
    """SentencePiece itself."""
    return tokenizer._processor


def test_token_ids_are_equal(pair):
    ours, _, tokenizer = pair
    for text, expected in ((SOURCES, ours.tokenizers.source), (TARGETS, ours.tokenizers.target)):
        found = tokenizer(text_target=text)["input_ids"] if expected is not ours.tokenizers.source else None
        found = tokenizer(text)["input_ids"] if found is None else found
        assert found == [[*pieces_to_marian(expected, ids), 0] for ids in expected.encode(text)]


def test_logits_are_equal(pair):
    import torch

    ours, theirs, _ = pair
    model = nnx.merge(ours.parameters.graphdef, ours.params)
    tokenizer = TOKENIZERS.target
    for source_text, target_text in list(zip(SOURCES, TARGETS, strict=True))[:5]:
        source = [*tokenizer.encode([source_text])[0], SPECIAL.end]
        target = [*tokenizer.encode([target_text])[0], SPECIAL.end]
        rows = [jnp.asarray([ids], jnp.int32) for ids in (source, target)]
        places = [jnp.arange(len(ids), dtype=jnp.int32)[None] for ids in (source, target)]
        batch = Batch(rows[0], places[0], jnp.ones_like(rows[0]), rows[1], places[1], jnp.ones_like(rows[1]))
        logits = np.asarray(model.output_projection().logits(model(batch)))[0]
        inputs = pieces_to_marian(tokenizer, [SPECIAL.start, *target[:-1]])
        with torch.no_grad():
            found = theirs(
                input_ids=torch.tensor([pieces_to_marian(tokenizer, source)]), decoder_input_ids=torch.tensor([inputs])
            ).logits[0]
        every = pieces_to_marian(tokenizer, list(range(tokenizer.vocab_size)))
        np.testing.assert_allclose(found.numpy()[:, every], logits[:, : tokenizer.vocab_size], rtol=1e-4, atol=1e-4)


def assert_alike(ours: Translator, theirs: Any, tokenizer: Any, order: np.ndarray, text: list[str], **settings: Any):
    """Asserts that best outputs and their scores are theirs, and that outputs are many, few empty, some at the limit.

    Theirs rank what was cut at the limit with what has ended, and ours behind it: where theirs was cut and ours has
    ended, theirs must score more.

    Args:
        ours: a translator.
        theirs: their model.
        tokenizer: of theirs.
        order: our id of each of their ids, of which the end token is 0.
        text: sentences.
        **settings: of `generate`, in place of those in their folder.
    """
    import torch

    outputs, closed = [], 0
    for start in range(0, len(text), 64):
        chunk = text[start : start + 64]
        inputs = tokenizer(chunk, return_tensors="pt", padding=True)
        with torch.no_grad():
            made = theirs.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
        rows, scores = made.sequences.tolist(), made.sequences_scores.tolist()
        for found, row, score in zip(ours.translate(chunk), rows, scores, strict=True):
            best = found.hypotheses[0]
            ids = processor(ours.tokenizers.target).piece_to_id(best.tokens) + [SPECIAL.end] * best.finished
            if best.finished and 0 not in row[1:]:
                assert score > best.score
            else:
                assert order[row[1 : 1 + len(ids)]].tolist() == ids and score == pytest.approx(best.score, abs=1e-4)
            outputs.append(tuple(found.tokens))
            closed += len(row) > LONGEST and row[LONGEST] != row[0]  # which is their padding
    assert len(outputs) >= 200 and len(set(outputs)) >= 20 and sum(map(bool, outputs)) > len(outputs) / 2
    assert closed >= 10


def test_a_beam_of_four_finds_the_same(pair):
    """By the settings that were written; an output that reaches the limit is closed there by both."""
    ours, theirs, tokenizer = pair
    text = [english_number_words(n) for n in range(1, 100_000, 397)]
    assert_alike(ours, theirs, tokenizer, marian_order(TOKENIZERS.target), text)


def lively(share: Literal["target_output", "none"], seed: int) -> tuple[TransformerConfig, Translator]:
    """Returns a random model that looks at its source, so that outputs differ, and a translator that closes them."""
    model = dataclasses.replace(MODEL, share_embeddings=share)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 10.0 * leaf if "cross_attention" in str(path) and "kernel" in str(path[-1]) else leaf,
        params_of(model, seed, SEPARATE),
    )
    params = params | {"source_embedding": {"table": 5.0 * params["source_embedding"]["table"]}}
    if share == "none":  # tokens that no trained model outputs, and theirs is told not to
        table = params["output_embedding"]["table"]
        params = params | {"output_embedding": {"table": table.at[jnp.array([SPECIAL.pad, SPECIAL.start])].set(0.0)}}
    decoding = dataclasses.replace(
        DECODING, beam_size=4, length_penalty="average:1.0", max_length_factor=0.0, max_length_offset=11,
        stop="first_finished", force_eos=True,
    )  # fmt: skip
    return model, Translator.from_params(model, SEPARATE, params, decoding, make_mesh(MeshConfig()))


@pytest.mark.parametrize("share, seed", [("target_output", 4), ("none", 6)])
def test_two_vocabularies_are_theirs_too(share, seed, tmp_path):
    """Two tables or three: written here, read by transformers, written by it, and read here again."""
    import torch

    transformers = pytest.importorskip("transformers")
    model, ours = lively(share, seed)
    write_marian(ours, model, tmp_path / "ours")
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "ours").eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    run, lost = read_marian(tmp_path / "theirs", tmp_path / "run")
    again = Translator.load(run.path, make_mesh(MeshConfig()))
    assert run.read_config().model.share_embeddings == share and not again.tokenizers.joint and lost == []

    for text, side, found in (
        (SOURCES, SEPARATE.source, tokenizer(SOURCES)["input_ids"]),
        (TARGETS, SEPARATE.target, tokenizer(text_target=TARGETS)["input_ids"]),
    ):
        assert found == [[*pieces_to_marian(side, ids), 0] for ids in side.encode(text)]
    unused = SEPARATE.target.vocab_size - 2  # our padding, which a random model may find probable
    with torch.no_grad():
        made = theirs.generate(
            **tokenizer(SOURCES, return_tensors="pt", padding=True), num_beams=4, length_penalty=1.0,
            early_stopping=True, max_length=13, forced_eos_token_id=0,
            bad_words_ids=[[theirs.config.pad_token_id], [unused]],
        ).tolist()  # fmt: skip
    outputs = set()
    same = again.with_decoding(ours.decoding).translate(SOURCES)
    for found, back, row in zip(ours.translate(SOURCES), same, made, strict=True):
        assert back == found
        ids = processor(SEPARATE.target).piece_to_id(found.tokens)
        assert row[1 : 2 + len(ids)] == [*pieces_to_marian(SEPARATE.target, ids), 0]
        outputs.add(tuple(ids))
    assert len(SOURCES) >= 200 and len(outputs) >= 20


def test_ctranslate2_reads_what_is_written_for_hugging_face(tmp_path):
    """A model with a zero start, which CTranslate2 gives every model: n-best lists of what has ended are equal."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    model = dataclasses.replace(MODEL, zero_start=True)
    params = params_of(model, 4)
    table = params["target_embedding"]["table"]
    params = params | {"target_embedding": {"table": table.at[SPECIAL.end].multiply(2.0)}}
    decoding = dataclasses.replace(
        DECODING, beam_size=4, length_penalty="average:1.0", max_length_factor=0.0, max_length_offset=LONGEST - 1,
        stop="first_finished",
    )  # fmt: skip
    ours = Translator.from_params(model, TOKENIZERS, params, decoding, make_mesh(MeshConfig()))
    write_marian(ours, model, tmp_path / "marian")
    TransformersConverter(str(tmp_path / "marian")).convert(str(tmp_path / "ctranslate2"))
    theirs = ctranslate2.Translator(str(tmp_path / "ctranslate2"), device="cpu", compute_type="float32")
    source = processor(TOKENIZERS.source).encode(SOURCES, out_type=str)
    made = theirs.translate_batch(
        [[*pieces, "</s>"] for pieces in source], beam_size=4, num_hypotheses=4, length_penalty=1.0,
        max_decoding_length=LONGEST - 1, min_decoding_length=0,
    )  # fmt: skip
    compared, outputs = 0, set()
    for pair, result in zip(ours.translate(SOURCES, num_hypotheses=4), made, strict=True):
        if max(map(len, result.hypotheses)) < LONGEST - 1:  # what was cut at the limit has another place there
            assert [h.tokens for h in pair.hypotheses] == result.hypotheses
            compared += 1
            outputs.add(tuple(tuple(h.tokens) for h in pair.hypotheses))
    assert compared >= 30 and len(outputs) >= 10


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model that transformers wrote itself: two SentencePiece models, one vocabulary, a language token, a bias."""
    transformers = pytest.importorskip("transformers")
    folder = foreign_marian(tmp_path_factory.mktemp("foreign") / "theirs")
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    saved = folder.parent / "saved"
    theirs.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    run, lost = read_marian(saved, folder.parent / "run")
    assert run.read_config().decoding.force_eos and lost == []
    ours = Translator.load(run.path, make_mesh(MeshConfig()))
    words = json.loads((saved / "vocab.json").read_text())
    order, _ = our_order(words, theirs.config.pad_token_id, 0)
    return ours, theirs, tokenizer, order


def test_a_set_up_as_published_finds_the_same(tmp_path):
    """By the settings in its folder: padding excluded, a forced end, and their usual stop rule."""
    import torch

    transformers = pytest.importorskip("transformers")
    folder = as_published(foreign_marian(tmp_path / "theirs"))
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    run, lost = read_marian(folder, tmp_path / "run")
    assert lost == []
    inputs = tokenizer(SOURCES, return_tensors="pt", padding=True)
    with torch.no_grad():
        made = theirs.generate(**inputs).tolist()
        otherwise = theirs.generate(**inputs, renormalize_logits=False).tolist()
    ours = Translator.load(run.path, make_mesh(MeshConfig()))
    assert write_marian(ours, run.read_config().model, tmp_path / "again") == []
    with torch.no_grad():
        assert transformers.MarianMTModel.from_pretrained(tmp_path / "again").eval().generate(**inputs).tolist() == made
    words = json.loads((folder / "vocab.json").read_text())
    order, _ = our_order(words, theirs.config.pad_token_id, 0)
    outputs = set()
    for found, row in zip(ours.translate(SOURCES), made, strict=True):
        ids = [processor(ours.tokenizers.target).piece_to_id(piece) for piece in found.tokens]
        assert order[row[1 : 2 + len(ids)]].tolist() == [*ids, SPECIAL.end]
        outputs.add(tuple(ids))
    assert len(SOURCES) >= 200 and len(outputs) >= 20
    assert sum(a != b for a, b in zip(made, otherwise, strict=True)) >= 20


def test_a_model_of_theirs_has_equal_ids(foreign):
    ours, _, tokenizer, order = foreign
    text = [*SOURCES, *(f">>deu<< {s}" for s in SOURCES[:20]), "unknown: \u4e2d\u6587 x"]
    text += [f">>deu<<{SOURCES[0]}", ">>deu<<", ">>deu<<  two", ">>fra<< two", ">>fra<<two", ">><<two", ">>two"]
    text += [" >>deu<< two", "two >>deu<< two", ">>deu<<>>deu<< two", ">>a>>deu<< two<<", ">>two<"]
    found = [order[ids].tolist() for ids in tokenizer(text)["input_ids"]]
    assert found == [[*ids, SPECIAL.end] for ids in ours.tokenizers.source.encode(text)]
    text = [*TARGETS, ">>deu<<ein", ">>fra<< ein"]
    found = [order[ids].tolist() for ids in tokenizer(text_target=text)["input_ids"]]
    assert found == [[*ids, SPECIAL.end] for ids in ours.tokenizers.target.encode(text)]


def test_a_pytorch_file_is_read_by_weights_only_loading_or_refused(tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = foreign_marian(tmp_path / "theirs")
    run, _ = read_marian(folder, tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file)
    again, _ = read_marian(folder, tmp_path / "second")
    chex.assert_trees_all_equal(*(Translator.load(r.path, make_mesh(MeshConfig())).params for r in (run, again)))
    whole = file.read_bytes()
    torch.save(tensors | {"model.shared.weight": pathlib.PurePosixPath("x")}, file)
    refused = file.read_bytes()
    torch.save(tensors | {"model.shared.weight": [1.0]}, file)
    unloadable = r"pytorch_model.bin cannot be read by weights-only loading \(.*\): it is damaged, or holds more than"
    for content, message in (
        (refused, unloadable),
        (whole[:-9], unloadable),
        (b"", unloadable),
        (file.read_bytes(), "must hold tensors by their names, and model.shared.weight is of type list. Copy or"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_marian(folder, tmp_path / "third")


def test_pieces_that_the_vocabulary_lacks_are_unknown_to_both(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = foreign_marian(tmp_path / "theirs")
    words, gone = without_pieces(folder, 5)
    order, pieces = our_order(words, words["<pad>"], words["</s>"])
    theirs = transformers.MarianTokenizer.from_pretrained(folder)(SOURCES)["input_ids"]
    ours = renumbered((folder / "source.spm").read_bytes(), pieces).encode(SOURCES)
    assert [order[ids].tolist() for ids in theirs] == [[*ids, SPECIAL.end] for ids in ours]
    assert len(gone) == 5 and sum(SPECIAL.unknown in ids for ids in ours) > 5


def test_generate_does_what_was_written_of_the_settings(tmp_path):
    """Without an argument: limits, repetition, bans and a forced end are in generation_config.json."""
    import torch

    transformers = pytest.importorskip("transformers")
    folder = foreign_marian(tmp_path / "theirs")
    shutil.copy(folder / "source.spm", folder / "target.spm")  # most of its outputs are of these pieces
    run, _ = read_marian(folder, tmp_path / "run")
    loaded = Translator.load(run.path, make_mesh(MeshConfig()))
    source, target = loaded.tokenizers.source, loaded.tokenizers.target
    text = [s for s, ids in zip(SOURCES, source.encode(SOURCES), strict=True) if 17 <= len(ids) + 1 <= 24]
    decoding = dataclasses.replace(
        loaded.decoding, beam_size=4, stop="first_finished", max_length_factor=0.0, max_length_offset=6, min_length=3,
        force_eos=True, no_repeat_ngram=2, repetition_penalty=1.3, suppress_unknown=True,
    )  # fmt: skip
    usual = loaded.with_decoding(decoding).translate(text)
    # What outputs like to say, one piece or two in a row, as far as a text is cut into them.
    said = [found.tokens[n : n + size] for found in usual for size in (1, 2) for n in range(len(found.tokens))]
    often = collections.Counter(target.decode(processor(target).piece_to_id(pieces)) for pieces in said)
    phrases = [text for text, _ in often.most_common() if target.pieces(target.encode([text])[0]) in said][:4]
    inside = next(pieces[0] for pieces in said if len(pieces) == 1 and pieces[0].isalpha())
    bans = {"suppress_sequences": tuple(phrases), "suppress_tokens": (inside,)}
    ours = loaded.with_decoding(dataclasses.replace(decoding, **bans))
    assert any(" " in phrase for phrase in phrases)
    assert write_marian(ours, run.read_config().model, tmp_path / "marian") == []

    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "marian").eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "marian")
    words = json.loads((tmp_path / "marian" / "vocab.json").read_text())
    order, _ = our_order(words, theirs.config.pad_token_id, 0)
    with torch.no_grad():
        made = theirs.generate(**tokenizer(text, return_tensors="pt", padding=True)).tolist()
    changed = closed = 0
    for found, before, row in zip(ours.translate(text), usual, made, strict=True):
        ids = processor(target).piece_to_id(found.tokens)
        assert order[row[1 : 2 + len(ids)]].tolist() == [*ids, SPECIAL.end]
        changed += found.tokens != before.tokens
        closed += len(ids) == 6
    assert len(text) >= 100 and changed >= 10 and closed >= 10


@pytest.mark.parametrize("forced", [None, 0])
@pytest.mark.parametrize("stop, early_stopping", [("exact", "never"), ("heuristic", False), ("first_finished", True)])
def test_a_model_of_theirs_finds_the_same(foreign, stop, early_stopping, forced):
    ours, theirs, tokenizer, order = foreign
    decoding = dataclasses.replace(
        ours.decoding, beam_size=4, length_penalty="average:1.0", stop=stop, max_length_factor=0.0,
        max_length_offset=LONGEST - 1, force_eos=forced == 0,
    )  # fmt: skip
    assert_alike(
        ours.with_decoding(decoding), theirs, tokenizer, order, SOURCES, num_beams=4, length_penalty=1.0,
        early_stopping=early_stopping, max_length=LONGEST + 1, forced_eos_token_id=forced,
        bad_words_ids=[[theirs.config.pad_token_id]],
    )  # fmt: skip
