"""Hostile text, tables, archives, tokenizers and command lines: see `fuzzing` for the promise and for more examples."""

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_transformer.cli import main as cli
from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.parallel_text import ParallelTextConfig, read_parallel_text
from flax_transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_transformer.data.text_files import iterate_lines
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.errors import InputError
from flax_transformer.inference.constraints import Constraints
from flax_transformer.inference.requests import RequestReader
from flax_transformer.inference.translation import NoTranslation
from tests.faults.fuzzing import damaged, hostile, succeeds_or_explains
from tests.small_models import SOURCES, TOKENIZERS
from tests.small_run import command

ODD_BYTES = [
    b"\xff",
    b"\0",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    b"\x1f\x8b",
    b"\xc3",
    b"\x1b[2J",
    b"\t",
]
ODD_TEXT = [
    "\u200c",
    "\u2028",
    "\x85",
    "\0",
    "\ufeff",
    "\u0e33",
    "\U0001f468\u200d\U0001f469",
    ">>deu<<",
    "\u2581",
    "<s>",
]


def repeated(part: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A part so many times that it becomes large."""
    return st.builds(lambda part, times: part * times, part, st.sampled_from([1, 2, 5_000, 100_000]))


PARTS = st.one_of(st.sampled_from(ODD_BYTES), st.text(max_size=9).map(str.encode), st.binary(max_size=9))
LINE = st.lists(PARTS, max_size=4).map(b"".join)
TEXT = st.lists(st.one_of(LINE, repeated(PARTS)), max_size=5).map(b"\n".join)
VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)
RECORD = st.fixed_dictionaries({}, optional={"source": VALUE, "target": VALUE | st.text(), "other": VALUE})
JSON_LINE = st.one_of(
    RECORD.map(lambda record: json.dumps(record).encode()),
    st.sampled_from(
        [b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5_000, b'{"source": "a", "target": "\\ud800"}', b"{", b"1e999"]
    ),
    LINE,
)
JSON_LINES = st.lists(JSON_LINE, max_size=4).map(b"\n".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@hostile
@given(content=damaged(TEXT), name=st.sampled_from(["text", "text.gz", "text.xz"]))
def test_text(folder, content, name):
    (folder / name).write_bytes(content)
    lines = succeeds_or_explains(lambda: list(iterate_lines(folder / name)))
    if not isinstance(lines, InputError):  # no line is lost
        assert len(lines) == content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


@hostile
@given(content=damaged(TEXT), columns=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_tsv(folder, content, columns):
    (folder / "text.TSV").write_bytes(content)
    config = ParallelTextConfig(source_column=columns[0], target_column=columns[1])
    succeeds_or_explains(lambda: read_parallel_text(folder / "text.TSV", folder / "text.TSV", config))


@hostile
@given(content=damaged(JSON_LINES), keys=st.tuples(*[st.sampled_from(["source", "target", "other", ""])] * 2))
def test_jsonl(folder, content, keys):
    (folder / "text.jsonl").write_bytes(content)
    config = ParallelTextConfig(source_key=keys[0], target_key=keys[1])
    found = succeeds_or_explains(lambda: read_parallel_text(folder / "text.jsonl", folder / "text.jsonl", config))
    if not isinstance(found, InputError):
        assert all(type(text) is str and "\n" not in text for side in found[:2] for text in side)


BOMB = gzip.compress(bytes(5_000_000))


@hostile
@given(data=st.data())
def test_compressed_text(folder, data):
    compress = data.draw(st.sampled_from([gzip.compress, bz2.compress, lambda data: lzma.compress(data, preset=0)]))
    parts = st.tuples(TEXT.map(compress), st.sampled_from([b"", BOMB, b"rubbish"])).map(b"".join)
    (folder / "text.GZ").write_bytes(data.draw(damaged(parts)))
    succeeds_or_explains(lambda: sum(1 for _ in iterate_lines(folder / "text.GZ")))


PLAIN = SentencePieceTokenizer.train(SOURCES, TokenizerConfig(vocab_size=60, normalization="identity"))


@hostile
@given(model=damaged(st.sampled_from([PLAIN.model, TOKENIZERS.source.model, b""])), text=st.text(max_size=9))
def test_a_tokenizer(model, text):
    def use() -> None:
        tokenizer = SentencePieceTokenizer(model)
        (ids,) = tokenizer.encode([text])
        assert all(0 <= number < tokenizer.vocab_size for number in (*ids, *tokenizer.special.ids))
        assert "\n" not in tokenizer.decode(ids) and len(tokenizer.pieces(ids)) == len(ids)
        tokenizer.decode(range(tokenizer.vocab_size))
        tokenizer.encoded_spans(text), tokenizer.decoded_spans(ids), tokenizer.normalized([text])

    succeeds_or_explains(use)


ANY_TEXT = st.one_of(
    st.text(st.characters(codec=None, categories=None), max_size=20), st.lists(st.sampled_from(ODD_TEXT)).map("".join)
)


@hostile
@given(
    sentence=ANY_TEXT,
    times=st.sampled_from([1, 1, 1, 100_000]),
    prefix=ANY_TEXT,
    phrases=st.lists(ANY_TEXT, max_size=2),
)
def test_a_sentence(sentence, times, prefix, phrases):
    """What is wrong with one sentence is said of that sentence alone."""
    reader = RequestReader(TOKENIZERS.source, Constraints(TOKENIZERS.target, DecodingConfig(), 47), 48)
    sentences, prefixes, required = ["one", sentence * times], ["", prefix], [[], phrases]
    usual, request = succeeds_or_explains(lambda: reader.read_all(sentences, prefixes, required))
    assert usual == reader.read("one")
    assert len(request.source if not isinstance(request, NoTranslation) else []) <= 48


OPTIONS = """
    --run --source --target --reference --input --output --config --resume --json --scores --num-hypotheses --num --of
    --beam-size --stop --length-penalty --method --top-p --seed --prefix --required --quantize --checkpoint --quality
    --data.kind --model.kind --model.model-dim --training.steps --help -h --debug to-hf from-hf --
""".split()
VALUES = ["", "-", "-1", "0", "nan", "1e999", "9" * 300, "x" * 300, "/dev/null", "/proc", "a/b", "\udcff", "."]
ARGUMENT = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(VALUES),
    st.tuples(st.sampled_from(OPTIONS), st.text(max_size=5).filter(lambda text: "\0" not in text)).map("=".join),
)


@pytest.fixture(scope="module")
def imported() -> None:
    """So that no example pays for what a command imports."""
    for verb in cli.VERBS:
        assert command(verb, "--help") == 0


@hostile
@given(verb=st.sampled_from(sorted(cli.VERBS)), arguments=st.lists(ARGUMENT, max_size=6))
def test_a_command_line(imported, verb, arguments):
    """No argument names a run, so no command does more than to read its arguments."""
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), errors="backslashreplace") for _ in range(3))
    try:
        code = succeeds_or_explains(lambda: command(verb, *arguments))
        sys.stderr.seek(0)
        errors = sys.stderr.read()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    assert code in ((0, 2) if {"-h", "--help"} & set(arguments) else (2,))
    assert "--debug" in arguments or "Traceback" not in errors and len(errors) < 5_000
