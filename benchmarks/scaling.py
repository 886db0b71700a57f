"""What changes as work grows: the cost of a training step, and what a search gives with more rows.

    python benchmarks/scaling.py growth [--rounds 5] [--sweeps tokens depth]
    python benchmarks/scaling.py rows --run RUN --text FILE [--lines 4000] [--rows 2 32 128] [--compositions 100]

RUN is any run folder, and FILE has sentences for it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from decoding import read_lines
from harness import Benchmark, Report, run, spread, take_turns
from training import train_steps

# --- The cost of a training step


@dataclass(frozen=True)
class Work:
    """One size: `tokens` on each side in rows of `length`, and a model of `depth` + `depth` layers of `width`."""

    tokens: int = 2048
    length: int = 32
    depth: int = 2
    width: int = 128


SWEEPS = {
    "tokens": (1024, 2048, 4096, 8192),
    "length": (16, 32, 64, 128, 256),
    "depth": (1, 2, 4, 8),
    "width": (64, 128, 256, 512),
}


@dataclass(frozen=True)
class Growth(Benchmark):
    """The cost of a training step as tokens, length of a sentence, depth and width grow.

    One of the four grows at a time, from the same base. The cost should be straight in tokens and in depth. It should
    be straight in the length at the same number of tokens, since a token's attention looks at the whole sentence. In
    the width one part is straight (norms, dropout, softmax), and one grows as its square (products). Beside each time
    stands what a line, or for the width a parabola, through all the others of its row says.

    Attributes:
        steps: in each turn.
        vocab_size: rows of the one table.
        sweeps: what grows.
    """

    steps: int = 3
    vocab_size: int = 2_000
    sweeps: tuple[str, ...] = tuple(SWEEPS)

    def measure(self, report: Report) -> None:
        """Adds a table for each sweep."""
        from flax_transformer.cli.main import use_every_core

        use_every_core()
        report.say(f"Base: {Work()}\n")
        for name in self.sweeps:
            sizes = SWEEPS[name]
            works = {str(size): self.trainer(dataclasses.replace(Work(), **{name: size})) for size in sizes}
            seconds = take_turns(works, self.rounds)
            times = {size: [1e3 * value / self.steps for value in values] for size, values in seconds.items()}
            medians = np.array([np.median(values) for values in times.values()])
            curve = predicted(np.array(sizes, float), medians, 2 if name == "width" else 1)
            rows = zip(times, map(spread, times.values()), (f"{value:.1f}" for value in curve), strict=True)
            report.table([name, "ms a step", "by the others"], rows)

    def trainer(self, work: Work) -> Any:
        """Returns a function that takes `steps` training steps and waits for them."""
        from flax_transformer.config.recipe import Config
        from flax_transformer.data.batching import BatchShape
        from flax_transformer.models.build import VocabularyInfo
        from flax_transformer.models.transformer_config import TransformerConfig
        from flax_transformer.shapes import Batch

        sizes = {"model_dim": work.width, "num_heads": 4, "feed_forward_dim": 4 * work.width}
        depths = {"num_encoder_layers": work.depth, "num_decoder_layers": work.depth}
        config = Config(model=TransformerConfig(**sizes, **depths))
        rows, rng = work.tokens // work.length, np.random.default_rng(0)

        def side() -> tuple[np.ndarray, ...]:
            tokens = rng.integers(4, self.vocab_size, (rows, work.length), np.int32)
            positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape)
            return tokens, positions, np.ones_like(tokens)

        vocabulary = VocabularyInfo(self.vocab_size, self.vocab_size, 1)
        shapes, batches = [BatchShape(rows, work.length, work.length)], [Batch(*side(), *side())] * self.steps
        return train_steps(config, vocabulary, shapes, batches)[0]


def predicted(sizes: np.ndarray, times: np.ndarray, degree: int) -> np.ndarray:
    """Returns for each size what the curve through all the other sizes says; relative errors weigh the same."""
    found = []
    for left_out in range(len(sizes)):
        others = np.arange(len(sizes)) != left_out
        curve = np.polynomial.Polynomial.fit(sizes[others], times[others], degree, w=1 / times[others])
        found.append(float(curve(sizes[left_out])))
    return np.array(found)


# --- What a search gives with more rows


@dataclass(frozen=True, kw_only=True)
class Rows(Benchmark):
    """What decoding promises, on a trained model, with other rows and other sentences beside.

    For one number of rows a translation is the same to the bit whatever stands beside it. Between numbers of rows sums
    may run in another order. So scores differ by rounding, and now and then a near tie is decided the other way.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them at most, without what occurs twice.
        rows: values of `decoding.batch_size`, each rounded up to a multiple of the devices.
        compositions: random ones, of up to 400 lines.
    """

    run: Path
    text: Path
    lines: int = 4_000
    rows: tuple[int, ...] = (2, 32, 128)
    compositions: int = 100

    def measure(self, report: Report) -> None:
        """Adds what was found of each promise."""
        from flax_transformer.cli.main import use_every_core
        from flax_transformer.inference.translator import Translator

        text = list(dict.fromkeys(line for line in read_lines(self.text) if line))[: self.lines]
        use_every_core()
        translator = Translator.load(self.run)
        report.say(f"{len(text):,} different lines, {translator.decoding}\n")
        whole = translator.translate(text, num_hypotheses=translator.decoding.beam_size)
        report.say(f"{compared_compositions(translator, text, whole, self.compositions)}\n")
        columns = ["rows", "equal tokens", "largest relative difference of scores among those"]
        report.table(columns, self.compared_rows(translator, text))

    def compared_rows(self, translator: Any, text: list[str]) -> Iterator[list[str]]:
        """Yields a row for each number of rows but the first, compared with the first."""
        found = {}
        for rows in self.rows:
            sized = translator.with_decoding(dataclasses.replace(translator.decoding, batch_size=rows))
            found[sized.batch_size] = [translation.hypotheses[0] for translation in sized.translate(text)]
        first, *others = found
        for rows in others:
            pairs = [(a, b) for a, b in zip(found[first], found[rows], strict=True) if a.tokens == b.tokens]
            off = max(abs(a.score - b.score) / max(abs(a.score), 1e-6) for a, b in pairs)
            yield [f"{first} and {rows}", f"{len(pairs):,} of {len(text):,}", f"{off:.1e}"]


def compared_compositions(translator: Any, text: list[str], whole: list[Any], num: int) -> str:
    """Returns how many translations of random compositions of the text are those of the whole text, to the bit."""
    rng, equal, compared = np.random.default_rng(0), 0, 0
    for _ in range(num):
        chosen = rng.choice(len(text), min(len(text), int(rng.integers(1, 401))), replace=False).tolist()
        found = translator.translate([text[i] for i in chosen], num_hypotheses=translator.decoding.beam_size)
        equal += sum(translation == whole[i] for i, translation in zip(chosen, found, strict=True))
        compared += len(chosen)
    return f"{num} compositions of 1 to 400 lines: {equal:,} of {compared:,} n-best lists equal to the bit"


if __name__ == "__main__":
    run({"growth": Growth, "rows": Rows})
