"""The page, the terminal's lines and the LaTeX table, also of hostile and empty results."""

import dataclasses
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from dlopt.lab.benchmark import figures, page, table
from dlopt.lab.benchmark.results import Cell, Results
from dlopt.lab.benchmark.scores import summarize
from tests.lab.benchmark.synthetic import make
from tests.support.browser import NEEDS_BROWSER, chromium

pytestmark = pytest.mark.drawn

EVIL = "<script>alert(1)</script>&\"'{x}$y_%#~^\\\n\x1b[31m"
STUBS = {name: {"source": "data:,", "width": "1"} for name in figures.FIGURES}
_VOID = {"meta", "link", "br", "img"}


class _Checker(HTMLParser):
    """Checks that elements are closed in order; collects texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.texts: list[str] = []
        self.rows: list[int] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert self.scripts <= 1  # the page's own, which sorts the tables
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def body(results: Results) -> str:
    return page.page(results, summarize(results), STUBS)


def hostile() -> Results:
    results = make({EVIL: 2.0, "_hidden": 1.0, "sgd": 0.7}, ("mlp", EVIL), 2, 4)
    return dataclasses.replace(results, facts={"command": EVIL, EVIL: {EVIL: [EVIL, 1]}}, shipped=frozenset({"sgd"}))


def test_writes_a_self_contained_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ("scores", "profiles", "sensitivity")  # the others take seconds
    monkeypatch.setattr(page, "draw", lambda *results: {name: figures.FIGURES[name](*results) for name in drawn})
    paths = page.write(hostile(), tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == [
        "index.html",
        "table.tex",
        *(f"figures/{name}.{form}" for name in drawn for form in ("png", "pdf")),
    ]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(link.startswith("data:") for link in _Checker(text).links)
    assert text.count("<img") == 3 and "default-src 'none'" in text


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_escaped() -> None:
    results = hostile()
    text = body(results)
    checked = _Checker(text)
    assert set(checked.links) == {"data:,"} and text.count("<script") == checked.scripts == 1 and "\x1b" not in text
    assert sum("alert(1)" in data for data in checked.texts) > 10
    drawn = figures.draw(results, summarize(results))
    assert set(drawn) == set(figures.FIGURES)
    for figure in drawn.values():
        figure.draw_without_rendering()
    tex = table.latex(results, summarize(results))
    assert all(line.count(r"\\") == 1 for line in tex.splitlines() if "alert" in line and not line.startswith("%"))
    assert not any("\x1b" in line for line in [tex, *table.lines(results)])


@pytest.mark.slow
def test_all_files_are_written(tmp_path: Path) -> None:
    page.write(hostile(), tmp_path)
    for name in figures.FIGURES:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "index.html").read_text(encoding="utf-8").count("<img") == len(figures.FIGURES)


@pytest.mark.parametrize("costs", [True, False])
def test_one_optimizer_and_empty_cells(costs: bool) -> None:
    results = make({"mine": 1.4}, ("mlp", "gpt"), 3, 4, costs=costs)
    results = dataclasses.replace(
        results, cells={("mine", "mlp"): results.cells["mine", "mlp"], ("mine", "gpt"): Cell(())}
    )
    summary = summarize(results)
    text = body(results)
    _Checker(text)
    assert "Without any trial" in text and "mine (gpt)" in text and ("<h2>Cost</h2>" in text) == costs
    drawn = figures.draw(results, summary)
    assert set(drawn) == set(figures.FIGURES) - {"differences", "tuning"}  # tuning: not on all workloads
    [axes] = drawn["profiles"].axes
    assert len([line for line in axes.get_lines() if line.get_linewidth() > 2 and len(line.get_xdata())]) == 1 + costs
    assert table.latex(results, summary).count(r"\bottomrule") == 2
    assert any(re.match(r"mine +\d+ +-$", line) for line in table.lines(results))


def test_no_results_yet(tmp_path: Path) -> None:
    empty = dataclasses.replace(make({"mine": 1.0}, ("mlp",), 1, 1), cells={})
    assert table.lines(empty) == ["There are no results yet."]
    assert [path.name for path in page.write(empty, tmp_path)] == ["index.html"]
    _Checker((tmp_path / "index.html").read_text())
    unfinished = dataclasses.replace(empty, cells={("mine", "mlp"): Cell(())})
    assert body(unfinished) and figures.draw(unfinished, summarize(unfinished)) and table.lines(unfinished)


def test_lines_fit_the_terminal() -> None:
    speeds = {"muon": 2.0, "sam": 0.9, "sgd": 0.7, "a_package.with.a.very_long_name.of.an.Optimizer": 1.4}
    reference = make({"muon": 2.0, "sam": 0.9})
    own = {name: speed for name, speed in speeds.items() if name not in ("muon", "sam")}
    results = make(own).with_reference(reference)
    lines = table.lines(results)
    assert max(map(len, lines)) <= table.WIDTH
    assert max(map(len, table.lines(results, 80))) <= 80
    assert lines[0].split()[3:] == ["updates", "evaluations", "time", "targets", "trials", "cost", "state"]
    assert lines[2].startswith("muon *") and "9/9" in lines[2] and re.search(r"1\.00 (\.\d\d|1\.0)-1\.0", lines[2])
    assert any(line.startswith("Optimizer ") for line in lines)
    heads = [line for line in lines if line.startswith("optimizer ") and "mlp" in line]
    assert len(heads) == 1 and "noisy_labels" in heads[0]
    many = make({"muon": 2.0}, [f"a_workload_with_number_{i}" for i in range(9)], 1, 2)
    assert sum(line.startswith("Updates to the target") for line in table.lines(many)) > 1
    assert max(map(len, table.lines(many))) <= table.WIDTH


def test_page_states_what_was_compared() -> None:
    reference = make({"muon": 2.0, "sgd": 0.7}, ("mlp", "gpt"))
    text = body(make({"mine": 1.4}, ("mlp", "gpt")).with_reference(reference))
    for part in (
        "3 optimizers (1 measured here, 2 shipped with dlopt) on 2 workloads of the tier small",
        "3 studies of 10 trials",
        "dlopt benchmark optimizer=muon,sgd", "torch 2.15.0", "tag(log, interval(0.0001, 1.0))", "arXiv:2306.07179",
        "muon <small>shipped</small>", "<b>mine</b>", "loss<br>accuracy", " ± 0.0", "0.9 ± 0",
        "</b><small> (1)</small>",
    ):  # fmt: skip
        assert part in text
    explained = re.findall(r"<dt>(.*?)</dt>", text)
    heads = re.findall(r'<th[^>]*scope="col"[^>]*>(.*?)</th>', text)
    scored = heads[heads.index("Score in updates") : heads.index("State") + 1]
    assert set(scored) <= set(explained)


def test_latex_marks_the_best_and_escapes() -> None:
    results = make({"muon_&": 2.0, "sgd": 0.7}, ("noisy_labels", "gpt"))
    text = table.latex(results, summarize(results))
    rows = [line for line in text.splitlines() if line.startswith(r"muon\_\& & ")]
    assert len(rows) == 2 and r"$\mathbf{" in rows[0] and r"\textbf{" in rows[1] and r"noisy\_labels" in text
    widths = {line.count(" & ") for line in text.splitlines() if line.startswith(("muon", "sgd", "optimizer"))}
    assert widths == {2, 6}


def _width_of_curve(line: Line2D) -> float:
    return line.get_linewidth() if len(line.get_xdata()) else 0.0  # type: ignore[arg-type]


def test_long_names_of_optimizers_are_broken_in_the_titles_of_the_profiles() -> None:
    results = make({"schedule_free_adamw": 2.0, "sgd": 0.7, "_hidden_optimizer": 1.0}, ("mlp", "gpt"), 2, 4)
    titles = {axes.get_title() for axes in figures.profiles(results, summarize(results)).axes}
    assert titles == {"schedule_\nfree_adamw", "sgd", "\u200b_hidden_\noptimizer"}


def test_curves_have_the_colours_of_the_profiles() -> None:
    results = make({"muon": 2.0, "sgd": 0.7, "adamw": 1.4}, ("mlp", "gpt"), 2, 4)
    summary = summarize(results)
    drawn = figures.draw(results, summary)
    panels = drawn["profiles"].axes
    lines = {axes.get_title(): max(axes.get_lines(), key=_width_of_curve).get_color() for axes in panels}
    assert [*lines] == summary.order
    [legend] = drawn["learning_curves"].legends
    entries = zip(legend.get_texts(), legend.get_lines(), strict=True)
    assert {text.get_text(): line.get_color() for text, line in entries} == lines
    assert [text.get_text() for text in drawn["differences"].axes[0].get_yticklabels()] == summary.order


def test_the_matrix_of_differences_shows_the_scores_and_greys_pairs_that_are_not_distinguishable() -> None:
    results = make({"muon": 2.0, "twin": 2.0, "never": 0.01}, ("mlp", "gpt"), 3, 4)
    summary = summarize(results)
    figure = figures.differences(results, summary)
    assert figure is not None
    [axes] = figure.axes
    shown = axes.images[1].get_array()
    pairs = summary.comparisons["updates"]
    assert [text.get_text().count("\n") for text in axes.texts] == [0] * 6
    for (row, name), (column, other) in product(enumerate(summary.order), repeat=2):
        is_grey = name == other or not pairs[name, other].distinguishable
        assert bool(np.ma.getmaskarray(shown)[row, column]) == is_grey


@pytest.mark.slow
@NEEDS_BROWSER
def test_tables_are_sorted_by_the_columns_that_are_clicked(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_text(body(make({"muon": 2.0, "sgd": 0.7, "adamw": 1.4, "lion": 0.01}, ("mlp", "gpt"), 2, 4)))
    with chromium(tmp_path / "profile") as browser:
        browser.get(file.as_uri())
        table = "[...document.querySelectorAll('table')].find((each) => each.tHead.textContent.includes('Targets'))"

        def click(column: int) -> list[str]:
            cells: list[str] = browser.execute_script(
                f"const table = {table}; table.tHead.rows[0].cells[{column}].click();"
                f"return [...table.tBodies[0].rows].map((row) => row.cells[{column}].textContent)"
            )
            return cells

        assert click(0) == ["adamw", "lion", "muon", "sgd"] and click(0) == ["sgd", "muon", "lion", "adamw"]
        scores = [float(text.split()[0]) for text in click(1)]
        assert scores == sorted(scores, reverse=True)
        assert [float(text.split()[0]) for text in click(1)] == sorted(scores)
        assert not browser.get_log("browser")  # the CSP allows the script
