"""Hostile text, tables, archives, tokenizers and command lines: success, or one of our errors, in a second and 200 MB.

See `tests/faults/hostile.py` for larger numbers.
"""

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
from flax_transformer.data.parallel_text import ParallelText, ParallelTextConfig, read_parallel_text
from flax_transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_transformer.data.text_files import iterate_lines
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.inference.constraints import Constraints
from flax_transformer.inference.requests import Request, RequestReader
from tests.faults.hostile import JSON, NONSENSE, answer, damaged, examples
from tests.small_models import SOURCES, TOKENIZERS
from tests.small_run import command

ODD_BYTES = [*NONSENSE, b"\r", b"\t", b"\xed\xa0\x80", b"\x1b[2J"]
PART = st.one_of(st.sampled_from(ODD_BYTES), st.text(max_size=9).map(str.encode))
LINE = st.lists(PART, max_size=4).map(b"".join)
LONG = st.tuples(st.binary(min_size=1, max_size=4), st.sampled_from([5_000, 20_000])).map(
    lambda part: part[0] * part[1]
)
TEXT = st.lists(st.one_of(LINE, LINE, LONG), max_size=5).map(b"\n".join)
RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys(("source", "target", "other"), JSON | st.text()))
JSON_TEXT = st.lists(RECORD.map(lambda record: json.dumps(record).encode()) | LINE, max_size=4).map(b"\n".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@given(content=TEXT.flatmap(damaged) | TEXT, name=st.sampled_from(["text", "text.gz", "text.XZ"]))
@examples(300)
def test_hostile_text(folder, content, name):
    """No line is lost."""
    (folder / name).write_bytes(content)
    lines = answer(lambda: list(iterate_lines(folder / name)))
    assert lines is None or len(lines) == content.count(b"\n") + (content != b"" and not content.endswith(b"\n"))


@given(content=TEXT.flatmap(damaged) | TEXT, columns=st.tuples(st.integers(1, 3), st.integers(1, 3)))
@examples(260)
def test_a_hostile_table(folder, content, columns):
    (folder / "text.TSV").write_bytes(content)
    config = ParallelTextConfig(source_column=columns[0], target_column=columns[1])
    found = answer(lambda: read_parallel_text(folder / "text.TSV", folder / "text.TSV", config))
    assert found is None or isinstance(found, ParallelText) and len(found.source) == len(found.target)


@given(content=JSON_TEXT.flatmap(damaged) | JSON_TEXT, keys=st.tuples(*[st.sampled_from(["source", "target", ""])] * 2))
@examples(150)
def test_hostile_json_lines(folder, content, keys):
    (folder / "text.jsonl").write_bytes(content)
    config = ParallelTextConfig(source_key=keys[0], target_key=keys[1])
    found = answer(lambda: read_parallel_text(folder / "text.jsonl", folder / "text.jsonl", config))
    assert found is None or all(type(text) is str and "\n" not in text for side in found[:2] for text in side)


COMPRESS = [gzip.compress, bz2.compress, lambda data: lzma.compress(data, preset=0)]
BOMB = gzip.compress(bytes(5_000_000))


@given(data=st.data())
@examples(100)
def test_a_hostile_archive(folder, data):
    packed = data.draw(st.sampled_from(COMPRESS))(data.draw(TEXT)) + data.draw(st.sampled_from([b"", BOMB, b"rubbish"]))
    (folder / "text.GZ").write_bytes(data.draw(damaged(packed) | st.just(packed)))
    answer(lambda: sum(1 for _ in iterate_lines(folder / "text.GZ")))


PLAIN = SentencePieceTokenizer.train(SOURCES, TokenizerConfig(vocab_size=60, normalization="identity"))


@given(model=st.sampled_from([PLAIN.model, TOKENIZERS.source.model]).flatmap(damaged), text=st.text(max_size=9))
@examples(150)
def test_a_hostile_tokenizer(model, text):
    def use() -> None:
        tokenizer = SentencePieceTokenizer(model)
        (ids,) = tokenizer.encode([text])
        assert all(0 <= number < tokenizer.vocab_size for number in (*ids, *tokenizer.special.ids))
        assert "\n" not in tokenizer.decode(ids) and len(tokenizer.pieces(ids)) == len(ids)
        tokenizer.decode(range(tokenizer.vocab_size))
        _ = tokenizer.encoded_spans(text), tokenizer.decoded_spans(ids), tokenizer.normalized([text])

    answer(use)


ODD = ["\u200c", "\u2028", "\0", "\ufeff", "\u0e33", "\U0001f468\u200d\U0001f469", ">>deu<<", "\u2581", "<s>", "\ud800"]
ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=20) | st.lists(st.sampled_from(ODD)).map(
    "".join
)


@given(
    sentence=ANY_TEXT, times=st.sampled_from([1, 1, 1, 50_000]), prefix=ANY_TEXT, phrases=st.lists(ANY_TEXT, max_size=2)
)
@examples(150)
def test_a_hostile_sentence(sentence, times, prefix, phrases):
    """What is wrong with one sentence is said of that sentence alone."""
    reader = RequestReader(TOKENIZERS.source, Constraints(TOKENIZERS.target, DecodingConfig(), 47), 48)
    found = answer(lambda: reader.read_all(["one", sentence * times], ["", prefix], [[], phrases]))
    assert found is not None and found[0] == reader.read("one")
    assert not isinstance(found[1], Request) or len(found[1].source) <= 48


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


@given(verb=st.sampled_from(sorted(cli.VERBS)), arguments=st.lists(ARGUMENT, max_size=6))
@examples(150)
def test_a_hostile_command_line(imported, verb, arguments):
    """No argument names a run, so no command does more than to read its arguments."""
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), errors="backslashreplace") for _ in range(3))
    try:
        code = answer(lambda: command(verb, *arguments))
        sys.stderr.seek(0)
        errors = sys.stderr.read()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    assert code in ((0, 2) if {"-h", "--help"} & set(arguments) else (2,))
    assert "--debug" in arguments or "Traceback" not in errors and len(errors) < 5_000
