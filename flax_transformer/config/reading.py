"""Reading a configuration from YAML, strictly, and writing it to YAML, completely."""

import contextlib
import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from flax_transformer.config.installed import installed_recipes
from flax_transformer.config.old_keys import explain_old_key, with_new_keys
from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError, did_you_mean, shortened, shown
from flax_transformer.object_storage import AnyPath
from flax_transformer.small_files import write_atomically

Section = TypeVar("Section")

# Limits of a configuration file. They bound the time and the memory that any file can take.
MOST_BYTES = 1 << 18
MOST_NESTED = 20

# Sections that the configuration of every run has, since the first version.
SECTIONS_OF_RUN = ("run", "data", "tokenizer", "model", "batching", "optimizer", "training", "decoding", "mesh")


# --- YAML -> dataclass


def from_dict(cls: type[Section], values: Any, path: str = "") -> Section:
    """Returns a `cls` made from a nested dict, strictly.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type. The message names the nearest known keys.
    """
    where = f"section '{path}'" if path else "the configuration"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields to values, got {shown(values)}.")
    hints = get_type_hints(cls)
    # Every section is a dataclass; Python has no public type to say that of `Section`.
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    kind = getattr(cls, "kind", None)
    given = {}
    for key, value in values.items():
        if key == "kind" and kind is not None:
            continue
        if key not in known:
            full = shortened(f"{path}.{key}" if path else str(key))
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
        raise ConfigError(f"{path}.kind: unknown kind {shown(kind)}.{did_you_mean(str(kind), names)}")
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
        raise ConfigError(explained or f"{path}: expected one of {', '.join(map(str, choices))}; got {shown(value)}.")
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
    if isinstance(value, str) and not _is_plain(value):
        raise ConfigError(f"{path}: {shown(value)} has a NUL character or half of a surrogate pair. Take it out.")
    if type(value) is not hint:
        raise ConfigError(f"{path}: expected {hint.__name__}, got {shown(value)} ({type(value).__name__}).")
    return value


def _is_plain(text: str) -> bool:
    """Returns whether a text can be written to a file, and can be a part of a path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


class StrictLoader(yaml.SafeLoader):
    """Loader of plain YAML with limits, which refuses a key that occurs twice in a mapping.

    PyYAML silently forgets the first of two equal keys.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._nested = 0

    def compose_node(self, parent, index):
        """Returns the next node.

        Raises:
            yaml.YAMLError: the node is nested too deeply.
        """
        if self._nested == MOST_NESTED:
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        self._nested += 1
        node = super().compose_node(parent, index)
        self._nested -= 1
        return node

    def construct_object(self, node, deep=False):
        """Returns the value of a node.

        Raises:
            yaml.YAMLError: the value does not fit the tag of the node, such as `!!timestamp foo`.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # as PyYAML meets it
            value = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"
            what = f"{value} cannot be read as {shown(node.tag.removeprefix('tag:yaml.org,2002:'))}"
            raise yaml.MarkedYAMLError(None, None, what, node.start_mark) from error

    def construct_mapping(self, node, deep=False):
        """Returns the mapping of a node.

        Raises:
            yaml.YAMLError: a key occurs twice, or is not plain text.
        """
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    None, None, "a key must be plain text; is a template not filled in?", key.start_mark
                )
            if key.value in seen:
                twice = f"key {shown(key.value)} stands twice"
                raise yaml.MarkedYAMLError(None, None, twice, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: AnyPath, of_run: bool = False) -> Config:
    """Returns the configuration in a YAML file. Fields that the file leaves out get their defaults.

    Args:
        path: the file.
        of_run: whether the file belongs to a run folder. Then old keys are translated, and no section may be missing.
            In a recipe an old key is an error.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of the wrong type or out of range, or fields that
            contradict each other.

    Example:
        >>> from flax_transformer.config.installed import recipe_path
        >>> config = read_config(recipe_path("number_words"))
        >>> config.data.kind, config.model.model_dim
        ('number_words', 128)
    """
    try:
        values = _read_yaml(path)
        if of_run and isinstance(values, dict):
            _check_complete(values)
            values = with_new_keys(values)
        return from_dict(Config, values)
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from error


def _check_complete(values: dict[str, Any]) -> None:
    """Raises a `ConfigError` if the configuration of a run lacks a section, which `write_config` has written."""
    if missing := [name for name in SECTIONS_OF_RUN if name not in values]:
        raise ConfigError(
            f"the configuration of a run has all sections, and this file lacks '{missing[0]}': it is cut short or "
            "damaged. Put it back from a copy, or from the recipe that the run was started with."
        )


def _read_yaml(path: AnyPath) -> Any:
    if not path.exists() or path.is_dir():
        raise ConfigError(
            f"no configuration file at {path}. Recipes lie in the folder configs/ of a clone, and these can be named "
            f"without a path: {', '.join(installed_recipes())}."
        )
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path} is no configuration: it has more than {MOST_BYTES:,} bytes. Give a recipe.")
    try:
        values = yaml.load(content.decode("utf-8"), Loader=StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {shortened(str(error), 300)}. Mend it.") from error
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


def write_config(config: Config, path: AnyPath) -> None:
    """Writes all fields as YAML, atomically, with the defaults, so that the file alone describes the run."""
    write_atomically(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
