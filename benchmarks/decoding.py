"""Decoding beside CTranslate2 and Hugging Face: the same weights, the same text, text in and text out.

    pip install -e ".[parity]"
    python benchmarks/decoding.py throughput --run RUN --text FILE [--reference FILE] [--lines 4000] [--rounds 3]
    python benchmarks/decoding.py latency --run RUN --text FILE [--lines 200] [--rounds 3]

RUN is a post-norm Transformer with `model.zero_start: true`, which is what CTranslate2 can express, such as a run of
`configs/multi30k_en_de_marian.yaml`. It is written as a MarianMT folder, and that is made into a CTranslate2 model.

All have the same beam, the length-normalised score of `average:1.0`, the same limit on the number of tokens, and the
same stop rule. A sentence ends once as many hypotheses are finished as the beam has places, which is CTranslate2's only
rule. Where there is a GPU that all can use, all use it:

    python benchmarks/decoding.py throughput --run RUN --text FILE --half --batch-sizes 128 256 512 \
        --systems ours CTranslate2 "Hugging Face"
"""

import contextlib
import dataclasses
import gzip
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decoding_peers
from harness import Benchmark, Built, Report, Systems, process, ratios, run, spread, user_environment

PENALTY = "average:1.0"

Translate = Callable[[list[str], int], list[str]]  # (sentences, how many of them at the same time) -> translations


@dataclass(frozen=True, kw_only=True)
class Decoding(Benchmark):
    """What the benchmarks of decoding share.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        lines: how many of them at most, without what occurs twice.
        beam_size: hypotheses kept at each step.
        longest: most tokens of an output, end token included.
    """

    packages = ("jax", "flax", "ctranslate2", "transformers", "torch")

    rounds: int = 3
    run: Path
    text: Path
    lines: int = 4_000
    beam_size: int = 4
    longest: int = 64

    def sentences(self) -> list[str]:
        """Returns the sentences to translate."""
        return list(self.pairs(self.text))

    def pairs(self, reference: Path) -> dict[str, str]:
        """Returns the sentences to translate, and the lines beside them in another file."""
        found: dict[str, str] = {}
        for source, target in zip(read_lines(self.text), read_lines(reference), strict=True):
            if source and len(found) < self.lines:
                found.setdefault(source, target)
        return found

    @contextlib.contextmanager
    def marian_folder(self) -> Generator[str]:
        """Writes the run as a MarianMT folder, with a CTranslate2 model in it, and removes it in the end."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(Path(temporary) / "marian")
            with process() as own:
                own.submit(write_models, self.run, folder).result()
            yield folder

    def load_peer(self, name: str, folder: str, *more: Any) -> Translate:
        """Returns the translation of another system."""
        return decoding_peers.LOADERS[name](folder, self.beam_size, self.longest, self.threads, *more)

    def load(self, quantize: Any = "none", stop: Any = "first_finished") -> Any:
        """Returns this project's translator."""
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need some of a GPU's memory, too

        from flax_transformer.cli.main import use_every_core
        from flax_transformer.inference.translator import Translator

        use_every_core()  # as the command does
        translator = Translator.load(self.run, quantize=quantize)
        sizes = {"beam_size": self.beam_size, "max_length_factor": 0.0, "max_length_offset": self.longest - 1}
        return translator.with_decoding(
            dataclasses.replace(translator.decoding, length_penalty=PENALTY, stop=stop, **sizes)
        )


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file, plain or .gz."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from map(str.strip, file)


def write_models(run: Path, folder: str) -> None:
    """Writes a run as a MarianMT folder, with a CTranslate2 model in it."""
    from ctranslate2.converters import TransformersConverter

    from flax_transformer.inference.translator import Translator
    from flax_transformer.interop.marian import write_marian
    from flax_transformer.run_folder import RunFolder

    write_marian(Translator.load(run), RunFolder.open(run).read_config().model, Path(folder))
    TransformersConverter(folder).convert(f"{folder}/ctranslate2")


def ours(options: Decoding, batch_sizes: tuple[int, ...], text: list[str], quantize: str, stop: str) -> Translate:
    """Returns this project's translation, at batch sizes whose programs are compiled."""
    made = options.load(quantize, stop)
    sized = {size: made.with_decoding(dataclasses.replace(made.decoding, batch_size=size)) for size in batch_sizes}
    for translator in sized.values():  # for every device, whichever of them takes what when it is timed
        translator.compile(text)
    return lambda lines, size: [translation.text for translation in sized[size].translate(lines)]


def equal(some: list[str], others: list[str]) -> str:
    """Returns how many of two systems' outputs are equal."""
    return f"{sum(a == b for a, b in zip(some, others, strict=True)):,} of {len(some):,}"


# --- Throughput


@dataclass(frozen=True, kw_only=True)
class Throughput(Decoding):
    """Decoding of a text beside CTranslate2 and Hugging Face.

    "ours, sure" is the exact stop rule, and "ours, likely" is Hugging Face's default. "int8" has integers for weights,
    which each system makes itself. Each system translates at the batch size that is fastest for it on half of the text.

    Attributes:
        reference: the sentences' translations; without it there is no BLEU.
        batch_sizes: sentences at the same time, to choose from.
        half: whether "ours" and Hugging Face compute in bfloat16, and CTranslate2 in float16.
        systems: which take part; "ours" must.
    """

    reference: Path | None = None
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    half: bool = False
    systems: tuple[str, ...] = ("ours", "ours, int8", "CTranslate2", "CTranslate2, int8", "Hugging Face")

    def measure(self, report: Report) -> None:
        """Adds a row for each system."""
        from sacrebleu.metrics import BLEU

        pairs, bleu, systems, facts = self.pairs(self.reference or self.text), BLEU(), Systems(), {}
        text, references = list(pairs), list(pairs.values())
        with self.marian_folder() as folder:
            known = self.known(folder)
            if "ours" not in self.systems or not set(self.systems) <= set(known):
                raise SystemExit(f"--systems must hold 'ours', and may hold {', '.join(known)}; got {self.systems}.")
            for name in self.systems:
                facts[name] = systems.start(name, at_best_size, self, text, *known[name])
            seconds = systems.take_turns(self.rounds)

        def row(name: str) -> list[str]:
            texts = facts[name]["texts"]
            rates = spread([len(text) / value for value in seconds[name]])
            score = f"{bleu.corpus_score(texts, [references]).score:.2f}" if self.reference else ""
            against = ratios(seconds["ours"], seconds[name])
            return [name, facts[name]["batch_size"], rates, against, equal(facts["ours"]["texts"], texts), score]

        report.say(f"{len(text):,} different lines\n")
        report.table(["system", "batch", "sentences/s", "ours against it", "equal outputs", "BLEU"], map(row, seconds))
        if self.reference:
            report.say(f"BLEU {bleu.get_signature()}")

    def known(self, folder: str) -> dict[str, tuple[Any, ...]]:
        """Returns what `at_best_size` takes for each system."""
        half = self.half
        return {
            "ours": ("ours", "bfloat16" if half else "none", "first_finished"),
            "ours, likely": ("ours", "none", "heuristic"),
            "ours, sure": ("ours", "none", "exact"),
            "ours, int8": ("ours", "int8", "first_finished"),
            "ours, bfloat16": ("ours", "bfloat16", "first_finished"),
            "CTranslate2": ("CTranslate2", folder, "float16" if half else "float32"),
            "CTranslate2, int8": ("CTranslate2", folder, "int8_float16" if half else "int8"),
            "Hugging Face": ("Hugging Face", folder, half),
        }


def at_best_size(options: Throughput, text: list[str], system: str, *arguments: Any) -> Built:
    """Returns a system at the batch size that is fastest on half of the text."""
    if system == "ours":
        translate = ours(options, options.batch_sizes, text, *arguments)
    else:
        translate = options.load_peer(system, *arguments)
    # Not a small part: where slots fall empty at the end, large batches would look worse than they are.
    part, seconds = text[: max(len(text) // 2, 1)], {}
    for size in options.batch_sizes if len(options.batch_sizes) > 1 else ():
        translate(part, size)
        started = time.perf_counter()
        translate(part, size)
        seconds[size] = time.perf_counter() - started
    best = min(seconds, key=lambda size: seconds[size], default=options.batch_sizes[0])
    facts: dict[str, Any] = {"batch_size": best}

    def translate_all() -> None:
        facts["texts"] = translate(text, best)

    return Built(translate_all, facts)  # which works once before its facts are read


# --- Latency


@dataclass(frozen=True, kw_only=True)
class Latency(Decoding):
    """How long one sentence takes beside CTranslate2 and Hugging Face.

    Warm: one sentence after the other, each in a call of its own. From command to answer: a process that loads the
    model, translates the first sentence and ends. "Nothing compiled" has an empty cache folder, as after an
    installation or a change of the recipe.
    """

    lines: int = 200

    def measure(self, report: Report) -> None:
        """Adds a table of warm systems and one of commands."""
        text = self.sentences()
        with self.marian_folder() as folder:
            report.table(["warm", "ms a sentence", "ours against it", "equal outputs"], self.warm(text, folder))
            report.table(["from command to answer", "s", "answer"], self.commands(text[0], folder))

    def warm(self, text: list[str], folder: str) -> Iterator[list[str]]:
        """Yields a row for each system."""
        systems, facts = Systems(), {}
        known = {"ours": ("ours", "none"), "ours, int8": ("ours", "int8")}
        known |= {name: (name, folder) for name in decoding_peers.LOADERS}
        for name, arguments in known.items():
            facts[name] = systems.start(name, one_at_a_time, self, text, *arguments)
        seconds = systems.take_turns(self.rounds)
        for name, values in seconds.items():
            each = spread([1000 * value / len(text) for value in values])
            outputs = equal(facts["ours"]["texts"], facts[name]["texts"])
            yield [name, each, ratios(seconds["ours"], values), outputs]

    def commands(self, line: str, folder: str) -> Iterator[list[str]]:
        """Yields a row for each command."""
        numbers = [str(number) for number in (self.beam_size, self.longest, self.threads)]
        our_command = [
            sys.executable, "-m", "flax_transformer.cli.main", "translate", "--run", str(self.run),
            "--stop", "first_finished", "--beam-size", str(self.beam_size), "--length-penalty", PENALTY,
            "--max-length-factor", "0", "--max-length-offset", str(self.longest - 1), "--batch-size", "1",
        ]  # fmt: skip
        known = {"ours, nothing compiled": our_command, "ours": our_command}
        for name in decoding_peers.LOADERS:
            known[name] = [sys.executable, decoding_peers.__file__, name, folder, *numbers]
        seconds: dict[str, list[float]] = {name: [] for name in known}
        answers = {}
        for turn in range(self.rounds + 1):  # the first warms the machine's file cache
            with tempfile.TemporaryDirectory() as cache:
                for name, command in known.items():
                    started = time.monotonic()
                    done = subprocess.run(
                        command, input=f"{line}\n", env=user_environment(Path(cache)), stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL, text=True, check=True,
                    )  # fmt: skip
                    answers[name] = done.stdout.strip()
                    seconds[name] += [time.monotonic() - started] * bool(turn)
        for name, values in seconds.items():
            yield [name, spread(values, 2), "equal" if answers[name] == answers["ours"] else "another"]


def one_at_a_time(options: Latency, text: list[str], system: str, argument: str) -> Built:
    """Returns a system that translates each sentence by itself."""
    if system == "ours":
        translate = ours(options, (1,), text, argument, "first_finished")
    else:
        translate = options.load_peer(system, argument)
    facts: dict[str, Any] = {}

    def translate_all() -> None:
        facts["texts"] = [translate([line], 1)[0] for line in text]

    return Built(translate_all, facts)


if __name__ == "__main__":
    run({"throughput": Throughput, "latency": Latency})
