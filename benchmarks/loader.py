"""How fast batches are made, without any training: this project's loader, and grain's where there is one.

    pip install grain
    python benchmarks/loader.py [--config FILE] [--rounds 5] [--threads 2]

Each makes every batch of an epoch from the same tokenised pairs, and they take turns. Grain shuffles, looks pairs up
and packs them first-fit into as many open rows, in this process or in worker processes, of which each packs a share of
the pairs (their start counts, once an epoch); it has no batches by length.
What a step needs is in the results of `train_transformer.py`.
"""

import dataclasses
import importlib
import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from paired import machine, set_threads

from flax_transformer.config.reading import read_config
from flax_transformer.data.batching import BatchShape, LengthSummary, Position, TokenizedPairs
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.loader import training_batches, training_plan
from flax_transformer.data.packing import OPEN_ROWS, packed_shape
from flax_transformer.data.preparation import prepare_tokenizers, prepare_training_pairs

Sizes = tuple[int, int]  # target tokens that are not padding, and positions of both sides


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the making of batches.

    Attributes:
        config: recipe whose data, tokenizer and batches are used.
        rounds: epochs of each loader, after one to warm up.
        threads: CPUs that the process may use.
    """

    config: Path = Path("configs/multi30k_en_de_tiny.yaml")
    rounds: int = 5
    threads: int = 2


def ours(pairs: TokenizedPairs, batching, epoch: int) -> Iterator[Sizes]:
    """Yields the sizes of an epoch's batches; planning the epoch is part of it."""
    plan = training_plan([pairs], batching, seed=0)
    for batch, position in training_batches([pairs], plan, Position(epoch, 0)):
        yield int(np.count_nonzero(batch.target_segments)), batch.source_tokens.size + batch.target_tokens.size
        if position.epoch > epoch:
            return


def grains(pairs: TokenizedPairs, shape: BatchShape, epoch: int, workers: int) -> Iterator[Sizes]:
    """Yields the sizes of an epoch's packed batches, as grain makes them in so many processes beside this one."""
    grain: Any = importlib.import_module("grain")

    def look_up(index: int) -> dict[str, np.ndarray]:
        line = pairs.kept[index]
        sides = {"source": pairs.source, "target": pairs.target}
        return {name: np.asarray(s.ids[s.offsets[line] : s.offsets[line + 1]]) for name, s in sides.items()}

    dataset = grain.MapDataset.range(len(pairs)).shuffle(seed=epoch).map(look_up).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct={"source": shape.source_length, "target": shape.target_length},
        num_packing_bins=OPEN_ROWS,
        seed=epoch,
    )
    batches = packed.batch(shape.rows)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    for batch in batches:
        yield int(np.count_nonzero(batch["target_segment_ids"])), batch["source"].size + batch["target"].size


def main() -> None:
    """Takes turns and prints a table."""
    options = tyro.cli(Options)
    set_threads(options.threads)
    config = read_config(options.config)
    parts = load_corpus(config.data).train
    tokenizers = prepare_tokenizers(parts, config.tokenizer)
    limits = config.model.max_source_length, config.model.max_target_length
    (pairs,) = prepare_training_pairs(parts, tokenizers, config.filters, *limits)
    bucketed = dataclasses.replace(config.batching, packing=False)
    packed = dataclasses.replace(config.batching, packing=True)
    row = packed_shape(LengthSummary.of(pairs.lengths), packed)

    loaders = {
        "bucketed": lambda epoch: ours(pairs, bucketed, epoch),
        "packed": lambda epoch: ours(pairs, packed, epoch),
    }
    packages = ["numpy"]
    if importlib.util.find_spec("grain"):
        importlib.import_module("absl.flags").FLAGS.mark_as_parsed()  # grain's workers ask for theirs
        loaders["packed by grain"] = lambda epoch: grains(pairs, row, epoch, 0)
        loaders["packed by grain, 2 workers"] = lambda epoch: grains(pairs, row, epoch, 2)
        packages.append("grain")
    print(f"{options}\n{machine(*packages)}\n{len(pairs):,} pairs; packed rows {row}\n")

    rates: dict[str, list[float]] = {name: [] for name in loaders}
    padding = {}
    for epoch in range(options.rounds + 1):
        for name, load in loaders.items():
            started = time.perf_counter()
            sizes = np.array(list(load(epoch)))
            seconds = time.perf_counter() - started
            tokens, positions = sizes.sum(axis=0)
            padding[name] = 1 - pairs.lengths.sum() / positions
            if epoch:
                rates[name].append(tokens / seconds)
    print("| loader | target tokens/s, median (least to most) | padding |\n|---|---|---|")
    for name, values in rates.items():
        print(
            f"| {name} | {statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f}) "
            f"| {100 * padding[name]:.1f} % |"
        )


if __name__ == "__main__":
    main()
