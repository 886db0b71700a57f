"""Sphinx configuration of the site: `sphinx-build -W docs build/site`.

Pages are executed in the build. Their outputs are kept in a cache, whose folder has a hash of all code that they run.
So no output is older than its code.
"""

import hashlib
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent


PACKAGE = [*(ROOT / "flax_transformer").rglob("*.py"), DOCS / "guide" / "short_training.py"]
DRAWN_FROM = [*(DOCS / "guide").glob("*.py"), *(DOCS / "guide" / "results").glob("*.json")]


def code_hash(files: list[Path]) -> str:
    """Returns a hash of files and their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


sys.path[:0] = [str(DOCS), str(ROOT)]
CACHE = ROOT / "build" / "site_cache"
# The environment of the kernels that execute the pages.
os.environ["PYTHONPATH"] = os.pathsep.join([str(DOCS / "guide"), str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ["GUIDE_RUNS"] = str(CACHE / f"runs-{code_hash(PACKAGE)}")
os.environ["JAX_PLATFORMS"] = "cpu"

project = "flax_transformer"
author = copyright = "the authors of flax_transformer"
version = release = installed_version("flax-transformer")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "code_pages",
    "configuration_page",
    "docstrings",
]
exclude_patterns = ["**/Dockerfile"]
smartquotes_action = "D"  # dashes alone: quotation marks stay as they are written
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures; most of them belong to other packages

add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings mark code by single backquotes
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # links to headings, as code hosts make them

nb_execution_mode = "cache"
nb_execution_cache_path = str(CACHE / f"cells-{code_hash(PACKAGE + DRAWN_FROM)}")
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds of one cell
nb_merge_streams = True

html_theme = "furo"
html_title = "flax_transformer"
html_static_path = ["_static"]
html_css_files = ["guide.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app):
    """Marks the pages of docs/zh as Chinese, so that browsers choose Chinese forms of signs that Japanese shares."""

    def mark(app, pagename, templatename, context, doctree):
        if pagename.startswith("zh/"):
            context["language"] = "zh-Hans"

    app.connect("html-page-context", mark)
