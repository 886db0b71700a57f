"""Which checkpoints of a run are kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orbax.checkpoint import checkpoint_managers


@dataclass(frozen=True)
class KeptSteps(checkpoint_managers.PreservationPolicy):
    """Orbax's policy to keep the newest and the best checkpoints.

    Orbax has a policy of its own for the best ones. It reads their qualities from a file of each checkpoint. If that
    file is missing, another checkpoint becomes the best, without a word.

    Attributes:
        rank: returns those of some steps whose quality is known, best first.
        newest, best: numbers of checkpoints to keep.
    """

    rank: Callable[[Sequence[int]], Sequence[int]]
    newest: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.kept(steps)
        return [step in kept for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Returns those of the steps that are kept."""
        return {*sorted(steps)[-self.newest :], *self.rank(steps)[: self.best]}
