"""Selects the files of the report by `output`, `format` and `plot`, and renders their content."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_atomically
from dlopt.basics.secrets import redact
from dlopt.results import drawing, paper
from dlopt.results.columns import summary_csv
from dlopt.results.destination import PICTURES, Destination, Format
from dlopt.results.page import page
from dlopt.results.plots import PLOTS, plots
from dlopt.results.ranking import Ranking
from dlopt.results.tables import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES: Mapping[Format, str] = {
    "html": "index.html", "csv": "summary.csv", "latex": "table.tex", "markdown": "table.md",
}  # fmt: skip


@dataclass(frozen=True)
class ReportContent:
    """Export options.

    `refresh`: seconds after which the page reloads; `top`: rows of a table for a paper; `sections`: of packages.
    """

    ranking: Ranking
    title: str
    made: str
    target: float | None
    test: bool
    refresh: float | None
    top: int
    sections: Sequence[Section] = ()


def render(to: Destination, report: ReportContent) -> dict[Path, bytes]:
    """Returns the content of the files. Raises `UserError` if there is no data for the requested plot."""
    files: dict[str, bytes] = {}
    figures = _figures(to, report) if set(to.formats) & set(PICTURES) else {}
    for form in sorted(to.formats, key=lambda form: form in PICTURES):  # the pictures last
        if form not in PICTURES:
            files[_NAMES[form]] = redact(_text(form, report)).encode()
        elif to.is_file and form == "pdf":
            files |= _pages(figures)
        else:
            files |= {f"{name}.{form}": drawing.encoded(figure, form) for name, figure in figures.items()}
    return {to.path if to.is_file else to.path / name: content for name, content in files.items()}


def write(to: Destination, report: ReportContent) -> list[Path]:
    """Writes the files and removes other plots of an earlier report. Raises OSError, and `UserError` as `render`."""
    files = render(to, report)
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    names = [] if to.is_file or to.plot is not None else list(PLOTS)
    for path in [to.path / f"{name}.{form}" for form in to.formats if form in PICTURES for name in names]:
        if path not in files:
            path.unlink(missing_ok=True)
    return list(files)


def _text(form: Format, report: ReportContent) -> str:
    if form == "html":
        return page(
            report.ranking, title=report.title, made=report.made, target=report.target, test=report.test,
            refresh=report.refresh, sections=report.sections,
        )  # fmt: skip
    if form == "csv":
        return summary_csv(report.ranking, report.target, test=report.test)
    render_table = paper.latex if form == "latex" else paper.markdown
    return render_table(report.ranking, made=f"{report.title}, {report.made}", test=report.test, top=report.top)


def _figures(to: Destination, report: ReportContent) -> dict[str, "Figure"]:
    """Returns the plots to draw: a PNG or SVG file has one, by default the learning curves."""
    plot = to.plot
    if plot is None and to.is_file and to.formats != ("pdf",):
        plot = "learning_curves"
    figures = plots(report.ranking, report.target, None if plot is None else [plot])
    if (plot is not None or to.is_file) and not figures and report.refresh is None:
        raise UserError(f"plot={plot or 'learning_curves'}: these runs have no data for it")
    return figures


def _pages(figures: Mapping[str, "Figure"]) -> dict[str, bytes]:
    """Returns a PDF file with a page per figure; none without figures."""
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages

    if not figures:
        return {}
    file = io.BytesIO()
    with matplotlib.rc_context(drawing.FILE_STYLE), PdfPages(file, metadata=drawing.METADATA["pdf"]) as pages:
        for figure in figures.values():
            pages.savefig(figure)
    return {"plots.pdf": file.getvalue()}
