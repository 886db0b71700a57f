"""Throughput of a training: tokens per second, and model FLOPs utilisation (MFU).

The cost of a model's products is counted from its parameters. A kernel costs six operations for each of its values and
each token that it is applied to. These are a multiplication and an addition in the forward pass, and twice that in the
backward pass. Padding does not count, nor does recomputation (Chowdhery et al. 2022, PaLM, appendix B).

The count leaves out the two products of attention without parameters, which are small at a sentence's length. It also
leaves out kernels that are applied once for each sentence.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.models.parameters import MultipliedWith, ParameterInfo
from flax_transformer.training.metrics import TokenCounts

# FLOP/s of one device, for dense products of bfloat16 with float32 sums, from the makers' data sheets. The keys are
# JAX's `device_kind`, of which most TPUs have had two.
BFLOAT16_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """Operations of the products of a training step.

    Attributes:
        source: operations for each source token, forward and backward.
        target: operations for each target token, forward and backward.
    """

    source: int
    target: int

    @classmethod
    def of(cls, parameter_info: Any, num_passes: int = 1) -> "ModelFlops":
        """Returns the cost for a model's parameters.

        Args:
            parameter_info: tree of the parameters' `ParameterInfo`.
            num_passes: number of passes of a step over each token.
        """
        infos: list[ParameterInfo] = jax.tree.leaves(parameter_info)

        def cost(token: MultipliedWith) -> int:
            return 6 * num_passes * sum(info.size for info in infos if info.multiplied_with == token)

        return cls(cost("source_token"), cost("target_token"))

    def total(self, tokens: TokenCounts) -> float:
        """Returns the number of operations for token counts."""
        return float(self.source * tokens.source + self.target * tokens.target)


@dataclass(frozen=True)
class FlopFigures:
    """Costs and peak that turn token counts into throughput.

    Attributes:
        cost: operations of the model's products.
        peak: peak FLOP/s of all devices together, or None if it is not known.
    """

    cost: ModelFlops
    peak: float | None


@dataclass(frozen=True)
class Throughput:
    """Throughput of some training steps.

    Attributes:
        source_tokens, target_tokens: tokens per second, without padding.
        flops: operations of the model's products per second, of all devices together.
        mfu: share of the devices' peak FLOP/s, in [0, 1], or None if the peak is not known.
    """

    source_tokens: float
    target_tokens: float
    flops: float
    mfu: float | None

    @classmethod
    def of(cls, tokens: TokenCounts, seconds: float, figures: FlopFigures) -> "Throughput":
        """Returns the throughput of token counts in `seconds`."""
        seconds = max(seconds, 1e-9)
        flops, peak = figures.cost.total(tokens) / seconds, figures.peak
        return cls(tokens.source / seconds, tokens.target / seconds, flops, None if peak is None else flops / peak)

    @property
    def text(self) -> str:
        """Figures for a progress line."""
        share = "" if self.mfu is None else f" ({100 * self.mfu:.0f}% of peak)"
        return (
            f"src {self.source_tokens:,.0f} tgt {self.target_tokens:,.0f} tok/s {self.flops / 1e12:.3g} TFLOP/s{share}"
        )


def peak_flops(mesh: Mesh, compute_dtype: str) -> float | None:
    """Returns the peak FLOP/s of a mesh's devices in products of `compute_dtype`, or None if it is not known."""
    peak = BFLOAT16_PEAKS.get(mesh.devices.flat[0].device_kind) if compute_dtype == "bfloat16" else None
    return None if peak is None else peak * mesh.size
