"""Configuration: strict reading, overrides, and no field that nobody reads."""

import ast
import dataclasses
from pathlib import Path

import pytest

from flax_transformer.cli.train import read_recipe
from flax_transformer.config.command_line import override
from flax_transformer.config.installed import installed_recipes, recipe_path
from flax_transformer.config.old_keys import OLD_KEYS, with_new_keys
from flax_transformer.config.reading import from_dict, read_config, to_dict, write_config
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.parallel_text import ParallelTextConfig
from flax_transformer.data.synthetic import NumberWordsConfig
from flax_transformer.errors import ConfigError
from flax_transformer.models.transformer_config import TransformerConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_read_and_survive_writing(path, tmp_path):
    config = read_config(path)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert config.run == f"runs/{path.stem}"


def test_the_configuration_of_an_earlier_run_folder_is_read():
    """Written by an earlier version, whose maximum lengths counted the end tokens of source and output."""
    path = ROOT / "tests/reference/run_config_before_renaming.yaml"
    found = read_config(path, of_run=True)
    assert found == dataclasses.replace(
        read_config(ROOT / "configs/multi30k_en_de.yaml"),
        run="runs/earlier",
        data=found.data,
        tokenizer=dataclasses.replace(found.tokenizer, max_training_pairs=1000),
        batching=dataclasses.replace(
            found.batching, packing=True, num_buckets=5, gradient_accumulation_steps=2, tokens_per_batch=4096
        ),
        optimizer=dataclasses.replace(
            found.optimizer, weight_decay_include="(kernel|table)$", weight_decay_exclude="(bias|scale|vector)$"
        ),
        training=dataclasses.replace(found.training, best_metric="chrf", early_stopping_patience=3),
        decoding=DecodingConfig(
            length_penalty="average:1.0", stop="heuristic", max_length_factor=2.0, max_length_offset=11, force_eos=True,
            suppress_unknown=True, suppress_sequences=("ein Hund",), suppress_tokens=("\u2581der",), batch_size=16,
        ),
    )  # fmt: skip
    assert from_dict(Config, with_new_keys(to_dict(found))) == found  # today's are left alone


@pytest.mark.parametrize("key", OLD_KEYS)
def test_a_recipe_with_an_old_key_is_refused_and_the_new_one_named(key):
    (section, name), old = key.split("."), OLD_KEYS[key]
    new = r"is gone\. A search waits for" if old.new is None else f"is '{old.new}"
    value = next(iter(old.values), 3)
    with pytest.raises(ConfigError, match=rf"'{key}.* {new}"):
        from_dict(Config, {section: {name: value}})
    with pytest.raises(ConfigError, match=rf"'{key}.* {new}"):
        override(Config(), [f"--{key.replace('_', '-')}={value}"])
    with pytest.raises(ConfigError, match=rf"'{key}.* {new}"):
        override(Config(), [f"--{key.replace('_', '-')}", str(value)])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": {"num_head": 4}}, r"unknown key 'model.num_head' .*Did you mean 'num_heads'"),
        ({"trainin": {}}, r"unknown key 'trainin' .*Did you mean 'training'"),
        ({"model": {"num_heads": "four"}}, r"model.num_heads: expected int, got 'four' \(str\)"),
        ({"model": {"num_heads": 4.0}}, r"model.num_heads: expected int, got 4.0 \(float\)"),
        ({"model": {"num_heads": True}}, r"model.num_heads: expected int, got True \(bool\)"),
        ({"model": {"norm_order": "middle"}}, r"model.norm_order: expected one of post, pre; got 'middle'"),
        ({"tokenizer": {"joint": "yes please"}}, r"tokenizer.joint: expected bool"),
        ({"optimizer": {"epsilon": "tiny"}}, r"optimizer.epsilon: expected float, got 'tiny'"),
        ({"data": {"kind": "paralel_text"}}, r"data.kind: unknown kind 'paralel_text'. Did you mean 'parallel_text'"),
        ({"optimizer": {"epsilon": "nan"}}, r"optimizer.epsilon must be a finite number, got nan"),
        ({"data": {"kind": ["parallel_text"]}}, r"data.kind: unknown kind"),
        ({"data": {"seed": -1}}, r"data.seed must lie between 0 and"),
        ({"data": 3}, r"section 'data' must be a mapping"),
        ({"tokenizer": {"joint": False}}, r"share_embeddings: all needs one vocabulary"),
        ({"training": {"ema_decay": 1.0}}, r"training.ema_decay must lie in \[0, 1\), got 1.0"),
        ({"training": {"steps": 0}}, r"training.steps must be at least 1, got 0"),
        ({"training": {"r_drop": -1.0}}, r"training.r_drop must not be negative .* got -1.0"),
        (
            {
                "training": {"r_drop": 5.0},
                "model": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
            },
            r"training.r_drop: 5.0 compares two passes .* Set model.dropout, or training.r_drop: 0",
        ),
        ({"decoding": {"length_penalty": "gmnt:1"}}, r"unknown length penalty 'gmnt:1'"),
    ],
)
def test_mistakes_are_explained(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, values)


@pytest.mark.parametrize("line", ["run: 2026-13-45", f"run: {'9' * 5000}", f"optimizer: {{epsilon: 1{'0' * 400}}}"])
def test_values_that_python_cannot_hold_are_explained(tmp_path, line):
    (tmp_path / "c.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")


def test_another_kind_comes_with_what_it_needs(capsys):
    """In any order, and though the recipe's other sections contradict the new kind's defaults."""
    packed = from_dict(Config, {"batching": {"packing": True}})
    kind, form = ["--model.kind", "rnn"], ["--batching.no-packing"]
    for flags in (kind + form, form + kind):
        assert override(packed, flags).model.kind == "rnn"
    with pytest.raises(SystemExit):
        override(packed, kind)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "cannot tell them apart. Set batching.packing: false" in message
    assert packed.model.kind == "transformer"


def test_yaml_exponents_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer:\n  epsilon: 1e-7\n  learning_rate_scale: 2\n")
    optimizer = read_config(tmp_path / "c.yaml").optimizer
    assert (optimizer.epsilon, optimizer.learning_rate_scale) == (1e-7, 2.0)


def test_files_that_cannot_be_read_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at .*absent.yaml"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "twice.yaml").write_text("training: {steps: 1}\ntraining: {seed: 1}\n")
    with pytest.raises(ConfigError, match="key 'training' stands twice"):
        read_config(tmp_path / "twice.yaml")
    (tmp_path / "bad.yaml").write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        read_config(tmp_path / "bad.yaml")


def test_overrides_reach_every_depth_and_kind():
    config = override(
        Config(), ["--model.num-heads", "8", "--training.steps=7", "--run", "x", "--tokenizer.no-joint",
                   "--model.share-embeddings", "none", "--data.kind", "parallel_text", "--data.folder", "d"]
    )  # fmt: skip
    assert isinstance(config.model, TransformerConfig)
    assert (config.model.num_heads, config.training.steps, config.run, config.tokenizer.joint) == (8, 7, "x", False)
    assert isinstance(config.data, ParallelTextConfig) and config.data.folder == "d"
    assert isinstance(override(config, ["--data.kind=number_words"]).data, NumberWordsConfig)


@pytest.mark.parametrize("flags", [["--model.num-haeds", "8"], ["--model.num-heads", "eight"]])
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        override(Config(), flags)
    assert stop.value.code == 2
    assert "num-h" in capsys.readouterr().err


def test_every_field_is_read_somewhere():
    """A field that no code mentions as an attribute is a promise nobody keeps."""
    read = set()
    for path in (ROOT / "flax_transformer").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        only_checked = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in only_checked:
                read.add(node.attr)
    configs = [read_config(path) for path in RECIPES]

    def fields(config):
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            yield f.name
            if dataclasses.is_dataclass(value):
                yield from fields(value)

    unread = {name for config in configs for name in fields(config)} - read
    assert not unread


def test_the_written_form_is_complete():
    assert set(to_dict(Config())) == {f.name for f in dataclasses.fields(Config)}
    assert to_dict(Config())["model"]["kind"] == "transformer"


@pytest.mark.parametrize("text", ["optimizer: {learning_rate: {{ lr }}}\n", "? [a, b]\n: 1\n"])
def test_a_key_that_is_no_plain_text_is_explained(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a key must be plain text"):
        read_config(tmp_path / "c.yaml")


def test_an_installed_recipe_is_named_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert installed_recipes() == [path.stem for path in RECIPES]
    config, resume = read_recipe(["--config", "number_words", "--run", "runs/a"], "train.py")
    assert config.data.kind == "number_words" and config.run == "runs/a" and not resume
    with pytest.raises(ConfigError, match="no configuration file at number_word. .* number_words, "):
        read_recipe(["--config", "number_word"], "train.py")


def test_a_file_comes_before_an_installed_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number_words").write_text("run: runs/own")
    assert read_config(recipe_path("number_words")).run == "runs/own"
