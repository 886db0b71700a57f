"""Strict settings for all tests: 8 fake devices, no silent promotion, warnings are errors (pyproject.toml)."""

import gc
import os
import tempfile
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from tests.small_run import SMALL, command

# Most of the time goes into compiling small programs. LLVM's optimisations are left out, and fusions are not emitted
# through MLIR (later versions of JAX ignore that option). XLA's own passes over a program are as they are for a user.
# With XLA_FLAGS set, to nothing as well, so is all the rest (.ci/run does so).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same small program is compiled, the same text is tokenised by many tests; this folder is theirs alone and goes
# with the session.
_cache = tempfile.TemporaryDirectory(prefix="flax_transformer_tests_", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = _cache.name
jax.config.update("jax_compilation_cache_dir", f"{_cache.name}/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Traced programs are millions of objects that live as long as the session. To walk through them again and again takes
# long, and finds little.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def what_other_files_left_is_not_walked_through():
    gc.freeze()


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, recipe) -> Path:
    """The folder of a run that has ended; who changes it takes a copy."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert command("train", "--config", str(recipe), "--run", str(folder)) == 0
    return folder
