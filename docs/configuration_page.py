"""A Sphinx extension: pages of the reference get the tables of the configuration and of the commands.

The tables come from the dataclasses and their docstrings, as `--help` does. They are made while a page is read.
"""

import dataclasses
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from flax_transformer.cli.main import VERBS
from flax_transformer.config.recipe import Config

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def sections() -> list[tuple[str, type]]:
    """Returns name and dataclass of each section and kind; the name of the recipe itself is ""."""
    found: list[tuple[str, type]] = [("", Config)]
    for name, hint in get_type_hints(Config).items():
        choices = [hint, *get_args(hint)]
        found += [(name, choice) for choice in choices if dataclasses.is_dataclass(choice)]
    return found


def type_text(hint: Any) -> str:
    """Returns a type as a recipe's author thinks of it, such as "integer" or "one of `a`, `b`"."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {type_text(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_text(each) for each in get_args(hint))
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_text(value: Any) -> str:
    """Returns a default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value!r}`" if isinstance(value, int | float) else f"`{value}`" if value else '`""`'


def one_line(text: str) -> str:
    """Returns a text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def table(section: str, cls: type) -> str:
    """Returns the heading, the text and the table of a section, as Markdown."""
    parsed = docstring_parser.parse(cls.__doc__ or "")
    texts = {param.arg_name: param.description or "" for param in parsed.params}
    hints = get_type_hints(cls)
    kind = getattr(cls, "kind", None)
    title = f"`{section}`" if section else "The recipe itself"
    if kind:
        title += f", `kind: {kind}`"
    lines = [f"\n## {title}\n", one_line(parsed.description or ""), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    values = cls()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(getattr(values, field.name)):
            continue
        key = f"{section}.{field.name}" if section else field.name
        default = default_text(getattr(values, field.name))
        lines.append(f"| `{key}` | {type_text(hints[field.name])} | {default} | {one_line(texts[field.name])} |")
    return "\n".join(lines) + "\n"


def tables() -> str:
    """Returns the tables of all sections, as Markdown."""
    return "".join(table(*section) for section in sections())


def commands() -> str:
    """Returns the table of all verbs, as Markdown."""
    rows = [f"| `{verb}` | {one_line(text)} |" for verb, text in VERBS.items()]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows]) + "\n"


TABLES = {"reference/configuration": tables, "reference/commands": commands}


def add_tables(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Appends the tables to the source of a page."""
    if docname in TABLES:
        source[0] += TABLES[docname]()


def setup(app: "Sphinx") -> dict[str, bool]:
    """Connects the extension."""
    app.connect("source-read", add_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
