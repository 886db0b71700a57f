"""Files of text as people have them: under other names, compressed, in pipes, with lines without end."""

import bz2
import gzip
import lzma
import os
import threading
from pathlib import Path

import pytest

from flax_transformer.cli.partial_output import PartialOutput, StreamOutput, output_of_lines
from flax_transformer.data import text_files
from flax_transformer.data.parallel_text import ParallelFiles, ParallelTextConfig, read_corpus, read_parallel_text
from flax_transformer.data.text_files import LineReader, iterate_lines
from flax_transformer.errors import InputError
from tests.faults.limits import within_limits
from tests.small_run import command

TEXT = "eins\u2028\r\n\nzw\u00f6lf\nlast"
LINES = ["eins\u2028", "", "zw\u00f6lf", "last"]


@pytest.mark.parametrize("name", ["text.TSV", "text.Tsv.GZ", "text.JSONL"])
def test_a_suffix_is_the_same_in_capitals(tmp_path, name):
    content = b'{"source": "a", "target": "b"}\n' if "JSONL" in name else b"a\tb\n"
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if "GZ" in name else content)
    assert list(read_parallel_text(tmp_path / name, tmp_path / name).pairs()) == [("a", "b")]


@pytest.mark.parametrize("name", ["text", "text.txt", "text.csv", "text.gz"])
def test_no_text_is_its_own_translation(tmp_path, name):
    """Also under another name, as a link is; and in a file of columns that are one and the same."""
    (tmp_path / name).write_text("a\tb\n")
    (tmp_path / "link").symlink_to(tmp_path / name)
    for other in (name, "link"):
        with pytest.raises(InputError, match="is named for both sides, so each line would be its own translation"):
            ParallelFiles(tmp_path / name, tmp_path / other, ParallelTextConfig()).check()
    (tmp_path / "pairs.tsv").write_text("a\tb\n")
    same = ParallelTextConfig(source_column=2)
    with pytest.raises(InputError, match="both column 2, so each .* Set data.source_column and data.target_column"):
        read_parallel_text(tmp_path / "pairs.tsv", tmp_path / "pairs.tsv", same)
    train = ("pairs.tsv",)
    with pytest.raises(InputError, match="is named for both sides"):
        read_corpus(ParallelTextConfig(str(tmp_path), train, train, validation_source=name, validation_target=name))


def test_every_verb_reads_the_columns_of_a_run(run, tmp_path, capsys):
    """What stands in other columns is no part of a sentence."""
    (tmp_path / "pairs.tsv").write_text("one\teins\tx\ntwo\tzwei\ty\n")
    (tmp_path / "plain").write_text("one\ntwo\n")
    outputs = []
    for name in ("pairs.tsv", "plain"):
        assert command("translate", "--run", str(run), "--input", str(tmp_path / name)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["text", "text.GZ", "text.txt"])
def test_compression_is_known_by_its_first_bytes(tmp_path, compress, name):
    (tmp_path / name).write_bytes(compress(TEXT[:9].encode()) + compress(TEXT[9:].encode()))  # one after the other
    assert list(iterate_lines(tmp_path / name)) == LINES


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x28\xb5\x2f\xfd....", "is compressed by Zstandard, which is not read here. Unpack it first"),
        (b"PK\x03\x04....", "is compressed by ZIP"),
        (gzip.compress(b"a\nb\n" * 99, mtime=0)[:-9], "not a whole gzip file"),
        (bz2.compress(b"a\nb\n")[:-9], "not a whole bzip2 file"),
        (lzma.compress(b"a\nb\n")[:-9], "not a whole xz file"),
        (gzip.compress(b"a\n", mtime=0) + b"rubbish", "not a whole gzip file"),
        (b"\xff\xfea\0", "line 1: not valid UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(iterate_lines(tmp_path / "text"))


@pytest.mark.parametrize(
    "suffix, content", [(".gz", gzip.decompress), (".BZ2", bz2.decompress), (".xz", lzma.decompress), (".txt", bytes)]
)
def test_an_output_is_compressed_as_its_name_says(tmp_path, suffix, content):
    """Also one that is gone on with, and one of `evaluate`."""
    path = tmp_path / f"out{suffix}"
    with pytest.raises(KeyboardInterrupt), PartialOutput(path, {}, False) as output:
        output.write(["one", "zw\u00f6lf"], "", False, 2)
        raise KeyboardInterrupt
    with Path(f"{path}.partial").open("ab") as file:  # half of a write
        file.write(b"\x1f\x8bhalf of it")
    with PartialOutput(path, {}, True) as output:
        assert output.progress.lines == 2
        output.write(["three"], "", False, 1)
    assert content(path.read_bytes()).decode() == "one\nzw\u00f6lf\nthree\n"
    with output_of_lines(path, ()) as write:
        write(["four"])
    assert content(path.read_bytes()) == b"four\n" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="Zstandard files cannot be written"):
        PartialOutput(tmp_path / "out.zst", {}, False)


def test_no_output_replaces_an_input(run, tmp_path, capsys):
    """Under no name of the file: `evaluate` once wrote its translations over the references."""
    source, reference, link, hard = (tmp_path / name for name in ("source", "reference", "link", "hard"))
    for path in (source, reference):
        path.write_text("one\n")
    link.symlink_to(reference)
    hard.hardlink_to(source)
    for output in (source, reference, link, hard, tmp_path / "." / "source"):
        files = ["--source", str(source), "--reference", str(reference), "--output", str(output)]
        assert command("evaluate", "--run", str(run), *files) == 2
        assert f"error: --output {output} is the file " in capsys.readouterr().err
    assert source.read_text() == reference.read_text() == "one\n" and len(list(tmp_path.iterdir())) == 4


def test_an_output_behind_a_symbolic_link_is_written_there(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(file)
    for line in ("one", "two"):
        with output_of_lines(link, ()) as write:
            write([line])
        assert link.is_symlink() and file.read_text() == f"{line}\n"


def test_a_pipe_is_read_and_written(tmp_path, capfdbinary):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content in (b"one\ntwo", gzip.compress(b"one\ntwo\n", mtime=0)):
        writer = threading.Thread(target=pipe.write_bytes, args=[content])
        writer.start()
        assert list(iterate_lines(pipe)) == ["one", "two"]
        writer.join()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    with StreamOutput(pipe) as output:
        output.write(["one"], "", False, 1)
    reader.join()
    assert found == [b"one\n"]
    for path in (Path("/dev/null"), Path("-"), Path("/dev/stdout")):
        with output_of_lines(path, ()) as write:
            write(["two"])
    assert capfdbinary.readouterr().out == b"two\ntwo\n"
    text = ParallelFiles(pipe, tmp_path / "text", ParallelTextConfig())
    (tmp_path / "text").write_text("eins\n")
    with pytest.raises(InputError, match="pipe or a device, and it is read twice. Write its text to a file first"):
        _ = text.fingerprint
    with pytest.raises(InputError, match="is a folder, and a text file is needed"):
        list(iterate_lines(tmp_path))
    with pytest.raises(InputError, match="there is no text file at a"):
        list(iterate_lines(Path("a\0b")))


def test_a_line_without_an_end_takes_little_memory(tmp_path):
    endless = tmp_path / "endless"
    with gzip.open(endless, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write("\u00e4".encode() * 500_000)
        file.write(b"\nnext\r\n")
    with within_limits(seconds=4.0, mebibytes=60), LineReader(endless) as lines:
        first, second = lines
    assert first == "\u00e4" * (text_files.MAX_CHARACTERS + 1) and second == "next"


def test_a_chunk_of_long_lines_has_few_of_them():
    lines = iter(["x" * text_files.MAX_CHARACTERS] * 9)
    sizes = [len(chunk) for chunk in text_files.chunks_of(lines, 100, len, lambda _: True)]
    assert sizes == [4, 4, 1]
