"""Length penalties make log-probabilities of hypotheses of different lengths comparable."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.errors import ConfigError, did_you_mean, shown

NAMES = ("gnmt", "average", "none")


@dataclass(frozen=True)
class LengthPenalty:
    """A divisor of log-probabilities, positive and monotone in the length. The length includes the end token.

        gnmt:a     ((5 + length) / 6) ** a
        average:a  length ** a
        none       1

    A larger exponent a favours longer hypotheses.

    Example:
        >>> float(LengthPenalty.parse("average:1.0").divisor(jnp.array(4)))
        4.0

    References:
        Wu et al. 2016 (GNMT), equation 14, without its coverage term.
    """

    name: str
    exponent: float

    @classmethod
    def parse(cls, text: str) -> "LengthPenalty":
        """Returns the penalty named by a text such as "gnmt:0.6", "average:1.0" or "none".

        Raises:
            ConfigError: an unknown name, or an exponent that is missing, not a number or negative.
        """
        name, _, exponent = text.partition(":")
        if name not in NAMES:
            raise ConfigError(f"unknown length penalty {shown(text)}.{did_you_mean(name, NAMES)}")
        if name == "none":
            if exponent:
                raise ConfigError(f"length penalty 'none' takes no exponent, got {shown(text)}.")
            return cls("none", 0.0)
        try:
            value = float(exponent)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < float("inf"):
            raise ConfigError(
                f"length penalty {shown(name)} needs an exponent of at least 0 after a colon, such as '{name}:0.6'; "
                f"got {shown(text)}."
            )
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.name == "none" else f"{self.name}:{self.exponent}"

    def divisor(self, length: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the float32 divisor for hypotheses of `length` tokens, at least 1."""
        length = jnp.asarray(length, jnp.float32)
        if self.name == "none" or self.exponent == 0.0:
            return jnp.ones_like(length)
        base = (5.0 + length) / 6.0 if self.name == "gnmt" else length
        return base**self.exponent
