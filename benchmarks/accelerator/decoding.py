"""Beam search of a model of base size with random weights, beside Hugging Face and CTranslate2 on the same weights.

Random weights practically never give the end token. So every output has the maximum length, and the number of steps is
known. The lengths that came out are shown.
"""

import contextlib
import ctypes.util
import glob
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decoding_peers
import numpy as np
from harness import Built, Report, Systems, ratios, spread

from accelerator.kernels import KernelTime, kernel_tables, profiled, save_kernels
from accelerator.measurement import Measurement, gibibytes, median_of, short

PENALTY = "average:1.0"


@dataclass(frozen=True)
class Decoding(Measurement):
    """Beam search beside Hugging Face and CTranslate2: the same random weights, full batches, text in and text out.

    Ours and Hugging Face compute in bfloat16, CTranslate2 in float16. Each turn translates one batch.

    Attributes:
        batch_sizes: sentences at the same time.
        systems: which of the others take part.
        profile: whether the kernels of a search are listed, and its program is kept, at the first batch size.
        beam_size: hypotheses of each sentence.
        length: tokens of each source, end token included, and of each output.
        vocab_size: rows of the one table.
    """

    rounds: int = 3
    batch_sizes: tuple[int, ...] = (128,)
    systems: tuple[str, ...] = ("Hugging Face", "CTranslate2")
    profile: bool = False
    beam_size: int = 4
    length: int = 64
    vocab_size: int = 32_000

    @property
    def num_words(self) -> int:
        """Number of rows of the table."""
        return 500 if self.tiny else self.vocab_size

    @property
    def longest(self) -> int:
        """Tokens of a source and of an output."""
        return 8 if self.tiny else self.length

    def sentences(self, number: int) -> list[str]:
        """Returns sentences of words that are one token each."""
        rng = np.random.default_rng(number)
        rows = rng.integers(4, self.num_words, (number, self.longest - 1))
        return [" ".join(f"w{word}" for word in row) for row in rows.tolist()]

    def measure(self, report: Report) -> None:
        """Adds a table for each batch size."""
        report.say(f"beam {self.beam_size}, sources and outputs of {self.longest} tokens, {self.num_words:,} tokens\n")
        with tempfile.TemporaryDirectory() as temporary:
            for number, size in enumerate((2, 1) if self.tiny else self.batch_sizes):
                self.one_size(report, f"{temporary}/marian", size, self.profile and number == 0)

    def one_size(self, report: Report, folder: str, size: int, profile: bool) -> None:
        """Adds the table of one batch size."""
        systems, facts = Systems(), {}
        columns = ["system", "batch", "ms a batch", "ms a step", "sentences/s", "output tokens", "start, s", "peak GiB"]
        facts["ours"] = systems.start("ours", our_search, self, folder, size)
        alone = systems.turns(self.rounds)["ours"]
        report.table(columns, [self.row("ours", size, facts["ours"], alone)])
        if profile:
            self.add_profile(report, systems)
        for name in self.systems:
            try:
                with stand_in_for_cublas() if name == "CTranslate2" else contextlib.nullcontext():
                    facts[name] = systems.start(name, their_search, self, name, folder, size)
            except Exception as error:  # of any library; the other systems can still be measured
                report.say(f"{name}: {short(error)}\n")
                self.note(name, batch_size=size, error=short(error))
                systems.end(name)
                continue
            seconds = systems.turns(self.rounds)
            rows = [self.row(who, size, facts[who], seconds[who]) for who in ("ours", name)]
            report.table(columns, rows)
            report.say(f"ours against {name}: {ratios(seconds['ours'], seconds[name])}\n")
            systems.end(name)
        systems.end("ours")

    def row(self, name: str, size: int, facts: dict[str, Any], seconds: list[float]) -> list[str]:
        """Returns the row of a system, and adds its figures to the file."""
        lengths = [len(text.split()) for text in facts["texts"]]
        steps = float(np.mean(lengths))  # CTranslate2 leaves room for an end token, and so takes one step less
        kept = {key: value for key, value in facts.items() if key != "texts"}
        self.note(name, batch_size=size, seconds=seconds, steps=steps, **kept)
        milliseconds = [1e3 * value for value in seconds]
        return [
            name, str(size), spread(milliseconds, 2), spread([value / steps for value in milliseconds], 3),
            f"{size / median_of(seconds):,.1f}", f"{steps:.1f} ({min(lengths)} to {max(lengths)})",
            f"{facts['start']:.1f}", gibibytes(facts.get("peak")),
        ]  # fmt: skip

    def add_profile(self, report: Report, systems: Systems) -> None:
        """Adds the kernels of one search, and keeps them and the program."""
        try:
            if self.folder is not None:
                systems.call("ours", save_search, f"{self.folder}/search.hlo.txt.gz")
            kernels, busy = systems.call("ours", profile_search)
        except Exception as error:  # the figures that follow need no profile
            report.say(f"no profile: {short(error)}\n")
            return
        kernel_tables(report, kernels, busy, self.longest)
        if self.folder is not None:
            save_kernels(self.folder / "search.kernels.csv.gz", kernels, self.longest)


# --- This project

_search: tuple[Any, Callable[[], Any]] | None = None  # in the process of ours: the translator, and one turn


def our_search(options: Decoding, folder: str, size: int) -> Built:
    """Returns turns of our search; writes the weights as a MarianMT folder if there is none."""
    import dataclasses
    import time

    import jax

    from flax_transformer.interop.marian import write_marian

    translator = our_translator(options, size)
    if not os.path.exists(folder):
        plain = dataclasses.replace(translator.model, compute_dtype="float32")
        write_marian(translator, plain, Path(folder))
    sentences, started = options.sentences(size), time.perf_counter()
    translator.compile(sentences)
    facts: dict[str, Any] = {"start": time.perf_counter() - started}

    def turn() -> None:
        facts["texts"] = [translation.text for translation in translator.translate(sentences)]

    turn()
    facts["peak"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    global _search
    _search = translator, turn
    return Built(turn, facts)


def our_translator(options: Decoding, size: int) -> Any:
    """Returns the translator of a model with random weights."""
    import jax
    from flax import nnx

    from flax_transformer.config.recipe import DecodingConfig
    from flax_transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
    from flax_transformer.data.tokenizer_pair import TokenizerPair
    from flax_transformer.inference.translator import Translator
    from flax_transformer.models.build import build_model, vocabulary_info
    from flax_transformer.models.transformer_config import TransformerConfig
    from flax_transformer.parallel.mesh import MeshConfig, make_mesh

    tokenizer = SentencePieceTokenizer(word_tokenizer(options.num_words))
    tokenizers = TokenizerPair(tokenizer, tokenizer)
    dim, heads, hidden, depth = (32, 4, 64, 1) if options.tiny else (512, 8, 2048, 6)
    model = TransformerConfig(
        model_dim=dim,
        num_heads=heads,
        feed_forward_dim=hidden,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        max_source_length=options.longest,
        max_target_length=options.longest,
        zero_start=True,
        compute_dtype="bfloat16",
    )
    decoding = DecodingConfig(
        beam_size=options.beam_size,
        length_penalty=PENALTY,
        stop="first_finished",
        max_length_factor=0.0,
        max_length_offset=options.longest - 1,
        batch_size=size,
    )
    make = jax.jit(
        lambda key: nnx.to_pure_dict(
            nnx.state(build_model(model, vocabulary_info(tokenizers), rngs=nnx.Rngs(params=key)))
        )
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Translator.from_params(model, tokenizers, make(jax.random.key(0)), decoding, mesh)


def word_tokenizer(size: int) -> bytes:
    """Returns a SentencePiece model with the four special tokens, and the words w4, w5 and so on."""
    from sentencepiece import sentencepiece_model_pb2 as made_by_protobuf

    protobuf: Any = made_by_protobuf
    model = protobuf.ModelProto()
    kinds = protobuf.ModelProto.SentencePiece
    special = (("<pad>", kinds.CONTROL), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN))
    words = [(f"\u2581w{number}", kinds.NORMAL) for number in range(4, size)]
    for number, (piece, kind) in enumerate((*special, *words)):
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = protobuf.TrainerSpec.UNIGRAM, size
    trainer.pad_id, trainer.bos_id, trainer.eos_id, trainer.unk_id = range(4)
    model.normalizer_spec.name = "identity"
    return model.SerializeToString()


def search_program() -> Any:
    """Returns our compiled search."""
    assert _search is not None
    translator, _ = _search
    (program,) = (program for key, program in translator.parameters.programs.items() if key[0] != "prepare")
    return program


def save_search(path: str) -> None:
    """Writes our compiled search as text."""
    import gzip

    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(search_program().as_text())


def profile_search() -> tuple[list[KernelTime], float]:
    """Returns the kernels of one turn of ours, and the seconds in which any ran."""
    assert _search is not None
    return profiled(_search[1], search_program().as_text())


# --- The others


def their_search(options: Decoding, system: str, folder: str, size: int) -> Built:
    """Returns turns of another system's search."""
    import time

    started = time.perf_counter()
    if system == "CTranslate2":
        translate = ctranslate2_search(options, folder)
    else:
        on_gpu = has_gpu()
        translate = decoding_peers.hugging_face_translator(
            folder, options.beam_size, options.longest, options.threads, on_gpu
        )
    sentences = options.sentences(size)
    facts: dict[str, Any] = {}

    def turn() -> None:
        facts["texts"] = translate(sentences, size)

    turn()
    facts["start"] = time.perf_counter() - started
    if system == "Hugging Face" and has_gpu():
        import torch

        facts["peak"] = torch.cuda.max_memory_allocated()
    return Built(turn, facts)


def has_gpu() -> bool:
    """Returns whether PyTorch has a GPU."""
    import torch

    return torch.cuda.is_available()


def ctranslate2_search(options: Decoding, folder: str) -> Callable[[list[str], int], list[str]]:
    """Returns CTranslate2's translation, by a model that it converts if there is none."""
    import ctranslate2

    if not os.path.exists(f"{folder}/ctranslate2"):
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(folder).convert(f"{folder}/ctranslate2")
    kind = "float16" if ctranslate2.get_cuda_device_count() else "float32"
    return decoding_peers.ctranslate2_translator(folder, options.beam_size, options.longest, options.threads, kind)


@contextlib.contextmanager
def stand_in_for_cublas() -> Generator[None]:
    """Lets processes that start now find a newer cuBLAS by the name of the one that CTranslate2 was built with.

    It does nothing where that one is there. The functions that CTranslate2 calls have the same arguments in both.
    """
    roots = [path for path in sys.path if os.path.isdir(f"{path}/nvidia")]
    found = [path for root in roots for path in glob.glob(f"{root}/nvidia/**/libcublas.so.13", recursive=True)]
    before = os.environ.get("LD_LIBRARY_PATH", "")
    if not found or ctypes.util.find_library("cublas") is not None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, version in (("libcublas", 12), ("libcublas", 13), ("libcublasLt", 12), ("libcublasLt", 13)):
            os.symlink(f"{os.path.dirname(found[0])}/{name}.so.13", f"{folder}/{name}.so.{version}")
        os.environ["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else folder
        try:
            yield
        finally:
            os.environ["LD_LIBRARY_PATH"] = before
