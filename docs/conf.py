"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs outputs/site` builds the site offline.

Sphinx, because MkDocs and Material are in maintenance mode, Zensical is young, and Sphinx is stable, checks its links
strictly, and lets a small extension generate the reference without intersphinx or a network.
"""

import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import extras  # noqa: E402

import dlopt  # noqa: E402

project = "dlopt"
author = "dlopt developers"
copyright = author
release = version = dlopt.__version__
repository = extras.repository()  # None: not published, and no page links to it

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown", ".myst": "markdown", ".ipynb": "markdown"}  # .myst: generated; .ipynb: see `fill`
exclude_patterns = ["_ext", "_static", "_templates"]
templates_path = ["_templates"]
smartquotes = False  # two hyphens are a flag
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = False

html_theme = "furo"
html_theme_options = {"source_edit_link": f"{repository}/edit/main/docs/{{filename}}"} if repository else {}
html_context = {"repository": repository}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        *(["links.html"] if repository else []),
        "sidebar/scroll-end.html",
    ]
}
html_title = f"dlopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_search_scorer = str(ROOT / "docs" / "_ext" / "scorer.js")
html_show_copyright = False
html_copy_source = False

_WRITTEN_ELSEWHERE = {"changelog", "contributing"}  # pages that include a file of the repository


def setup(app: Sphinx) -> None:
    """Generates the reference before Sphinx looks for pages, and links its overviews to these pages.

    `<!-- toctree ... -->`: a toctree, which readers of the repository need not see. A page whose commands
    scripts/type_pages.py typed says when.
    """
    import notebook
    import reference

    docs = Path(app.srcdir)
    parts = {"reference/commands": reference.commands_table, "reference/groups": reference.choices_table}
    printed = extras.printed()
    generated = re.compile(r"<!-- generated: \w+ -->.*?<!-- end -->", re.DOTALL)

    def fill(_: Sphinx, name: str, source: list[str]) -> None:
        if app.env.doc2path(name).suffix == ".ipynb":
            source[0] = notebook.page(source[0], Path(name).name, docs / "_static/notebooks", "/_static/notebooks")
        if name in parts:
            source[0] = generated.sub(lambda _: parts[name](linked=True), source[0])
        if name in printed:
            day = date.fromisoformat(printed[name]).strftime("%-d %B %Y")
            source[0] += f"\n\n*The commands of this page were last typed, and their output compared, on {day}.*\n"
        source[0] = re.sub(r"<!-- toctree\n(.*?)-->", r"```{toctree}\n\1```", source[0], flags=re.DOTALL)

    def omit_edit_link(_: Sphinx, name: str, __: str, context: dict[str, Any], ___: object) -> None:
        """Leaves out the link to a source that is not in the repository, or is not the text of the page."""
        if context.get("page_source_suffix") == ".myst" or name in _WRITTEN_ELSEWHERE:
            context["page_source_suffix"] = ""

    app.connect("builder-inited", lambda _: reference.write(docs))
    app.connect("env-get-outdated", lambda *_: list(parts))  # conf/ may have changed
    app.connect("source-read", fill)
    app.connect("html-page-context", omit_edit_link)
