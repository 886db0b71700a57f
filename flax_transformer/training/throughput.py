"""How fast a training is: tokens a second, and the share of what its devices can do at most.

The cost of a model's products is counted from its parameters. A kernel costs six operations for each of its values and
each token that it is applied to. These are a multiplication and an addition in the forward pass, and twice that in the
backward pass. Padding does not count, nor does recomputation (Chowdhery et al. 2022, PaLM, appendix B). Left out are
the two products of attention without parameters, which are small at a sentence's length. Kernels that are applied once
for each sentence are left out, too.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.models.parameters import MultipliedWith, ParameterInfo
from flax_transformer.training.metrics import TokenCounts

# Dense products of bfloat16 with float32 sums, FLOP/s of one device, from the makers' data sheets; names as JAX's
# `device_kind` gives them; TPUs have had two names each.
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
    """Operations of one training step's products.

    Attributes:
        source: for each source token, forward and backward.
        target: for each target token.
    """

    source: int
    target: int

    @classmethod
    def of(cls, parameter_info: Any, num_passes: int = 1) -> "ModelFlops":
        """Returns the cost for a model's parameters.

        Args:
            parameter_info: the tree of the parameters' `ParameterInfo`.
            num_passes: how often a step computes each token.
        """
        infos: list[ParameterInfo] = jax.tree.leaves(parameter_info)

        def cost(token: MultipliedWith) -> int:
            return 6 * num_passes * sum(info.size for info in infos if info.multiplied_with == token)

        return cls(cost("source_token"), cost("target_token"))

    def total(self, tokens: TokenCounts) -> float:
        """Returns the operations for these numbers of tokens."""
        return float(self.source * tokens.source + self.target * tokens.target)


@dataclass(frozen=True)
class FlopFigures:
    """The figures that turn a training's token counts into throughput.

    Attributes:
        cost: operations of the model's products.
        peak: FLOP/s that all devices together can do at most; None where that is not known.
    """

    cost: ModelFlops
    peak: float | None


@dataclass(frozen=True)
class Throughput:
    """What a stretch of training comes to in a second.

    Attributes:
        source_tokens, target_tokens: that are not padding.
        flops: operations of the model's products, of all devices together.
        mfu: of what the devices can do at most, in [0, 1]; None where that is not known.
    """

    source_tokens: float
    target_tokens: float
    flops: float
    mfu: float | None

    @classmethod
    def of(cls, tokens: TokenCounts, seconds: float, figures: FlopFigures) -> "Throughput":
        """Returns the throughput of these numbers of tokens in `seconds`."""
        seconds = max(seconds, 1e-9)
        flops, peak = figures.cost.total(tokens) / seconds, figures.peak
        return cls(tokens.source / seconds, tokens.target / seconds, flops, None if peak is None else flops / peak)

    @property
    def text(self) -> str:
        """The figures for a progress line."""
        share = "" if self.mfu is None else f" ({100 * self.mfu:.0f}% of peak)"
        return (
            f"src {self.source_tokens:,.0f} tgt {self.target_tokens:,.0f} tok/s {self.flops / 1e12:.3g} TFLOP/s{share}"
        )


def peak_flops(mesh: Mesh, compute_dtype: str) -> float | None:
    """Returns the most FLOP/s that a mesh's devices do together in products of a type, or None if that is not known."""
    peak = BFLOAT16_PEAKS.get(mesh.devices.flat[0].device_kind) if compute_dtype == "bfloat16" else None
    return None if peak is None else peak * mesh.size
