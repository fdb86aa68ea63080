"""The page with sliders: it computes the paths of the commands that it shows, by keyboard, on a phone, and offline."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.basics.random import generator
from dlopt.lab.trajectory.functions import MatrixQuadratic
from dlopt.optim.orthogonalize import QUINTIC, iterate
from tests.support.browser import NEEDS_BROWSER, narrow
from tests.support.line import dlopt
from tests.support.pages import ROOT

PAGE = ROOT / "docs/_static/sliders/index.html"
UPDATES = 200
PLANES = ("quadratic", "noisy_quadratic", "rosenbrock", "saddle")
OPTIMIZERS = ("gradient_descent", "momentum", "nesterov", "rmsprop", "adam", "adamw", "lion")
SCHEDULES = ("constant", "linear", "cosine", "step", "wsd")
CHOICES = [(function, optimizer) for function in (*PLANES, "matrix") for optimizer in OPTIMIZERS] + [("matrix", "muon")]
RIGHT, DOWN, ENTER = "\ue014", "\ue015", "\ue007"  # of WebDriver


def test_the_numbers_in_the_page_are_those_that_dlopt_draws() -> None:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', PAGE.read_text(), re.S)
    data = json.loads(text)
    draws = [torch.randn(2, generator=generator("cpu", 0, t), dtype=torch.float64) for t in range(UPDATES)]
    assert data["draws"] == torch.stack(draws).tolist()
    function = MatrixQuadratic(curvatures=(1.0, 0.3, 0.1, 0.03), singular_values=(1.0, 0.8, 0.6, 0.4), rotated=True)
    for name in ("left", "right"):
        torch.testing.assert_close(
            torch.tensor(data[name], dtype=torch.float64), getattr(function, name), rtol=0, atol=1e-14
        )


def test_the_page_is_one_small_file_without_network() -> None:
    assert [path.name for path in PAGE.parent.iterdir()] == ["index.html"] and PAGE.stat().st_size < 150_000
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:src|href)=|@import|url\((?!#)|fetch\(|//(?!www\.w3\.org)\w", text)


def precise(matrices: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """`orthogonalize` in float64."""
    assert coefficients == QUINTIC
    return iterate(matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps), [QUINTIC] * steps)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The paths of the commands that follow, which draw nothing; Muon's iteration is in float64."""
    found: list[Tensor] = []

    def record(function: Any, trajectories: dict[str, Any], **arguments: str) -> None:
        found.extend(trajectory.points for trajectory in trajectories.values())

    monkeypatch.setattr("dlopt.lab.trajectory.paths.draw_trajectories", record)
    monkeypatch.setattr("dlopt.lab.trajectory.matrix.draw_components", record)
    monkeypatch.setattr("dlopt.results.drawing.save", lambda *arguments: [])
    monkeypatch.setattr("dlopt.optim.muon.orthogonalize", precise)
    return found


@pytest.fixture
def page(browser: Any) -> Any:
    browser.get(PAGE.as_uri())
    return browser


def choose(page: Any, **choices: str) -> None:
    """Selects, as the reader does."""
    for group, choice in choices.items():
        page.find_element("css selector", f"#{group} option[value={choice}]").click()


def result(page: Any) -> str:
    return str(page.find_element("id", "result").text)


@pytest.mark.slow
@NEEDS_BROWSER
def test_paths_are_those_of_the_commands_that_the_page_shows(page: Any, paths: list[Tensor], tmp_path: Path) -> None:
    page.execute_script("state.steps = arguments[0]", UPDATES)
    largest = 0.0
    for number, (function, optimizer) in enumerate(CHOICES):
        choose(page, function=function, optimizer=optimizer, schedule=SCHEDULES[number % len(SCHEDULES)])
        page.find_element("id", "fastest").click()
        if (function, optimizer) == ("matrix", "rmsprop"):
            # Shorter steps: at the fastest rate it oscillates about the minimum, and a start that differs by 1e-15 ends
            # at 9 % of the initial distance.
            page.execute_script("keysOf('optimizer').lr = 0.0018; changed()")
        command = shlex.split(page.find_element("id", "command").text)
        computed = torch.tensor(page.execute_script("return pathOf()"), dtype=torch.float64)
        assert dlopt(tmp_path, *command[1:], f"output={number}").code == 0
        expected = paths[-1]
        assert len(expected) == len(computed) == UPDATES + 1, command
        difference = float((computed - expected).norm(dim=1).max() / expected[0].norm())
        assert difference < 1e-6, command
        largest = max(largest, difference)
    print(f"largest relative difference over {UPDATES} updates of {len(paths)} paths: {largest:.2g}")


@pytest.mark.slow
@NEEDS_BROWSER
def test_keys_of_all_choices_are_in_the_command(page: Any, paths: list[Tensor], tmp_path: Path) -> None:
    """Moves every slider by one place: the command has the key, and makes the same path."""
    for number, (function, optimizer) in enumerate([("noisy_quadratic", "adamw"), ("matrix", "muon")]):
        choose(page, function=function, optimizer=optimizer, schedule=("step", "wsd")[number])
        for slider in page.find_elements("css selector", "#controls input"):
            if slider.get_attribute("id") != "optimizer.lr":
                slider.send_keys(RIGHT if slider.get_attribute("value") == "0" else "\ue012")
        text = page.find_element("id", "command").text
        keys = page.execute_script("return [...document.querySelectorAll('#controls input')].map((each) => each.id)")
        assert all(re.sub(r"beta\d", "betas", key) + "=" in text for key in keys), text
        assert dlopt(tmp_path, *shlex.split(text)[1:], f"output={number}").code == 0
        computed = torch.tensor(page.execute_script("return pathOf()"), dtype=torch.float64)
        torch.testing.assert_close(computed, paths[-1], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@NEEDS_BROWSER
def test_start_guess_and_sliders_by_keyboard(page: Any) -> None:
    before = result(page)
    slider = page.find_element("id", "optimizer.momentum")
    slider.send_keys(RIGHT)
    assert slider.get_attribute("aria-valuetext") == "0.9" and result(page) != before
    start = page.find_element("id", "start")
    start.send_keys(RIGHT, DOWN)
    assert "'function.start=[-3.93,0.46]'" in page.find_element("id", "command").text
    assert page.execute_script("return document.activeElement.id") == "start"
    page.find_element("id", "guess").send_keys(ENTER)
    assert result(page).startswith("Where will the path end?") and not page.find_elements(
        "css selector", "#plane .path"
    )
    mark = page.find_element("id", "mark")
    mark.send_keys(*[RIGHT] * 50, ENTER)  # half of the window of 7: at -0.43
    assert "Your guess is 0." in result(page) and page.find_elements("css selector", "#plane .path")
    slider.send_keys(RIGHT)
    assert result(page).startswith("Where will the path end?")
    choose(page, function="matrix", optimizer="muon")
    mark.send_keys(DOWN, ENTER)
    assert "Your guess is " in result(page)
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.slow
@NEEDS_BROWSER
def test_start_is_dragged_and_the_page_fits_on_a_phone(page: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).drag_and_drop_by_offset(page.find_element("id", "start"), 120, 40).perform()
    x, y = page.execute_script("return state.start")
    assert x > -3 and y < 0.3
    page.find_element("id", "guess").click()
    page.find_element("id", "plane").click()  # at its centre
    assert "Your guess is" in result(page)
    narrow(page, 360)
    for function in (*PLANES, "matrix"):
        choose(page, function=function)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
