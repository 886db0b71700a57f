"""A whole small run through the commands: train, resume, translate, evaluate, and what goes wrong on the way."""

import dataclasses
import gzip
import io
import json
import re
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from flax_transformer import Translator
from flax_transformer.config.reading import read_config
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus
from flax_transformer.data.tokenizer import SubwordSample
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.run import run_experiment
from flax_transformer.experiment.validation import Validation
from flax_transformer.inference.attention_map import attention_map
from flax_transformer.inference.chunks import length_bucket
from flax_transformer.parallel.mesh import MeshConfig, make_mesh, search_meshes
from flax_transformer.run_folder import RunFolder
from flax_transformer.shapes import Batch
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics_file import read_metrics
from tests.small_run import SMALL, checkpoint_params, command


@pytest.fixture(scope="module")
def translator(run) -> Translator:
    """On one device, so that all sentences of a batch go through one program."""
    return Translator.load(run, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_commands_have_few_devices_search_side_by_side(run, translator, monkeypatch, tmp_path):
    two = make_mesh(MeshConfig(), jax.devices()[:2])
    monkeypatch.setattr("flax_transformer.inference.ensemble.make_mesh", lambda _: two)
    made = []

    def recorded(mesh):
        made.extend(search_meshes(mesh))
        return made

    monkeypatch.setattr("flax_transformer.inference.translator.search_meshes", recorded)
    text = ["one", "twenty-one", "", "five hundred"] * 10
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in text))
    arguments = ["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert command("translate", *arguments) == 0
    assert [mesh.devices.flatten().tolist() for mesh in made] == [[device] for device in jax.devices()[:2]]
    assert (tmp_path / "out").read_text().splitlines() == [t.text for t in translator.translate(text)]


def test_a_training_has_all_devices_search_together(monkeypatch, tmp_path):
    """Its few sentences are not worth a second program."""
    meshes = []

    def stopped(translator, *_):
        meshes.extend(translator.parameters.search_meshes)
        raise ConfigError("that is all that is asked")

    monkeypatch.setattr(Translator, "compile", stopped)
    (tmp_path / "small.yaml").write_text(SMALL)
    arguments = ["--config", str(tmp_path / "small.yaml"), "--run", str(tmp_path / "run"), "--mesh.data", "2"]
    assert command("train", *arguments) == 2
    assert [mesh.size for mesh in meshes] == [2]


# --- training


def test_a_run_leaves_everything_in_its_folder(run):
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.yaml", "run_card.json", "metrics.jsonl", "train.log", "tokenizer", "checkpoints"}
    assert not [p for p in run.rglob("*.new")]
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 8]
    train = [r for r in records if r["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    card = json.loads((run / "run_card.json").read_text())
    assert card["test"]["num_sentences"] == 24
    assert card["test"]["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:char")
    assert card["versions"]["jax"] == jax.__version__
    assert len((run / "samples" / "test.hypotheses.txt").read_text().splitlines()) == 24
    for picture in ("curves.png", "attention.png"):
        assert (run / "plots" / picture).read_bytes().startswith(b"\x89PNG")
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    for tag in (b"train/loss", b"train/target_tokens_per_second", b"validation/loss", b"validation/bleu"):
        assert tag in events


def test_the_progress_line_says_all_that_is_asked_of_it(run):
    samples = (run / "train.log").read_text().split("samples from the test part")[1]
    assert samples.count("    -> ") == 10
    line = next(text for text in (run / "train.log").read_text().splitlines() if "4/8" in text)
    for part in (
        "[##########..........]",
        "loss ",
        "ppl ",
        "acc ",
        "lr ",
        "|g| ",
        "src ",
        "tgt ",
        "tok/s",
        "pad ",
        "left ",
    ):
        assert part in line, part


@pytest.mark.slow
def test_packed_batches_in_pieces_train_resume_and_are_described(recipe, tmp_path):
    packed = ["--batching.packing", "--batching.row-length", "96", "--batching.tokens-per-batch", "1600"]
    arguments = ["--config", str(recipe), *packed, "--batching.gradient-accumulation-steps", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command("train", *arguments, "--run", str(whole)) == 0
    assert re.search(
        r"batches 16x\d+/96 \(rows x source/target\): 1 compiled shapes, \d+ batches an epoch, padding \d+ %",
        (whole / "train.log").read_text(),
    )
    assert command("train", *arguments, "--run", str(stopped), "--training.steps", "4") == 0
    assert command("train", "--run", str(stopped), "--resume", "--training.steps", "8") == 0
    chex.assert_trees_all_equal(checkpoint_params(stopped, 8), checkpoint_params(whole, 8))
    losses = [r["loss"] for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.slow  # three kills of tests/faults/test_torture.py say the same in the fast suite
def test_resuming_equals_not_stopping_bit_for_bit(run, recipe, tmp_path):
    folder = tmp_path / "stopped"
    assert command("train", "--config", str(recipe), "--run", str(folder), "--training.steps", "4") == 0
    with (folder / "metrics.jsonl").open("a") as metrics:  # what a kill after step 4 may leave behind
        metrics.write('{"kind": "train", "step": 5, "loss": 0}\n{"kind": "tr')
    moved = folder.rename(tmp_path / "moved")
    assert command("train", "--run", str(moved), "--resume", "--training.steps", "8") == 0
    folder = moved
    assert read_config(folder / "config.yaml").training.steps == 8
    assert json.loads((folder / "run_card.json").read_text())["steps"] == 8
    chex.assert_trees_all_equal(checkpoint_params(folder, 8), checkpoint_params(run, 8))
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"] == [2, 4, 6, 8]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_in_the_same_place(run, recipe, tmp_path):
    folder = tmp_path / "stopped"
    assert command("train", "--config", str(recipe), "--run", str(folder), "--training.steps", "4") == 0
    others = ["--mesh.data", "2", "--mesh.fsdp", "2"]
    assert command("train", "--run", str(folder), "--resume", "--training.steps", "8", *others) == 0
    on_one, on_four = (
        [r["loss"] for r in read_metrics(f / "metrics.jsonl") if r["kind"] == "train"] for f in (run, folder)
    )
    assert len(on_one) == 4
    np.testing.assert_allclose(on_four, on_one, rtol=2e-5)


@pytest.mark.slow
def test_random_segmentations_that_are_lost_are_drawn_anew(recipe, tmp_path, monkeypatch, capsys):
    """SentencePiece draws others in another process, as it does here; the run goes on with them, and says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, sampled = tmp_path / "run", ["--subword-sampling.alpha", "0.1", "--subword-sampling.variants", "1"]
    short = ["--training.steps", "2", "--training.evaluate-sentences", "2"]
    assert command("train", "--config", str(recipe), "--run", str(folder), *sampled, *short) == 0
    resume = ["train", "--run", str(folder), "--resume", "--training.steps"]
    assert command(*resume, "3") == 0
    assert "drawn anew" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache" / "flax_transformer" / "tokens")
    at = SubwordSample.at
    monkeypatch.setattr(SubwordSample, "at", lambda self, *place: at(self, 7, *place))
    assert command(*resume, "4") == 0
    assert "are no longer in the cache and were drawn anew: this epoch has other" in capsys.readouterr().out


@pytest.mark.slow
def test_resuming_with_an_average_equals_not_stopping_bit_for_bit(recipe, tmp_path):
    """Translation uses the average, so that a resumed run must have the parameters that are trained, too."""
    arguments = ["--config", str(recipe), "--training.ema-decay", "0.9"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command("train", *arguments, "--run", str(whole)) == 0
    assert command("train", *arguments, "--run", str(stopped), "--training.steps", "4") == 0
    assert command("train", "--run", str(stopped), "--resume", "--training.steps", "8") == 0
    chex.assert_trees_all_equal(checkpoint_params(stopped, 8), checkpoint_params(whole, 8))
    losses = [[r["loss"] for r in read_metrics(f / "metrics.jsonl") if r["kind"] == "train"] for f in (whole, stopped)]
    assert losses[0] == losses[1]
    assert command("train", "--run", str(stopped), "--resume", "--training.ema-decay", "0.5") == 2


def test_a_signal_saves_the_state_and_gives_code_3(recipe, tmp_path, monkeypatch, run):
    """At once, though it comes in the middle of an evaluation, which may take minutes."""
    ended = []

    def evaluate(*_) -> float:
        signal.raise_signal(signal.SIGTERM)
        ended.append(True)
        return 0.0

    monkeypatch.setattr(Validation, "__call__", evaluate)
    folder = tmp_path / "killed"
    arguments = ["--config", str(recipe), "--run", str(folder), "--training.evaluate-every-steps", "6"]
    assert command("train", *arguments) == 3
    chex.assert_trees_all_equal(checkpoint_params(folder, 6), checkpoint_params(run, 6))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not ended
    assert "the evaluation at step 6 was stopped: --resume will begin with it" in (folder / "train.log").read_text()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.saved is not None and checkpoints.saved[-1] == (6, None) and not checkpoints.best_steps()


def test_divergence_is_said_and_nothing_that_is_not_finite_is_saved(recipe, tmp_path, capsys):
    folder = tmp_path / "diverged"
    arguments = ["--config", str(recipe), "--run", str(folder), "--optimizer.learning-rate-scale", "1e15"]
    arguments += ["--training.steps", "40", "--training.evaluate-every-steps", "40", "--model.norm-order", "pre"]
    assert command("train", *arguments) == 1
    captured = capsys.readouterr()
    assert "training diverged: 10 steps in a row were skipped, the last is step" in captured.err
    assert re.search(r"the last is step \d+: loss \S+, gradient norm \S+\. Its batch is kept in ", captured.err)
    assert str(folder / "bad_batch.npz") in captured.err and "Try a lower learning rate" in captured.err
    assert "The last checkpoint is whole" in captured.err
    step = int(captured.err.split("the last is step ")[1].split(":")[0])
    assert f"warning: step {step - 9} was skipped: loss" in captured.out
    assert f"warning: step {step - 10} was skipped" not in captured.out
    with np.load(folder / "bad_batch.npz") as batch:
        assert set(batch) == set(Batch._fields) and batch["target_segments"].any()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        latest = checkpoints.latest_step()
    assert latest is not None and all(np.isfinite(a).all() for a in jax.tree.leaves(checkpoint_params(folder, latest)))


@pytest.mark.slow
def test_training_on_files_with_separate_vocabularies(recipe, tmp_path, capsys):
    """The other kind of corpus, plain and compressed, with three embedding tables; and what may be wrong with it."""
    corpus = number_words_corpus(NumberWordsConfig(200, 20, 20))
    (train,) = corpus.train
    assert isinstance(train, ParallelText)
    # What filters drop of the training text stays where models are judged: identical sides, twice, and unlike lengths.
    filtered = ParallelText(["one", "one", "one", "five " * 8], ["one", "one", "two " * 9, "five"])
    texts = [
        ParallelText([*part.source, *filtered.source], [*part.target, *filtered.target])
        for part in (train, corpus.validation, corpus.test)
    ]
    texts[2] = ParallelText([*texts[2].source, "one " * 80], [*texts[2].target, "eins"])  # beyond the limit, but tested
    for name, part in zip(("train", "validation", "test"), texts, strict=True):
        (tmp_path / f"{name}.source").write_bytes("".join(f"{line}\n" for line in part.source).encode())
        packed = gzip.compress("".join(f"{line}\n" for line in part.target).encode())
        (tmp_path / f"{name}.target.gz").write_bytes(packed)
    values = yaml.safe_load(recipe.read_text()) | {
        "run": str(tmp_path / "run"),
        "data": {"kind": "parallel_text", "folder": str(tmp_path)}
        | {f"{name}_target": f"{name}.target.gz" for name in ("train", "validation", "test")},
        "tokenizer": {"vocab_size": 50, "joint": False},
        "batching": {"tokens_per_batch": 640, "num_buckets": 1},
        "filters": {"max_length_ratio": 3, "drop_identical": True, "drop_duplicates": True},
    }
    values["model"]["share_embeddings"] = "none"
    values["training"] = {"steps": 2, "evaluate_sentences": 4}
    path = tmp_path / "files.yaml"
    path.write_text(yaml.safe_dump(values))
    assert command("train", "--config", str(path)) == 0
    said = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"\d+ of unequal length, \d+ duplicate left out\), 24 validation, 25 test\n", said)
    assert json.loads((tmp_path / "run" / "run_card.json").read_text())["test"]["num_sentences"] == 25
    assert re.search(r"warning: \S+test.source and .*, line 25 is longer than the model.s 63 tokens", said)
    assert {p.name for p in (tmp_path / "run" / "tokenizer").iterdir()} == {"source.model", "target.model"}
    params = checkpoint_params(tmp_path / "run", 2)
    assert {"source_embedding", "target_embedding", "output_embedding"} <= params.keys()

    with (tmp_path / "train.source").open("a") as file:  # another text: the position in it would mean nothing
        file.write("one\n")
    assert command("train", "--run", str(tmp_path / "run"), "--resume", "--training.steps", "3") == 2
    assert "train.source has 205 and" in capsys.readouterr().err
    lines = (tmp_path / "train.source").read_text().splitlines()
    (tmp_path / "train.source").write_text("".join(f"{line}\n" for line in lines[1:]))
    assert command("train", "--run", str(tmp_path / "run"), "--resume", "--training.steps", "3") == 2
    assert "was trained on other text than its configuration now finds" in capsys.readouterr().err
    (tmp_path / "train.source").write_bytes("schön\n".encode("latin-1"))
    assert command("train", "--config", str(path), "--run", str(tmp_path / "new")) == 2
    assert "line 1: not valid UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- translating


SENTENCES = ["twenty-one", "", "nine hundred thousand", "one", "   ", "seven hundred twelve thousand forty-five", "six"]


def test_translations_are_in_order_and_empty_for_empty(translator):
    together = translator.translate(SENTENCES, num_hypotheses=2)
    assert len(together) == len(SENTENCES)
    assert together[1].text == together[4].text == "" and together[1].score == 0.0
    for sentence, expected in zip(SENTENCES, together, strict=True):
        assert translator.translate([sentence], num_hypotheses=2)[0] == expected  # bit-equal scores included


def test_hypotheses_are_sorted_and_score_what_the_model_says(translator):
    source = "seven hundred twelve thousand forty-five"
    found = translator.translate([source], beam_size=3, num_hypotheses=3, length_penalty="average:1.0")[0]
    assert 1 <= len(found.hypotheses) <= 3
    finished = [h.finished for h in found.hypotheses]
    assert finished == sorted(finished, reverse=True)
    model = nnx.merge(translator.parameters.graphdef, translator.params)
    source_ids = jnp.array([[*translator.tokenizers.source.encode([source])[0], SPECIAL.end]])
    positions = jnp.arange(source_ids.shape[1])[None]
    memory = jax.jit(model.encode)(source_ids, positions, jnp.ones_like(source_ids))
    step = jax.jit(model.decode_step)
    for hypothesis in found.hypotheses:
        ids = [translator.tokenizers.target.id_of(p) for p in hypothesis.tokens] + [SPECIAL.end] * hypothesis.finished
        state = model.init_decode_state(memory, 1, 64)
        total, previous = 0.0, SPECIAL.start
        for token in ids:
            output, state = step(jnp.array([[previous]]), state)
            total += float(jax.nn.log_softmax(output.logits[0, 0])[token])
            previous = token
        assert hypothesis.score == pytest.approx(total / len(ids), rel=1e-4)


def test_one_beam_is_greedy_and_nothing_is_compiled_twice(translator):
    source = "nine hundred thousand"
    source_ids = jnp.array([[*translator.tokenizers.source.encode([source])[0], SPECIAL.end]])
    model = nnx.merge(translator.parameters.graphdef, translator.params)
    memory = jax.jit(model.encode)(source_ids, jnp.arange(source_ids.shape[1])[None], jnp.ones_like(source_ids))
    step = jax.jit(model.decode_step)
    found = translator.translate([source], beam_size=1)[0].hypotheses[0]
    state, previous, greedy = model.init_decode_state(memory, 1, 64), SPECIAL.start, []
    for _ in range(len(found.tokens) + found.finished):
        output, state = step(jnp.array([[previous]]), state)
        previous = int(jnp.argmax(output.logits[0, 0]))
        greedy.append(previous)
    assert found.tokens == translator.tokenizers.target.pieces([t for t in greedy if t != SPECIAL.end])
    assert (greedy[-1] == SPECIAL.end) == found.finished
    programs = dict(translator.parameters.programs)
    translator.translate([source, "nine hundred million"], beam_size=1)
    assert translator.parameters.programs == programs


def test_a_sentence_beyond_the_limit_is_cut_and_said_to_be(translator):
    assert translator.model.max_source_length == 64
    long = "one " * 80
    short, cut = translator.translate(["one", long])
    assert not short.truncated and cut.truncated


def test_buckets_depend_on_the_length_alone():
    assert [length_bucket(n, 1000) for n in (1, 8, 9, 25, 33, 48, 49, 65, 97, 129)] == [
        16, 16, 16, 32, 48, 48, 64, 96, 128, 192,
    ]  # fmt: skip
    assert length_bucket(60, 62) == 62


def test_settings_out_of_range_are_explained(translator):
    with pytest.raises(ConfigError, match=r"num_hypotheses \(3\) must lie between 1 and beam_size \(2\)"):
        translator.translate(["one"], beam_size=2, num_hypotheses=3)
    with pytest.raises(ConfigError, match="put a single one into a list"):
        translator.translate("one")


def test_attention_maps_are_distributions(translator):
    found = attention_map(translator, "twenty-one", "einundzwanzig")
    assert found is not None
    assert found.weights.shape == (1, 2, len(found.target), len(found.source))
    np.testing.assert_allclose(found.weights.sum(-1), 1.0, rtol=1e-5)


class Stdin(io.TextIOWrapper):
    def isatty(self):
        return False


def translate(monkeypatch, capsys, run, data: bytes) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", Stdin(io.BytesIO(data)))
    code = command("translate", "--run", str(run))
    output = capsys.readouterr()
    return code, output.out, output.err


def test_translate_command_is_line_by_line(monkeypatch, capsys, run, translator):
    code, out, err = translate(monkeypatch, capsys, run, b"twenty-one\n\nsix\r\nno end of line")
    assert code == 0 and re.fullmatch(
        r"4 sentences, \d+ tokens in [\d.]+ s: [\d.,]+ sentences/s, [\d.,]+ tokens/s"
        r"(; \d outputs were cut at their maximum length)?\n",
        err,
    )
    expected = [t.text for t in translator.translate(["twenty-one", "", "six", "no end of line"])]
    assert out.split("\n") == [*expected, ""]
    assert translate(monkeypatch, capsys, run, b"")[:2] == (0, "")


def test_translate_command_names_lines_that_it_shortens(monkeypatch, capsys, run):
    code, out, err = translate(monkeypatch, capsys, run, b"six\n" + b"one " * 80 + b"\nsix\n")
    assert code == 4 and out.count("\n") == 3
    assert "line 2 is longer than the model's 63 tokens" in err
    assert "Break it into sentences, one a line, or train with a model.max_source_length above 64." in err


def test_translate_command_translates_what_stands_before_a_bad_line(monkeypatch, capsys, run, translator):
    code, out, err = translate(monkeypatch, capsys, run, b"six\n\xff\xfe\n")
    assert code == 2
    assert out == translator.translate(["six"])[0].text + "\n"
    assert "standard input, line 2: not valid UTF-8" in err


@pytest.mark.slow
def test_commands_take_8_bit_weights_and_evaluate_another_search(monkeypatch, capsys, run, tmp_path):
    text = ["twenty-one", "six hundred"]
    expected = [t.text + "\n" for t in Translator.load(run, quantize="int8").translate(text)]
    monkeypatch.setattr(sys, "stdin", Stdin(io.BytesIO("\n".join(text).encode())))
    assert command("translate", "--run", str(run), "--quantize", "int8", "--scores") == 0
    found = capsys.readouterr().out.splitlines(keepends=True)
    assert [line.partition("\t")[2] for line in found] == expected
    whole = [h.score for t in Translator.load(run).translate(text) for h in t.hypotheses]
    assert [f"{score:.6f}" for score in whole] != [line.partition("\t")[0] for line in found]
    for side in ("source", "reference"):
        (tmp_path / side).write_text("\n".join(text) + "\n")
    arguments = ["--source", str(tmp_path / "source"), "--reference", str(tmp_path / "reference")]
    output = ["--output", str(tmp_path / "output")]
    assert command("evaluate", "--run", str(run), "--quantize", "int8", *arguments, *output) == 0
    assert (tmp_path / "output").read_text() == "".join(expected)
    changed = ["--stop", "first_finished", "--beam-size", "1", "--length-penalty", "none"]
    assert command("evaluate", "--run", str(run), *changed, *arguments, *output) == 0
    found = Translator.load(run).translate(text, stop="first_finished", beam_size=1, length_penalty="none")
    assert (tmp_path / "output").read_text() == "".join(t.text + "\n" for t in found)


def test_a_run_computes_in_bfloat16_when_asked(run, translator):
    """Whatever it was trained in: its scores are near those in float32, and rounded otherwise."""
    text = ["twenty-one", "six hundred", "nine"]
    found = Translator.load(run, quantize="bfloat16").translate(text)
    scores, expected = ([h.score for t in each for h in t.hypotheses] for each in (found, translator.translate(text)))
    assert scores != expected
    np.testing.assert_allclose(scores, expected, atol=0.05)


def test_evaluate_command_prints_signatures(run, tmp_path, capsys):
    (tmp_path / "source").write_text("twenty-one\nsix\n")
    (tmp_path / "reference").write_text("einundzwanzig\nsechs\n")
    arguments = ["evaluate", "--run", str(run), "--source", str(tmp_path / "source"), "--reference"]
    assert command(*arguments, str(tmp_path / "reference")) == 0
    out = capsys.readouterr().out
    assert "BLEU" in out and "tok:char" in out and "chrF" in out and "nc:6" in out and "of 2 sentences" in out
    (tmp_path / "short").write_text("einundzwanzig\n")
    assert command(*arguments, str(tmp_path / "short")) == 2
    assert "has 2 and" in capsys.readouterr().err


def test_unknown_verbs_are_explained():
    result = subprocess.run(
        [sys.executable, "-m", "flax_transformer.cli.main", "tranlsate"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "unknown verb 'tranlsate'. Did you mean 'translate'" in result.stderr


# --- the same run on a mesh


@pytest.mark.slow
def test_an_experiment_on_eight_devices_equals_one(run, recipe, tmp_path, one_device):
    config = read_config(recipe)
    config = dataclasses.replace(
        config,
        run=str(tmp_path / "mesh"),
        mesh=dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2),
        training=dataclasses.replace(config.training, steps=4),
    )
    run_experiment(config)
    one = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"][:2]
    eight = [r["loss"] for r in read_metrics(tmp_path / "mesh" / "metrics.jsonl") if r["kind"] == "train"]
    np.testing.assert_allclose(eight, one, rtol=2e-5)
    # Saved on eight devices, read on one: the checksums are of the values, wherever they lie.
    translator = Translator.load(tmp_path / "mesh", one_device)
    assert len(translator.translate(["six"])) == 1


# --- best checkpoints, averages, starting from another run


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_tested_and_translated_with(recipe, tmp_path, monkeypatch, capsys):
    """Made-up qualities, best at step 4; patience ends the training two evaluations later."""
    qualities = {2: 1.0, 4: 3.0, 6: 2.0, 8: 3.0, 10: 2.5}
    monkeypatch.setattr(Validation, "quality", lambda self, record: qualities[record["step"]])
    folder = tmp_path / "best"
    arguments = ["--config", str(recipe), "--run", str(folder), "--training.evaluate-every-steps", "2"]
    arguments += ["--training.early_stopping_patience", "2", "--training.keep-newest", "1", "--training.steps", "12"]
    assert command("train", *arguments) == 0
    printed = capsys.readouterr().out
    assert "no new best in 2 evaluations in a row: the training ends at step 8" in printed
    assert "the best evaluation was at step 8" not in printed  # an equal one does not end the search, but is later
    card = json.loads((folder / "run_card.json").read_text())
    assert (card["steps"], card["tested_step"]) == (8, 8)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.best_steps()[0] == 8

    monkeypatch.setitem(qualities, 8, 2.0)
    folder = tmp_path / "earlier"
    assert command("train", *(str(folder) if a == str(tmp_path / "best") else a for a in arguments)) == 0
    assert "the best evaluation was at step 4: its parameters are tested" in capsys.readouterr().out
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert (checkpoints.newest_steps(), checkpoints.choose("best"), checkpoints.choose("last")) == ([8, 4], 4, 8)
    best, last = (Translator.load(folder, checkpoint=which).params for which in ("best", "last"))
    chex.assert_trees_all_equal(jax.device_get(best), checkpoint_params(folder, 4))
    chex.assert_trees_all_equal(jax.device_get(last), checkpoint_params(folder, 8))
    # Step 6 is gone, so that 8 and 4 are not the newest two.
    assert command("average", "--run", str(folder), "--output", str(tmp_path / "mean"), "--num", "2") == 2
    assert "of the steps 8, 6 it lacks 6 (training.keep_newest is 1)" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
    # Going on does not begin to count anew.
    assert command("train", "--run", str(folder), "--resume") == 0
    assert json.loads((folder / "run_card.json").read_text())["steps"] == 8


def test_an_average_translates_but_is_not_resumed(run, tmp_path, capsys):
    output = tmp_path / "mean"
    assert command("average", "--run", str(run), "--output", str(output), "--num", "2") == 0
    assert "the mean of steps 6, 8 lies in" in capsys.readouterr().out
    sixth, eighth = checkpoint_params(run, 6), checkpoint_params(run, 8)
    mean = jax.device_get(Translator.load(output).params)
    chex.assert_trees_all_close(mean, jax.tree.map(lambda a, b: (a + b) / 2, sixth, eighth), rtol=1e-6, atol=1e-8)
    meta = json.loads((output / "checkpoints" / "8" / "meta" / "metadata").read_text())
    assert meta["tokenizers"] == RunFolder(run).tokenizers().fingerprint
    before = (output / "config.yaml").read_bytes()
    assert command("train", "--run", str(output), "--resume", "--training.steps", "10") == 2
    assert (output / "config.yaml").read_bytes() == before
    assert "holds parameters without the state of an optimiser" in capsys.readouterr().err
    assert command("average", "--run", str(run), "--output", str(tmp_path / "more"), "--num", "7") == 2
    assert "to choose the 7 newest from. Ask for fewer by --num" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    assert command("average", "--run", str(run), "--output", str(output), "--num", "1") == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_starts_from_another_with_its_tokenizer(run, recipe, tmp_path, capsys):
    folder = tmp_path / "tuned"
    arguments = ["--config", str(recipe), "--run", str(folder), "--init-from", str(run)]
    assert command("train", *arguments, "--data.num-train", "200", "--optimizer.warmup-steps", "1000000") == 0
    assert RunFolder(folder).tokenizers().source.model == RunFolder(run).tokenizers().source.model
    best = jax.device_get(Translator.load(run).params)
    # So slow a warm-up moves nothing by more than this, so what is left is where it started.
    chex.assert_trees_all_close(checkpoint_params(folder, 8), best, atol=1e-5)
    assert command("train", *arguments, "--run", str(tmp_path / "no"), "--tokenizer.vocab-size", "50") == 2
    message = capsys.readouterr().err
    assert "its tokenizer was learnt with other settings" in message and "copy section 'tokenizer' from" in message
    assert command("train", *arguments, "--run", str(tmp_path / "no"), "--model.feed-forward-dim", "48") == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
