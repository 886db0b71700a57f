"""The mean of several checkpoints of a run.

References:
    Vaswani et al. 2017, section 6.1 (the last 5 for the base model, 20 for the big one).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.data.tokenizer import START_ID
from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.state import abstract_model


def average_checkpoints(run: Path, output: Path, num: int, of: Literal["newest", "best"]) -> list[int]:
    """Makes the run folder `output` with the mean of `num` checkpoints' parameters, and returns their steps.

    The mean is taken in float64, one checkpoint in memory at a time.

    Raises:
        ConfigError: `num` below 1.
        RunFolderError: no run, too few checkpoints in it, or `output` in use.
    """
    if num < 1:
        raise ConfigError(f"--num must be at least 1, got {num}.")
    folder, made = RunFolder.open(run), RunFolder(output)
    made.check_unused()
    config, tokenizers = folder.read_config(), folder.tokenizers()
    sizes = tokenizers.source.vocab_size, tokenizers.target.vocab_size
    _, abstract = abstract_model(config.model, VocabularyInfo(*sizes, START_ID))
    total: Any = None
    with Checkpoints(folder.checkpoints) as checkpoints:
        steps = (checkpoints.newest_steps() if of == "newest" else checkpoints.best_steps())[:num]
        if len(steps) < num:
            raise RunFolderError(
                f"{run} has {len(steps)} checkpoints to choose the {num} {of} from. Ask for fewer by --num, or train "
                f"with training.keep_{of}: {num}."
            )
        abstract_params = nnx.to_pure_dict(abstract)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_params)
        for step in steps:
            params = jax.device_get(checkpoints.restore_params(step, target))
            params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
            total = params if total is None else jax.tree.map(np.add, total, params)
    mean = jax.tree.map(lambda a, like: jnp.asarray(a / len(steps), like.dtype), total, abstract_params)
    made.create(dataclasses.replace(config, run=str(output)), tokenizers)
    with Checkpoints(made.checkpoints, (1, 1)) as checkpoints:
        checkpoints.save_params(max(steps), mean)
    return steps
