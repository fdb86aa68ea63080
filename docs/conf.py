"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs outputs/site` builds the site offline.

Sphinx, because MkDocs and Material are in maintenance mode, Zensical is young, and Sphinx is stable, checks its links
strictly, and lets a small extension generate the reference without intersphinx or a network.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import dlopt  # noqa: E402

project = "dlopt"
author = "dlopt developers"
copyright = author
release = version = dlopt.__version__

extensions = ["myst_parser", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "markdown", ".myst": "markdown"}  # .myst: generated
exclude_patterns = ["_ext", "_static"]
smartquotes = False  # two hyphens are a flag
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = False

html_theme = "furo"
html_title = f"dlopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False


def setup(app: Sphinx) -> None:
    """Generates pages before Sphinx looks for them, and fills `<!-- generated -->` in the pages that it reads."""
    import benchmark
    import gallery
    import reference

    docs = Path(app.srcdir)
    parts = {
        "reference/commands": reference.commands_table,
        "reference/groups": reference.choices_table,
        "gallery": lambda: gallery.lectures(docs),
        "claims": lambda: gallery.claims(docs),
        "results": benchmark.results,
    }

    def fill(_: Sphinx, name: str, source: list[str]) -> None:
        if name in parts:
            source[0] = source[0].replace("<!-- generated -->", parts[name]())

    app.connect("builder-inited", lambda _: reference.write(docs))
    app.connect("env-get-outdated", lambda *_: list(parts))  # conf/ may have changed
    app.connect("source-read", fill)
