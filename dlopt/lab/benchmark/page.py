"""Writes the results of a benchmark as a self-contained HTML page, with its figures and a LaTeX table."""

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import dlopt
from dlopt.files import write_atomically
from dlopt.lab.benchmark import sections
from dlopt.lab.benchmark.figures import draw
from dlopt.lab.benchmark.markup import Html, escaped, tag
from dlopt.lab.benchmark.results import Results
from dlopt.lab.benchmark.scores import Summary, summarize
from dlopt.lab.benchmark.table import latex
from dlopt.results import drawing
from dlopt.results.page import document, read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    drawing.fix_layout(figure)
    patches = figure.patch, *(axes.patch for axes in figure.axes)
    white = [patch for patch in patches if tuple(patch.get_facecolor()[:3]) == (1.0, 1.0, 1.0)]
    for patch in white:  # transparent on dark pages
        patch.set_alpha(0)
    svg = drawing.encoded(figure, "svg")
    for patch in white:
        patch.set_alpha(1)
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return Html(f'<img src="{source}" alt="{escaped(description)}" width="{96 * figure.get_figwidth():.0f}">')


def _document(results: Results, body: Html) -> str:
    style = read_text("page.css") + files("dlopt.lab.benchmark").joinpath("page.css").read_text(encoding="utf-8")
    title = escaped(f"Optimizer benchmark, {results.tier} tier")
    version = escaped(f"Written by dlopt {dlopt.__version__}")
    content = f"<header><h1>{title}</h1></header>\n<main>\n{body}\n</main>\n<footer>{version}</footer>"
    return document(title, style, content)
