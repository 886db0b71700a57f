"""Decoding beside CTranslate2 and Hugging Face: the same weights, the same text, text in and text out.

    pip install -e ".[parity]"
    python benchmarks/decode.py --run RUN --text FILE [--lines 4000] [--beam-size 4] [--rounds 3]

RUN is a post-norm Transformer with `model.zero_start: true`, which is what CTranslate2 can express. It is written as a
MarianMT folder, and that is made into a CTranslate2 model. All have two CPU cores, float32, the same beam, the
length-normalised score of `average:1.0`, the same limit on the number of tokens and the same stop rule (as many
finished hypotheses as the beam has places, which is all that CTranslate2 has), and take turns. CTranslate2 has one
worker of one thread for each core. "ours, sure" is the exact rule, "ours, likely" Hugging Face's default, both in
float32; "int8" has integers for weights, made by each system itself; "ours, bfloat16" takes part when it is named, and
has no peer where CTranslate2 has no bfloat16 on a CPU. Each translates at the batch size that was fastest for it on
half of the text. Of all pairs of outputs the equal ones are counted, and with --reference the BLEU of each is printed.

Where there is a GPU that jax, CTranslate2 and PyTorch can use, all use it, CTranslate2 with one worker. With --half
"ours" and Hugging Face compute in bfloat16 and CTranslate2 in float16:

    python benchmarks/decode.py --run RUN --text FILE --half --batch-sizes 128 256 512 \
        --systems ours CTranslate2 "Hugging Face"
"""

import dataclasses
import gzip
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from paired import Built, Systems, machine
from sacrebleu.metrics import BLEU

from flax_transformer.decoding.beam_search import StopRule
from flax_transformer.inference.prepare import Quantize

PENALTY = "average:1.0"


@dataclass(frozen=True)
class Options:
    """Compares decoding with CTranslate2 and Hugging Face.

    Attributes:
        run: run folder of the model.
        text: sentences, one a line, plain or .gz.
        reference: their translations; without it no BLEU is printed.
        lines: how many of them at most, without what occurs twice.
        beam_size: hypotheses kept at each step.
        longest: most tokens of an output, end token included.
        batch_sizes: sentences at the same time, to choose from.
        rounds: turns of each system, after one to warm up.
        threads: of each system.
        half: whether "ours", CTranslate2 and Hugging Face compute with 16 bits.
        systems: who takes part; "ours" must.
    """

    run: Path
    text: Path
    reference: Path | None = None
    lines: int = 4_000
    beam_size: int = 4
    longest: int = 64
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    rounds: int = 3
    threads: int = 2
    half: bool = False
    systems: tuple[str, ...] = (
        "ours", "ours, likely", "ours, sure", "ours, int8", "CTranslate2", "CTranslate2, int8", "Hugging Face",
    )  # fmt: skip


def read_text(options: Options) -> tuple[list[str], list[str]]:
    """Returns the sentences to translate, and their translations if there are any."""

    def lines(path: Path) -> list[str]:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return [line.strip() for line in file]

    sources = lines(options.text)
    references = sources if options.reference is None else lines(options.reference)
    pairs: dict[str, str] = {}
    for source, reference in zip(sources, references, strict=True):
        if source:
            pairs.setdefault(source, reference)
    return list(pairs)[: options.lines], [] if options.reference is None else list(pairs.values())[: options.lines]


Translate = Callable[[list[str], int], list[str]]  # (sentences, how many of them at the same time) -> translations


def at_best_size(options: Options, text: list[str], load: Callable[..., Translate], *arguments: Any) -> Built:
    """Returns what `load(options, *arguments)` makes, at the batch size that is fastest on half of the text."""
    translate = load(options, *arguments)
    # Not a small part: where slots fall empty at the end, large batches would look worse than they are.
    part = text[: max(len(text) // 2, 1)]
    seconds = {}
    for size in options.batch_sizes if len(options.batch_sizes) > 1 else ():
        translate(part, size)
        started = time.perf_counter()
        translate(part, size)
        seconds[size] = time.perf_counter() - started
    best = min(seconds, key=lambda size: seconds[size], default=options.batch_sizes[0])
    facts: dict[str, Any] = {"batch_size": best}

    def translate_all() -> None:
        facts["texts"] = translate(text, best)

    return Built(translate_all, facts)  # which is called once before its facts are read


def our_translator(options: Options, stop: StopRule, quantize: Quantize) -> Any:
    """Returns this project's translator, at the first batch size."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need some of a GPU's memory, too

    from flax_transformer.cli.main import use_every_core
    from flax_transformer.inference.translator import Translator

    use_every_core()  # as the command does
    translator = Translator.load(options.run, quantize=quantize)
    settings = dataclasses.replace(
        translator.decoding,
        beam_size=options.beam_size,
        length_penalty=PENALTY,
        stop=stop,
        max_length_factor=0.0,
        max_length_offset=options.longest,
        batch_size=options.batch_sizes[0],
    )
    return translator.with_decoding(settings)


def ours(options: Options, stop: StopRule, quantize: Quantize) -> Translate:
    """Returns this project's translation."""
    made = our_translator(options, stop, quantize)
    sized = {
        size: made.with_decoding(dataclasses.replace(made.decoding, batch_size=size)) for size in options.batch_sizes
    }
    for translator in sized.values():  # for every device, whichever of them takes what when it is timed
        translator.compile(read_text(options)[0])
    return lambda lines, size: [t.text for t in sized[size].translate(lines)]


def ctranslate2_peer(options: Options, folder: Path, compute_type: str) -> Translate:
    """Returns CTranslate2's translation."""
    import ctranslate2
    import sentencepiece
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"), force=True)
    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    workers = 1 if device == "cuda" else options.threads  # on a CPU one worker of two threads is slower at any size
    threads = {"inter_threads": workers, "intra_threads": 1}
    model = ctranslate2.Translator(str(folder / "ctranslate2"), device=device, compute_type=compute_type, **threads)
    source = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    target = sentencepiece.SentencePieceProcessor(model_file=str(folder / "target.spm"))

    def translate(lines: list[str], size: int) -> list[str]:
        pieces = [[*p, "</s>"] for p in source.encode(lines, out_type=str)]
        found = model.translate_batch(
            pieces, beam_size=options.beam_size, max_batch_size=size, length_penalty=1.0,
            max_decoding_length=options.longest - 1, min_decoding_length=0,
        )  # fmt: skip
        return target.decode([f.hypotheses[0] for f in found])

    return translate


def hugging_face_peer(options: Options, folder: Path) -> Translate:
    """Returns the translation of Hugging Face's `generate`."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.MarianMTModel.from_pretrained(folder).eval()
    model = model.to(device, torch.bfloat16 if options.half else torch.float32)
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    size_of_vocabulary = model.config.decoder_vocab_size

    def translate(lines: list[str], size: int) -> list[str]:
        order = sorted(range(len(lines)), key=lambda n: -len(lines[n]))
        results = [""] * len(lines)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            inputs = tokenizer([lines[n] for n in chunk], return_tensors="pt", padding=True).to(device)
            with torch.inference_mode():
                made = model.generate(
                    **inputs, num_beams=options.beam_size, length_penalty=1.0, early_stopping=True,
                    max_length=options.longest + 1, bad_words_ids=[[size_of_vocabulary - 1]],
                )  # fmt: skip
            for n, made_text in zip(chunk, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                results[n] = made_text
        return results

    return translate


def write_model(run: Path, folder: Path) -> None:
    """Writes a run as a MarianMT folder, in a process of its own, since jax starts threads."""
    writer = multiprocessing.get_context("spawn").Process(target=_write_model, args=(run, folder))
    writer.start()
    writer.join()


def _write_model(run: Path, folder: Path) -> None:
    from flax_transformer.inference.translator import Translator
    from flax_transformer.interop.marian import write_marian
    from flax_transformer.run_folder import RunFolder

    write_marian(Translator.load(run), RunFolder.open(run).read_config().model, folder)


def main() -> None:
    """Takes turns and prints a table."""
    options = tyro.cli(Options)
    text, references = read_text(options)
    packages = ["jax", "flax", "ctranslate2", "transformers", "torch"]
    print(f"{options}\n{machine(*packages)}\n{len(text):,} different lines\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "marian"
        write_model(options.run, folder)
        systems, facts = Systems(options.threads), {}
        half = options.half
        known: dict[str, tuple[Any, ...]] = {
            "ours": (ours, "first_finished", "bfloat16" if half else "none"),
            "ours, likely": (ours, "heuristic", "none"),
            "ours, sure": (ours, "exact", "none"),
            "ours, int8": (ours, "first_finished", "int8"),
            "ours, bfloat16": (ours, "first_finished", "bfloat16"),
            "CTranslate2": (ctranslate2_peer, folder, "float16" if half else "float32"),
            "CTranslate2, int8": (ctranslate2_peer, folder, "int8_float16" if half else "int8"),
            "Hugging Face": (hugging_face_peer, folder),
        }
        if "ours" not in options.systems or not set(options.systems) <= set(known):
            raise SystemExit(f"--systems must hold 'ours', and may hold {', '.join(known)}; got {options.systems}.")
        for name in options.systems:
            facts[name] = systems.start(name, at_best_size, options, text, *known[name])
        seconds = systems.take_turns(options.rounds)
    print("| system | batch | sentences/s, median (least to most) | ours against it | equal outputs | BLEU |")
    print("|---" * 6 + "|")
    bleu = BLEU()
    for name, values in seconds.items():
        rates = [len(text) / value for value in values]
        ratios = [theirs / our for our, theirs in zip(seconds["ours"], values, strict=True)]
        rate, ratio = statistics.median(rates), statistics.median(ratios)
        equal = sum(a == b for a, b in zip(facts["ours"]["texts"], facts[name]["texts"], strict=True))
        score = f"{bleu.corpus_score(facts[name]['texts'], [references]).score:.2f}" if references else ""
        print(
            f"| {name} | {facts[name]['batch_size']} | {rate:.1f} ({min(rates):.1f} to {max(rates):.1f}) "
            f"| {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {equal:,} of {len(text):,} | {score} |"
        )
    if references:
        print(f"\nBLEU {bleu.get_signature()}")


if __name__ == "__main__":
    main()
