"""Flags of a command line, which change a configuration."""

import dataclasses
from types import SimpleNamespace
from typing import Any, get_type_hints

import tyro

from flax_transformer.config.old_keys import explain_old_key
from flax_transformer.config.reading import section_class
from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError


def override(config: Config, arguments: list[str], program: str = "train.py") -> Config:
    """Returns `config` with the values of dotted flags, such as `["--model.num-heads", "8"]`.

    `--data.kind` and `--model.kind` choose another kind of section, with that kind's defaults.

    Raises:
        ConfigError: an unknown kind, or a key that has another name now.
        SystemExit: with code 2, after tyro's message, an unknown flag, a value of the wrong type, or fields that
            contradict each other. With code 0 after `--help`.

    Example:
        >>> override(Config(), ["--model.num-heads", "8", "--optimizer.warmup-steps", "100"]).model.num_heads
        8
    """
    hints = get_type_hints(Config)
    # This is no `Config` yet, since a section of a new kind may contradict the others until all flags are read.
    sections: Any = SimpleNamespace(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    rest, position = [], 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        section = name.removeprefix("--").removesuffix(".kind")
        if name in ("--data.kind", "--model.kind"):
            if not equals:
                position += 1
                if position == len(arguments):
                    raise ConfigError(f"{name} needs a value.")
                value = arguments[position]
            chosen = section_class(hints[section], {"kind": value}, section)
            if not isinstance(getattr(sections, section), chosen):
                setattr(sections, section, chosen())
        else:
            given = value if equals else "".join(arguments[position + 1 : position + 2])
            if name.startswith("--") and (explained := explain_old_key(name[2:].replace("-", "_"), given)):
                raise ConfigError(explained)
            rest.append(arguments[position])
        position += 1
    # Tyro reads one attribute of its default for each field, so the default need not be a `Config`.
    return tyro.cli(Config, default=sections, args=rest, config=(tyro.conf.AvoidSubcommands,), prog=program)
