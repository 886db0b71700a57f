"""Trainings and translations of several processes, beside those of one process."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.processes.group import Group, command
from tests.small_run import SMALL

pytestmark = pytest.mark.slow

RECIPE = SMALL.replace("mesh: {data: 1}", "mesh: {data: 1, fsdp: 2}").replace("steps: 8", "steps: 40")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory, recipe) -> Path:
    """The run of one process with two devices."""
    folder = tmp_path_factory.mktemp("reference")
    group = Group(command, 1, folder, ("train", "--config", str(recipe), "--run", str(folder / "run")), devices=2)
    assert group.wait() == [0], group.errors(0)
    return folder / "run"


def figures(run: Path) -> dict[tuple[str, int], list[float]]:
    """Loss and quality of each record."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    names = ("loss", "accuracy", "gradient_norm", "target_tokens", "bleu", "chrf")
    return {(r["kind"], r["step"]): [r[n] for n in names if n in r] for r in map(json.loads, lines)}


def wait_for_step(run: Path, step: int) -> None:
    """Waits until a training has recorded a step."""
    last = time.monotonic() + 120
    while time.monotonic() < last:
        if (run / "metrics.jsonl").exists() and any(number >= step for _, number in figures(run)):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come")


def test_a_training_is_stopped_killed_and_resumed_on_other_numbers_of_processes(tmp_path, recipe, reference):
    run = tmp_path / "run"
    expected = figures(reference)

    # Two processes, one of which gets a signal: both stop at one step, and leave its checkpoint.
    group = Group(command, 2, tmp_path / "two", ("train", "--config", str(recipe), "--run", str(run)))
    wait_for_step(run, 6)
    group.send(1, signal.SIGTERM)
    assert group.wait() == [3, 3], group.errors(0) + group.errors(1)
    stopped = max(step for _, step in figures(run))
    assert (run / "checkpoints" / str(stopped)).is_dir() and stopped < 40
    assert f"stopped by signal 15 at step {stopped}" in group.output(0)
    common = {key: value for key, value in figures(run).items() if key in expected}
    assert len(common) >= 3 and common == {key: expected[key] for key in common}  # to the bit

    # A part of a checkpoint that one process alone reads is damaged: both end, and the checkpoint stays.
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for part in damaged.glob(f"checkpoints/{stopped}/params/ocdbt.process_1/d/*"):
        part.write_bytes(b"")
    group = Group(command, 2, tmp_path / "broken", ("train", "--run", str(damaged), "--resume"))
    assert group.wait(90) == [2, 2], group.errors(0) + group.errors(1)
    assert any("Resume the training in one process" in group.errors(number) for number in (0, 1))
    assert (damaged / "checkpoints" / str(stopped)).is_dir()

    # Four processes go on. One is killed: the others end, and say so.
    four = ("--mesh.data", "2", "--mesh.fsdp", "2")
    group = Group(command, 4, tmp_path / "four", ("train", "--run", str(run), "--resume", *four))
    wait_for_step(run, stopped + 4)
    clock = time.monotonic()
    group.send(2, signal.SIGKILL)
    codes = group.wait(60)
    assert codes[2] == -signal.SIGKILL and all(codes) and time.monotonic() - clock < 40, codes
    assert all("resumed" not in group.output(number) for number in (1, 3))  # the first one alone writes the log
    told = [group.errors(number) for number in (0, 1, 3)]
    assert any("lost the connection to another one" in text or "another task died" in text for text in told), told

    # One process with one device ends it, with the same curve.
    alone = ("--mesh.data", "1", "--mesh.fsdp", "1")
    group = Group(command, 1, tmp_path / "one", ("train", "--run", str(run), "--resume", *alone))
    assert group.wait() == [0], group.errors(0)
    found = figures(run)
    assert found.keys() >= {("train", step) for step in range(stopped + 2, 41, 2)}
    for kind, step in found.keys() & expected.keys():
        loss, other = found[kind, step][0], expected[kind, step][0]
        # Rounding grows from step to step.
        assert math.isclose(loss, other, rel_tol=1e-4 if step <= stopped + 8 else 2e-2), (kind, step, loss, other)


def test_two_processes_translate_score_and_evaluate_as_one_with_two_devices(tmp_path, reference):
    sources = reference / "samples" / "test.sources.txt"
    (tmp_path / "references.txt").write_text((reference / "samples" / "test.references.txt").read_text())
    pairs = ("--source", str(sources), "--target", str(tmp_path / "references.txt"), "--json")
    verbs = {
        "translate": ("--input", str(sources), "--json", "--attention", "--num-hypotheses", "2"),
        "score": pairs,
        "evaluate": ("--source", str(sources), "--reference", str(tmp_path / "references.txt"), "--beam-size", "3"),
    }
    for verb, options in verbs.items():
        arguments = (verb, "--run", str(reference), *options)
        one = Group(command, 1, tmp_path / f"{verb}1", arguments, devices=2)
        two = Group(command, 2, tmp_path / f"{verb}2", arguments)
        assert (one.wait(), two.wait()) == ([0], [0, 0]), two.errors(0) + two.errors(1)
        assert two.output(0) == one.output(0) != "" and two.output(1) == ""


def in_folder(flags: list[str], folder: str, *arguments: str) -> int:
    """Runs a command in a folder of its own, as on a machine that shares no disk."""
    os.chdir(folder)
    return command(flags, *arguments)


@pytest.mark.parametrize(
    "others, told",
    [
        ("", "does not see the run folder run of process 0"),
        ("optimizer: {warmup_steps: 11}", "process 1 has another section 'optimizer' than process 0"),
    ],
    ids=["a folder that is not shared", "another recipe"],
)
def test_what_processes_do_not_share_is_told_before_the_first_step(tmp_path, others, told):
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        text = RECIPE if not number or not others else RECIPE.replace("optimizer: {warmup_steps: 10}", others)
        (tmp_path / str(number) / "small.yaml").write_text(text)
    arguments = ("train", "--config", "small.yaml", "--run", "run")
    group = Group(in_folder, 2, tmp_path / "said", lambda number: (str(tmp_path / str(number)), *arguments))
    assert group.wait(120) == [2, 2]
    assert all(told in group.errors(number) for number in (0, 1)), group.errors(0)
    assert not (tmp_path / "1" / "run").exists()
