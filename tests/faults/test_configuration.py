"""Configurations that cannot be used: each gets one short sentence, in a short time."""

import ast
import re
import time
from pathlib import Path

import pytest

from flax_transformer.config.reading import MOST_BYTES, read_config, write_config
from flax_transformer.config.recipe import Config, DecodingConfig, TrainingConfig
from flax_transformer.errors import ConfigError, describe_os_error, shown
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.run_folder import RunFolder
from tests.faults.damage import cut, empty, remove

PACKAGE = Path(__file__).parent.parent.parent / "flax_transformer"


def aliases(text: str, levels: int = 6) -> str:
    """A list of lists of lists; each level names the one below ten times."""
    levels_of_text = [f"&a0 [{','.join([text] * 10)}]"]
    levels_of_text += [f"&a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return f"[{', '.join(levels_of_text)}]"


def merges(levels: int = 8) -> str:
    """Mappings that each merge ten times the one before."""
    rows = ["m0: &m0 {a: 1}"] + [f"m{n}: &m{n} {{<<: [{','.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(rows)


HOSTILE = {
    "run: !!timestamp foo": "'foo' cannot be read as 'timestamp'",
    'run: !!int ""': "'' cannot be read as 'int'",
    "run: !!bool foo": "'foo' cannot be read as 'bool'",
    "run: !!float foo": "'foo' cannot be read as 'float'",
    "run: !!map [a]": "expected a mapping node",
    "run: 2026-13-45": "'2026-13-45' cannot be read as 'timestamp'",
    f"run: {'9' * 5000}": "cannot be read as 'int'",
    f"run: {'[' * 5000}": "nested too deeply",
    f"run: {'{a: ' * 30}": "nested too deeply",
    f"training: {{steps: 0x{'f' * 20000}}}": "training.steps must lie between .* got a number of thousands of digits",
    f"training: {{steps: -0x{'f' * 20000}}}": "training.steps must lie between",
    f"mesh: {{data: 0x{'f' * 20000}}}": "mesh.data must lie between",
    f"run: 0x{'f' * 20000}": r"run: expected str, got a number of thousands of digits \(int\)",
    f"decoding: {{max_length_offset: 1{'0' * 400}}}": "decoding.max_length_offset must lie between .* got 1000",
    f"optimizer: {{epsilon: 1{'0' * 400}}}": "optimizer.epsilon: expected float, got 1000",
    f"run: {aliases('text')}": r"run: expected str, got \[\['text', 'text', .* \(list\)",
    f"suppress: {aliases('text')}": "unknown key 'suppress'",
    f"? {'k' * 100_000}\n: 1": "unknown key 'k{80}\\.\\.\\.'",
    merges(): "unknown key 'm0'",
    "run: &a [*a]": "run: expected str, got",
    'run: "a\\0b"': "NUL character",
    'run: "a\\ud800"': "half of a surrogate pair",
    "x" * (MOST_BYTES + 1): "is no configuration: it has more than 262,144 bytes",
    "model: {model_dim: 2147483647, num_heads: 4}": "must divide model.model_dim .* nearest: 1, 2147483647",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_a_hostile_configuration_gets_a_short_sentence_in_a_short_time(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=rf"c\.yaml[\s\S]*{HOSTILE[text]}") as caught:
        read_config(file)
    assert time.process_time() - started < 1 and len(str(caught.value)) < 1000


def test_the_configuration_of_a_run_that_is_cut_short_is_no_recipe_of_defaults(tmp_path):
    """A recipe may leave out what it likes; the configuration of a run has all."""
    folder = RunFolder(tmp_path)
    write_config(Config(), folder.config_file)
    before = folder.config_file.read_bytes()
    for damage in (empty, lambda file: cut(file, 0.9), lambda file: cut(file, 0.5)):
        folder.config_file.write_bytes(before)
        damage(folder.config_file)
        with pytest.raises(ConfigError, match=r"config\.yaml.*(cut short or damaged. Put it back|is not a YAML file)"):
            folder.read_config()
    remove(folder.config_file)
    with pytest.raises(ConfigError, match="no configuration file"):
        folder.read_config()


def test_numbers_beyond_32_bits_are_refused_from_python_too():
    for make in (lambda: TrainingConfig(steps=10**400), lambda: TransformerConfig(vocab_multiple=2**31)):
        with pytest.raises(ConfigError, match="must lie between -2147483647 and 2147483647, got"):
            make()
    assert Config(training=TrainingConfig(seed=2**32 - 1)).training.seed == 2**32 - 1


def test_numbers_beyond_those_of_float32_are_refused():
    for value in (1e39, -1e308, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="repetition_penalty must be a finite number, got .* at most 3.4e38"):
            DecodingConfig(repetition_penalty=value)


def test_the_names_of_files_in_messages_are_short():
    assert len(describe_os_error(OSError(36, "File name too long", "x" * 10_000))) < 500


def test_values_in_messages_are_short():
    bomb: list = ["x"]
    for _ in range(40):
        bomb = [bomb] * 10
    for value in ("x" * 10**6, bomb, {i: bomb for i in range(1000)}, 10**5000, [10**5000], b"x" * 10**6, None, 1.5):
        assert 0 < len(shown(value)) <= 103
    assert [shown(value) for value in ("four", 4.0, True, None)] == ["'four'", "4.0", "True", "None"]


def test_no_message_shows_a_value_as_it_comes():
    """`!r` in the text of a message would show all of a value, so `shown` takes its place."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FormattedValue) and path != PACKAGE / "__init__.py":
                shows = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "repr"
                assert node.conversion != ord("r") and not shows, f"{path}, line {node.lineno}: use shown(...)"


def test_keys_of_an_earlier_version_in_sections_that_are_none_are_explained(tmp_path):
    folder = RunFolder(tmp_path)
    write_config(Config(), folder.config_file)
    text = folder.config_file.read_text()
    for section, value in (("decoding", "[a]"), ("batching", "5"), ("decoding", "{max_length_factor: x, stop: sure}")):
        folder.config_file.write_text(re.sub(rf"(?m)^{section}:\n(  .*\n)+", f"{section}: {value}\n", text))
        with pytest.raises(ConfigError, match=rf"'?{section}.* (must be a mapping|expected float)"):
            folder.read_config()
