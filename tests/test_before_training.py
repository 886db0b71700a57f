"""What a training does before its first step: it refuses what cannot work, and compiles all that it will need."""

import re

import jax

from flax_transformer.training import loop
from flax_transformer.training.metrics_file import read_metrics
from tests.small_run import command


def test_a_run_that_cannot_begin_leaves_nothing_behind(recipe, tmp_path, capsys):
    folder = tmp_path / "never"
    for mistake, message in (
        (["--tokenizer.vocab-size", "9000"], "cannot learn tokenizer.vocab_size = 9000"),
        (["--batching.tokens-per-batch", "40"], "batching.tokens_per_batch (40) is too small"),
        (["--mesh.tensor", "8"], "mesh.tensor (8) must divide"),
        (["--mesh.data", "9"], "but JAX has 8"),
        (["--training.seed", "-1"], "training.seed must lie between 0"),
        (["--model.param-dtype", "bfloat16"], "cannot be trained in: most updates"),
        (["--model.kind", "rnn", "--model.param-dtype", "bfloat16"], "Keep model.param_dtype: float32 and set"),
        (["--data.kind", "parallel_text", "--data.folder", str(tmp_path)], "no text file at"),
    ):
        assert command("train", "--config", str(recipe), "--run", str(folder), *mistake) == 2
        assert message in capsys.readouterr().err
        assert not folder.exists()


def test_a_step_that_does_not_fit_the_memory_is_explained_before_the_first(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flax_transformer.parallel.memory.available_bytes", lambda mesh: 1000)
    assert command("train", "--config", str(recipe), "--run", str(tmp_path / "large")) == 2
    message = capsys.readouterr().err
    assert re.search(r"on batches of 8 rows x 28/44 tokens needs 0.0 GiB on each device, and there are 0.0", message)
    assert "Raise batching.gradient_accumulation_steps, lower batching.tokens_per_batch" in message


def test_a_beam_that_does_not_fit_the_memory_is_explained_before_the_first_step(recipe, tmp_path, capsys):
    wide = ["--decoding.beam-size", "30000"]
    assert command("train", "--config", str(recipe), "--run", str(tmp_path / "wide"), *wide) == 2
    message = capsys.readouterr().err
    needs = r"with 30000 hypotheses of at most \d+ tokens for each, needs [\d.]+ GiB on each device, and there are "
    assert re.search(f"a search of 8 sentences at a time, {needs}", message) and "Lower decoding.beam_size" in message
    assert not (tmp_path / "wide").exists()


def test_nothing_is_compiled_once_training_has_begun(recipe, tmp_path, monkeypatch):
    """Evaluations included: training ends with the second of them."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    around = []

    def train_loop(*arguments, **named):
        around.append(events.count("/jax/compilation_cache/compile_requests_use_cache"))
        result = loop.train_loop(*arguments, **named)
        around.append(events.count("/jax/compilation_cache/compile_requests_use_cache"))
        return result

    monkeypatch.setattr("flax_transformer.experiment.run.train_loop", train_loop)
    jax.clear_caches()  # of what other tests have compiled
    several = ["--batching.num-buckets", "2", "--batching.tokens-per-batch", "480"]
    assert command("train", "--config", str(recipe), "--run", str(tmp_path / "run"), *several) == 0
    assert "2 compiled shapes" in (tmp_path / "run" / "train.log").read_text()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2
    assert around[0] > 2 and around[0] == around[1]
