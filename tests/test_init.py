"""`init`: what it sees in a corpus, how it splits it, and the recipe that it writes."""

import gzip
import json
import math
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml

from flax_transformer.cli.init import InitOptions
from flax_transformer.config.commented_recipe import CommentedRecipe
from flax_transformer.config.reading import read_config, to_dict
from flax_transformer.config.recipe import Config
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.held_out import PARTS, Split, SplitSizes, choose_split, new_folder, write_split
from flax_transformer.data.preparation import prepare_tokenizers
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus
from flax_transformer.data.text_survey import SmallestHashes, is_clean, source_key, survey_pairs
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.experiment.corpus_report import check_survey, survey_text, survey_warnings
from flax_transformer.experiment.first_recipe import (
    ON_CPU,
    SIZES,
    Machine,
    bleu_tokenizer,
    choose_size,
    length_limit,
    num_evaluations,
    num_steps,
    reason_of_steps,
)
from flax_transformer.experiment.programs import make_programs
from flax_transformer.experiment.text import prepare_text
from flax_transformer.experiment.training_time import TrainingTime, duration_text, measure_training, step_seconds
from flax_transformer.parallel.mesh import make_mesh
from tests.small_run import command

WORDS = number_words_corpus(NumberWordsConfig(num_train=2_000, num_validation=1, num_test=1)).train[0].pairs()
PAIRS = list(dict.fromkeys(WORDS))[:900]  # each once
CPU = Machine("cpu", 2, "cpu", 12 << 30)
GPU = Machine("gpu", 8, "NVIDIA H100 80GB HBM3", 80 << 30)


def write(folder: Path, pairs: list[tuple[str, str]], name: str = "text") -> tuple[str, str]:
    paths = folder / f"{name}.en", folder / f"{name}.de"
    for side, path in enumerate(paths):
        path.write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def init(*arguments: str) -> int:
    return command("init", *arguments, "--no-measure")


# --- the survey


def test_a_survey_counts_what_can_be_counted_by_hand():
    found = survey_pairs(
        [("ab c", "d"), ("", "e"), ("x", "x"), ("ab c", "d"), ("y" * 40, "zzz"), ("q" * 1001, "r" * 900)]
    )
    assert (found.num_pairs, found.num_empty, found.num_copied, found.num_duplicates) == (6, 1, 1, 1)
    assert (found.num_unequal, found.first_unequal, found.num_very_long) == (1, 5, 1)
    assert (found.source.characters, found.target.characters) == (4 + 1 + 4 + 40 + 1001, 1 + 1 + 1 + 1 + 3 + 900)
    assert (found.source.words, found.source.longest, found.source.longest_line) == (7, 1001, 6)
    assert found.source.counts["a"] == 2 and found.clean_sources.num_distinct == 1
    x, y = np.log1p([4, 0, 1, 4, 40, 1001]), np.log1p([1, 1, 1, 1, 3, 900])
    assert found.length_correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    single = survey_pairs([("a", "b")])
    assert math.isnan(single.length_correlation) and survey_text(single).endswith(
        "1.00 times the characters of the source"
    )


def test_different_items_are_counted_exactly_and_then_estimated():
    few = SmallestHashes(4)
    few.add([7, 7, 9])
    assert (few.num_distinct, few.exact) == (2, True)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, 20_000, dtype=np.uint64).tolist()
    whole, parts = SmallestHashes(1_000), SmallestHashes(1_000)
    whole.add(numbers * 2)
    for start in range(0, 20_000, 700):
        parts.add(numbers[::-1][start : start + 700])
    assert not whole.exact and not parts.exact and np.array_equal(whole.values, parts.values)
    assert abs(whole.num_distinct / 20_000 - 1) < 5 / math.sqrt(1_000)  # five standard errors


def test_a_survey_warns_of_lines_that_have_shifted():
    assert not survey_warnings(survey_pairs(PAIRS))
    mixed = list(zip([s for s, _ in PAIRS], random.Random(1).sample([t for _, t in PAIRS], len(PAIRS)), strict=True))
    assert "correlate" in survey_warnings(survey_pairs(mixed))[0]


@pytest.mark.slow
def test_a_survey_of_a_long_text_needs_little_memory(monkeypatch):
    monkeypatch.setattr("flax_transformer.data.text_survey.HASHES_AT_ONCE", 1 << 12)
    peaks = []
    for length in (10_000, 30_000):
        tracemalloc.start()
        survey_pairs((f"line {n} of a long text", f"Zeile {n} eines langen Textes") for n in range(length))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)  # the lines between have thrice that as objects of Python


# --- the split


def test_no_source_stands_on_both_sides_of_a_split(tmp_path):
    doubled = [*PAIRS, *PAIRS[:300], *((f"{source.upper()}!", target) for source, target in PAIRS[300:500])]
    texts = {}
    for name, pairs in (("one", doubled), ("other", random.Random(0).sample(doubled, len(doubled)))):
        split = choose_split(survey_pairs(pairs), ["validation", "test"], 50)
        with new_folder(tmp_path / name) as folder:
            sizes = write_split(pairs, split, folder)
        assert (sizes.validation, sizes.test) == (50, 50)
        assert sizes.train + sizes.validation + sizes.test + sizes.left_out == len(doubled)
        texts[name] = {file.name: file.read_text().splitlines() for file in (tmp_path / name).iterdir()}
        keys = [
            {source_key(line) for line in texts[name][f"{part}.source"]} for part in ("train", "validation", "test")
        ]
        assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
        known = set(doubled)
        for part in PARTS:
            assert set(zip(texts[name][f"{part}.source"], texts[name][f"{part}.target"], strict=True)) <= known
    for file in texts["one"]:  # the order of the lines decides nothing but, of variants, which one is first
        lines = [sorted({source_key(line) for line in texts[name][file]}) for name in texts]
        assert lines[0] == lines[1] or file.endswith("target")


def test_keys_ignore_punctuation_and_case_but_no_vowel_sign():
    assert source_key('He said: "Hi!"') == source_key("he_said   hi")
    assert source_key("कि") != source_key("की")  # they differ in a combining mark alone
    assert source_key("I ❤️ you.") == source_key("I ❤ you") and source_key("1️⃣ dog") == source_key("1 dog")
    assert source_key("كَتَبَ") == source_key("كتب")  # vowel signs are optional there
    assert source_key("caf\u00e9") == source_key("cafe\u0301") != source_key("cafe")
    assert source_key("?!") != source_key("...")


def test_sources_of_given_text_are_not_trained_on(tmp_path):
    given = frozenset(source_key(source) for source, _ in PAIRS[:10])
    split = choose_split(survey_pairs(PAIRS), ["test"], 20, given)
    assert not split.validation and len(split.test) == 20
    sizes = write_split(PAIRS, split, tmp_path)
    trained = {source_key(line) for line in (tmp_path / "train.source").read_text().splitlines()}
    assert not trained & (given | split.test) and sizes.train == len(trained)
    assert not (tmp_path / "validation.source").exists()


def test_repetitions_of_a_held_out_pair_do_not_make_a_corpus_small():
    pairs = [*PAIRS, *(10 * PAIRS)]
    survey, sizes = survey_pairs(pairs), SplitSizes(train=8_800, validation=50, test=50, left_out=1_000)
    assert sizes.num_distinct(survey.pairs.num_distinct) == len(PAIRS) - 100
    assert SplitSizes(train=9, validation=1, test=0, left_out=2).num_distinct(12) == 9  # no pair repeats another


def test_only_clean_pairs_are_held_out():
    assert is_clean("a", "b") and not is_clean("a", "a") and not is_clean(" ", "b") and not is_clean("a" * 50, "b")
    assert choose_split(survey_pairs(PAIRS), []) == Split()


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "text") as folder:
        (folder / "train.source").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    for content in ("old", "new"):
        with new_folder(tmp_path / "text", replace=content == "new") as folder:
            (folder / content).write_text("x")
        assert [path.name for path in (tmp_path / "text").iterdir()] == [content]
    with pytest.raises(InputError, match="is there already"), new_folder(tmp_path / "text"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# --- the rules


def test_sizes_follow_the_corpus_and_the_machine():
    assert [choose_size(n, CPU) for n in (0, 14_999, 15_000, 59_999)] == [SIZES[0], SIZES[0], SIZES[1], SIZES[1]]
    assert choose_size(60_000, CPU) == choose_size(10**8, CPU) == ON_CPU
    assert choose_size(60_000, GPU) == SIZES[2] and choose_size(10**8, GPU) == SIZES[3]


def test_the_reason_of_the_steps_names_their_limits():
    expected = {
        8: (3_000, "375 epochs of 8 batches; 50 are usual for this size, but at least 3,000 steps"),
        100: (5_000, "50 epochs of 100 batches; 50 are usual for this size"),
        4_000: (100_000, "25 epochs of 4,000 batches; 50 are usual for this size, but at most 100,000 steps"),
    }
    assert {n: (num_steps(SIZES[0], n), reason_of_steps(SIZES[0], n)) for n in expected} == expected


def test_evaluations_take_a_fifth_of_a_training_at_most():
    assert [num_evaluations(seconds, 10.0) for seconds in (1.0, 200.0, 10_000.0)] == [2, 4, 10]


def test_a_length_limit_keeps_nearly_all_pairs():
    assert length_limit(np.full(10, 5)) == 64
    assert length_limit(np.arange(1, 1001) // 10) == 128  # 99.9 % have at most 99 tokens
    assert length_limit(np.array([*[10] * 2000, 900])) == 64  # one of 2,001 is no reason
    assert length_limit(np.full(10, 900)) == 256


@pytest.mark.parametrize(
    ("target", "tokenizer"),
    [
        ("ein Hund läuft", "13a"),
        ("一只狗在跑", "zh"),
        ("犬が走っている", "char"),
        ("개가 달린다", "char"),
        ("สุนัขกำลังวิ่งอยู่ในสวน", "char"),
    ],
)
def test_the_target_language_chooses_the_words_of_bleu(target, tokenizer):
    found, reason = bleu_tokenizer(survey_pairs([("a dog runs", target)]))
    assert found == tokenizer and reason


def test_a_recipe_has_a_reason_above_its_values():
    recipe = CommentedRecipe("A title.", "Another line.")
    recipe.set("of the run", run="runs/x")
    recipe.set("of both", model__dropout=0.2, model__norm_order="pre")
    recipe.set("many", training__steps=7)
    expected = """\
# A title.
#
# Another line.
# of the run
run: runs/x
model:
  # of both
  dropout: 0.2
  norm_order: pre
training:
  # many
  steps: 7
"""
    assert recipe.text == expected
    assert recipe.config.model.dropout == 0.2 and recipe.config.training.steps == 7


# --- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a corpus, its recipe, and the parts of its text."""
    folder = tmp_path_factory.mktemp("init")
    source, target = write(folder, [*PAIRS, *PAIRS[:5]])
    assert init("--train", source, target, "--output", str(folder / "my.yaml"), "--held-out", "40") == 0
    return folder


def test_the_recipe_of_a_corpus_is_one_and_says_why(made):
    config = read_config(made / "my.yaml")
    corpus = load_corpus(config.data)
    assert (len(corpus.validation.source), len(corpus.test.source)) == (40, 40)
    assert len(list(corpus.train[0].pairs())) == len(PAIRS) + 5 - 80 - sum(
        source_key(s) in {source_key(t) for t in (*corpus.test.source, *corpus.validation.source)} for s, _ in PAIRS[:5]
    )
    assert config.filters.drop_duplicates and not config.filters.drop_identical
    assert config.model.model_dim == 128 and config.tokenizer.vocab_size < 2_000  # numbers have few pieces
    assert config.optimizer.decay_steps == config.training.steps >= 3_000
    written = yaml.safe_load((made / "my.yaml").read_text())
    defaults = to_dict(Config(data=config.data))
    for section, values in to_dict(config).items():  # what differs from the defaults is there, and nothing is lost
        if isinstance(values, dict) and section != "data":
            assert values == defaults[section] | written.get(section, {})
    text = re.sub(r"\n\s*# ", " ", (made / "my.yaml").read_text())
    assert "5 pairs repeat an earlier one" in text and "Sennrich and Zhang 2019" in text


def test_what_is_there_is_kept_unless_asked(made, capsys):
    source, target = str(made / "text.en"), str(made / "text.de")
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert init("--train", source, target, "--output", str(made / "my.yaml")) == 2
    assert "my.yaml is there already" in capsys.readouterr().err
    (made / "my.yaml").rename(made / "aside.yaml")
    assert init("--train", source, target, "--output", str(made / "my.yaml")) == 2
    assert "my.text is there already" in capsys.readouterr().err
    (made / "aside.yaml").rename(made / "my.yaml")
    assert before == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert init("--train", source, target, "--output", str(made / "my.yaml"), "--held-out", "40", "--replace") == 0
    out = capsys.readouterr().out
    for path, content in before.items():  # all is as before: the choice depends on the text alone
        assert path.suffix == ".yaml" or path.read_bytes() == content
    assert "905 pairs of lines" in out and "40 validation and 40 test pairs" in out
    assert "flax-transformer train --config" in out and "my.text/test.source" in out


def test_given_parts_are_used_where_they_are(tmp_path, capsys):
    lines = [json.dumps({"en": source, "de": target}) + "\n" for source, target in PAIRS]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress("".join(lines[:600]).encode()))
    (tmp_path / "dev.jsonl").write_text("".join(lines[590:650]))
    keys = ["--source-key", "en", "--target-key", "de"]
    arguments = ["--train", str(tmp_path / "train.jsonl.gz"), "--validation", str(tmp_path / "dev.jsonl")]
    arguments += ["--test", str(tmp_path / "dev.jsonl"), "--output", str(tmp_path / "my.yaml")]
    assert init(*arguments, *keys) == 0
    assert "10 training pairs have a source" in capsys.readouterr().err
    corpus = load_corpus(read_config(tmp_path / "my.yaml").data)
    assert corpus.validation.source == [source for source, _ in PAIRS[590:650]] and not (tmp_path / "my.text").exists()
    arguments = ["--train", str(tmp_path / "train.jsonl.gz"), "--test", str(tmp_path / "dev.jsonl"), *keys]
    assert init(*arguments, "--output", str(tmp_path / "half.yaml"), "--held-out", "30") == 0
    corpus = load_corpus(read_config(tmp_path / "half.yaml").data)
    assert (len(corpus.validation.source), len(corpus.test.source)) == (30, 60)
    assert len(list(corpus.train[0].pairs())) == 600 - 30 - 10


def faulty(folder: Path, case: str) -> list[str]:
    """Writes a corpus with a fault, and returns the arguments of `init`."""
    source, target = write(folder, PAIRS[:200])
    output = folder / "my.yaml"
    train = [source, target]
    match case:
        case "too small":
            train = [*write(folder, PAIRS[:30], "small")]
        case "one column":
            (folder / "one.tsv").write_text("".join(f"{source}\n" for source, _ in PAIRS))
            train = [str(folder / "one.tsv")]
        case "one file of text":
            train = [source]
        case "different lengths":
            Path(target).write_text("nur eine Zeile\n")
        case "not UTF-8":
            Path(source).write_bytes(Path(source).read_text().replace("one", "é").encode("latin-1"))
        case "empty files":
            train = [*write(folder, [], "empty")]
        case "empty lines":
            train = [*write(folder, [("", "a"), ("b", " ")], "blank")]
        case "the same file":
            train = [source, source]
        case "the same text":
            Path(target).write_text(Path(source).read_text())
        case "no folder":
            output = folder / "missing" / "my.yaml"
        case "a folder as output":
            output = folder
        case "no file":
            train = [source, str(folder / "none.de")]
        case "three files":
            train = [source, target, target]
        case "text as output":
            return ["--train", *train, "--output", source, "--replace"]
        case "the name of the folder":
            output = folder / "my.text"
        case "text in the folder":
            (folder / "my.text").mkdir()
            train = [*write(folder / "my.text", PAIRS[:200])]
            return ["--train", *train, "--output", str(output), "--replace"]
        case "the same validation text":
            return ["--train", *train, "--validation", *train, "--held-out", "1", "--output", str(output)]
        case "hours without end":
            return ["--train", *train, "--output", str(output), "--hours", "inf"]
    return ["--train", *train, "--output", str(output)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "too small",
            r"too small to take test and validation text .*: 100 pairs for each need 800 .* there are 30",
        ),
        ("one column", r"one.tsv, line 1: expected at least 2 columns .* found 1"),
        ("one file of text", r"named for both sides.*Name two files, or a .tsv or .jsonl file"),
        ("different lengths", r"same number of lines, but .* has 200 and .* has 1\b"),
        ("not UTF-8", r"text.en, line \d+: not valid UTF-8 .*iconv"),
        ("empty files", r"no line; at least one sentence pair"),
        ("empty lines", r"each of its 2 pairs has an empty side"),
        ("the same file", r"named for both sides"),
        ("the same text", r"200 of 200 pairs have the same text on both sides"),
        ("no folder", r"there is no folder .*missing. Make it first"),
        ("a folder as output", r"is a folder. Name a file, such as"),
        ("no file", r"there is no text file at .*none.de"),
        ("three files", r"--train takes a file of each language, .* got 3"),
        ("text as output", r"--output .*text.en is the file .*text.en that is read, too"),
        ("the name of the folder", r"my.text has the name of the folder for the text.*my.yaml"),
        ("text in the folder", r"text.en is text to read, and --replace would remove its folder .*my.text"),
        ("the same validation text", r"there are 0 besides those of the text that is named"),
        ("hours without end", r"--hours must be a finite number above 0, got inf"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(case, message, tmp_path, capsys):
    arguments = faulty(tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    assert init(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_learnt_from_a_text_that_is_no_translation():
    with pytest.raises(InputError, match="the same text on both sides"):
        check_survey(survey_pairs([("a", "a")] * 3), "x")


def test_options_are_checked_before_the_text_is_read(monkeypatch):
    with pytest.raises(ConfigError, match="--held-out must be at least 1"):
        InitOptions((), Path("x.yaml"), held_out=0).check()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"--output x.yaml: the folder . cannot be written"):
        InitOptions((), Path("x.yaml")).check()


# --- the time


def test_a_time_is_the_sum_of_its_parts():
    time = TrainingTime(step=2.0, fastest_step=1.0, slowest_step=3.0, evaluation=5.0, test=7.0, compilation=8.0)
    about, least, most = time.total(10, 2)
    assert (about, least, most) == pytest.approx((20 + 25, 0.85 * (10 + 25), 1.15 * (30 + 25)))
    assert [duration_text(seconds) for seconds in (40, 100, 6_000, 10**6)] == [
        "40 seconds", "2 minutes", "1.7 hours", "11.6 days"
    ]  # fmt: skip


def test_the_time_of_a_training_comes_from_its_own_programs(run, recipe):
    """The programs are those of a run that has ended, so they lie in the cache."""
    config = read_config(recipe)
    corpus, mesh = load_corpus(config.data), make_mesh(config.mesh)
    text = prepare_text(config, corpus, prepare_tokenizers(corpus.train, config.tokenizer), mesh)
    programs = make_programs(config, text, mesh)
    time = measure_training(config, text, programs)
    assert 0 < time.fastest_step <= time.step <= time.slowest_step < 60
    assert time.evaluation > 0 and time.test > 0 and time.compilation > 0
    assert 0 < step_seconds(config, text, programs) < 60
