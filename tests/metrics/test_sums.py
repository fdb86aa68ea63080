import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlopt.metrics.sums import MetricSum
from tests.support.tasks import CLASSIFICATION, REGRESSION

Batch = tuple[Tensor, Tensor, Tensor]
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=12)


def batches(sizes: list[int], seed: int = 0, mixed: bool = False) -> list[Batch]:
    """(mean loss, outputs [B, 4], targets); with `mixed` every other batch has probabilities for targets."""
    draws = torch.Generator().manual_seed(seed)
    result = []
    for number, size in enumerate(sizes):
        outputs = torch.randn(size, 4, generator=draws)
        targets = torch.randint(4, (size,), generator=draws)
        if mixed and number % 2:
            targets = torch.rand(size, 4, generator=draws).softmax(1)
        result.append((torch.rand((), generator=draws) * 3, outputs, targets))
    return result


def plain_loop(parts: list[Batch]) -> dict[str, float]:
    loss, right, count = 0.0, 0, 0
    for mean, outputs, targets in parts:
        for row, target in zip(outputs.tolist(), targets.tolist(), strict=True):
            label = target if isinstance(target, int) else target.index(max(target))
            right += row.index(max(row)) == label
            count += 1
        loss += float(mean) * len(outputs)
    return {"train_loss": loss / count, "train_accuracy": right / count}


@given(sizes=sizes, seed=st.integers(0, 99), mixed=st.booleans())
def test_equals_plain_loop(sizes: list[int], seed: int, mixed: bool) -> None:
    sums = MetricSum(CLASSIFICATION)
    for part in batches(sizes, seed, mixed):
        sums.add(sums.keep(*part))
    assert sums.means("train") == plain_loop(batches(sizes, seed, mixed))
    assert sums.count == sum(sizes)


@given(sizes=sizes, settled=st.sets(st.integers(0, 11)), reported=st.sets(st.integers(0, 11)))
def test_does_not_depend_on_the_times_of_syncs(sizes: list[int], settled: set[int], reported: set[int]) -> None:
    reference, sums = MetricSum(CLASSIFICATION), MetricSum(CLASSIFICATION)
    for number, part in enumerate(batches(sizes)):
        reference.add(reference.keep(*part))
        sums.add(sums.keep(*part))
        if number in settled:
            sums.sync()
        if number in reported:
            sums.since_last()
    first, second = sums.state_dict(), reference.state_dict()
    assert [first[key] for key in ("loss", "correct", "count")] == [second[key] for key in ("loss", "correct", "count")]


@given(sizes=sizes, cut=st.integers(0, 12))
def test_resumes_bitwise_identically(sizes: list[int], cut: int) -> None:
    parts = batches(sizes)
    first, second = MetricSum(CLASSIFICATION), MetricSum(CLASSIFICATION)
    for part in parts[:cut]:
        first.add(first.keep(*part))
    state = first.state_dict()
    reported = state["reported"]
    assert all(type(value) in (int, float) for value in (state["loss"], state["correct"], state["count"], *reported))
    second.load_state_dict(state)
    for part in parts[cut:]:
        second.add(second.keep(*part))
    assert second.means("train") == plain_loop(parts)


def test_bounds_pending_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.metrics.sums._MAX_PENDING_OUTPUTS", 40)
    sums, held = MetricSum(CLASSIFICATION), []
    for part in batches([5] * 20):
        sums.add(sums.keep(*part))
        held.append(sum(each.outputs.numel() for each in sums._pending if each.outputs is not None))
    assert 0 < max(held) <= 40
    assert sums.means("train") == plain_loop(batches([5] * 20))


def test_large_outputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text has the whole vocabulary as outputs of each token, and an update many micro-batches."""
    monkeypatch.setattr("dlopt.metrics.sums._MAX_KEPT_OUTPUTS", 20)
    sums = MetricSum(CLASSIFICATION)
    measured = [sums.keep(*part) for part in batches([5, 6, 7])]
    assert [each.outputs is None for each in measured] == [False, True, True]
    sums.add(*measured)
    assert sums.means("train") == plain_loop(batches([5, 6, 7]))


def test_since_last_covers_each_sample_once() -> None:
    sums = MetricSum(CLASSIFICATION)
    parts = batches([3, 4, 5, 2])
    for part in parts[:2]:
        sums.add(sums.keep(*part))
    assert sums.since_last()["accuracy"] == plain_loop(parts[:2])["train_accuracy"]
    for part in parts[2:]:
        sums.add(sums.keep(*part))
    metrics_since = sums.since_last()
    assert metrics_since["accuracy"] == plain_loop(parts[2:])["train_accuracy"]
    assert metrics_since["loss"] == pytest.approx(plain_loop(parts[2:])["train_loss"], rel=1e-12)


def test_a_report_after_a_resume_covers_the_whole_interval() -> None:
    first, second, parts = MetricSum(CLASSIFICATION), MetricSum(CLASSIFICATION), batches([3, 4, 5, 2])
    first.add(first.keep(*parts[0]))
    first.since_last()
    first.add(first.keep(*parts[1]))
    second.load_state_dict(first.state_dict())
    for part in parts[2:]:
        second.add(second.keep(*part))
    assert second.since_last()["loss"] == pytest.approx(plain_loop(parts[1:])["train_loss"], rel=1e-12)


def test_regression_has_no_accuracy() -> None:
    sums = MetricSum(REGRESSION)
    sums.add(sums.keep(torch.tensor(2.0), torch.zeros(3, 1), torch.zeros(3)))
    sums.add(sums.keep(torch.tensor(4.0), torch.zeros(1, 1), torch.zeros(1)))
    assert sums.means("val") == {"val_loss": 2.5}


def test_without_accuracy_no_outputs_are_read() -> None:
    sums = MetricSum(CLASSIFICATION, accuracy=False)
    for part in batches([3, 4]):
        measured = sums.keep(*part)
        assert measured.outputs is measured.correct is None
        sums.add(measured)
    assert sums.means("train") == {"train_loss": plain_loop(batches([3, 4]))["train_loss"]}


def test_empty() -> None:
    """A loss of 0 would be the best one: an epoch whose updates were all skipped has none."""
    means = MetricSum(CLASSIFICATION).means("val")
    assert means.keys() == {"val_loss", "val_accuracy"} and all(map(math.isnan, means.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_precision_losses_add_up_in_float64(dtype: Any) -> None:
    sums = MetricSum(REGRESSION)
    value = torch.tensor(1.0078125, dtype=dtype)  # exact in both
    for _ in range(3000):
        sums.add(sums.keep(value, torch.zeros(1, 1), torch.zeros(1)))
    assert sums.means("train")["train_loss"] == 1.0078125


def test_parts_of_an_interval_that_begins_in_the_epoch_before() -> None:
    """Means of the parts (a, b) over 4 + 4 samples, of which the first 4 were reported, and 4 of the next epoch."""
    sums = MetricSum(REGRESSION)

    def add(a: float, b: float) -> None:
        sums.add(sums.keep_parts(torch.tensor(a + b), {"a": torch.tensor(a), "b": torch.tensor(b)}, 4))

    add(1.0, 2.0)
    sums.since_last()
    add(3.0, 5.0)
    assert sums.means("train") == {"train_loss": 5.5, "train_a": 2.0, "train_b": 3.5}
    sums.start_epoch()
    add(5.0, 2.0)
    assert sums.since_last() == {"loss": 7.5, "a": 4.0, "b": 3.5}
