import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.training.stopping import Best, Early, Never, Target, Tolerance, monitored_key

NAN, INF = math.nan, math.inf


def stops_at(stopping: Early | Target, losses: list[float], key: str = "val_loss") -> int | None:
    """Returns the evaluation (from 1) at which the run stops."""
    for number, loss in enumerate(losses, start=1):
        stopping.update({"epoch": number, key: loss})
        if stopping.should_stop:
            return number
    return None


def early(monitor: str = "val_loss", patience: int = 2, min_delta: float = 0.0) -> Early:
    return Early(monitor=monitor, patience=patience, min_delta=min_delta)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([3, 2, 1, 0.5], 1, 0.0, None),
        ([1, 2], 1, 0.0, 2),
        ([1, 1], 1, 0.0, 2),  # equal is no improvement
        ([1, 2, 2], 2, 0.0, 3),
        ([1, 2, 0.9, 2, 2], 2, 0.0, 5),  # an improvement starts the count again
        ([1, 0.95, 0.95, 0.95], 3, 0.1, 4),  # too small steps are none
        ([1, 0.95, 0.85, 0.85], 3, 0.1, None),  # slow, but 0.15 below the best that counted
        ([1, 0.9], 1, 0.1, 2),  # "more than" min_delta
        ([NAN, NAN, NAN], 3, 0.0, 3),
        ([NAN, 1, NAN, 2], 2, 0.0, 4),
        ([1, NAN, 0.5, 0.4], 2, 0.0, None),
        ([INF, INF], 2, 0.0, 2),
        ([-INF, 1, 0.5], 2, 0.0, None),  # not finite: no improvement, and not the best for ever
    ],
)
def test_patience(losses: list[float], patience: int, min_delta: float, expected: int | None) -> None:
    assert stops_at(early(patience=patience, min_delta=min_delta), losses) == expected


def test_early_stopping_on_accuracy() -> None:
    assert stops_at(early("val_accuracy"), [0.5, 0.6, 0.7, 0.7, 0.6], "val_accuracy") == 5
    assert stops_at(early("val_accuracy", min_delta=0.05), [0.5, 0.54, 0.56, 0.57], "val_accuracy") is None
    assert stops_at(early("val_accuracy", min_delta=0.05), [0.5, 0.54, 0.55, 0.57], "val_accuracy") == 3


@pytest.mark.parametrize(
    ("monitor", "key", "values", "target", "expected"),
    [
        ("val_loss", "val_loss", [3, 2.0, 1], 2.0, 2),  # as good as the target is enough
        ("val_loss", "val_loss", [NAN, 3, 2.1], 2.0, None),
        ("val_accuracy", "val_accuracy", [0.5, 0.89, 0.9, 0.8], 0.9, 3),
        ("auto", "val_accuracy", [0.5, 0.95], 0.9, 2),
        ("auto", "val_loss", [0.5, 0.1], 0.2, 2),
    ],
)
def test_target(monitor: str, key: str, values: list[float], target: float, expected: int | None) -> None:
    stopping = Target(monitor=monitor, value=target)
    assert stops_at(stopping, values, key) == expected
    resumed = Target(monitor=monitor, value=target)
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.should_stop == (expected is not None)


@given(losses=st.lists(st.one_of(st.floats(-5, 5), st.just(NAN)), min_size=1, max_size=30), patience=st.integers(1, 4))
def test_early_resumes_between_any_two_evaluations(losses: list[float], patience: int) -> None:
    expected = stops_at(early(patience=patience), losses)
    stopping, found = early(patience=patience), None
    for number, loss in enumerate(losses, start=1):
        state = stopping.state_dict()
        stopping = early(patience=patience)
        stopping.load_state_dict(state)
        stopping.update({"epoch": number, "val_loss": loss})
        if stopping.should_stop:
            found = number
            break
    assert found == expected


@given(losses=st.lists(st.floats(-5, 5), min_size=1, max_size=40), patience=st.integers(1, 4), delta=st.floats(0, 1))
def test_early_equals_reference_on_the_full_history(losses: list[float], patience: int, delta: float) -> None:
    anchor, expected = 0, None  # evaluation of the last improvement that counted
    for n, loss in enumerate(losses):
        if n == 0 or loss < losses[anchor] - delta:
            anchor = n
        elif n - anchor == patience:
            expected = n + 1
            break
    assert stops_at(early(patience=patience, min_delta=delta), losses) == expected


def test_never_stops() -> None:
    stopping = Never()
    for epoch in range(1, 11):
        stopping.update({"epoch": epoch, "val_loss": NAN})
    stopping.load_state_dict(stopping.state_dict())
    assert not stopping.should_stop


@given(moves=st.lists(st.sampled_from([0.0, 0.5, 0.999, 1.001, 2.0]), max_size=30), iterations=st.integers(0, 3))
def test_tolerance_equals_reference(moves: list[float], iterations: int) -> None:
    """With frozen parameters, which do not count, and a checkpoint at any time."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, second).double()
    second.weight.requires_grad_(False)
    stopping, row, expected = Tolerance(model, tolerance=1.0, iterations=iterations), 0, []
    seen = []
    for n, move in enumerate(moves):
        with torch.no_grad():
            second.weight.add_(100.0)
            first.bias[n % 2] += 0.6 * move
            second.bias[n % 2] += 0.8 * move
        stopping.after_change()
        stopping.update({"epoch": 1, "val_loss": NAN})
        row = row + 1 if move < 1 else 0
        expected.append(row > iterations)
        seen.append(stopping.should_stop)
        if n % 3 == 0:
            state, stopping = stopping.state_dict(), Tolerance(model, tolerance=1.0, iterations=iterations)
            stopping.load_state_dict(state)
    assert seen == expected


@pytest.mark.parametrize(
    ("monitor", "metrics", "expected"),
    [
        ("auto", {"val_loss": 2.0, "val_accuracy": 0.25}, -0.25),
        ("auto", {"val_loss": 2.0}, 2.0),
        ("val_loss", {"val_loss": 2.0, "val_accuracy": 0.25}, 2.0),
        ("val_accuracy", {"val_loss": 2.0, "val_accuracy": 0.0}, 0.0),
        ("val_macro_f1", {"val_macro_f1": 0.5}, -0.5),
        ("val_calibration_error", {"val_calibration_error": 0.5}, 0.5),
        ("val_class_accuracy/loss", {"val_class_accuracy/loss": 0.5}, -0.5),  # the class is named "loss"
    ],
)
def test_monitored_loss(monitor: str, metrics: dict[str, float], expected: float) -> None:
    assert monitored_key(metrics, monitor)[0] == expected


@pytest.mark.parametrize(("direction", "best_epoch", "stops_after"), [("min", 2, 4), ("max", 1, 3)])
def test_a_users_metric_follows_its_direction_and_not_its_name(
    direction: Any, best_epoch: int, stops_after: int
) -> None:
    best = Best("val_dice_score", direction=direction)
    early = Early(direction, monitor="val_dice_score", patience=2, min_delta=0.0)
    target = Target(direction, monitor="val_dice_score", value=0.2 if direction == "min" else 0.7)
    stopped, reached = [], []
    for epoch, value in enumerate([0.6, 0.2, 0.3, 0.4], 1):
        metrics = {"epoch": epoch, "val_dice_score": value, "val_loss": 1.0}
        best.update(metrics), early.update(metrics), target.update(metrics)
        stopped += [epoch] * early.should_stop
        reached += [epoch] * target.should_stop
    assert (best.epoch, best.others) == (best_epoch, {"val_dice_score": 0.2 if direction == "min" else 0.6})
    assert stopped[0] == stops_after and reached == ([2] if direction == "min" else [])


def test_the_direction_of_a_users_metric_is_never_guessed() -> None:
    with pytest.raises(UserError, match=r"val_dice_score: whether .* monitor_mode=min \(or max\)"):
        monitored_key({"val_dice_score": 0.5}, "val_dice_score")


def test_unknown_metric_lists_the_logged_ones() -> None:
    with pytest.raises(UserError, match=r"monitor=val_f1: .*val_accuracy, val_loss"):
        monitored_key({"val_loss": 1.0, "val_accuracy": 0.5, "train_loss": 1.0}, "val_f1")
    with pytest.raises(UserError, match=r"monitor=val_loss: .* none"):
        monitored_key({"train_loss": 1.0}, "auto")


def bests(monitor: str, sequence: list[tuple[float | None, float]]) -> tuple[list[bool], Best]:
    best, seen = Best(monitor), []
    for epoch, (accuracy, loss) in enumerate(sequence, start=1):
        seen.append(best.update({"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss}))
    return seen, best


def test_best_by_accuracy_then_loss_then_epoch() -> None:
    seen, best = bests("auto", [(0.5, 1.0), (0.5, 1.0), (0.5, 0.9), (0.4, 0.1), (0.6, 3.0), (0.6, 3.0)])
    assert seen == [True, False, True, False, True, False]
    assert (best.epoch, best.val_accuracy, best.val_loss) == (5, 0.6, 3.0)


def test_best_by_loss() -> None:
    seen, best = bests("val_loss", [(0.9, 1.0), (0.1, 0.5), (0.95, 0.5)])
    assert (seen, best.epoch) == ([True, True, False], 2)
    seen, best = bests("auto", [(None, 1.0), (None, 0.5), (None, 0.7)])
    assert (seen, best.epoch, best.val_accuracy) == ([True, True, False], 2, None)


@pytest.mark.parametrize("monitor", ["auto", "val_loss"])
def test_best_ignores_nonfinite_metrics(monitor: str) -> None:
    seen, best = bests(monitor, [(None, NAN), (None, INF), (None, 2.0), (None, -INF), (None, NAN), (None, 1.0)])
    assert (seen, best.epoch) == ([False, False, True, False, False, True], 6)
    seen, best = bests("auto", [(0.5, NAN), (0.5, 7.0), (0.5, NAN)])
    assert (seen, best.epoch) == ([True, True, False], 2), "of equal accuracies the one whose loss is a number"


def test_best_state_dict() -> None:
    _, best = bests("auto", [(0.5, 1.0), (0.7, 2.0)])
    state: dict[str, Any] = json.loads(json.dumps(best.state_dict()))
    other = Best("auto")
    other.load_state_dict(state)
    assert other == best
    assert not other.update({"epoch": 3, "val_accuracy": 0.7, "val_loss": 2.0})
