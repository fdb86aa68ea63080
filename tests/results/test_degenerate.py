"""Reports of sweeps without a spread: ties, one run, metrics that are missing, not finite, zero, tiny or huge."""

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from dlopt.results.destination import destination
from dlopt.results.exports import ReportContent, render
from dlopt.results.page_data import page_data
from dlopt.results.plots import PLOTS, AxisScale, plots
from dlopt.results.ranking import Ranking, default_target, importance
from tests.support.folders import make_run, table

pytestmark = pytest.mark.drawn

KEYS = {"lr": (0.1, 0.2), "optimizer.weight_decay": (0.0, 0.1), "model.activation": ("relu", "tanh")}
VALIDATION = ("val_accuracy", "val_loss", "best_val_accuracy", "best_val_loss")


def removed(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def without_value(values: dict[str, Any], value: float | None) -> dict[str, Any]:
    return {key: value if key in VALIDATION else other for key, other in values.items()}


def keep(values: dict[str, Any], number: int) -> dict[str, Any]:
    return values


# What a sweep has in common: the arguments of run `number`, and what is changed in its metrics and its summary.
CASES: dict[str, tuple[Any, Any]] = {
    "all tie": (lambda number: {}, keep),
    "one epoch": (lambda number: {"accuracies": (0.7,)}, keep),
    "all failed": (lambda number: {"status": "failed", "accuracies": ()}, keep),
    "failed after an epoch": (lambda number: {"status": "failed", "accuracies": (0.5,)}, keep),
    "one ended": (lambda number: {"status": "failed", "accuracies": ()} if number else {}, keep),
    "all zero": (lambda number: {"accuracies": (0.0,), "losses": (0.0,)}, keep),
    "negative and zero": (lambda number: {"accuracies": (0.7,), "losses": (-1.0 * (number % 2),)}, keep),
    "tiny": (lambda number: {"accuracies": (0.7,), "losses": (5e-324 * (1 + number),)}, keep),
    "huge": (lambda number: {"accuracies": (0.7,), "losses": (1e200 * (1 + number),)}, keep),
    "null": (lambda number: {}, lambda values, number: without_value(values, None)),
    "not finite": (lambda number: {}, lambda values, number: without_value(values, math.nan)),
    "missing": (lambda number: {}, lambda values, number: removed(values, *VALIDATION)),
    "missing in some": (lambda number: {}, lambda values, number: removed(values, *VALIDATION * (number % 2))),
    "no seconds": (lambda number: {}, lambda values, number: removed(values, "seconds", "train_loss")),
}

BY_LOSS = ("all zero", "negative and zero", "tiny", "huge")


def sweep(folder: Path, case: str, keys: int, seeds: int = 2) -> None:
    """Writes a sweep over the first `keys` of `KEYS`."""
    arguments, change = CASES[case]
    grid = itertools.product(*list(KEYS.values())[:keys], range(seeds))
    for number, (*values, seed) in enumerate(grid):
        config = dict(zip(KEYS, values, strict=False))
        lr = config.pop("lr", 0.1)
        path = make_run(folder / str(number), lr=lr, seed=seed, config=config, **arguments(number))
        lines = (path / "metrics.jsonl").read_text().splitlines()
        changed = [json.dumps(change(json.loads(line), number)) + "\n" for line in lines]
        (path / "metrics.jsonl").write_text("".join(changed))
        summary = change(json.loads((path / "summary.json").read_text()), number)
        (path / "summary.json").write_text(json.dumps(summary))


def check(ranking: Ranking, folder: Path) -> None:
    """Makes every part of the report, with each plot, without a warning of NumPy or matplotlib."""
    target = default_target(ranking)
    report = ReportContent(ranking, "title", "now", target, test=False, refresh=None, top=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(plots(ranking, target)) <= set(PLOTS)
        files = render(destination(folder, None, ["html", "csv", "latex", "markdown"], None), report)
    assert all(files.values()) and len(files) == 4
    json.dumps(page_data(ranking, target=target, test=True, refresh=None), allow_nan=False)


@pytest.mark.parametrize("case", CASES)
def test_report_of_a_sweep_without_a_spread(tmp_path: Path, case: str) -> None:
    sweep(tmp_path, case, keys=2)
    check(table(tmp_path, "val_loss" if case in BY_LOSS else None), tmp_path)


@pytest.mark.parametrize(("keys", "seeds"), [(0, 1), (0, 2), (1, 1), (1, 2), (3, 1)])
def test_report_of_a_tie(tmp_path: Path, keys: int, seeds: int) -> None:
    sweep(tmp_path, "all tie", keys, seeds)
    check(table(tmp_path), tmp_path)


def test_parallel_coordinates_of_a_tie_show_the_metric(tmp_path: Path) -> None:
    sweep(tmp_path, "all tie", 2)
    ranking = table(tmp_path)
    parallel = page_data(ranking, target=None, test=False, refresh=None)["parallel"]
    assert parallel["axes"][-1]["ticks"] == [[0.5, "80.00 %"]]
    assert [line[-1] for line in parallel["lines"]] == [0.5] * 4
    [axis] = plots(ranking, None, ["parallel_coordinates"])["parallel_coordinates"].axes
    assert [note.get_text() for note in axis.texts if note.xy[0] == 2] == ["80"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [None, None], [0.5, None, 0.5], [True, True], ["a", None, 3]])
def test_scale_without_a_range_maps_every_value(values: list[Any]) -> None:
    scale = AxisScale(values)
    assert all(0 < scale(value) < 1 for value in values)
    assert {at for at, _, _ in scale.ticks} <= set(map(scale, values))


@pytest.mark.parametrize("values", [(5e-324, 1e300), (1e-300, 1e300), (1.0, 1.0 + 2**-52), (-1e300, 1e300), (0, 1)])
def test_scale_of_any_range_ends_at_0_and_1(values: tuple[float, float]) -> None:
    scale = AxisScale(values)
    assert [scale(value) for value in values] == [0, 1]


def test_importance_does_not_change_with_the_unit_of_the_metric(tmp_path: Path) -> None:
    found = []
    for i, factor in enumerate((1.0, 1e200)):
        for number, (lr, decay) in enumerate(itertools.product((0.1, 0.2, 0.4), (0.0, 0.1))):
            losses, config = (factor * (lr + 0.01 * decay),), {"optimizer.weight_decay": decay}
            make_run(tmp_path / f"{i}/{number}", lr=lr, config=config, accuracies=(0.5,), losses=losses)
        found.append(importance(table(tmp_path / str(i), "val_loss")))
    first, second = found
    assert first is not None and second is not None
    assert first.fractions["optimizer.lr"] > 0.9
    assert first.fractions == pytest.approx(second.fractions) and first.explained == pytest.approx(second.explained)
