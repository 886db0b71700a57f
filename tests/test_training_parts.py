"""Small parts of a training: memory that is counted, checksums of what is saved, patience."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from flax_transformer.data.batching import Position
from flax_transformer.parallel.memory import available_bytes, needed_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.training.checkpoint import Checkpoints, checksums
from flax_transformer.training.loop import Patience
from flax_transformer.training.state import TrainState


def test_memory_is_counted(one_device):
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert 2 * 64 * 64 * 4 <= needed_bytes(program) < 10 * 64 * 64 * 4
    available = available_bytes(one_device)
    assert available is not None and available > 2**28
    assert available_bytes(make_mesh(MeshConfig(data=8))) == available // 8


def test_checksums_do_not_depend_on_sharding_and_see_every_bit_and_place():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    plain = checksums({"a": values})
    for spec in (jax.P("data"), jax.P("tensor", "fsdp"), jax.P(("data", "fsdp", "tensor")), jax.P()):
        assert checksums({"a": jax.device_put(values, NamedSharding(mesh, spec))}) == plain
    bits = np.asarray(values).view(np.uint32)
    for bit in range(32):
        flipped = bits.copy()
        flipped[3, 5] ^= np.uint32(1 << bit)
        assert checksums({"a": jnp.asarray(flipped.view(np.float32))}) != plain
    swapped = values.at[jnp.array([0, 1])].set(values[jnp.array([1, 0])])
    assert checksums({"a": swapped}) != plain
    assert checksums({"a": values.T})["a"] != plain["a"]


def test_patience_counts_evaluations_since_the_best():
    patience = Patience(2, [1.0, 3.0])
    assert not patience.exhausted
    for quality, exhausted in ((2.0, False), (4.0, False), (4.0, False), (3.0, True)):
        patience.note(quality)
        assert patience.exhausted == exhausted
    never = Patience(0, [5.0, 4.0, 3.0, 2.0])
    assert not never.exhausted


def test_the_best_is_known_as_soon_as_it_is_saved(tmp_path, monkeypatch):
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path / "checkpoints", (2, 2)) as checkpoints:
        manager = checkpoints._manager
        waited: list[int] = []
        metrics, wait = manager.metrics, manager.wait_until_finished
        monkeypatch.setattr(manager, "wait_until_finished", lambda: (waited.append(1), wait()))
        # What is being written has no quality yet: it gets one when it is waited for.
        monkeypatch.setattr(manager, "metrics", lambda step: metrics(step) if waited else None)
        for step, quality in ((1, 0.5), (2, 0.7)):
            state = TrainState(jnp.asarray(step, jnp.int32), tree, tree, None)
            checkpoints.save(state, Position(0, step), "data", quality)
        waited.clear()
        assert checkpoints.best_steps() == [2, 1]
