"""A recipe whose every value has its reason beside it, as a YAML file for a reader."""

import textwrap
from typing import Any

import yaml

from flax_transformer.config.reading import from_dict
from flax_transformer.config.recipe import Config

COLUMNS = 100


class CommentedRecipe:
    """Values of a recipe by their dotted names, each with a reason. Values that are not set have their defaults.

    Args:
        title: paragraphs above the recipe.
    """

    def __init__(self, *title: str):
        self.title = list(title)
        self._values: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}

    def set(self, reason: str, **values: Any) -> None:
        """Sets values that have one reason.

        Args:
            reason: the reason; "" for a value that the reason before it explains, too.
            values: values by dotted names, with "__" for each dot, such as model__dropout.
        """
        for key, value in values.items():
            name = key.replace("__", ".")
            self._values[name] = list(value) if isinstance(value, tuple) else value
            self._reasons[name], reason = reason, ""

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str, default: Any) -> Any:
        """Returns a value, or `default` if it is not set."""
        return self._values.get(name, default)

    @property
    def config(self) -> Config:
        """The recipe as a configuration.

        Raises:
            ConfigError: a value is out of range, or two contradict each other.
        """
        return from_dict(Config, self._nested())

    @property
    def text(self) -> str:
        """The recipe as YAML, with each reason as a comment above its values."""
        lines = [line for paragraph in self.title for line in (*_comment(paragraph, ""), "#")][:-1]
        for section, values in self._nested().items():
            if not isinstance(values, dict):
                lines += [*_comment(self._reasons[section], ""), _field(section, values)]
                continue
            lines.append(f"{section}:")
            for name, value in values.items():
                lines += _comment(self._reasons[f"{section}.{name}"], "  ")
                lines.append(f"  {_field(name, value)}")
        return "".join(f"{line}\n" for line in lines)

    def _nested(self) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in self._values.items():
            section, _, field = name.partition(".")
            if field:
                nested.setdefault(section, {})[field] = value
            else:
                nested[section] = value
        return nested


def _field(name: str, value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    end_of_document = "...\n"  # which follows a value that is no collection
    return f"{name}: {dumped.removesuffix(end_of_document).rstrip()}"


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text, COLUMNS, initial_indent=prefix, subsequent_indent=prefix, break_long_words=False, break_on_hyphens=False
    )
