"""What a training gives TensorBoard beside its figures: samples, attention, and a profile of some steps."""

import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event  # type: ignore[missing-module-attribute]

from flax_transformer.experiment.validation import markdown_table
from flax_transformer.training.loop import WARM_UP_STEPS
from flax_transformer.training.step_profile import StepProfile
from tests.small_run import command


def values(folder: Path) -> dict[str, dict[int, Any]]:
    """The values of all event files by tag and step."""
    found: dict[str, dict[int, Any]] = {}
    for path in folder.glob("events*"):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value
    return found


def step_numbers(folder: Path) -> set[int]:
    """The numbers of the steps that a profile names."""
    (path,) = (folder / "plugins" / "profile").glob("*/*.xplane.pb")
    found = set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            found |= {int(dict(event.stats)["step_num"]) for event in line.events if event.name == "train"}
    return found


@pytest.fixture(scope="module")
def traced(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "run"
    more = ["--training.draw-attention", "--training.profile-steps", "2"]
    assert command("train", "--config", str(recipe), "--run", str(folder), *more) == 0
    return folder / "tensorboard"


def test_each_evaluation_shows_translations_and_attention(traced):
    found = values(traced)
    assert set(found["validation/samples"]) == set(found["validation/bleu"]) == {4, 8}
    text = found["validation/samples"][8].tensor.string_val[0].decode()
    assert text.startswith("| source | output | reference |\n|---|---|---|\n") and text.count("\n") == 2 + 5
    assert set(found["validation/attention"]) == {4, 8}
    for picture in found["validation/attention"].values():
        assert picture.image.encoded_image_string.startswith(b"\x89PNG")
        assert min(picture.image.width, picture.image.height) > 200


def test_a_profile_has_the_steps_that_were_asked_for(traced):
    assert step_numbers(traced) == {WARM_UP_STEPS + 1, WARM_UP_STEPS + 2}


def test_a_profile_ends_with_its_training(tmp_path):
    with StepProfile(tmp_path, 5, after=1) as profile:
        for number in (1, 2, 3):
            with profile.step(number):
                result = jnp.ones(3) + 1
            assert profile.end_step(number, result) == 0.0
    assert step_numbers(tmp_path) == {2, 3}


def test_nothing_is_profiled_unasked(tmp_path):
    with StepProfile(tmp_path, 0) as profile, profile.step(1):
        pass
    assert not list(tmp_path.iterdir())


def test_signs_of_markdown_stand_for_themselves():
    made = markdown_table(("a", "b"), [("x|y", "<b>*z*</b>")])
    assert made == "| a | b |\n|---|---|\n| x&#124;y | &#60;b&#62;&#42;z&#42;&#60;/b&#62; |\n"
    made = markdown_table(("a",), [("x\ry\nz",)])  # a line of text may hold a carriage return
    assert made == "| a |\n|---|\n| x&#13;y&#10;z |\n"
