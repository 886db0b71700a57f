"""Each reader of a file meets hostile files: it succeeds, or gives one of our errors, within a second and 200 MB.

Where a file has a checksum, success means the right content. See `tests/faults/hostile.py` for larger numbers.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_transformer.cli.partial_output import OutputProgress, PartialOutput
from flax_transformer.config.reading import read_config
from flax_transformer.config.recipe import Config
from flax_transformer.data.token_cache import tokenized_parts
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.inference.comparison import RunSummary
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics_file import read_metrics
from tests.faults.damage import files_of
from tests.faults.hostile import YAML_TEXTS, answer, damaged, damaged_object, examples
from tests.faults.test_checkpoints import SHAPE, collected, layout, save
from tests.faults.test_damaged_cache import CONFIG, TEXT, contents
from tests.faults.test_records import TRAIN, VALIDATION, begun, lines_of, make_run
from tests.small_run import SMALL

__all__ = ["begun", "collected"]  # fixtures

# What Orbax leaves behind it when a file is damaged.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]

LOG = lines_of(TRAIN, VALIDATION, TRAIN | {"step": 4}, VALIDATION | {"step": 4})


@given(st.one_of(YAML_TEXTS, damaged(SMALL.encode())))
@examples(150)
def test_a_hostile_configuration(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_bytes(content)
    config = answer(lambda: read_config(file))
    assert config is None or isinstance(config, Config)


@given(st.one_of(damaged(LOG), st.lists(damaged_object(VALIDATION), max_size=3).map(b"\n".join)))
@examples(400)
def test_a_hostile_log_of_figures(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    file.write_bytes(content)
    figures = answer(lambda: [-record["loss"] for record in read_metrics(file)])
    assert figures is None or all(isinstance(figure, float | int) for figure in figures)


@given(st.data())
@examples(150)
def test_a_hostile_record_of_an_output(begun, data):
    record, output = begun / "out.partial.json", begun / "out"
    whole = record.read_bytes()
    changed = st.one_of(damaged(whole), damaged_object(json.loads(whole)))
    try:
        record.write_bytes(data.draw(changed))
        found = answer(lambda: PartialOutput(output, {"beam": 3}, True).progress)
    finally:
        record.write_bytes(whole)
    right = PartialOutput(output, {"beam": 3}, True).progress
    assert found in (None, right) and isinstance(right, OutputProgress)


@pytest.fixture(scope="module")
def tokenizers() -> TokenizerPair:
    return TokenizerPair.train(TEXT.source, TEXT.target, CONFIG)


@given(st.data())
@examples(20)
def test_a_hostile_cache_of_tokens(tmp_path_factory, tokenizers, data):
    folder = tmp_path_factory.getbasetemp() / "hostile tokens"
    whole = tokenized_parts((TEXT,), tokenizers, folder)
    file = data.draw(st.sampled_from(files_of(whole.folder)))
    right = contents(whole)
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    found = answer(lambda: tokenized_parts((TEXT,), tokenizers, folder))
    assert found is not None and contents(found) == right


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Two checkpoints of hardly anything."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(folder, (9, 9)) as checkpoints:
        save(checkpoints, 2, 0.75)
        save(checkpoints, 4, 0.5)
    return folder


def parameters(folder: Path, step: int) -> list[float] | None:
    with Checkpoints(folder) as checkpoints:
        return np.asarray(checkpoints.restore_params(step, {"w": SHAPE})["w"]).tolist()


@given(st.data())
@examples(10)
def test_a_hostile_checkpoint(two, tmp_path_factory, data):
    """Translation takes the right parameters or none, and a training goes on from the newest that is right."""
    folder = tmp_path_factory.mktemp("hostile") / "checkpoints"
    shutil.copytree(two, folder)
    file = data.draw(st.sampled_from(files_of(folder / "4")))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    assert answer(lambda: parameters(folder, 4)) in (None, [4, 5, 6, 7])
    best = answer(lambda: Checkpoints(folder).choose("best"))
    assert best in (None, 2)
    with Checkpoints(folder, (9, 9)) as checkpoints:
        restored = answer(lambda: checkpoints.restore(layout()))
        assert restored is not None
        step = int(restored.state.step)
        assert step in (2, 4) and restored.position.batch == step and restored.state.params["w"][0] == step


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, tokenizers) -> Path:
    folder = make_run(tmp_path_factory.mktemp("small") / "run")
    tokenizers.save(folder.tokenizer)
    return folder.path


@given(st.data())
@examples(10)
def test_a_hostile_run_folder(small_run, tmp_path_factory, data):
    folder = RunFolder(tmp_path_factory.mktemp("hostile") / "run")
    shutil.copytree(small_run, folder.path)
    file = data.draw(st.sampled_from(files_of(folder.path)))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    answer(lambda: folder.read_config())
    answer(lambda: folder.tokenizers())
    answer(lambda: RunSummary.read(folder.path))
