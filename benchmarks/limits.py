"""The formulas of docs/scale/limits.md beside compiled train steps, on 16, 256 and 4,096 described chips.

    pip install -e ".[plan]"
    python benchmarks/limits.py

The models have the widths of base and big, and two layers on each side, so that they compile soon. Each device has the
same number of rows, so a perfect machine would take the same time everywhere. Nothing is run.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import BatchingConfig
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.experiment.hardware_plan import longest_batch, plan_hardware, vocabulary_of_recipe
from flax_transformer.experiment.step_estimate import estimate_step
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.parallel.mesh import MeshConfig
from flax_transformer.parallel.topology import set_up_compilers

LENGTH, ROWS = 64, 16  # tokens of each side, rows of a device
BASE = TransformerConfig(
    model_dim=512,
    num_heads=8,
    feed_forward_dim=2048,
    num_encoder_layers=2,
    num_decoder_layers=2,
    max_source_length=LENGTH,
    max_target_length=LENGTH,
    compute_dtype="bfloat16",
)
BIG = dataclasses.replace(BASE, model_dim=1024, num_heads=16, feed_forward_dim=4096)
CASES = [
    ("base", BASE, "v5e:4x4", MeshConfig(16, 1, 1)),
    ("base", BASE, "v5e:16x16", MeshConfig(256, 1, 1)),
    ("base", BASE, "v5p:16x16x16", MeshConfig(4096, 1, 1)),
    ("big", BIG, "v5e:4x4", MeshConfig(1, 16, 1)),
    ("big", BIG, "v5e:16x16", MeshConfig(16, 16, 1)),
    ("big", BIG, "v5p:16x16x16", MeshConfig(256, 16, 1)),
    ("big", BIG, "v5e:4x4", MeshConfig(4, 1, 4)),
]


def main() -> int:
    """Prints a table: formula / compiled program."""
    with tempfile.TemporaryDirectory() as log_folder:
        set_up_compilers(Path(log_folder))
        print("| model | hardware | mesh | GiB | TFLOP | GB moved | MB exchanged | ms of kernels | ms of exchanges |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name, model, topology, mesh in CASES:
            row_shards, started = mesh.data * mesh.fsdp, time.monotonic()
            config = Config(
                model=model,
                tokenizer=TokenizerConfig(vocab_size=32_000),
                batching=BatchingConfig(tokens_per_batch=row_shards * ROWS * LENGTH, row_multiple=row_shards),
                mesh=mesh,
            )
            estimate = estimate_step(config, vocabulary_of_recipe(config), longest_batch(config), topology)
            train = plan_hardware(config, topology, search=False).train
            assert train.cost is not None
            pairs = (
                (estimate.needed_bytes / 2**30, train.needed / 2**30),
                (estimate.flops / 1e12, train.cost.flops / 1e12),
                (estimate.moved_bytes / 1e9, train.cost.bytes / 1e9),
                (sum(estimate.exchanged.values()) / 1e6, sum(e.bytes for e in train.exchanges) / 1e6),
                (estimate.kernel_seconds * 1e3, train.cost.seconds * 1e3),
                (sum(estimate.exchange_seconds.values()) * 1e3, sum(e.seconds for e in train.exchanges) * 1e3),
            )
            cells = " | ".join(f"{formula:.3g} / {compiled:.3g}" for formula, compiled in pairs)
            print(f"| {name} | {topology} | {mesh.data} x {mesh.fsdp} x {mesh.tensor} | {cells} |", flush=True)
            print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
