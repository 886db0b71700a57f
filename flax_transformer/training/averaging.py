"""The mean of several checkpoints of a run.

References:
    Vaswani et al. 2017, section 6.1 (the last 5 for the base model, 20 for the big one).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.models.build import vocabulary_info
from flax_transformer.object_storage import AnyPath
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.placement import replicated
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.state import abstract_model


def _chosen_steps(of: Literal["newest", "best"], num: int, checkpoints: Checkpoints, config: Config) -> list[int]:
    """Returns the steps of the newest or best `num` of all checkpoints that the run has ever saved.

    A run keeps its newest checkpoints and its best ones. So the kept checkpoints need not be the newest, nor the best.

    Raises:
        RunFolderError: there are fewer checkpoints, or one of them was deleted.
    """
    kept = checkpoints.newest_steps() if of == "newest" else checkpoints.best_steps()
    advice = f"Ask for fewer by --num, or train with training.keep_{of}: {num}."
    run = checkpoints.folder.parent
    if len(kept) < num:
        raise RunFolderError(f"{run} has {len(kept)} checkpoints to choose the {num} {of} from. {advice}")
    limit = getattr(config.training, f"keep_{of}")
    if checkpoints.saved is None:  # an earlier version did not write down what it deleted
        if num > limit:
            raise RunFolderError(
                f"{run} was made by an earlier version, which did not write down the checkpoints that it deleted. So "
                f"only its {limit} {of} checkpoints are known (training.keep_{of}), not its {num} {of}. {advice}"
            )
        return kept[:num]
    if of == "newest":
        ranked = sorted((step for step, _ in checkpoints.saved), reverse=True)
    else:
        known = [(quality, step) for step, quality in checkpoints.saved if quality is not None]
        ranked = [step for _, step in sorted(known, reverse=True)]
    gone = [step for step in ranked[:num] if step not in kept]
    if gone:
        raise RunFolderError(
            f"{run} no longer has all of its {num} {of} checkpoints: of the steps {', '.join(map(str, ranked[:num]))} "
            f"it lacks {', '.join(map(str, gone))} (training.keep_{of} is {limit}). {advice}"
        )
    return ranked[:num]


def average_checkpoints(run: AnyPath, output: AnyPath, num: int, of: Literal["newest", "best"]) -> list[int]:
    """Makes the run folder `output` with the mean parameters of `num` checkpoints, and returns their steps.

    The mean is computed in float64, with one checkpoint in memory at a time.

    Raises:
        ConfigError: `num` is below 1.
        RunFolderError: there is no run, it has too few checkpoints, or some of the newest or best were deleted. Or a
            checkpoint has other tokenizers, or `output` is in use.
    """
    if num < 1:
        raise ConfigError(f"--num must be at least 1, got {num}.")
    folder, made = RunFolder.open(run), RunFolder(output)
    made.check_unused("--output")
    config, tokenizers = folder.read_config(), folder.tokenizers()
    _, abstract = abstract_model(config.model, vocabulary_info(tokenizers))
    total: Any = None
    with Checkpoints(folder.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
        steps = _chosen_steps(of, num, checkpoints, config)
        abstract_params = nnx.to_pure_dict(abstract)
        target = replicated(abstract_params, make_mesh(MeshConfig(data=1)))
        for step in steps:
            params = jax.device_get(checkpoints.restore_params(step, target))
            params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
            total = params if total is None else jax.tree.map(np.add, total, params)
    mean = jax.tree.map(lambda a, like: jnp.asarray(a / len(steps), like.dtype), total, abstract_params)
    with made.made_whole() as partial:
        partial.create(dataclasses.replace(config, run=str(made.path)), tokenizers)
        with Checkpoints(partial.checkpoints, (1, 1), tokenizers.fingerprint) as checkpoints:
            checkpoints.save_params(max(steps), mean)
    return steps
