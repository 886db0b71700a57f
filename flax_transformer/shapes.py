"""The legend of shape letters, and array containers that several packages use.

Legend:
    B batch size          N attention heads        V vocabulary size (padded)
    S source length       H head dim               L layers
    T target length       F feed-forward dim       K beams
    D model dim           U recurrent units

Signatures in all files use these letters for these sizes.

The module does not import JAX, and neither does `flax_transformer.data`. So a process that only loads data starts fast.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

# Score of what is excluded, in place of minus infinity. It is finite, so differences and backward passes give no NaN.
# Its exponential is exactly 0.
MASKED = -1e30

Container = TypeVar("Container")


def is_possible(score: Any) -> Any:
    """Returns where scores are real ones. NaN is none, and neither is a sum that contains `MASKED`."""
    return score > MASKED / 2


class Batch(NamedTuple):
    """Sentence pairs as int32 arrays of fixed shapes: the interface between data, training and inference.

    A row contains one pair, or several when packed. The tokens of the k-th pair of a row have segment k on both sides.
    Padding has segment 0. Positions restart at 0 in each segment. Masks come from segments alone, so the token id of
    padding does not matter.

    Attributes:
        source_tokens: [B, S], each sentence with its end token.
        source_positions: [B, S], 0-based within the segment.
        source_segments: [B, S].
        target_tokens: [B, T], labels of the model: each sentence with its end token, without a start token.
        target_positions: [B, T].
        target_segments: [B, T].

    Example:
        >>> tokens, positions, segments = np.array([[5, 6, 2, 0]]), np.array([[0, 1, 2, 3]]), np.array([[1, 1, 1, 0]])
        >>> batch = Batch(tokens, positions, segments, tokens, positions, segments)
        >>> batch.source_tokens[batch.source_segments > 0].tolist()
        [5, 6, 2]
    """

    source_tokens: Any
    source_positions: Any
    source_segments: Any
    target_tokens: Any
    target_positions: Any
    target_segments: Any


def static_field(**arguments: Any) -> Any:
    """Returns a dataclass field that `array_tree` keeps in the structure of the tree. Its value must be hashable.

    Args:
        **arguments: arguments of `dataclasses.field`, such as `default`.
    """
    return dataclasses.field(metadata={"static": True}, **arguments)


def derived_field() -> Any:
    """Returns a dataclass field for an array that a method of the class makes from the other fields; None at first.

    The constructor does not take it, and `dataclasses.replace` makes it None again. So it cannot contradict the fields
    that it was made from. `with_derived` gives it a value.
    """
    return dataclasses.field(default=None, init=False)


def array_tree(cls: type[Container]) -> type[Container]:
    """Registers a frozen dataclass of arrays, or of trees of arrays, as a JAX pytree. Returns the class.

    Tree operations rebuild the object without `__init__`, since shape checks there would fail. JAX puts shapes,
    shardings or None in the place of arrays. `jax.tree_util.register_dataclass` does run `__init__`.

    A field made by `static_field` is no leaf. Programs are compiled anew for each of its values.

    Example:
        >>> @array_tree
        ... @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     x: jax.Array
        ...     unit: str = static_field(default="m")
        >>> jax.tree.map(lambda a: 2 * a, Point(x=3))
        Point(x=6, unit='m')
    """
    import jax  # whoever makes a tree has it already

    # `Container` is a dataclass; Python has no public type to say that.
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields if not field.metadata.get("static")]
    static_names = [field.name for field in fields if field.metadata.get("static")]

    def flatten_with_keys(tree):
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in names]
        return leaves, tuple(getattr(tree, name) for name in static_names)

    def unflatten(static, leaves):
        return _built(cls, dict(zip((*names, *static_names), (*leaves, *static), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def with_derived(tree: Container, **arrays: Any) -> Container:
    """Returns a copy of an array tree, with values for fields made by `derived_field`. Only its class calls this."""
    return _built(type(tree), {**vars(tree), **arrays})


def _built(cls: type[Container], fields: dict[str, Any]) -> Container:
    """Returns an object of a frozen dataclass with these fields, without `__init__`."""
    tree = object.__new__(cls)
    tree.__dict__.update(fields)
    return tree
