"""What a checkpoint says of itself and of the run, beside its arrays."""

from dataclasses import dataclass
from typing import Any

from flax_transformer.data.batching import Position
from flax_transformer.errors import shown
from flax_transformer.small_files import sealed, unsealed


@dataclass(frozen=True)
class CheckpointMeta:
    """The JSON object of a checkpoint.

    Attributes:
        step: number of updates.
        checksums: for each part of the checkpoint, the checksum of each array by its path.
        saved: step and quality of each checkpoint that the run has saved up to this one, deleted ones included. A
            quality is None if there was no evaluation. None for runs of an early version, which did not write it down.
        quality: quality of this checkpoint, or None.
        tokenizers: fingerprint of the run's tokenizers, or None if it is not known.
        position: next batch to train on. It means nothing for parameters alone.
        data: text of the `DataFingerprint`, which the position belongs to.
    """

    step: int
    checksums: dict[str, dict[str, str]]
    saved: tuple[tuple[int, float | None], ...] | None
    quality: float | None = None
    tokenizers: str | None = None
    position: Position = Position(0, 0)
    data: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object, with a checksum of its own."""
        saved = None if self.saved is None else [[step, quality] for step, quality in self.saved]
        return sealed(
            {
                "step": self.step,
                "saved": saved,
                "quality": self.quality,
                "tokenizers": self.tokenizers,
                "data": self.data,
                "epoch": self.position.epoch,
                "batch": self.position.batch,
                "checksums": self.checksums,
            }
        )

    @classmethod
    def of_record(cls, record: dict[str, Any], step: int) -> "CheckpointMeta":
        """Returns what `record` wrote.

        Args:
            record: the JSON object.
            step: step that the checkpoint's folder is named after.

        Raises:
            ValueError: the object is damaged, or belongs to another step.
        """
        values = unsealed(record, optional=True)

        def entry(name: str, kinds: Any, default: Any = None) -> Any:
            value = values.get(name, default)
            if not isinstance(value, kinds):
                raise ValueError(f"{name} cannot be {shown(value)}")
            return value

        if entry("step", int) != step:
            raise ValueError(f"it was saved at step {shown(values['step'])}")
        sums, saved = entry("checksums", dict), entry("saved", list | None)
        if not isinstance(sums.get("params"), dict) or not all(isinstance(part, dict) for part in sums.values()):
            raise ValueError("it has no checksums of parameters")
        if not all(_is_saved(each) for each in saved or ()):
            raise ValueError(f"saved cannot be {shown(saved)}")
        return cls(
            step,
            sums,
            None if saved is None else tuple((number, quality) for number, quality in saved),
            entry("quality", float | None),
            entry("tokenizers", str | None),
            Position(entry("epoch", int, 0), entry("batch", int, 0)),
            entry("data", str, ""),
        )


def _is_saved(each: Any) -> bool:
    """Returns whether a JSON value is a step with its quality."""
    return isinstance(each, list) and [type(value) for value in each] in ([int, float], [int, type(None)])


@dataclass
class History:
    """The checkpoints that a run has saved.

    Attributes:
        saved: step and quality of each, deleted ones included; None if the run did not write it down.
        qualities: known qualities by their steps.
    """

    saved: list[tuple[int, float | None]] | None
    qualities: dict[int, float]

    def noted(self, step: int, quality: float | None) -> tuple[tuple[int, float | None], ...] | None:
        """Notes a checkpoint, or the quality of one that is known. Returns `saved` with it."""
        if quality is not None:
            self.qualities[step] = quality
        if self.saved is None:
            return None
        if step in dict(self.saved):
            self.saved[:] = [(number, quality if number == step else each) for number, each in self.saved]
        else:
            self.saved.append((step, quality))
        return tuple(self.saved)
