"""A small run that several test files look at, and what they do with the commands."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flax_transformer.cli import main as cli

SMALL = """
data: {kind: number_words, num_train: 300, num_validation: 20, num_test: 24}
tokenizer: {vocab_size: 60}
model: {model_dim: 16, num_heads: 2, feed_forward_dim: 32, num_encoder_layers: 1, num_decoder_layers: 1,
        max_source_length: 64, max_target_length: 48}
batching: {tokens_per_batch: 640, num_buckets: 1}
optimizer: {warmup_steps: 10}
training: {steps: 8, log_every_steps: 2, evaluate_every_steps: 4, checkpoint_every_steps: 2, evaluate_sentences: 8}
decoding: {beam_size: 2, batch_size: 8, max_length_factor: 1.0, max_length_offset: 4}
evaluation: {bleu_tokenizer: char}
mesh: {data: 1}
"""


def command(*arguments: str) -> int:
    """Runs `flax-transformer` in this process and returns its exit code."""
    verb = cli.verb(arguments[0])
    try:
        return cli.run_verb(verb, list(arguments[1:]), f"flax-transformer {arguments[0]}")
    except SystemExit as stop:  # how tyro ends on a flag that it cannot use
        assert isinstance(stop.code, int)
        return stop.code


def checkpoint_params(folder: Path, step: int) -> Any:
    """Returns the parameters that a run saved at a step, as arrays of NumPy."""
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.device_get(checkpointer.restore(folder.absolute() / "checkpoints" / str(step) / "params"))
