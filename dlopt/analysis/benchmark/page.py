"""Writes the results of a benchmark as a self-contained HTML page, with its figures and a LaTeX table."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import dlopt
from dlopt.analysis import drawing
from dlopt.analysis.benchmark import sections
from dlopt.analysis.benchmark.figures import draw
from dlopt.analysis.benchmark.latex import latex
from dlopt.analysis.benchmark.markup import Html, escaped, picture, tag
from dlopt.analysis.benchmark.results import Results
from dlopt.analysis.benchmark.scores import Summary, summarize
from dlopt.analysis.report.page import csp_hash
from dlopt.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_FORMATS = ("png", "pdf")


def write(results: Results, folder: Path) -> list[Path]:
    """Writes index.html, table.tex and figures/NAME.png and .pdf; returns their paths. Raises OSError."""
    if results.optimizers:
        summary = summarize(results)
        figures = draw(results, summary)
        contents = {"index.html": page(results, summary, figures), "table.tex": latex(results, summary)}
    else:
        figures, contents = {}, {"index.html": _document(results, tag("p", "There are no results yet."))}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    written = {folder / name: text.encode() for name, text in contents.items()}
    for name, figure in figures.items():
        written |= {folder / "figures" / f"{name}.{form}": drawing.encoded(figure, form) for form in _FORMATS}
    for path, content in written.items():
        write_atomically(path, content)
    return [*written]


def page(results: Results, summary: Summary, figures: Mapping[str, "Figure"]) -> str:
    pictures = {name: _picture(figure, sections.DESCRIPTIONS[name]) for name, figure in figures.items()}
    return _document(results, sections.body(results, summary, pictures))


def _picture(figure: "Figure", description: str) -> Html:
    figure.draw_without_rendering()  # computes the layout once for all formats
    figure.set_layout_engine("none")
    white = [patch for patch in (figure.patch, *(axes.patch for axes in figure.axes)) if _is_white(patch)]
    for patch in white:  # transparent on dark pages
        patch.set_alpha(0)
    svg = drawing.encoded(figure, "svg")
    for patch in white:
        patch.set_alpha(1)
    return picture(svg, description, figure.get_figwidth())


def _is_white(patch: "Patch") -> bool:
    return tuple(patch.get_facecolor()[:3]) == (1.0, 1.0, 1.0)


def _document(results: Results, body: Html) -> str:
    own = files("dlopt.analysis.benchmark").joinpath("page.css").read_text(encoding="utf-8")
    style = (files("dlopt.analysis.report") / "page" / "page.css").read_text(encoding="utf-8") + own
    policy = f"default-src 'none'; img-src data:; style-src '{csp_hash(style)}'; base-uri 'none'; form-action 'none'"
    title = escaped(f"Optimizer benchmark, {results.tier} tier")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
<footer>{escaped(f"Written by dlopt {dlopt.__version__}")}</footer>
</body>
</html>
"""
