"""A Sphinx extension: each file of the repository that a page links to becomes a page with numbered lines.

On a code host, a link such as `../flax_transformer/nn/attention.py` shows the file. On the site it leads to a page that
this extension makes. Outputs of executed cells link to lines as `code:PATH#L12`. They cannot know the depth of their
page, so the extension completes these links too.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent.resolve()
FOLDER = "_code"
LINK = re.compile(r'href="code:([^"#]+)(#[^"]*)?"')


def link_to_code_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Replaces links to files that are no pages of the site by links to the pages that this extension makes."""
    folder = Path(app.env.doc2path(app.env.current_document.docname)).parent
    for link in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        target = link["reftarget"]
        if link.get("refdomain") == "doc":  # the name of a page: an absolute path without its ending, if there is none
            if target in app.env.found_docs:
                continue
            target = f"{target}.md"
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT) and path.exists():
            uri = f"code:{path.relative_to(ROOT).as_posix()}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))


def complete_links(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Completes the links `code:PATH#LINE` of a page, and notes which files they need."""

    def complete(match: re.Match[str]) -> str:
        path, line = match.group(1), match.group(2) or ""
        if not (ROOT / path).exists():
            raise ValueError(f"{pagename} links to {path}, which is not in the repository.")
        app.linked_code.add(path)  # type: ignore[attr-defined]
        return f'href="{context["pathto"](f"{FOLDER}/{path}")}{line}"'

    if "body" in context:
        context["body"] = LINK.sub(complete, context["body"])


def code_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields a page for each file of the package, and for each other text file that pages link to."""
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "flax_transformer").rglob("*.py")}
    for path in sorted(files | app.linked_code):  # type: ignore[attr-defined]
        if (ROOT / path).is_dir():
            text = "\n".join(sorted(entry.name for entry in (ROOT / path).iterdir()))
        else:
            text = (ROOT / path).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(path)
        except ClassNotFound:
            lexer = TextLexer()
        lines = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True, wrapcode=True)
        code = highlight(text, lexer, lines).replace('name="L-', 'name="L').replace('href="#L-', 'href="#L')
        code = re.sub(r'id="L-(\d+)"', r'id="L\1"', code)
        yield f"{FOLDER}/{path}", {"title": path, "body": f"<h1>{path}</h1>{code}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the extension."""
    app.linked_code = set()  # type: ignore[attr-defined]
    app.connect("doctree-read", link_to_code_pages, priority=100)  # before Sphinx copies the downloads
    app.connect("html-page-context", complete_links)
    app.connect("html-collect-pages", code_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
