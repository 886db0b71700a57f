"""What each program is traced for."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

from flax_transformer import backend
from flax_transformer.errors import ConfigError
from flax_transformer.inference.attention_map import _attention_weights, attention_map
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import build_model, vocabulary_info
from flax_transformer.ops.attention import projected_attention
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.training import state
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from tests.small_models import DECODING, MODELS, SOURCES, TARGETS, TOKENIZERS, params_that_end


def test_programs_that_need_no_mesh_to_run_are_traced_for_one(monkeypatch, one_device):
    """The preparation of parameters, the attention map, the creation of a state; without a mesh there is none."""
    assert backend.platform() is None
    model, vocabulary = MODELS["transformer"], vocabulary_info(TOKENIZERS)
    translator = Translator.from_params(model, TOKENIZERS, params_that_end(model, 2), DECODING, one_device)
    prepared = nnx.merge(*translator.parameters.prepared()[0])
    assert prepared.output_projection().bias_in_kernel  # as on a CPU alone

    seen, platform = [], backend.platform

    def noted():
        seen.append(platform())
        return seen[-1]

    monkeypatch.setattr(backend, "platform", noted)
    program: Any = _attention_weights
    program.clear_cache()  # another test may have traced it
    assert attention_map(translator, SOURCES[0], TARGETS[0]) is not None
    assert set(seen) == {"cpu"}

    config = OptimizerConfig()
    optimizer = make_optimizer(config, make_schedule(config, model.model_dim), describe_parameters(model, vocabulary))
    layout = make_layout(model, vocabulary, optimizer, one_device)
    built = []

    def build(*arguments, **options):
        built.append(platform())
        return build_model(*arguments, **options)

    monkeypatch.setattr(state, "build_model", build)
    init_state(model, vocabulary, layout, 0)
    assert built == ["cpu"]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_are_left_out_where_the_user_says_so(platform, monkeypatch):
    with backend.tracing_for(platform):
        assert backend.uses_kernels(platform)
        monkeypatch.setenv("FLAX_TRANSFORMER_KERNELS", "off")
        assert not backend.uses_kernels(platform)
        monkeypatch.setenv("FLAX_TRANSFORMER_KERNELS", "0")
        with pytest.raises(ConfigError, match="must be on or off, got '0'"):
            backend.uses_kernels(platform)
    monkeypatch.delenv("FLAX_TRANSFORMER_KERNELS")
    others: tuple[backend.Platform, ...] = ("cpu", "gpu", "tpu")
    for other in others:
        with backend.tracing_for(other):
            assert backend.uses_kernels(platform) == (other == platform)
    assert not backend.uses_kernels(platform)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by newer JAX
@pytest.mark.parametrize(
    "platform, kind, jax_name, kernel", [("gpu", "NVIDIA H100", "cuda", True), ("cpu", "cpu", "cpu", False)]
)
def test_a_program_is_exported_for_a_device_that_is_not_here(platform, kind, jax_name, kernel):
    """Short rows of a GPU are computed by a kernel, whatever the process that exports the program runs on."""
    projection = jnp.ones((32, 2, 16)), jnp.ones((2, 16))

    @jax.jit
    def attend(x):
        return projected_attention(x, x, (projection,) * 3, AttentionMask(causal=True), jnp.dtype("bfloat16"))

    allowed = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with backend.tracing_for(platform, kind):
        program = export.export(attend, platforms=[jax_name], disabled_checks=[allowed])(jnp.ones((2, 8, 32)))
    assert ("short_attention" in program.mlir_module()) == kernel
