"""What decoding promises, on a trained model: how far translations agree, and whether refilled slots pay.

    python benchmarks/rows.py --run RUN --text FILE [--lines 4000] [--rows 2 32 128] [--compositions 100] [--rounds 3]

For one number of rows a translation is the same to the bit whatever stands beside it; between numbers of rows sums may
run in another order, so that scores differ by rounding, and now and then a near tie is decided the other way. Counts
the sentences whose best output has the same tokens, and the largest difference of scores among those.

Before that, random compositions of the text, whose n-best lists are compared with those of the whole to the bit; what
`score` gives for the outputs; and the time of searches whose slots are refilled, beside one batch after another.
"""

import dataclasses
import gzip
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from paired import machine


@dataclass(frozen=True)
class Options:
    """Compares translations at different numbers of rows.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them at most, without what occurs twice.
        rows: values of `decoding.batch_size`, each rounded up to a multiple of the devices.
        compositions: random ones, of up to 400 lines.
        rounds: turns of the searches that are timed, after one to warm up.
    """

    run: Path
    text: Path
    lines: int = 4_000
    rows: tuple[int, ...] = (2, 32, 128)
    compositions: int = 100
    rounds: int = 3


def compositions(translator: Any, text: list[str], whole: list[Any], num: int) -> str:
    """Returns how many translations of random compositions of the text are those of the whole text, to the bit."""
    rng, equal, compared = np.random.default_rng(0), 0, 0
    for _ in range(num):
        chosen = rng.choice(len(text), min(len(text), int(rng.integers(1, 401))), replace=False).tolist()
        found = translator.translate([text[i] for i in chosen], num_hypotheses=translator.decoding.beam_size)
        equal += sum(translation == whole[i] for i, translation in zip(chosen, found, strict=True))
        compared += len(chosen)
    return f"{num} compositions of 1 to 400 lines: {equal:,} of {compared:,} n-best lists equal to the bit"


def scores(translator: Any, text: list[str], whole: list[Any]) -> str:
    """Returns how far what `score` says of the outputs is from what the search said."""
    from flax_transformer.inference.scorer import Scorer

    best = [translation.hypotheses[0] for translation in whole]
    target = translator.tokenizers.target
    taken = [i for i, h in enumerate(best) if h.finished and target.pieces(target.encode([h.text])[0]) == h.tokens]
    found = Scorer(translator).score([text[i] for i in taken], [best[i].text for i in taken])
    tokens = max(
        max(abs(a - b) for a, b in zip(scored.token_scores, best[i].token_scores, strict=True))
        for i, scored in zip(taken, found, strict=True)
    )
    sentence = max(abs(s.score - best[i].score) / abs(best[i].score) for i, s in zip(taken, found, strict=True))
    return (
        f"score, of {len(taken):,} outputs that had ended and are cut into the tokens that were found: at most "
        f"{tokens:.1e} nats a token, {sentence:.1e} relative a sentence"
    )


def refilling(translator: Any, text: list[str], rounds: int) -> str:
    """Returns a table of seconds with slots that are refilled, and with calls of one batch each."""
    from flax_transformer.inference.programs import ProgramOptions

    options = {"refilled": ProgramOptions(), "one batch after another": ProgramOptions(sentences_per_row=1)}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for turn in range(rounds + 1):
        for name, times in seconds.items():
            made = dataclasses.replace(translator, options=options[name])
            made.compile(text)  # for every device, whichever of them takes what
            started = time.perf_counter()
            made.translate(text)
            if turn:
                times.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    lines = "\n".join(f"| {name} | {', '.join(f'{s:.2f}' for s in times)} |" for name, times in seconds.items())
    return f"| slots | seconds |\n|---|---|\n{lines}\n\nrefilled: {statistics.median(ratios):.2f} times as fast"


def main() -> None:
    """Translates with each number of rows and prints what was found."""
    from flax_transformer.cli.main import keep_memory, use_every_core
    from flax_transformer.inference.translator import Translator

    keep_memory()
    options = tyro.cli(Options)
    with gzip.open(options.text, "rt") if options.text.suffix == ".gz" else options.text.open() as file:
        text = list(dict.fromkeys(line.strip() for line in file if line.strip()))[: options.lines]
    use_every_core()
    translator = Translator.load(options.run)
    print(f"{options}\n{machine('jax', 'flax')}\n{len(text):,} different lines, {translator.decoding}\n")
    whole = translator.translate(text, num_hypotheses=translator.decoding.beam_size)
    print(f"{compositions(translator, text, whole, options.compositions)}\n{scores(translator, text, whole)}\n")
    print(f"{refilling(translator, text, options.rounds)}\n")
    found = {}
    for rows in options.rows:
        sized = translator.with_decoding(dataclasses.replace(translator.decoding, batch_size=rows))
        found[sized.batch_size] = [translation.hypotheses[0] for translation in sized.translate(text)]
    first, *others = found
    print("| rows | equal tokens | largest relative difference of scores among those |\n|---|---|---|")
    for rows in others:
        pairs = [(a, b) for a, b in zip(found[first], found[rows], strict=True) if a.tokens == b.tokens]
        off = max(abs(a.score - b.score) / max(abs(a.score), 1e-6) for a, b in pairs)
        print(f"| {first} and {rows} | {len(pairs):,} of {len(text):,} ({len(pairs) / len(text):.3%}) | {off:.1e} |")


if __name__ == "__main__":
    main()
