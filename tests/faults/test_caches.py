"""What a preparation meets: a home that cannot be written, a full disk, text that changes or is left out."""

import contextlib
import resource
from pathlib import Path

import pytest

from flax_transformer import user_cache
from flax_transformer.cli import main as cli
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.preparation import normalized_lines, prepare_tokenizers, prepare_training_pairs
from flax_transformer.data.sentencepiece_tokenizer import MAX_LEARNT_BYTES, SentencePieceTokenizer
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import InputError, RunFolderError
from flax_transformer.experiment.report import describe_normalization
from flax_transformer.inference.translator import Translator
from flax_transformer.run_folder import RunFolder
from tests.small_models import SOURCES, TARGETS, TOKENIZERS
from tests.small_run import command

TEXT = ParallelText(SOURCES[:40], TARGETS[:40])


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """No folder for caches can be made, whoever the user is."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    user_cache._temporary_cache.cache_clear()
    yield
    user_cache._temporary_cache.cache_clear()


def test_a_cache_is_never_needed(no_home, capsys):
    assert user_cache.writable_cache("compiled") is None
    assert cli.run_verb(lambda *_: 0, [], "flax-transformer") == 0 and not capsys.readouterr().err
    tokenizers = prepare_tokenizers((TEXT,), TokenizerConfig(vocab_size=40))
    (pairs,) = prepare_training_pairs((TEXT,), tokenizers, FilterConfig(), 64, 64)
    err = capsys.readouterr().err
    assert len(pairs) == 40 and err.count("Set XDG_CACHE_HOME to keep them.") == 1  # said once


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache.writable_cache("compiled") is None


@contextlib.contextmanager
def small_files():
    """Files of this process have at most one byte; a larger one is as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_of_the_cache_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for prepare in (
        lambda: prepare_tokenizers((TEXT,), TokenizerConfig(vocab_size=41)),
        lambda: prepare_training_pairs((TEXT,), TOKENIZERS, FilterConfig(), 64, 64),
    ):
        with pytest.raises(OSError, match="File too large") as error, small_files():
            prepare()
        assert str(tmp_path) in cli.describe(error.value)
    assert not list(tmp_path.rglob("*partial*"))


def test_an_output_that_cannot_be_written_fails_before_the_work(run, tmp_path, monkeypatch, capsys):
    """The folder /proc takes no file, not even from root; other systems have no such folder."""
    monkeypatch.setattr(Translator, "load", None)  # would fail
    for name in ("source", "reference"):
        (tmp_path / name).write_text("one\n")
    texts = ["--source", str(tmp_path / "source"), "--reference", str(tmp_path / "reference")]
    assert command("evaluate", "--run", str(run), *texts, "--output", "/proc/out") == 2
    assert "/proc" in capsys.readouterr().err
    assert command("translate", "--run", str(run), "--input", texts[1], "--output", "/proc/out") == 2
    assert "/proc" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(RunFolderError, match=r"new/run cannot be made, since .* cannot be written. Choose another by"):
        RunFolder(tmp_path / "new" / "run").check_unused()


def test_normalisation_says_what_it_changes():
    """Spaces alone are no change, nor are letters that only look unusual."""
    persian, thai = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0e17\u0e33"
    text = ParallelText([persian, thai, "one  two", "a\u00a0b"], ["eins", "\u201ezw\u00f6lf\u201c", thai, "\ufb01n"])
    found = normalized_lines((text,), TOKENIZERS)
    assert (found.num_changed, found.num_lines) == (4, 8) and found.before == persian
    said = describe_normalization((text,), TOKENIZERS)
    assert said.startswith("normalisation changes 4 of the first 8 lines of training text, such as '\u0645")
    assert "\\u200c" in said and said.endswith("tokenizer.normalization: identity changes none\n")
    config = TokenizerConfig(vocab_size=60, normalization="identity")
    plain = TokenizerPair.train(SOURCES, TARGETS, config)
    assert describe_normalization((text,), plain) == "" == describe_normalization((TEXT,), TOKENIZERS)


@pytest.mark.parametrize(
    "lines, reason",
    [
        (["a" * (MAX_LEARNT_BYTES + 1)] * 3, "of its 3 lines, each is empty or longer than 4,192 bytes"),
        (["\u00e4" * 2_097, ""], "of its 2 lines, each is empty or longer than 4,192 bytes"),
        ([], "of its 0 lines"),
        (["\u200b", " "], "no character is left after normalisation"),
    ],
)
def test_text_that_nothing_can_be_learnt_from_is_explained(lines, reason):
    with pytest.raises(InputError, match=reason):
        SentencePieceTokenizer.train(lines, TokenizerConfig(vocab_size=40))


def test_the_longest_line_that_is_learnt_from_is_known():
    SentencePieceTokenizer.train(["a" * MAX_LEARNT_BYTES], TokenizerConfig("char", vocab_size=40))
