"""How long one sentence takes: in a program that is warm, and from a command that begins to its answer.

    pip install -e ".[parity]"
    python benchmarks/latency.py --run RUN --text FILE [--lines 200] [--rounds 3]

RUN as for benchmarks/decode.py, whose systems and settings these are: the same weights, beam and stop rule, float32,
two CPU cores each, taking turns. Warm: one sentence after the other, each in a call of its own. From command to answer:
a process that loads the model, translates the first sentence of the text and ends; "nothing compiled" has an empty
cache folder, as after an installation or a change of the recipe.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import tyro
from paired import Built, Systems, machine, set_threads

CTRANSLATE2 = """
import sys, ctranslate2, sentencepiece
folder, beam, longest, threads = sys.argv[1], *map(int, sys.argv[2:])
model = ctranslate2.Translator(folder + "/ctranslate2", compute_type="float32", inter_threads=threads, intra_threads=1)
source = sentencepiece.SentencePieceProcessor(model_file=folder + "/source.spm")
target = sentencepiece.SentencePieceProcessor(model_file=folder + "/target.spm")
pieces = [*source.encode(sys.stdin.readline().strip(), out_type=str), "</s>"]
found = model.translate_batch([pieces], beam_size=beam, length_penalty=1.0, max_decoding_length=longest - 1,
                              min_decoding_length=0)
print(target.decode(found[0].hypotheses[0]))
"""

HUGGING_FACE = """
import sys, torch, transformers
folder, beam, longest, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = transformers.MarianMTModel.from_pretrained(folder).eval()
tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
with torch.inference_mode():
    found = model.generate(
        **tokenizer(sys.stdin.readline().strip(), return_tensors="pt"), num_beams=beam, length_penalty=1.0,
        early_stopping=True, max_length=longest + 1, bad_words_ids=[[model.config.decoder_vocab_size - 1]],
    )
print(tokenizer.decode(found[0], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Options:
    """Compares the time that one sentence takes with CTranslate2 and Hugging Face.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them when warm.
        beam_size: hypotheses kept at each step.
        longest: most tokens of an output, end token included.
        rounds: turns of each system.
        threads: of each system.
    """

    run: Path
    text: Path
    lines: int = 200
    beam_size: int = 4
    longest: int = 64
    rounds: int = 3
    threads: int = 2


def one_at_a_time(options: decode.Options, text: list[str], load: Callable[..., Any], *arguments: Any) -> Built:
    """Returns a system that translates each sentence by itself."""
    translate = load(options, *arguments)
    facts: dict[str, Any] = {}

    def translate_all() -> None:
        facts["texts"] = [translate([line], 1)[0] for line in text]

    return Built(translate_all, facts)


def command_seconds(command: list[str], line: str, cache: Path) -> tuple[float, str]:
    """Returns the seconds that a command takes to translate a line, and what it wrote."""
    started = time.monotonic()
    done = subprocess.run(
        command, input=f"{line}\n", env=os.environ | {"XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return time.monotonic() - started, done.stdout.strip()


def main() -> None:
    """Takes turns and prints two tables."""
    options = tyro.cli(Options)
    set_threads(options.threads)
    settings = decode.Options(
        options.run, options.text, lines=options.lines, beam_size=options.beam_size, longest=options.longest,
        batch_sizes=(1,), threads=options.threads,
    )  # fmt: skip
    text, _ = decode.read_text(settings)
    print(f"{options}\n{machine('jax', 'flax', 'ctranslate2', 'transformers', 'torch')}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "marian"
        decode.write_model(options.run, folder)
        systems, facts = Systems(options.threads), {}
        for name, arguments in {
            "ours": (decode.ours, "first_finished", "none"),
            "ours, int8": (decode.ours, "first_finished", "int8"),
            "CTranslate2": (decode.ctranslate2_peer, folder, "float32"),
            "Hugging Face": (decode.hugging_face_peer, folder),
        }.items():
            facts[name] = systems.start(name, one_at_a_time, settings, text, *arguments)
        seconds = systems.take_turns(options.rounds)
        print("| warm | ms a sentence, median (least to most) | ours against it | equal outputs |\n" + "|---" * 4 + "|")
        for name, values in seconds.items():
            each = [1000 * value / len(text) for value in values]
            ratios = [theirs / our for our, theirs in zip(seconds["ours"], values, strict=True)]
            equal = sum(a == b for a, b in zip(facts["ours"]["texts"], facts[name]["texts"], strict=True))
            print(
                f"| {name} | {statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f}) "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {equal} of {len(text)} |",
                flush=True,
            )

        ours = [
            sys.executable, "-m", "flax_transformer.cli.main", "translate", "--run", str(options.run),
            "--stop", "first_finished", "--beam-size", str(options.beam_size), "--length-penalty", decode.PENALTY,
            "--max-length-factor", "0", "--max-length-offset", str(options.longest), "--batch-size", "1",
        ]  # fmt: skip
        numbers = [str(folder), str(options.beam_size), str(options.longest), str(options.threads)]
        commands = {
            "ours, nothing compiled": ours,
            "ours": ours,
            "CTranslate2": [sys.executable, "-c", CTRANSLATE2, *numbers],
            "Hugging Face": [sys.executable, "-c", HUGGING_FACE, *numbers],
        }
        starts: dict[str, list[float]] = {name: [] for name in commands}
        answers = set()
        for number in range(options.rounds + 1):  # the first warms the machine's file cache
            for name, command in commands.items():
                spent, answer = command_seconds(command, text[0], Path(temporary) / f"cache{number}")
                starts[name].append(spent)
                answers.add(answer)
        print("\n| from command to answer | s, median (least to most) |\n|---|---|")
        for name, values in starts.items():
            kept = values[1:]
            print(f"| {name} | {statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f}) |")
        print(f"\n{'All answers are equal' if len(answers) == 1 else f'{len(answers)} different answers'}.")


if __name__ == "__main__":
    main()
