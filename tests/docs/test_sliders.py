"""The page with sliders: its paths are those of `dlopt trajectory`, and it draws them without a server."""

import json
import math
import runpy
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.support.browser import NEEDS_BROWSER, chromium, narrow
from tests.support.pages import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs/sliders.py"))
FOLDER = ROOT / "docs/_static/sliders"


def saved() -> dict[str, Any]:
    text = SCRIPT["PATH"].read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text.removeprefix("const DATA = ").removesuffix(";\n"))
    return content


@pytest.mark.parametrize(
    ("condition", "momentum", "rate"), [(100, 0.0, 0.01), (100, 0.9, 0.03), (5, 0.99, 0.5), (1, 0.5, 2.0)]
)
def test_saved_paths_are_those_of_the_recurrence(condition: int, momentum: float, rate: float) -> None:
    data = saved()
    combinations = list(product(data["conditions"], data["momenta"], data["rates"]))
    assert len(combinations) == len(data["paths"])
    path = np.reshape(data["paths"][combinations.index((condition, momentum, rate))], (-1, 2))
    assert path.tolist() == SCRIPT["path"](condition, momentum, rate)
    point, velocity = np.array([-4.0, 0.5]), np.zeros(2)
    for found in path:
        assert found == pytest.approx(point, rel=1e-3, abs=2e-6)
        velocity = momentum * velocity + np.array([1, condition]) * point
        point = point - rate * velocity


def test_a_path_ends_early_exactly_if_it_leaves_the_stable_range() -> None:
    data = saved()
    for (condition, momentum, rate), path in zip(
        product(data["conditions"], data["momenta"], data["rates"]), data["paths"], strict=True
    ):
        bound = 2 * (1 + momentum) / condition
        if rate > 1.2 * bound:
            assert len(path) <= 2 * data["updates"], (condition, momentum, rate)
        elif rate < bound:
            assert len(path) == 2 * (data["updates"] + 1) and all(map(math.isfinite, path))


def test_the_page_loads_only_its_own_files_and_is_of_modest_size() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert "//" not in page.replace("http://www.w3.org", "")
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


@pytest.mark.slow
@NEEDS_BROWSER
def test_sliders_move_by_keyboard_and_fit_on_a_phone(tmp_path: Any) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.get((FOLDER / "index.html").as_uri())
        shown = browser.find_element("id", "result").text
        assert "Without momentum: " in shown and "0.036 converge" in shown
        slider = browser.find_element("id", "momentum")
        slider.send_keys("\ue014")  # arrow to the right
        assert slider.get_attribute("aria-valuetext") == "0.9" and browser.find_element("id", "result").text != shown
        browser.find_element("id", "best").send_keys("\ue007")  # enter
        assert "within a thousandth of the initial distance after" in browser.find_element("id", "result").text
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        narrow(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
