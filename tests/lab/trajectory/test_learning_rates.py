"""Learning-rate curves of schedules, and their plot."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from dlopt.lab.trajectory.learning_rates import Curve, curve, draw_schedules
from dlopt.results.drawing import MAX_CURVES, save
from dlopt.schedules import Horizon, Plateau, Schedule, warmed_up

pytestmark = pytest.mark.drawn


def test_curve_has_the_rate_of_every_update() -> None:
    result = curve("a", lambda t: 0.5**t, lr=0.1, steps=5, steps_per_epoch=2)
    assert result.epochs == [0, 0.5, 1, 1.5, 2, 2.5]
    assert result.rates == [0.1 * 0.5**t for t in (0, 1, 2, 3, 4, 4)]


def test_thins_curves_of_long_runs() -> None:
    result = curve("a", float, lr=1, steps=100_001, steps_per_epoch=100)
    assert 3000 < len(result.rates) < 4100
    assert result.epochs[-1] == 1000.01 and result.rates[-2] == pytest.approx(100_000, rel=1e-3)
    assert all(
        rate == pytest.approx(100 * epoch) for rate, epoch in zip(result.rates[:-1], result.epochs, strict=False)
    )


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0), (40, 2), (40_000, 0)])
def test_plateau_curve_decays_after_patience(steps: int, warmup: int) -> None:
    epoch = steps // 20
    plateau = Plateau(
        monitor="val_loss", mode="auto", factor=0.1, patience=1, threshold=0.0, threshold_mode="abs", cooldown=0,
        min_factor=0.0, horizon=Horizon(warmup, steps, epoch),
    )  # fmt: skip
    factor = warmed_up(plateau, warmup, 0.0, "linear") if warmup else plateau
    result = curve("a", Schedule(factor, follows=plateau), lr=1.0, steps=steps, steps_per_epoch=epoch, evaluate_every=3)
    # Evaluations after epochs 3, 6, 9 ...: the first is the best, the third is the second without improvement.
    rates = dict(zip(result.epochs, result.rates, strict=True))
    assert [math.log10(rates[e]) for e in (8.5, 9, 14.5, 15, 20)] == pytest.approx([0, -1, -1, -2, -2])


@pytest.mark.parametrize("log_y", [False, True])
def test_plot_of_schedules(tmp_path: Path, log_y: bool) -> None:
    curves = [Curve("first", [0, 1, 4], [0.0, 0.2, 0.0]), Curve("second", [0, 2, 4], [0.1, 1e-12, 1e-12])]
    figure = draw_schedules(curves, title="Rates", subtitle="seed=0 " * 30, steps_per_epoch=7, log_y=log_y)
    (axes,) = figure.axes
    assert axes.get_title().startswith("Rates\nseed=0")
    assert axes.get_xlabel() == "epoch (7 updates each)" and axes.get_ylabel() == "learning rate"
    assert axes.get_xlim() == (0, 4) and axes.get_yscale() == ("log" if log_y else "linear")
    assert axes.get_ylim()[0] == (pytest.approx(0.2e-6) if log_y else 0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    for line, each in zip(axes.lines, curves, strict=True):
        assert list(line.get_xdata()) == each.epochs and list(line.get_ydata()) == each.rates
    png, svg = save(figure, tmp_path, "rates")
    with Image.open(png) as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_max_curves_have_distinct_styles() -> None:
    curves = [Curve(str(i), [0, 1], [i, i]) for i in range(MAX_CURVES)]
    lines = draw_schedules(curves, title="", steps_per_epoch=1, log_y=False).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == MAX_CURVES == 28
