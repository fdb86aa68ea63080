"""Output files of the report, selected by `output`, `format` and `plot`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.results.confusion import confusion_table
from dlopt.results.destination import SUFFIXES, destination
from dlopt.results.exports import ReportContent, render
from dlopt.results.plots import PLOTS
from dlopt.results.tables import Table
from tests.support.folders import make_run, table

pytestmark = pytest.mark.drawn

STARTS = {".html": b"<!DOCTYPE", ".csv": b"rank,", ".tex": b"% ", ".md": b"| ", ".pdf": b"%PDF", ".png": b"\x89PNG",
          ".svg": b"<?xml"}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportContent:
    folder = tmp_path_factory.mktemp("runs")
    for i in range(2):
        make_run(folder / str(i), lr=0.1 * (i + 1))
    return ReportContent(table(folder), "title", "now", 0.7, test=False, refresh=None, top=20)


def written(
    report: ReportContent, folder: Path, output: str | None, formats: Any = None, plot: str | None = None
) -> set[str]:
    files = render(destination(folder, output, formats, plot), report)
    assert all(content.startswith(STARTS[path.suffix]) for path, content in files.items())
    return {path.name if output is None else str(path) for path in files}


def test_suffix_of_output_selects_one_file(report: ReportContent, tmp_path: Path) -> None:
    assert STARTS.keys() == SUFFIXES.keys()
    for suffix in SUFFIXES:
        assert written(report, tmp_path, f"paper/table.x{suffix}") == {f"paper/table.x{suffix}"}
    assert written(report, tmp_path, "s.PNG".lower(), plot="learning_rates") == {"s.png"}


def test_formats_select_files_of_the_folder(report: ReportContent, tmp_path: Path) -> None:
    curves = {"learning_curves", "learning_curves_seconds", "learning_rates", "lr_sensitivity", "time_to_target"}
    assert written(report, tmp_path, None) == {"index.html", "summary.csv", *(f"{name}.png" for name in curves)}
    both = written(report, tmp_path, None, ["latex", "markdown", "svg"], "lr_sensitivity")
    assert both == {"table.tex", "table.md", "lr_sensitivity.svg"}
    (tmp_path / "old.pdf").mkdir()
    for output in ("folder", "v1.2/", str(tmp_path / "old.pdf")):
        [name] = written(report, tmp_path, output, "csv")
        assert name.endswith("summary.csv")


def test_pdf_has_a_page_per_plot_and_is_reproducible(report: ReportContent, tmp_path: Path) -> None:
    [content] = render(destination(tmp_path, "paper.pdf", None, None), report).values()
    assert content.count(b"/Type /Page ") == 5 and b"/Type3" not in content
    to = destination(tmp_path, "rates.pdf", None, "learning_rates")
    [content] = render(to, report).values()
    assert content.count(b"/Type /Page ") == 1 and render(to, report) == {Path("rates.pdf"): content}


@pytest.mark.parametrize(
    ("output", "formats", "plot", "message"),
    [
        ("a.docx", None, None, "output=a.docx: unknown format; allowed: .html, .csv, .tex"),
        ("a.pdf", "csv", None, "output=a.pdf: a .pdf file, but format=csv; leave out format"),
        ("s3://b/a.pdf", None, None, "must be a path, not a URL"),
        (None, [], None, r"format=\[\]: needs at least one"),
        (None, None, "curves", "plot=curves: unknown plot; did you mean plot=learning_curves?"),
        (None, "csv", "learning_curves", "plot=learning_curves: needs a format of plots"),
    ],
)
def test_refused(output: str | None, formats: Any, plot: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        destination(tmp_path, output, formats, plot)


def test_the_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report").symlink_to(tmp_path)
    with pytest.raises(UserError, match="run: report is a link"):
        destination(tmp_path / "run", None, None, None)
    assert destination(tmp_path / "run", str(tmp_path / "run/report"), None, None).path == tmp_path / "run/report"


def test_plot_without_data_is_refused_unless_runs_may_follow(report: ReportContent, tmp_path: Path) -> None:
    assert "importance" in PLOTS
    to = destination(tmp_path, "i.png", None, "importance")
    with pytest.raises(UserError, match="plot=importance: these runs have no data for it"):
        render(to, report)
    watched = ReportContent(report.ranking, "title", "now", None, test=False, refresh=5.0, top=20)
    assert render(to, watched) == {}


def test_names_of_others_are_data_in_every_format(tmp_path: Path) -> None:
    evil = "=cmd()|<img src=x onerror=alert(1)>[x](javascript:y)\\"
    for seed, value in enumerate(("a", "b")):
        overrides = ["optimizer=sgd", "allow_packages=[evil]", f"seed={seed}"]
        make_run(tmp_path / value, config={evil: value}, seed=seed, overrides=overrides)
    ranking = table(tmp_path)
    report = ReportContent(ranking, "title", "now", None, test=False, refresh=None, top=20)
    [csv_text] = render(destination(tmp_path, str(tmp_path / "a.csv"), None, None), report).values()
    assert evil[:5] in ranking.keys[0] and b"'=cmd()|" in csv_text and b",=cmd()" not in csv_text
    [markdown] = Table([evil, "value"], [["a", "0.5 [0.1, 0.9]"]]).markdown()[:1]
    assert markdown == r"| =cmd()\|&lt;img src=x onerror=alert(1)>[x]\(javascript:y)\\ | value |"
    assert (
        confusion_table(torch.eye(2, dtype=torch.int64), ["=x", "-1"]) == "true \\ predicted,'=x,-1\n'=x,1,0\n-1,0,1\n"
    )
    [page] = render(destination(tmp_path, str(tmp_path / "a.html"), None, None), report).values()
    assert b"<img src=x" not in page
    # It is named, but part of no command that the page offers.
    assert page.count(b"allow_packages") == page.count(b'["command needs","allow_packages=[evil], if you trust') > 0
