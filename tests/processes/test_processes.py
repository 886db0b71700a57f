"""What processes tell each other, and how they end together. They share no model here, so they are quick."""

import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.shares import Found, exchange_results
from flax_transformer.parallel import processes
from flax_transformer.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from flax_transformer.parallel.placement import fetch, local_mesh, put, replicated, spans_processes
from flax_transformer.parallel.processes import ProcessGroup
from flax_transformer.training.stopping import STEPS_BETWEEN_VOTES, StopVote
from tests.processes.group import Group, command, join


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"processes": "2"}, "--process-id and --coordinator is missing"),
        ({"processes": "two", "process-id": "0", "coordinator": "h:1"}, "--processes must be a whole number"),
        ({"processes": "2", "process-id": "2", "coordinator": "h:1"}, "ids are 0 to 1"),
        ({"processes": "2", "process-id": "0", "coordinator": "h"}, "HOST:PORT"),
        ({"processes": "auto", "process-id": "0"}, "Leave out --process-id"),
        ({"processes": "2", "process-id": "0", "coordinator": "h:1", "seconds-to-join": "0"}, "at least 1"),
    ],
)
def test_wrong_flags_are_refused(flags, part):
    with pytest.raises(ConfigError, match=part):
        ProcessGroup.parse(flags)


def test_one_process_is_the_identity():
    join(["--processes", "1", "--process-id", "0", "--coordinator", "nowhere:1"])
    assert not processes.joined() and processes.num_processes() == 1 and processes.is_first()
    assert processes.exchange({"a": [1]}) == [{"a": [1]}] and processes.exchange_bytes(b"x") == [b"x"]
    assert processes.first_then_others(lambda: 3) == processes.from_first(lambda: 3) == 3
    processes.check_agreement({"text": "a"})
    with processes.calls_of_first(max) as call:
        assert call is max


def hypotheses(number: int, rows: int) -> Hypotheses:
    values = jnp.full((rows, 2), number, jnp.int32)
    floats = values.astype(jnp.float32)
    return Hypotheses(values[..., None], values, floats, values > 0, floats[..., None], {"attention": floats})


def toy(flags):
    """All that processes exchange, with a check of each result."""
    join(flags)
    me, count = processes.process_id(), processes.num_processes()

    # Messages, of any length.
    assert processes.exchange({"me": me}) == [{"me": number} for number in range(count)]
    long = bytes([me]) * (processes.BYTES_OF_A_PIECE + 1)
    assert [(len(each), each[-1]) for each in processes.exchange_bytes(long)] == [(len(long), n) for n in range(count)]
    assert processes.from_first(lambda: me) == 0
    seen = []
    processes.first_then_others(lambda: seen.append(time.monotonic()))
    times = processes.exchange(seen[0])  # of one machine's clock
    assert all(times[0] < other for other in times[1:])
    calls = []
    with processes.calls_of_first(lambda *, value: calls.append(value)) as call:
        if call is not None:
            call(value=5)
            call(value=7)
    assert calls == [5, 7]

    # Errors of the first, and disagreement, are errors of all.
    def bad():
        raise InputError("the first cannot")

    with pytest.raises(InputError, match="the first cannot"):
        processes.first_then_others(bad)
    processes.check_agreement({"text": "same"})
    with pytest.raises(ConfigError, match=r"^process 1 has another text than process 0: expected '0', got '1'\."):
        processes.check_agreement({"text": str(me)})

    # Arrays.
    mesh = make_mesh(MeshConfig())
    assert spans_processes(mesh) and not spans_processes(local_mesh(mesh))
    rows = np.arange(4 * count).reshape(2 * count, 2)
    split = put(rows, batch_sharding(mesh))
    assert [shard.data.shape for shard in split.addressable_shards] == [(2, 2)]
    np.testing.assert_array_equal(fetch(split), rows)
    here = replicated({"a": split}, local_mesh(mesh))["a"]
    assert here.is_fully_addressable
    np.testing.assert_array_equal(np.asarray(here), rows)
    with pytest.raises(ConfigError, match=f"JAX has {count} .cpu. in {count} processes"):
        make_mesh(MeshConfig(data=1))

    # Results of searches.
    own = [Found(index=10 * me + row, hypotheses=hypotheses(me, 3), row=row) for row in (2, 0)]
    found = {each.index: each for each in exchange_results(own if me else [])}
    assert sorted(found) == [10 * number + row for number in range(1, count) for row in (0, 2)]
    assert all(each.hypotheses.auxiliary["attention"][each.row, 0] == index // 10 for index, each in found.items())

    # A signal of one stops all at the same step.
    vote, stopped = StopVote(mesh), None
    for step in range(40):
        stopped = vote.result(step, signal.SIGTERM if me == count - 1 and step > 9 else None)
        if stopped is not None:
            break
    assert (step, stopped) == (12 + STEPS_BETWEEN_VOTES, signal.SIGTERM)
    processes.leave()
    assert not processes.joined()
    print("all is well")


def test_processes_tell_each_other(tmp_path):
    group = Group(toy, 2, tmp_path)
    assert group.wait(60) == [0, 0], group.errors(0) + group.errors(1)
    # What C++ libraries print does not get among the output.
    assert [group.output(number) for number in (0, 1)] == ["all is well\n"] * 2


def fail_alone(flags, number):
    join(flags)
    if processes.process_id() == number:
        processes.fail(2, "the sun is too bright.")
    processes.exchange(None)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_process_ends_all(tmp_path, number):
    group, clock = Group(fail_alone, 3, tmp_path, (number,)), time.monotonic()
    assert group.wait(60) == [2, 2, 2] and time.monotonic() - clock < 30
    for other in {0, 1, 2} - {number}:
        assert f"error: process {number} has failed: the sun is too bright." in group.errors(other)


def wait_for_others(flags, other_flags):
    join([*flags, "--seconds-to-join", "4", *other_flags])
    processes.exchange(None)


@pytest.mark.parametrize(
    "count, other_flags",
    [
        (1, ["--processes", "2"]),
        pytest.param(2, ["--process-id", "1"], marks=pytest.mark.slow),
        pytest.param(2, ["--process-id", "0"], marks=pytest.mark.slow),
    ],
    ids=["a process that never comes", "two of one number", "two of number 0"],
)
def test_processes_that_do_not_fit_together_wait_for_no_one_for_ever(tmp_path, count, other_flags):
    group = Group(wait_for_others, count, tmp_path, (other_flags,))
    codes = group.wait(60)
    assert all(codes), codes  # neither 0 nor still running
    said = [group.errors(number) for number in range(count)]
    assert any("has waited 4 s in vain: another one was not started, has the number of a third one" in s for s in said)


def test_processes_with_other_arguments_are_told_at_once(tmp_path):
    group = Group(command, 2, tmp_path, lambda number: ("train", "--config", f"recipe{number}.yaml"))
    assert group.wait(60) == [2, 2]
    for number in (0, 1):
        assert "error: process 1 has another command line than process 0" in group.errors(number)
        assert "recipe0.yaml" in group.errors(number) and "recipe1.yaml" in group.errors(number)


def test_other_verbs_are_the_work_of_one_process(tmp_path, capsys):
    from tests.small_run import command as run

    assert run("compare", "a", "--processes", "2", "--process-id", "0", "--coordinator", "localhost:1") == 2
    assert "is the work of one process" in capsys.readouterr().err
