"""The page of a verdict and its luck: its intervals and verdicts are those of a leaderboard, on a phone and offline."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from scipy.special import stdtrit

from dlopt.results.leaderboard import Record
from dlopt.results.ranking import Ranking, gather
from dlopt.results.simultaneous import rate_of
from tests.support.browser import NEEDS_BROWSER, narrow
from tests.support.pages import ROOT

PAGE = ROOT / "docs/_static/verdict/index.html"
IMAGES = 144
RATES = ("0.005", "0.003")
RIGHT, ENTER = "\ue014", "\ue007"  # of WebDriver


def recorded() -> dict[str, list[float]]:
    """The accuracies of each learning rate, in the order of the seeds."""
    saved = json.loads((ROOT / "docs/gallery/three_seeds.json").read_text(encoding="utf-8"))
    assert saved["seeds"] == [*range(20, 40)]
    return {row["variant"].removeprefix("learning rate "): row["val_accuracy"] for row in saved["rows"]}


def test_the_numbers_in_the_page_are_the_recorded_ones() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {rate: json.loads(f"[{row}]") for rate, row in re.findall(r'^  "([\d.]+)": \[(.*)\],$', text, re.M)}
    assert rows == {rate: pytest.approx([IMAGES * each for each in row], abs=1e-6) for rate, row in recorded().items()}
    [line] = re.findall(r"HALF_WIDTH = \{(.*)\};", text)
    quantiles = re.findall(r"(\d+): ([\d.]+) / Math.sqrt\(\1\)", line)
    found = {int(count): float(quantile) / float(count) ** 0.5 for count, quantile in quantiles}
    expected = {n: float(stdtrit(n - 1, 1 - rate_of(1) / 2)) / n**0.5 for n in (3, 20)}
    assert found == pytest.approx(expected, rel=1e-12)
    [(enough, quantile)] = re.findall(r"ENOUGH = (\d+), LATER = ([\d.]+) / Math.sqrt\(\1\);", text)
    assert float(quantile) == pytest.approx(float(stdtrit(int(enough) - 1, 1 - rate_of(2) / 2)), rel=1e-12)


def test_the_page_is_one_small_file_without_network() -> None:
    assert [path.name for path in PAGE.parent.iterdir()] == ["index.html"] and PAGE.stat().st_size < 20_000
    assert not re.findall(r"\b(?:src|href)=|@import|url\(|fetch\(|https?:", PAGE.read_text(encoding="utf-8"))


def board(seeds: tuple[int, ...]) -> Ranking:
    """The leaderboard of both learning rates over some of the seeds, counted from 0."""
    records = []
    for rate, accuracies in recorded().items():
        for seed in seeds:
            correct = round(IMAGES * accuracies[seed])
            records.append(
                Record(
                    Path(f"{rate}-{seed}"),
                    "finished",
                    {"optimizer.lr": float(rate), "seed": seed},
                    {"val_accuracy": correct / IMAGES},
                    overrides=[f"optimizer.lr={rate}", f"seed={seed}"],
                    origin={"validation": {"count": IMAGES, "unit": "images"}},
                )
            )
    return gather(records, [])


@pytest.fixture
def page(browser: Any) -> Any:
    browser.get(PAGE.as_uri())
    return browser


@pytest.mark.slow
@NEEDS_BROWSER
def test_intervals_and_verdicts_are_those_of_the_leaderboard(page: Any) -> None:
    """For all 1140 choices of three seeds, and for all 20."""
    choices = [*combinations(range(20), 3), tuple(range(20))]
    script = "return [...TRIPLES, EVERY].map(differenceOf).map((each) => [each, sentenceOf(each)])"
    shown, decided = page.execute_script(script), 0
    assert len(shown) == len(choices) == 1141
    for seeds, (computed, sentence) in zip(choices, shown, strict=True):
        found = board(seeds)
        assert sentence == found.verdict, seeds
        other = found.rows[1]
        assert other.difference is not None
        # The page subtracts the second rate from the first, a leaderboard the first row from the others.
        sign = -1 if RATES[1] in other.label else 1
        low, high = computed["low"], computed["high"]
        expected = [other.difference.mean, other.difference.low, other.difference.high]
        shown_ends = [computed["mean"], *((low, high) if sign > 0 else (high, low))]
        for one, each in zip(expected, shown_ends, strict=True):
            difference = each if one is None else sign * each / IMAGES
            assert difference == (one if one is None else pytest.approx(one, rel=1e-6, abs=1e-8)), seeds
        decided += "is better" in sentence and len(seeds) == 3
    counts = page.execute_script("return COUNTS")
    assert sum(counts.values()) == 1140 and counts["0.005"] + counts["0.003"] == decided
    print(f"{decided} of 1140 choices of three seeds decide")


@pytest.mark.slow
@NEEDS_BROWSER
def test_slider_and_guess_by_keyboard(page: Any) -> None:
    slider = page.find_element("id", "triple")
    before = page.find_element("id", "seeds").text
    slider.send_keys(RIGHT)
    seeds = page.find_element("id", "seeds").text
    assert seeds != before and slider.get_attribute("aria-valuetext") == f"seeds {seeds}"
    assert len(page.find_elements("css selector", ".seed.chosen")) == 3
    counted = page.find_element("id", "counted")
    page.find_element("id", "guess").send_keys(ENTER)
    assert not counted.is_displayed()
    page.find_element("id", "guessed").send_keys(RIGHT)
    page.find_element("id", "answer").send_keys(ENTER)
    assert counted.is_displayed() and "Your guess was 51 %" in counted.text
    page.find_element("id", "random").send_keys(ENTER)
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
@NEEDS_BROWSER
def test_the_page_fits_on_a_phone(page: Any) -> None:
    narrow(page, 360)
    page.find_element("id", "guess").click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.find_element("id", "answer").click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
