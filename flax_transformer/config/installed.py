"""The recipes that are installed with the package, by name."""

from pathlib import Path

from flax_transformer.object_storage import AnyPath, any_path

# In a clone this folder is a link to `configs/` at the top. A wheel has the files.
FOLDER = Path(__file__).parent.parent / "configs"


def installed_recipes() -> list[str]:
    """Returns the names of the recipes that are installed with the package, sorted.

    Example:
        >>> "number_words" in installed_recipes()
        True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(text: str) -> AnyPath:
    """Returns the path of a recipe: that of an installed one for its name, such as "number_words".

    A file of that name in the working directory comes first.

    Args:
        text: a path, or the name of an installed recipe.

    Raises:
        ConfigError: an address of storage that is not supported.

    Example:
        >>> recipe_path("number_words").name, recipe_path("mine/recipe.yaml").name
        ('number_words.yaml', 'recipe.yaml')
    """
    path = any_path(text)
    if text in installed_recipes() and not path.is_file():
        return FOLDER / f"{text}.yaml"
    return path
