"""A Sphinx extension: docstrings as this project writes them become pages.

Formulas are indented paragraphs, and stay as they are written. Signatures are readable, and the attributes of a class
are called attributes.
"""

from typing import Any

from flax import nnx
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util import inspect
from sphinx.util.inspect import stringify_signature

SECTION = ":"  # ends the title of a section, such as "Args:", whose lines are indented, too


def keep_formulas(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Marks each indented paragraph after running text as a literal block. Napoleon reads the sections later."""
    kept: list[str] = []
    in_section = False
    for number, line in enumerate(lines):
        after_blank = number > 0 and not lines[number - 1].strip()
        if line.strip() and not line.startswith(" "):
            in_section = line.rstrip().endswith(SECTION) and line.split()[0][:1].isupper() and len(line.split()) == 1
        text = next((each for each in reversed(kept) if each.strip()), "")
        if line.startswith("    ") and after_blank and not in_section and not text.startswith(" "):
            kept += ["::", ""]
        kept.append(line)
    lines[:] = kept


def readable_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returns: str
) -> Any:
    """Returns a signature with the short name of JAX's arrays; that of a layer is the one of its `__init__`."""
    if what == "class" and issubclass(type(thing), type(nnx.Module)):  # its metaclass takes any arguments
        signature = stringify_signature(
            inspect.signature(thing.__init__, bound_method=True),
            unqualified_typehints=True,
            show_return_annotation=False,
        )
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the extension."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", keep_formulas, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", readable_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
