"""Strict settings for all tests: 8 fake devices, no silent promotion, warnings are errors (pyproject.toml)."""

import jax
import pytest
from jax.sharding import Mesh

from flax_transformer.parallel.mesh import MeshConfig, make_mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])
