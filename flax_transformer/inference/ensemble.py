"""The run folders of an ensemble, and their parameters on the devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.inference.parameters import mesh_that_shards, must_be_sharded, stacked_shardings
from flax_transformer.models.build import vocabulary_info
from flax_transformer.models.parameters import Params
from flax_transformer.object_storage import AnyPath
from flax_transformer.parallel.mesh import MeshConfig, make_mesh, replicated_sharding
from flax_transformer.parallel.placement import placed
from flax_transformer.parallel.sharding_rules import parameter_shardings
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, Choice
from flax_transformer.training.state import abstract_model


def open_ensemble(run: AnyPath | str | Sequence[AnyPath | str]) -> list[RunFolder]:
    """Returns the run folders of an ensemble; a single run is an ensemble of one.

    Raises:
        RunFolderError: not a run folder, or the runs differ in their model or tokenizers.
        ConfigError: no run at all.
    """
    paths = [run] if isinstance(run, AnyPath | str) else list(run)
    if not paths:
        raise ConfigError("a translator needs at least one run folder, got an empty list.")
    folders = [RunFolder.open(path) for path in paths]
    model, tokenizers = folders[0].read_config().model, folders[0].tokenizers().fingerprint
    for folder in folders[1:]:
        if folder.read_config().model != model or folder.tokenizers().fingerprint != tokenizers:
            raise RunFolderError(
                f"{folder.path} and {folders[0].path} cannot be an ensemble: all need the same section 'model' and "
                "the same tokenizers. Train them from one recipe, with other values of training.seed."
            )
    return folders


def restore_ensemble(
    folders: list[RunFolder], mesh: Mesh | None, checkpoint: Choice, sharded: bool | None
) -> tuple[Params, Mesh, bool]:
    """Returns the parameters of an ensemble on their devices, the mesh, and whether they are split over it.

    Those of several models are stacked. No device ever has all of the parameters that are split.

    Args:
        folders: result of `open_ensemble`.
        mesh: devices; None uses all. If the parameters are split, None chooses the mesh that splits them most.
        checkpoint: "best" or "last".
        sharded: whether the parameters are split. None does so if they are too large for a copy on every device.

    Raises:
        RunFolderError: a checkpoint is missing or damaged.
        ConfigError: the parameters are split, and an axis of `mesh` does not divide a dimension.
    """
    tokenizers = folders[0].tokenizers()
    _, abstract_params = abstract_model(folders[0].read_config().model, vocabulary_info(tokenizers))
    shapes = nnx.to_pure_dict(abstract_params)
    splitting = mesh_that_shards(abstract_params) if mesh is None else mesh
    if sharded is None:
        sharded = must_be_sharded(shapes, splitting, len(folders))
    mesh = make_mesh(MeshConfig()) if mesh is None and not sharded else splitting
    if sharded:
        shardings = parameter_shardings(abstract_params, mesh)
    else:
        shardings = jax.tree.map(lambda _: replicated_sharding(mesh), shapes)
    target = placed(shapes, shardings)
    restored = [_restore(folder, tokenizers.fingerprint, checkpoint, target) for folder in folders]
    if len(restored) == 1:
        return restored[0], mesh, sharded
    stack = jax.jit(
        lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),
        out_shardings=stacked_shardings(shardings, len(restored)),
    )
    return stack(restored), mesh, sharded


def _restore(folder: RunFolder, tokenizers: str, checkpoint: Choice, target: Params) -> Params:
    """Returns the parameters of a run, in the shapes and shardings of `target`."""
    with Checkpoints(folder.checkpoints, tokenizers=tokenizers) as checkpoints:
        return checkpoints.undisturbed(lambda: checkpoints.restore_params(checkpoints.choose(checkpoint), target))
