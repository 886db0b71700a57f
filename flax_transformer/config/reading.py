"""Reading a configuration from YAML, strictly, and writing it to YAML, completely."""

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from flax_transformer.config.old_keys import explain_old_key, with_new_keys
from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError, did_you_mean

Section = TypeVar("Section")


# --- YAML -> dataclass


def from_dict(cls: type[Section], values: Any, path: str = "") -> Section:
    """Returns a `cls` made from a nested dict, strictly.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type. The message names the nearest known keys.
    """
    where = f"section '{path}'" if path else "the configuration"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields to values, got {values!r}.")
    hints = get_type_hints(cls)
    # Every section is a dataclass; Python has no public type to say that of `Section`.
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    kind = getattr(cls, "kind", None)
    given = {}
    for key, value in values.items():
        if key == "kind" and kind is not None:
            continue
        if key not in known:
            full = f"{path}.{key}" if path else str(key)
            if explained := explain_old_key(full, value):
                raise ConfigError(explained)
            raise ConfigError(f"unknown key '{full}' in the configuration.{did_you_mean(str(key), known)}")
        given[key] = _convert(hints[key], value, f"{path}.{key}" if path else key)
    return cls(**given)


def section_class(hint: Any, values: Any, path: str) -> Any:
    """Returns the dataclass of a section; where there are several, the one of its `kind`."""
    if dataclasses.is_dataclass(hint):
        choices = [hint]
    else:
        choices = [c for c in get_args(hint) if dataclasses.is_dataclass(c)]
    if not choices:
        return None
    kinds = {getattr(c, "kind", None): c for c in choices}
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind is None:
        return choices[0]
    if not isinstance(kind, str) or kind not in kinds:
        names = [k for k in kinds if k]
        raise ConfigError(f"{path}.kind: unknown kind {kind!r}.{did_you_mean(str(kind), names)}")
    return kinds[kind]


def _convert(hint: Any, value: Any, path: str) -> Any:
    section = section_class(hint, value, path)
    if section is not None:
        return from_dict(section, value, path)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices and type(value) in {type(c) for c in choices}:
            return value
        explained = explain_old_key(path, value) if isinstance(value, str) else ""
        raise ConfigError(explained or f"{path}: expected one of {', '.join(map(str, choices))}; got {value!r}.")
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, path)
    if get_origin(hint) is tuple:  # of any length and one type; a single value is read as a tuple of one
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(get_args(hint)[0], each, path) for each in values)
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__}).")
    return value


class UniqueKeyLoader(yaml.SafeLoader):
    """Loader of plain YAML that refuses a key which occurs twice in a mapping; PyYAML silently forgets the first."""

    def construct_mapping(self, node, deep=False):
        """Returns the mapping of a node.

        Raises:
            yaml.YAMLError: a key occurs twice, or is not plain text.
        """
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text; is a template not filled in?", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: Path, of_run: bool = False) -> Config:
    """Returns the configuration in a YAML file. Fields that the file leaves out get their defaults.

    Args:
        path: the file.
        of_run: whether the file belongs to a run folder, whose old keys are translated. In a recipe they are errors.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of the wrong type or out of range, or fields that
            contradict each other.
    """
    try:
        values = _read_yaml(path)
        return from_dict(Config, with_new_keys(values) if of_run and isinstance(values, dict) else values)
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}. Recipes lie in the folder configs/ of a clone.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:  # such as a 13th month in what looks like a date
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    return {} if values is None else values


# --- dataclass -> YAML


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a nested dict of all fields, with the `kind` of each section that has one."""
    values = {"kind": config.kind} if hasattr(config, "kind") else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        value = list(value) if isinstance(value, tuple) else value
        values[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


def write_config(config: Config, path: Path) -> None:
    """Writes all fields as YAML, with the defaults, so that the file alone describes the run."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
