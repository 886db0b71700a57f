"""Damage to the user's cache: what lies there is made again, and is never taken for right when it is not."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from flax_transformer.data import preparation, text_files, token_cache
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.preparation import prepare_tokenizers
from flax_transformer.data.token_cache import DTYPES, TokenizedParts, tokenized_parts
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import InputError
from flax_transformer.user_cache import CHECKED, remove_damaged_programs
from tests.faults.damage import cut, empty, files_of, flip_bit, remove, replace, zero

LINES = [f"a{n} b{n % 7} c{n % 5}" for n in range(60)]
TEXT = ParallelText([*LINES, LINES[0]], [*LINES[::-1], LINES[0]])
CONFIG = TokenizerConfig(vocab_size=20)


@pytest.fixture(scope="module")
def tokenizers() -> TokenizerPair:
    return TokenizerPair.train(TEXT.source, TEXT.target, CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizers) -> Path:
    """A cache folder with the tokens of one text."""
    return tokenized_parts((TEXT,), tokenizers, tmp_path_factory.mktemp("cache") / "tokens").folder.parent


def contents(tokens: TokenizedParts) -> list:
    arrays = tokens.source.ids, tokens.source.offsets, tokens.target.ids, tokens.target.offsets, *tokens.marks
    return [tokens.ends, *(np.asarray(array).tolist() for array in arrays)]


@pytest.mark.parametrize("name", [*DTYPES, "meta.json"])
def test_damage_to_cached_tokens_is_noticed_and_they_are_made_again(tmp_path, cache, tokenizers, capsys, name):
    whole = contents(tokenized_parts((TEXT,), tokenizers, cache))
    assert not capsys.readouterr().err
    tokens = Path(shutil.copytree(cache, tmp_path / "tokens"))
    (folder,) = tokens.iterdir()
    file = folder / name
    damages = [lambda bit=bit: flip_bit(file, bit) for bit in (0, 77, 1_000_003)]
    damages += [lambda: cut(file, 0.5), lambda: zero(file, 0.9), lambda: empty(file), lambda: remove(file)]
    if name == "meta.json":
        for text in (b"5", b"[" * 9999, b"{}", json.dumps({"ends": [61]}).encode(), b"\xff", b"1" * 5000):
            damages.append(lambda text=text: replace(file, text))
    for damage in damages:
        damage()
        assert contents(tokenized_parts((TEXT,), tokenizers, tokens)) == whole
        err = capsys.readouterr().err
        assert err.startswith(f"warning: {folder} is damaged (") and err.endswith("so the text is tokenised again\n")
    assert contents(tokenized_parts((TEXT,), tokenizers, tokens)) == whole and not capsys.readouterr().err
    assert list(tokens.iterdir()) == [folder]


def test_a_disk_that_damages_what_is_written_is_named(tmp_path, tokenizers, monkeypatch):
    write = token_cache._write

    def write_badly(parts, tokenizers, sample, folder):
        write(parts, tokenizers, sample, folder)
        flip_bit(folder / "source_ids", 5)

    monkeypatch.setattr(token_cache, "_write", write_badly)
    with pytest.raises(InputError, match=r"is damaged, though it has just been made: source_ids .*Check that disk"):
        tokenized_parts((TEXT,), tokenizers, tmp_path)


def test_long_lines_are_tokenised_in_groups_of_few_pairs(tmp_path, tokenizers, cache, monkeypatch):
    """The memory of a group is limited by its characters, too; the tokens are the same."""
    whole, sizes, encode = contents(tokenized_parts((TEXT,), tokenizers, cache)), [], token_cache._encode
    monkeypatch.setattr(text_files, "CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(token_cache, "_encode", lambda *rest: sizes.append(len("".join(rest[1]))) or encode(*rest))
    assert contents(tokenized_parts((TEXT,), tokenizers, tmp_path)) == whole
    assert len(sizes) > 10 and max(sizes) < 100


def test_a_compiled_program_that_was_cut_short_is_removed_at_the_next_start(tmp_path):
    """JAX would keep it for ever. Those that have been checked are not read again."""
    damages = {
        "whole": lambda _: None,
        "cut": lambda file: cut(file, 0.9),
        "empty": empty,
        "zeros": lambda f: zero(f, 0.5),
    }
    for name, damage in damages.items():
        (tmp_path / f"{name}-cache").write_bytes(zlib.compress(bytes(range(256)) * 9))
        damage(tmp_path / f"{name}-cache")
    whole = tmp_path / "whole-cache"
    (tmp_path / "other").write_bytes(b"no program")
    remove_damaged_programs(tmp_path)
    left = {CHECKED, "other", whole.name}
    assert {path.name for path in tmp_path.iterdir()} == left
    cut(whole, 0.9)
    os.utime(whole, (0, 0))
    remove_damaged_programs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left
    whole.touch()
    remove_damaged_programs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left - {whole.name}
    remove_damaged_programs(tmp_path / "nothing")  # is no error


def test_damage_to_cached_tokenizers_is_noticed_and_they_are_learnt_again(tmp_path, monkeypatch, tokenizers):
    monkeypatch.setattr(preparation, "user_cache", lambda _: tmp_path)
    right = prepare_tokenizers((TEXT,), CONFIG).fingerprint
    model, fingerprint = files_of(tmp_path)[::-1]
    assert (model.name, fingerprint.name) == ("joint.model", preparation.FINGERPRINT)
    learnt = []
    train = TokenizerPair.train
    monkeypatch.setattr(TokenizerPair, "train", lambda *rest: learnt.append(1) or train(*rest))
    damages = [lambda bit=bit: flip_bit(model, bit) for bit in range(800, 6000, 800)]
    damages += [lambda: empty(fingerprint), lambda: replace(fingerprint, b"\xff"), lambda: remove(fingerprint)]
    for damage in damages:
        damage()
        assert prepare_tokenizers((TEXT,), CONFIG).fingerprint == right
    assert len(learnt) == len(damages)
    assert prepare_tokenizers((TEXT,), CONFIG).fingerprint == right and len(learnt) == len(damages)
