"""Checks of a checkpoint that Orbax does not make: its tokenizers, its shapes, its bytes."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_transformer.errors import RunFolderError
from flax_transformer.object_storage import AnyPath
from flax_transformer.training.checkpoint_errors import DamagedCheckpointError
from flax_transformer.training.checksums import checksums


def check_tokenizers(checkpoint: AnyPath, saved: str | None, expected: str | None) -> None:
    """Compares the fingerprints of the tokenizers that a checkpoint was saved with, and of those of its run.

    Args:
        checkpoint: folder of the checkpoint.
        saved: fingerprint in the checkpoint; None is always accepted.
        expected: fingerprint of the run's tokenizers; None accepts any.

    Raises:
        RunFolderError: they differ.
    """
    if expected is None or saved is None or saved == expected:
        return
    raise RunFolderError(
        f"the checkpoint {checkpoint} was saved with other tokenizers than the run folder now has in "
        "tokenizer/joint.model, or in tokenizer/source.model and tokenizer/target.model: expected SHA-256 (of "
        f"source and target) {saved}, got {expected}. Its parameters mean nothing with others. Put back the "
        "files that the run began with, from a copy of its folder."
    )


def check_shapes(checkpoint: AnyPath, saved: Any, params: Any) -> None:
    """Compares shapes and dtypes of saved parameters with those of the model; Orbax does not.

    Args:
        checkpoint: folder of the checkpoint.
        saved: Orbax's description of the saved parameters.
        params: shapes of the model's parameters.

    Raises:
        RunFolderError: they differ.
    """
    there, wanted = _shapes(saved), _shapes(params)
    if there == wanted:
        return
    names = sorted(n for n in there.keys() | wanted.keys() if there.get(n) != wanted.get(n))
    lines = [f"  {n}: checkpoint {there.get(n, 'nothing')}, model {wanted.get(n, 'nothing')}" for n in names[:8]]
    more = f"\n  and {len(names) - 8} more" if len(names) > 8 else ""
    raise RunFolderError(
        f"the checkpoint {checkpoint} does not fit the model that the configuration describes:\n"
        + "\n".join(lines)
        + f"{more}\nUse the settings and the tokenizer that it was trained with; {checkpoint.parent.parent} has them."
    )


def _shapes(tree: Any) -> dict[str, str]:
    """Returns shape and dtype of each leaf, as text, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{tuple(leaf.shape)} {jnp.dtype(leaf.dtype)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_sums(checkpoint: AnyPath, items: dict[str, Any], saved: dict[str, dict[str, str]]) -> None:
    """Compares the checksums of arrays that were read with those that were saved.

    Args:
        checkpoint: folder of the checkpoint.
        items: parts of the checkpoint, trees of arrays.
        saved: checksums of each part.

    Raises:
        DamagedCheckpointError: an array is not what was saved.
    """
    for item, tree in items.items():
        known = saved.get(item, {})
        wrong = [name for name, value in checksums(tree).items() if known.get(name) != value]
        if wrong:
            raise DamagedCheckpointError(
                f"the checkpoint {checkpoint} is damaged: {item} {', '.join(wrong[:3])} "
                f"({len(wrong)} in all) do not have the checksum that they were saved with."
            )
