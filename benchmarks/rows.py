"""How far translations agree between numbers of rows, whose programs are compiled apart.

    python benchmarks/rows.py --run RUN --text FILE [--lines 4000] [--rows 2 32 128]

For one number of rows a translation is the same to the bit whatever stands beside it; between numbers of rows sums may
run in another order, so that scores differ by rounding, and now and then a near tie is decided the other way. Counts
the sentences whose best output has the same tokens, and the largest difference of scores among those.
"""

import dataclasses
import gzip
from dataclasses import dataclass
from pathlib import Path

import tyro
from paired import machine


@dataclass(frozen=True)
class Options:
    """Compares translations at different numbers of rows.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them at most, without what occurs twice.
        rows: values of `decoding.batch_rows`, each rounded up to a multiple of the devices.
    """

    run: Path
    text: Path
    lines: int = 4_000
    rows: tuple[int, ...] = (2, 32, 128)


def main() -> None:
    """Translates with each number of rows and prints a table."""
    from flax_transformer.cli.main import use_every_core
    from flax_transformer.inference.translator import Translator

    options = tyro.cli(Options)
    with gzip.open(options.text, "rt") if options.text.suffix == ".gz" else options.text.open() as file:
        text = list(dict.fromkeys(line.strip() for line in file if line.strip()))[: options.lines]
    use_every_core()
    translator = Translator.load(options.run)
    print(f"{options}\n{machine('jax', 'flax')}\n{len(text):,} different lines, {translator.decoding}\n")
    found = {}
    for rows in options.rows:
        sized = translator.with_decoding(dataclasses.replace(translator.decoding, batch_rows=rows))
        found[sized.rows] = [translation.hypotheses[0] for translation in sized.translate(text)]
    first, *others = found
    print("| rows | equal tokens | largest relative difference of scores among those |\n|---|---|---|")
    for rows in others:
        pairs = [(a, b) for a, b in zip(found[first], found[rows], strict=True) if a.tokens == b.tokens]
        off = max(abs(a.score - b.score) / max(abs(a.score), 1e-6) for a, b in pairs)
        print(f"| {first} and {rows} | {len(pairs):,} of {len(text):,} ({len(pairs) / len(text):.3%}) | {off:.1e} |")


if __name__ == "__main__":
    main()
