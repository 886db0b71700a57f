"""The legend of shape letters, and the array containers that travel between rooms.

    B batch rows          N attention heads        V vocabulary rows (padded)
    S source length       H head dim               L layers
    T target length       F feed-forward dim       K beams
    D model dim           U recurrent units

Every signature in the project uses these letters and no others for these things.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax

# The project's one "minus infinity" for scores: finite, so that differences and backward passes give no NaN, and so
# far below any real score that its exponential is exactly 0.
MASKED = -1e30

Container = TypeVar("Container")


def is_possible(score: Any) -> Any:
    """Returns where scores are real ones: sums with `MASKED` in them are not, and neither is a NaN."""
    return score > MASKED / 2


class Batch(NamedTuple):
    """Sentence pairs as fixed-shape int32 arrays: the one interface between data, training and inference.

    A row holds one pair, or several when packed. Segment 0 is padding; the pieces of the k-th pair of a row carry
    segment k (1 everywhere when nothing is packed), on the source and on the target side, and positions restart at 0
    in each segment. Masks are derived from segments alone, so the token id under padding is irrelevant.

    Attributes:
        source_tokens: [B, S], each sentence closed by the end token.
        source_positions: [B, S], 0-based within the segment.
        source_segments: [B, S].
        target_tokens: [B, T], what the model must predict: each sentence closed by the end token, without start token.
        target_positions: [B, T].
        target_segments: [B, T].
    """

    source_tokens: Any
    source_positions: Any
    source_segments: Any
    target_tokens: Any
    target_positions: Any
    target_segments: Any


def static_field(**arguments: Any) -> Any:
    """Returns a dataclass field that `array_tree` keeps in the structure of the tree; its value must be hashable.

    Args:
        **arguments: of `dataclasses.field`, such as `default`.
    """
    return dataclasses.field(metadata={"static": True}, **arguments)


def array_tree(cls: type[Container]) -> type[Container]:
    """Registers a frozen dataclass of arrays (or of trees of arrays) as a JAX pytree; returns the class.

    `jax.tree_util.register_dataclass` runs `__init__` again on every unflatten, so that shape checks on the fields
    fail when JAX puts shapes, shardings or None in the place of arrays. Here the fields are checked when a person
    builds the object, and tree operations rebuild it without `__init__`.

    A field that is made by `static_field` is no leaf: programs are compiled anew for each of its values.

    Example:
        >>> @array_tree
        ... @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     x: jax.Array
        ...     unit: str = static_field(default="m")
        >>> jax.tree.map(lambda a: 2 * a, Point(x=3))
        Point(x=6, unit='m')
    """
    # A dataclass, since the decorator below has made it one; no public type of Python's can say that of `Container`.
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields if not field.metadata.get("static")]
    static_names = [field.name for field in fields if field.metadata.get("static")]

    def flatten_with_keys(tree):
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in names]
        return leaves, tuple(getattr(tree, name) for name in static_names)

    def unflatten(static, leaves):
        tree = object.__new__(cls)
        tree.__dict__.update(zip(names, leaves, strict=True))
        tree.__dict__.update(zip(static_names, static, strict=True))
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls
