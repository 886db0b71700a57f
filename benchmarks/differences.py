"""Why an output differs from CTranslate2's, line by line.

    pip install -e ".[parity]"
    python benchmarks/differences.py --run RUN --text FILE [--lines 4000]

RUN and settings are those of benchmarks/decode.py. For each line whose outputs differ it prints what both systems
found, the scores that this project's model gives to the two, and what sets the line apart:

    limit  some hypothesis reached the most tokens that are allowed. What is cut there stands behind what has ended
           here; CTranslate2 takes all beams of the last step for hypotheses and ranks them beside what has ended.
    tie    both have ended, and the gap between two candidates of which one was kept is within what float32 rounds away:
           the same search with parameters that are changed by one part in ten million finds CTranslate2's output.
    other  neither.
"""

import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import tyro
from paired import machine

ROUNDING = 1e-7
TRIES = 30


@dataclass(frozen=True)
class Options:
    """Explains outputs that differ from CTranslate2's.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them at most, without what occurs twice.
        batch_size: sentences at the same time.
    """

    run: Path
    text: Path
    lines: int = 4_000
    batch_size: int = 32


def theirs(options: decode.Options, text: list[str], folder: Path, found: Any) -> None:
    """Puts CTranslate2's outputs into a queue."""
    found.put(decode.ctranslate2_peer(options, folder, "float32")(text, options.batch_sizes[0]))


def main() -> None:
    """Prints a line for each difference and their sums."""
    options = tyro.cli(Options)
    settings = decode.Options(options.run, options.text, lines=options.lines, batch_sizes=(options.batch_size,))
    text, _ = decode.read_text(settings)
    print(f"{options}\n{machine('jax', 'flax', 'ctranslate2')}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "marian"
        decode.write_model(options.run, folder)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=theirs, args=(settings, text, folder, queue))
        process.start()
        outputs = queue.get()
        process.join()

    import jax
    import numpy as np

    from flax_transformer.inference.scorer import Scorer

    translator = decode.our_translator(settings, "first_finished", "none")
    translations = translator.translate(text, num_hypotheses=settings.beam_size)
    different = [n for n, translation in enumerate(translations) if translation.text != outputs[n]]
    reasons = {}
    for number in different:
        longest = max(len(h.token_scores) for h in translations[number].hypotheses)
        reasons[number] = "limit" if longest >= settings.longest else "other"
    rest = [number for number in different if reasons[number] == "other"]
    rng = np.random.default_rng(0)
    for _ in range(TRIES):
        rest = [number for number in rest if reasons[number] == "other"]
        if not rest:
            break
        changed = jax.tree.map(
            lambda x: x * (1 + ROUNDING * rng.standard_normal(x.shape)).astype(x.dtype), translator.params
        )
        found = translator.with_params(changed).translate([text[n] for n in rest])
        for number, translation in zip(rest, found, strict=True):
            if translation.text == outputs[number]:
                reasons[number] = "tie"
    scorer = Scorer(translator)
    sources = [text[n] for n in different]
    scores = [scorer.score(sources, [o[n] for n in different]) for o in ([t.text for t in translations], outputs)]
    for number, ours_scored, theirs_scored in zip(different, *scores, strict=True):
        print(f"{number + 1}\t{reasons[number]}\t{ours_scored.score:.6f}\t{theirs_scored.score:.6f}")
        print(f"\tours\t{translations[number].text}\n\ttheirs\t{outputs[number]}")
    counts = {reason: list(reasons.values()).count(reason) for reason in ("limit", "tie", "other")}
    print(f"\n{len(different)} of {len(text):,} lines differ: {counts}")


if __name__ == "__main__":
    main()
