"""The page in a real browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from scipy import stats

from dlopt.basics.folders import short_path
from dlopt.metrics.shown import format_metric
from dlopt.results.page import page
from dlopt.results.ranking import Ranking, band, fastest, gather, targets, time_to_target
from dlopt.results.reading import RunReader
from dlopt.results.tables import RunSection, Section, Table
from tests.support.browser import NEEDS_BROWSER, chromium, narrow
from tests.support.folders import make_run

WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
pytestmark = [pytest.mark.slow, NEEDS_BROWSER]
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    """adamw and sgd at four rates, three seeds each; sgd at 10 fails with HTML markup as the reason."""
    folder = tmp_path_factory.mktemp("sweep")
    tops = {("sgd", 0.01): 0.6, ("sgd", 0.1): 0.8, ("sgd", 1.0): 0.7, ("sgd", 10.0): 0.2,
            ("adamw", 0.001): 0.75, ("adamw", 0.01): 0.9, ("adamw", 0.1): 0.85, ("adamw", 1.0): 0.3}  # fmt: skip
    for i, ((optimizer, lr), top) in enumerate(tops.items()):
        for seed in range(3):
            make_run(
                folder / f"{i}-{seed}", optimizer=optimizer, lr=lr, seed=seed, test=0.5 + i / 100,
                accuracies=(0.1, top / 2, top + 0.01 * (seed - 1)), status="failed" if lr == 10 else "finished",
                reason=EVIL, seconds=1 + 0.1 * seed,
            )  # fmt: skip
    (folder / "0-0/summary.json").write_text("{")
    return gather(*RunReader().read([folder]))


@pytest.fixture(scope="module")
def file(table: Ranking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    bad = RunSection(
        [EVIL, "5 epochs"],
        ["measure", "deep=1"],
        ["optimizer", "seed"],
        Table(["a", "b"], [[EVIL, "1"]]),
        is_urgent=True,
    )
    section = Section("Measure", runs={run.path: bad for run in table.failed})
    for run in table.failed:
        (run.path / "train.log").write_text(f"a line of the log\n{EVIL}\n")
    path.write_text(page(table, title=EVIL, made="now", target=0.7, test=False, refresh=None, sections=[section]))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as result:
        yield result


@pytest.fixture
def shown(browser: Any, file: Path) -> Iterator[Any]:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get(file.as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def column(browser: Any, name: str) -> list[str]:
    script = """
        const heads = [...document.querySelectorAll("#leaderboard th")];
        const i = heads.findIndex((head) => head.dataset.column === arguments[0]);
        return [...document.querySelectorAll("#leaderboard tbody tr")].map((row) =>
            (row.cells[i].querySelector("a:has(+ sup)") || row.cells[i]).textContent);"""
    result: list[str] = browser.execute_script(script, name)
    return result


def press(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).innerText", selector))


def hover(browser: Any, selector: str, x: float, y: float) -> str:
    """Returns the tooltip with the pointer at a fraction of an element's width and height."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    box = element.rect
    offset = round((x - 0.5) * box["width"]), round((y - 0.5) * box["height"])
    ActionChains(browser).move_to_element_with_offset(element, *offset).perform()
    return text(browser, "#tip")


def test_leaderboard_has_the_order_of_the_table(shown: Any, table: Ranking) -> None:
    assert column(shown, "rank") == [*map(str, range(1, 8)), "-"], "the last one has no value"
    assert column(shown, "key optimizer.lr")[:3] == ["0.01", "0.1", "0.1"]
    assert column(shown, "val_accuracy")[0] == "90.00 ± 1.00 %"
    assert column(shown, "difference")[1] == "−5.00"  # equal differences have no interval
    assert "3 failed" in column(shown, "runs")[-1]
    assert text(shown, "#title").startswith("<img") and "Unreadable" in text(shown, "#damaged")


def test_every_column_sorts_both_ways(shown: Any) -> None:
    ids = shown.execute_script(
        "return [...document.querySelectorAll('th[data-column]')].map((each) => each.dataset.column)"
    )
    assert {"rank", "key optimizer", "key optimizer.lr", "val_accuracy", "val_loss", "difference"} <= set(ids)
    for name in ids:
        for _ in range(2):
            press(shown, f"th[data-column='{name}'] button")
            direction = shown.execute_script(
                "return document.querySelector(arguments[0]).ariaSort", f"th[data-column='{name}']"
            )
            cells = column(shown, name)
            known = [cell for cell in cells if cell not in ("-", "")]
            values = [c if name == "key optimizer" else float(c.split()[0].replace("−", "-")) for c in known]
            if name != "runs":
                assert values == sorted(values, reverse=direction == "descending"), name
            assert cells[: len(known)] == known, "missing values are last"


def test_filters_hide_and_restore_rows(shown: Any) -> None:
    press(shown, "input[data-key='optimizer'][data-value='sgd']")
    assert set(column(shown, "key optimizer")) == {"adamw"} and "4 of 8 configurations" in text(shown, "#filtered")
    press(shown, "input[data-key='optimizer.lr'][data-value='0.01']")
    assert "0.01" not in column(shown, "key optimizer.lr") and len(column(shown, "rank")) == 3
    shown.refresh()  # the URL hash keeps the state
    assert len(column(shown, "rank")) == 3
    press(shown, "#clear")
    assert len(column(shown, "rank")) == 8


def test_shows_test_metrics_for_the_first_row_only(shown: Any) -> None:
    assert "test accuracy 55.00 ± 0.00 %" in text(shown, "#selected").replace("\n", " ")
    press(shown, "tr[data-rank='2']")
    assert "#2" in text(shown, "#selected") and "test accuracy" not in text(shown, "#selected")
    assert "for the first row only" in text(shown, "#selected")
    assert "dlopt train -m optimizer=adamw optimizer.lr=0.1 seed=0,1,2" in text(shown, "#selected")


def test_headline_is_the_verdict_in_words(shown: Any, table: Ranking) -> None:
    head, reason = table.headline
    assert head.startswith("adamw lr 0.01 is first; not distinguishable from adamw lr 0.1, ")
    assert reason == "Fewer than 3 common seeds"
    assert (text(shown, "h1"), text(shown, "#reason")) == (head, reason)
    assert text(shown, "#setting") == "digits · mlp, 1,000 parameters · 3 epochs · dlopt 0.1.0 at commit cccccccc"
    press(shown, "tr[data-rank='2']")
    hidden = "return !document.querySelector('h1').offsetHeight && !document.querySelector('#versus').offsetHeight"
    WebDriverWait(shown, 20).until(lambda page: page.execute_script(hidden))
    assert text(shown, "#title").startswith("<img") and text(shown, "#run h2").startswith("Run ")


DOTS = """
    const at = (node, name) => Number(node.getAttribute(name));
    return [...document.querySelectorAll("#versus [data-row]")].map((row) => {
        const dot = row.querySelector(".dot"), bar = row.querySelector(".interval");
        const ends = bar ? [at(bar, "x1"), at(bar, "x2")] : null;
        return [at(dot, "cx"), ends, dot.getAttribute("fill"), row.querySelectorAll(".arrow").length];
    });"""
TICKS = """
    const labels = [...document.querySelectorAll("#versus svg > text")]
        .filter((each) => /^[−\\d.]+$/.test(each.textContent));
    return labels.map((each) => [Number(each.getAttribute("x")), Number(each.textContent.replace("−", "-"))])"""


def test_dots_and_intervals_are_those_of_the_table(browser: Any, tmp_path: Path) -> None:
    """On the axis that the ticks say, in points; a wider interval than twice the median ends in an arrow."""
    values = {0.1: (0.90, 0.91, 0.92), 0.2: (0.89, 0.89, 0.92), 0.3: (0.60, 0.61, 0.63), 0.4: (0.86, 0.9, 0.9)}
    for lr, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(accuracy,))
    rows = gather(*RunReader().read([tmp_path]))
    path = tmp_path / "index.html"
    path.write_text(page(rows, title="t", made="now", target=None, test=False, refresh=None))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(path.as_uri())
    (x0, value0), *_, (x1, value1) = browser.execute_script(TICKS)

    def shown_at(x: float) -> float:
        return (value0 + (x - x0) / (x1 - x0) * (value1 - value0)) / 100

    dots = browser.execute_script(DOTS)
    assert len(dots) == len(rows.rows) == 4 and shown_at(dots[0][0]) == pytest.approx(0, abs=1e-6)
    for row, (x, ends, fill, arrows) in zip(rows.rows[1:], dots[1:], strict=True):
        found = row.difference
        assert found is not None and found.low is not None and found.high is not None
        assert shown_at(x) == pytest.approx(found.mean, abs=1e-6)
        is_clear = found.high < 0
        assert (fill == "var(--paper)") == (not is_clear)
        for end, value in zip(ends, (found.low, found.high), strict=True):
            assert shown_at(end) == pytest.approx(value, abs=1e-6) or arrows
    bars = browser.execute_script("return document.querySelectorAll('#leaderboard .bar .dot').length")
    assert bars == 3 and [bool(arrows) for *_, arrows in dots].count(True) <= 1
    assert json.dumps(browser.get_log("browser")) == "[]"


def test_a_filter_that_matches_nothing_leaves_a_sentence(shown: Any) -> None:
    hidden = "return document.querySelector(arguments[0]).offsetHeight === 0"
    is_open = "return document.querySelector('#filters details').open"
    assert not shown.execute_script(is_open) and shown.execute_script(hidden, "#clear"), "folded, nothing to clear"
    type_into(shown, "#where", "val_accuracy>0.999")
    shown.get("about:blank")
    shown.back()
    WebDriverWait(shown, 20).until(lambda page: not page.execute_script(hidden, "#nothing"))
    assert shown.execute_script(is_open), "the address has a filter"
    for section in ("versus", "leaderboard", "curves", "heat", "parallel", "times"):
        assert shown.execute_script(hidden, f"#{section}"), section
    press(shown, "#nothing button")
    assert len(column(shown, "rank")) == 8 and shown.execute_script(hidden, "#clear")


def test_unfinished_and_misspelled_conditions_hide_no_row(shown: Any) -> None:
    press(shown, "#filters summary")
    for condition, problem in {
        "val_acuracy>0.9": "unknown key val_acuracy; did you mean val_accuracy?",
        "val_acc": "did you mean key val_accuracy?",
        "optimizer=ad": "no such value; did you mean adamw?",
        "val_accuracy>": "> needs a number",
    }.items():
        type_into(shown, "#where", condition)
        assert problem in text(shown, "#problem") and len(column(shown, "rank")) == 8
    options = shown.execute_script("return [...document.querySelectorAll('#keys option')].map((each) => each.value)")
    assert {"optimizer.lr", "val_accuracy", "status"} <= set(options)


def test_a_key_with_many_numbers_has_a_range(browser: Any, tmp_path: Path) -> None:
    for number in range(8):
        config = {"optimizer.weight_decay": number % 2 / 10}
        make_run(tmp_path / str(number), lr=2.0**-number, accuracies=(0.9 - number / 100,), config=config)
    path = tmp_path / "index.html"
    rows = gather(*RunReader().read([tmp_path]))
    path.write_text(page(rows, title="t", made="now", target=None, test=False, refresh=None))
    browser.get(path.as_uri())
    boxes = "return [...document.querySelectorAll('#filters [type=checkbox]')].map((each) => each.dataset.key)"
    assert set(browser.execute_script(boxes)) == {"optimizer.weight_decay"}
    assert not browser.execute_script("return document.querySelector('#heat').offsetHeight"), "a column per run"
    type_into(browser, "[data-range='optimizer.lr from']", 0.1)
    type_into(browser, "[data-range='optimizer.lr to']", 0.5)
    assert column(browser, "key optimizer.lr") == ["0.5", "0.25", "0.125"]
    browser.refresh()
    assert len(column(browser, "rank")) == 3
    ticks = "return [...document.querySelectorAll('#sensitivity-chart svg > text')].map((each) => each.textContent)"
    assert {"0.25", "0.5", "1"} <= set(browser.execute_script(ticks)), "the rates that were tried"
    assert json.dumps(browser.get_log("browser")) == "[]"


def select(browser: Any, name: str, value: str) -> None:
    script = """
        const select = document.querySelector(`[data-choice=${arguments[0]}]`);
        select.value = arguments[1];
        select.dispatchEvent(new Event("change"));"""
    browser.execute_script(script, name, value)


def test_tooltips_show_curve_values(shown: Any, table: Ranking) -> None:
    result = hover(shown, "#curves-chart .over", 0.95, 0.3)
    assert result.startswith("epoch 3") and "#1 adamw lr 0.01" in result
    row = band(table.rows[0].runs, "val_accuracy")
    assert row is not None
    low, high = row.spreads["range"]
    expected = f"{100 * row.mean[-1]:.2f} % [{100 * low[-1]:.2f} %, {100 * high[-1]:.2f} %] of 3"
    assert expected in result and expected == "90.00 % [89.00 %, 91.00 %] of 3"
    assert len(result.splitlines()) > 6
    for name, (low, high) in row.spreads.items():
        select(shown, "band", name)
        expected = f"[{100 * low[-1]:.2f} %, {100 * high[-1]:.2f} %] of 3"
        assert expected in hover(shown, "#curves-chart .over", 0.95, 0.3)
    for x, name in (("seconds", "seconds"), ("step", "updates")):
        select(shown, "x", x)
        assert hover(shown, "#curves-chart .over", 0.5, 0.5).startswith(name)
    assert hover(shown, "#rates-chart .over", 0.5, 0.5).startswith("updates")
    assert hover(shown, "#sensitivity-chart .over", 0.4, 0.5).startswith("learning rate")
    press(shown, "#log")
    press(shown, "#curves .legend button")
    assert "#1 " not in hover(shown, "#curves-chart .over", 0.5, 0.5)
    assert shown.execute_script("return document.querySelectorAll(\"#curves [aria-pressed='false']\").length") == 1


def test_bands_of_groups_are_students_intervals(shown: Any, table: Ranking) -> None:
    """A group has the runs of several rows."""
    select(shown, "group", "optimizer.lr")
    select(shown, "band", "confidence")
    result = hover(shown, "#curves-chart .over", 0.95, 0.3)
    values = [0.8 + 0.01 * (seed - 1) for seed in range(3)] + [0.85 + 0.01 * (seed - 1) for seed in range(3)]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert f"82.50 % [{100 * low:.2f} %, {100 * high:.2f} %] of 6" in result


def test_curves_end_where_less_than_half_of_the_runs_are_left(browser: Any, tmp_path: Path) -> None:
    for seed, epochs in enumerate((1, 2, 3, 4)):
        accuracies = tuple(0.5 + 0.1 * i for i in range(epochs))
        make_run(tmp_path / str(seed), seed=seed, accuracies=accuracies, config={"epochs": 4})
    [row] = (found := gather(*RunReader().read([tmp_path]))).rows
    curve = band(row.runs, "val_accuracy")
    assert curve is not None and curve.x["epoch"].tolist() == [1, 2, 3]
    text = page(found, title="", made="", target=None, test=False, refresh=None)
    (tmp_path / "index.html").write_text(text)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get((tmp_path / "index.html").as_uri())
    result = hover(browser, "#curves-chart .over", 0.99, 0.3)
    assert result.startswith("epoch 3") and "70.00 % of 2" in result


def test_a_run_shows_each_diagnostic_with_its_layers(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/0")
    tags = {"gradients/norm/conv": 0.5, "gradients/norm/head": 2.0, "gradients/noise_scale": 30.0}
    (run / "diagnostics.jsonl").write_text("".join(json.dumps({"step": step} | tags) + "\n" for step in (1, 11, 21)))
    ranking = gather(*RunReader().read([tmp_path / "runs"]))
    (tmp_path / "index.html").write_text(page(ranking, title="", made="", target=None, test=False, refresh=None))
    browser.get(f"{(tmp_path / 'index.html').as_uri()}#run={quote(short_path(run))}")
    legends = "return [...document.querySelectorAll('#run-charts .legend')].map((each) => each.innerText)"
    found = browser.execute_script(legends)
    assert "conv\nhead" in found and "gradients/noise_scale" in found, found


def test_remarks_are_below_the_leaderboard(shown: Any, table: Ranking) -> None:
    """sgd at 0.01 lacks a seed, whose run is damaged."""
    rows = "return [...document.querySelectorAll('#leaderboard tbody tr')]"
    marks = shown.execute_script(f"{rows}.map((row) => row.querySelector('sup')?.textContent ?? '')")
    assert marks[:2] == ["", "a"] and "b" in marks[[row.values["optimizer.lr"] for row in table.rows].index(0.01, 1)]
    below = shown.execute_script("return [...document.querySelectorAll('.remark')].map((each) => each.innerText)")
    assert below[0] == "a: the same difference in every seed, so no interval"
    assert below[1].startswith("b: warning: without")
    title = "return document.querySelector('#leaderboard [data-rank=\"2\"] sup').title"
    assert shown.execute_script(title) == "the same difference in every seed, so no interval"


def test_curves_against_seconds_match_those_of_the_image_files(shown: Any, table: Ranking) -> None:
    """Slower seeds are 1, 1.1 and 1.2 s per epoch: an epoch takes 1.1 s on average."""
    select(shown, "x", "seconds")
    row = band(table.rows[0].runs, "val_accuracy")
    assert row is not None and row.x["seconds"].tolist() == pytest.approx([1.1, 2.2, 3.3])
    for at, x, mean in ((0.02, 1.1, row.mean[0]), (0.5, 2.2, row.mean[1]), (0.98, 3.3, row.mean[2])):
        result = hover(shown, "#curves-chart .over", at, 0.5)
        seconds, label, reading = result.splitlines()[:3]  # the best is first; others are 0.05 s per epoch slower
        assert float(seconds.split()[1]) == pytest.approx(x, abs=0.16)
        assert label.startswith("#1 ") and reading.startswith(f"{100 * mean:.2f} %")


def test_zoom_by_dragging_and_by_keys(shown: Any) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    def read(*keys: str) -> str:
        ActionChains(shown).send_keys(*keys).perform()
        return text(shown, "#tip").partition("\n")[0]

    chart = shown.find_element(By.CSS_SELECTOR, "#curves-chart .over")
    shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    width, hidden = chart.rect["width"], "return document.querySelector('#curves-chart .reset').hidden"
    assert shown.execute_script(hidden)
    drag = ActionChains(shown).move_to_element_with_offset(chart, round(-0.1 * width), 0)
    drag.click_and_hold().move_by_offset(round(0.6 * width), 3).release().perform()
    assert not shown.execute_script(hidden)
    shown.execute_script("document.querySelector('#curves-chart .plot').focus()")
    assert read(Keys.HOME) == "epoch 2"
    press(shown, "#log")  # draws another chart, without the zoom
    shown.execute_script("document.querySelector('#curves-chart .plot').focus()")
    assert read(Keys.ARROW_RIGHT) == "epoch 1" and read(Keys.ARROW_RIGHT) == "epoch 2" and read(Keys.END) == "epoch 3"
    assert read("+") and not shown.execute_script(hidden) and read(Keys.HOME) == "epoch 2"
    assert read("0", Keys.HOME) == "epoch 1" and shown.execute_script(hidden)


def test_plots_the_checked_rows_in_constant_colours(shown: Any) -> None:
    def colours(selector: str) -> dict[str, str]:
        script = """
            return [...document.querySelectorAll(arguments[0])].map((each) =>
                [each.closest("tr, span, button").textContent.trim(), each.getAttribute("stroke")])"""
        return dict(shown.execute_script(script, selector))

    before = colours("#curves .legend line")
    assert len(before) == 6
    first = next(iter(before))
    best = {name: next(before[row] for row in before if name in row) for name in ("adamw", "sgd")}
    assert {name.split(",")[0]: colour for name, colour in colours("#sensitivity .legend line").items()} == best
    press(shown, "tr[data-rank='1'] input")
    assert colours("#curves .legend line") == {row: colour for row, colour in before.items() if row != first}
    press(shown, "tr[data-rank='7'] input")
    after = colours("#curves .legend line")
    assert len(after) == 6 and before.items() - after.items() == {(first, before[first])}
    assert list(after.values()) == list(before.values())  # in the colour that became free


def test_columns_that_do_not_fit_are_hidden_by_name_until_they_are_chosen(shown: Any) -> None:
    is_cut = """
        const scroll = document.querySelector("#leaderboard .scroll"), frame = scroll.parentElement;
        return [scroll.scrollWidth > scroll.clientWidth + 2, frame.classList.contains("more")]"""
    heads = "return [...document.querySelectorAll('#leaderboard th')].map((head) => head.dataset.column)"
    for width in (1700, 1000):
        narrow(shown, width)
        shown.refresh()
        WebDriverWait(shown, 20).until(lambda page: page.execute_script(is_cut) == [False, False])
        names = "training" in text(shown, "#leaderboard .columns summary")
        assert names == (width == 1000) != ("train_loss" in shown.execute_script(heads))
    for name in ("train_loss", "train_accuracy"):
        press(shown, f"[data-show='{name}']")
    assert {"train_loss", "train_accuracy"} <= set(shown.execute_script(heads))
    WebDriverWait(shown, 20).until(lambda page: page.execute_script(is_cut) == [True, True])
    press(shown, "[data-show='val_loss']")
    assert "val_loss" not in shown.execute_script(heads)


def test_dark_screen_and_white_paper(shown: Any) -> None:
    """The charts follow the colours of the page; paper is white, whatever the screen."""
    shown.execute_script("""
        window.printed = null;
        addEventListener("beforeprint", () => { window.printed = [
            getComputedStyle(document.documentElement).getPropertyValue("--paper"),
            document.querySelector("#curves-chart svg").viewBox.baseVal.width]; });""")
    ink = "return getComputedStyle(document.querySelector('#curves-chart text')).fill"
    light = shown.execute_script(ink)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    try:
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        WebDriverWait(shown, 20).until(lambda page: page.execute_script(ink) != light)
        assert shown.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        shown.execute_cdp_cmd("Page.printToPDF", {})
        assert shown.execute_script("return window.printed") == ["#ffffff", 690]
        assert shown.execute_script("return document.documentElement.className") == ""
    finally:
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_time_to_target_matches_metrics(shown: Any, table: Ranking) -> None:
    def rows() -> dict[str, list[str]]:
        script = """
            const rows = [...document.querySelectorAll("#times tbody tr")];
            return rows.map((row) => [...row.cells].map((cell) => cell.textContent));"""
        return {cells[0]: cells[2:] for cells in shown.execute_script(script)}

    script = "return [...document.querySelectorAll('[data-choice=target] option')].map((each) => each.value)"
    shown_targets = shown.execute_script(script)
    goals = {format_metric("val_accuracy", goal): goal for goal in (0.7, *targets(table))}
    assert shown_targets == list(goals) and len(goals) > 3
    for name, target in goals.items():
        select(shown, "target", name)
        result = rows()
        for rank, row in enumerate(table.rows, 1):
            expected = time_to_target(row, "val_accuracy", target)
            reached, steps, _ = result["-" if row.rank is None else str(rank)]
            assert reached == f"{expected.count} of {expected.runs}"
            assert steps.split(" ")[0] == ("–" if expected.steps is None else f"{expected.steps.mean:.4g}")
        ranks = [str(table.rows.index(row) + 1) for row, _ in fastest(table, target)]
        assert list(result)[: len(ranks)] == ranks


def test_parallel_coordinates_highlight_brushed_lines(shown: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    kept = "return document.querySelectorAll('#parallel-chart path.kept').length"
    assert shown.execute_script(kept) == 7
    handle = shown.find_element(By.CSS_SELECTOR, "[data-axis='val_accuracy']")
    shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    half = handle.rect["height"] / 2
    drag = ActionChains(shown).move_to_element_with_offset(handle, 0, round(-half + 3))
    drag.click_and_hold().move_by_offset(0, round(half * 0.4)).release().perform()
    assert 0 < shown.execute_script(kept) < 7
    ActionChains(shown).move_to_element_with_offset(handle, 0, 0).click().perform()
    assert shown.execute_script(kept) == 7


def type_into(browser: Any, selector: str, value: object) -> None:
    script = """
        const field = document.querySelector(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event("input"));"""
    browser.execute_script(script, selector, value)


def lines(browser: Any, selector: str = "") -> list[str]:
    """Returns the colours of the curves."""
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.getAttribute('stroke'))"
    return list(browser.execute_script(script, f"#curves-chart path[stroke]{selector}"))


def saved(browser: Any, chart: str) -> dict[str, str]:
    """Clicks the buttons of a plot that save it; returns the content of the files by their name."""
    script = """
        const [selector, done] = arguments, files = {}, urls = {};
        URL.createObjectURL = (blob) => {
            const url = `blob:${Object.keys(urls).length}`;
            urls[url] = blob;
            return url;
        };
        HTMLAnchorElement.prototype.click = async function () {
            const blob = urls[this.getAttribute("href")];
            files[this.download] = `${blob.type} ${(await blob.text()).replaceAll("\\uFFFD", "?")}`;
            if (Object.keys(files).length === 3) done(files);
        };
        document.querySelectorAll(`${selector} [data-save]`).forEach((button) => button.click());"""
    return dict(browser.execute_async_script(script, chart))


def test_controls_of_the_plots(shown: Any, table: Ranking) -> None:
    """Smoothing, single runs, colours by key, groups, heat map, files: each from its control to what is drawn."""
    assert set(lines(shown)) == {"var(--c0)", "var(--c1)"} and len(lines(shown)) == 6  # by optimizer
    type_into(shown, "#smooth", 0.5)
    assert len(lines(shown, ".raw")) == 6 and len(lines(shown)) == 12
    row = band(table.rows[0].runs, "val_accuracy")
    assert row is not None
    smooth = sum(0.5**i * value for i, value in enumerate(row.mean[::-1])) / 1.75
    tooltip = hover(shown, "#curves-chart .over", 0.95, 0.3)
    assert f"{100 * smooth:.2f} %" in tooltip and "(raw 90.00 %)" in tooltip
    press(shown, "#singles")
    assert len(lines(shown, ":not(.raw)")) == sum(len(row.runs) for row in table.rows[:6]) and "seed 2" in hover(
        shown, "#curves-chart .over", 0.95, 0.3
    )
    press(shown, "#singles")
    type_into(shown, "#smooth", 0)
    for control in ("[data-choice=colour]", "th[data-column='rank'] button", "#log"):  # drawn again, with the focus
        shown.execute_script("document.querySelector(arguments[0]).focus()", control)
        shown.execute_script("document.activeElement.dispatchEvent(new Event('change'))")
        shown.execute_script("document.activeElement.click()")
        assert shown.execute_script("return document.activeElement.matches(arguments[0])", control)
    press(shown, "th[data-column='rank'] button")
    press(shown, "#log")
    select(shown, "colour", "optimizer.lr")
    rates = [row.values["optimizer.lr"] for row in table.rows[:6]]
    colours = [f"var(--c{sorted({row.values['optimizer.lr'] for row in table.rows}).index(rate)})" for rate in rates]
    swatches = "return [...document.querySelectorAll(arguments[0])].map((each) => each.getAttribute('stroke'))"
    assert lines(shown) == shown.execute_script(swatches, "#leaderboard .swatch line") == colours
    best = shown.execute_script(swatches, "#parallel-chart path.kept:nth-of-type(7)")
    assert best == [colours[0]]
    select(shown, "group", "optimizer")
    groups = [row.split("\t") for row in text(shown, "#groups tbody").splitlines()]
    means = {name: [row.value.mean for row in table.rows if row.value and row.values["optimizer"] == name]
             for name in ("adamw", "sgd")}  # fmt: skip
    assert [group[:3] for group in groups] == [["sgd", "4", "11"], ["adamw", "4", "12"]]
    assert groups[1][4] == f"{100 * max(means['adamw']):.2f} %"
    assert groups[1][3].startswith(f"{100 * sum(means['adamw']) / 4:.0f} ± ")
    assert len(lines(shown)) == 2
    cells = "return [...document.querySelectorAll('#heat-chart .cell text')].map((each) => each.textContent)"
    assert sorted(shown.execute_script(cells)) == sorted(
        f"{100 * row.value.mean:.2f} %" for row in table.rows if row.value
    )
    select(shown, "group", "")
    files = saved(shown, "#curves-chart")
    names = [f"validation_accuracy_against_epoch.{end}" for end in ("csv", "png", "svg")]
    assert sorted(files) == names
    csv, png, picture = (files[name] for name in names)
    assert png.startswith("image/png") and 'xmlns="http://www.w3.org/2000/svg"' in picture and "var(" not in picture
    assert "#1 adamw lr 0.01" in picture  # its legend
    assert csv.splitlines()[0] == "text/csv line,epoch,validation accuracy,low,high,runs"
    first = "#1 adamw lr 0.01,3,0.9,0.89,0.91,3"
    assert first in [re.sub(r"\d\.\d{9,}", lambda number: f"{float(number[0]):.6g}", line) for line in csv.splitlines()]
    for chart in ("#heat", "#parallel", "#sensitivity-chart", "#rates-chart"):
        assert len(saved(shown, chart)) == 3


def test_conditions_filter_as_those_of_the_command_line(shown: Any) -> None:
    def ranks(conditions: str) -> list[str]:
        type_into(shown, "#where", conditions)
        assert text(shown, "#problem") == ""
        return column(shown, "rank")

    press(shown, "#filters summary")
    assert ranks("optimizer=adamw val_accuracy>0.74") == ["1", "2", "4"] == ranks("optimizer=adam? val_accuracy>74%")
    assert ranks("lr<=0.01 optimizer!=sgd") == ranks("ADAMW lr<=0.01") == ["1", "4"]
    assert ranks("status=failed") == ["-"] and ranks("model=mlp") == ranks("") and ranks("seed=7") == []
    for conditions, problem in (("nothing=1", "unknown key nothing"), ("lr>high", "> needs a number")):
        type_into(shown, "#where", f"{conditions} optimizer=sgd")
        assert problem in text(shown, "#problem") and len(column(shown, "rank")) == 4, "other conditions hold"
    shown.refresh()
    assert len(column(shown, "rank")) == 4


def test_view_of_one_run(shown: Any, table: Ranking) -> None:
    """Opened by a click on its row, or by its address; leads back, to other seeds and to a difference."""

    def visible_sections() -> list[str]:
        script = "return [...document.querySelectorAll('main > section')].filter((each) => each.offsetHeight)"
        return [str(name) for name in shown.execute_script(f"{script}.map((each) => each.id)")]

    def wait_for(view: str) -> None:
        script = "return document.body.dataset.view"
        WebDriverWait(shown, 20).until(lambda page: page.execute_script(script) == view)

    press(shown, "tr[data-rank='8'] td:nth-child(3)")
    wait_for("run")
    assert visible_sections() == ["run", "selected", "difference"]
    address = str(shown.current_url)
    assert "#run=" in address and "Run " in text(shown, "#run h2")
    body = text(shown, "#run")
    assert EVIL in body and "5 epochs" in body and "dlopt measure optimizer=sgd optimizer.lr=10.0 seed=0 deep=1" in body
    assert shown.execute_script("return document.querySelectorAll('#run-charts .plot').length") >= 3
    assert "a line of the log" in body and "image/" not in body
    select(
        shown,
        "compare",
        shown.execute_script("return document.querySelector('[data-choice=compare]').options[1].value"),
    )
    difference = text(shown, "#difference")
    assert "optimizer\tsgd\tadamw" in difference and "optimizer.lr\t10\t0.01" in difference
    assert "data.batch_size" not in difference
    press(shown, "#back")
    wait_for("all")
    assert "leaderboard" in visible_sections() and "run" not in visible_sections()
    shown.get("about:blank")
    shown.get(address)
    assert visible_sections() == ["run", "selected", "difference"]
    press(shown, "#selected tbody tr:nth-child(2) a")
    WebDriverWait(shown, 20).until(lambda page: "8" not in page.current_url or page.current_url != address)
    shown.get("about:blank")
    shown.get(address.partition("#")[0] + "#run=nowhere")
    assert "This report has no run nowhere." in text(shown, "#run")


def test_large_data_is_compressed(
    browser: Any, file: Path, table: Ranking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.results.page._LARGEST_PLAIN", 0)
    path = tmp_path / "index.html"
    path.write_text(page(table, title="t", made="now", target=0.7, test=False, refresh=None))
    assert path.stat().st_size < 0.8 * file.stat().st_size
    browser.get(path.as_uri())
    WebDriverWait(browser, 20).until(
        lambda each: each.execute_script("return document.querySelector('#curves-chart svg')")
    )
    assert column(browser, "val_accuracy")[0] == "90.00 ± 1.00 %"
    assert json.dumps(browser.get_log("browser")) == "[]"


def test_failed_runs_show_reason_as_plain_text(shown: Any) -> None:
    assert text(shown, "#failed").count("<img src=x onerror=alert(1)>") == 3
    assert text(shown, "#failed").count("Copy command: Measure") == 3
    assert shown.execute_script("return document.images.length") == 0


def test_fits_the_width_of_a_phone(shown: Any) -> None:
    narrow(shown)
    shown.refresh()
    assert shown.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page scrolls sideways"
    )
    heads = "return [...document.querySelectorAll('#leaderboard th')].slice(1, 5).map((head) => head.dataset.column)"
    assert shown.execute_script(heads) == ["rank", "key optimizer", "key optimizer.lr", "val_accuracy"]
    small = shown.execute_script("""
        return [...document.querySelectorAll("p, td, th, li, svg text")].filter((each) => each.textContent.trim() &&
            each.getClientRects().length && parseFloat(getComputedStyle(each).fontSize) < 11).length""")
    assert small == 0


def test_watched_page_reloads(browser: Any, table: Ranking, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    options: Any = {"made": "now", "target": 0.7, "test": False, "refresh": 3}
    path.write_text(page(table, title="before", **options))
    browser.get(path.as_uri())
    path.write_text(page(table, title="after", **options))
    from selenium.common.exceptions import WebDriverException

    wait = WebDriverWait(browser, 60, ignored_exceptions=[WebDriverException])  # while the page changes
    wait.until(lambda result: result.title == "after")
    browser.get("about:blank")


def test_test_of_a_run_with_samples(browser: Any, tmp_path: Path) -> None:
    """Of #1 only; a picture that is none, or boxes beside it, leave a table of the samples."""
    for name, top in (("first", 0.9), ("second", 0.8)):
        make_run(tmp_path / name, lr=top, accuracies=(0.1, top))
        picture = Image.new("RGB", (300, 200), "white")
        picture.paste((200, 0, 0), (10, 20, 110, 120))
        picture.save(tmp_path / name / "most_wrong.png")
        sample = {"position": 7, "true": "cat", "predicted": EVIL, "probability": 0.98, "source": "/home/me/cat/1.png"}
        report = {
            "split": "test", "samples": 30, "classes": [{"class": "cat"}, {"class": EVIL}],
            "confusion": [[9, 1], [5, 15]],
            "curves": {
                "roc": [{"name": EVIL, "area": 0.75, "points": [[0, 0], [0, 0.5], [1, 1]]}],
                "precision_recall": [{"name": EVIL, "area": 0.7, "points": [[0, 1], [1, 0.6]]}],
                "calibration": [[0.6, 0.5, 10], [0.9, 0.95, 20]], "predicted": [],
            },
            "wrong": 6, "most_wrong": [{**sample, "box": [10, 20, 100, 100]}],
        }  # fmt: skip
        (tmp_path / name / "eval.json").write_text(json.dumps(report))

    def show(name: str) -> str:
        path = tmp_path / "index.html"
        found = gather(*RunReader().read([tmp_path / "first", tmp_path / "second"]))
        path.write_text(page(found, title="t", made="now", target=None, test=False, refresh=None))
        browser.get("about:blank")
        browser.get(f"{path.as_uri()}#run={quote(short_path(tmp_path / name))}")
        return text(browser, "#run")

    shown = show("first")
    assert "30 samples of the split: test" in shown and "The 1 most wrong of 6 wrong samples" in shown
    assert "This page contains 1 sample of the data" in shown and f"{EVIL} 98.0 %" in shown
    assert "This page contains 1 sample of the data" in text(browser, "footer")
    cells = "return [...document.querySelectorAll('#test-matrix g')].map((each) => each.textContent)"
    assert browser.execute_script(cells) == ["990 %", "110 %", "525 %", "1575 %"]
    assert "AUC 0.7500" in shown and "AP 0.7000" in shown
    assert browser.execute_script("return document.querySelectorAll('#test-calibration circle').length") == 2
    sheet = browser.execute_script("return document.querySelector('.samples image').getAttribute('href')")
    with Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2]))) as thumbnails:
        red, green, _ = thumbnails.convert("RGB").getpixel((32, 32))
        assert thumbnails.size == (384, 64) and red > 180 and green < 30
    assert "Evaluation" not in show("second"), "tests are shown of the first row"
    for damage in ("pixels", "boxes", "numbers"):
        file = tmp_path / "first" / ("most_wrong.png" if damage == "pixels" else "eval.json")
        whole = file.read_bytes()
        changed = {"boxes": [(b"[10, 20, 100, 100]", b"[10, 20, 900, 100]")], "numbers": [(b"0.98", b'"much"')]}
        for old, new in changed.get(damage, [(b"IDAT", b"IDOT")]):
            file.write_bytes(whole.replace(old, new))
        shown = show("first")
        assert ("cat/1.png" in shown and "/home" not in shown) if damage != "numbers" else "Evaluation" not in shown
        file.write_bytes(whole)
    assert json.dumps(browser.get_log("browser")) == "[]"


def test_page_without_data(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "0", accuracies=(), status=None)
    for i, result in enumerate((gather(*RunReader().read([tmp_path])), gather([], []))):
        path = tmp_path / f"{i}.html"
        path.write_text(page(result, title="t", made="now", target=None, test=False, refresh=None))
        browser.get(path.as_uri())
        assert json.dumps(browser.get_log("browser")) == "[]"
        assert text(browser, "#counts")
