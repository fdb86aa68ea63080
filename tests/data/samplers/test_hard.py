"""Loss-aware sampling: draws per sample, observed losses, and resuming."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.data.samplers import HardExamples
from dlopt.data.samplers.hard import expected_draws
from dlopt.losses import MSE, CrossEntropy
from dlopt.metrics.sums import MetricSum, sample_losses
from tests.support.runs import (
    assert_same_run,
    at_update,
    in_fork,
    metrics,
    result,
    resume,
    same,
    start,
    terminate,
    timeless,
)
from tests.support.sizes import RICH, STEPS_PER_EPOCH
from tests.support.tasks import REGRESSION

LOSSES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40)
FLOORS = st.sampled_from([0.05, 0.2, 0.5, 1.0])
CEILINGS = st.sampled_from([1.0, 1.5, 4.0, 1e9])


def sampler(count: int, floor: float = 0.2, max_draws: float = 4.0, seed: int = 0) -> HardExamples:
    return HardExamples(targets=torch.zeros(count, dtype=torch.int64), seed=seed, floor=floor, max_draws=max_draws)


def epoch_of(hard: HardExamples, epoch: int, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """Serves the epoch as one batch with the given losses; returns the draws of each sample."""
    order = hard.order(epoch)
    hard.begin()
    hard.serve(epoch, order)
    hard.observe(losses(order))
    return order.bincount(minlength=len(hard))


@given(losses=LOSSES, floor=FLOORS, ceiling=CEILINGS)
def test_expected_draws(losses: list[float], floor: float, ceiling: float) -> None:
    """Draws are proportional to the losses between floor and ceiling, and sum to one per sample."""
    values = torch.tensor(losses, dtype=torch.float64)
    draws = expected_draws(values, floor, ceiling)
    assert float(draws.sum()) == pytest.approx(len(losses), rel=1e-6)
    assert float(draws.min()) >= floor * (1 - 1e-9)
    top = floor + (1 - floor) * ceiling
    assert float(draws.max()) <= top * (1 + 1e-6)
    assert bool((draws[values.argsort()].diff() >= -1e-6).all())
    extra, free = draws - floor, draws < top * (1 - 1e-6)
    if floor < 1 and bool(values[free].sum() > 0):
        weights = values[free] + values.mean() * 1e-9  # so that a loss of zero is no division by zero
        torch.testing.assert_close(extra[free] / extra[free].sum(), weights / weights.sum(), rtol=1e-5, atol=1e-6)


def test_expected_draws_of_a_worked_example() -> None:
    draws = expected_draws(torch.tensor([100.0, 1.0, 2.0, 0.0, 0.0, 0.0]), 0.5, 3.0)
    torch.testing.assert_close(draws.tolist(), [2.0, 1.0, 1.5, 0.5, 0.5, 0.5], rtol=0, atol=1e-6)
    assert expected_draws(torch.tensor([3.0, 3.0]), 0.2, 4.0).tolist() == pytest.approx([1, 1])
    assert expected_draws(torch.zeros(3), 0.2, 4.0).tolist() == pytest.approx([1, 1, 1])


@given(losses=LOSSES, floor=FLOORS, ceiling=CEILINGS, epochs=st.integers(1, 30))
def test_draws_follow_constant_losses(losses: list[float], floor: float, ceiling: float, epochs: int) -> None:
    values = torch.tensor(losses)
    hard, total = sampler(len(losses), floor, ceiling), torch.zeros(len(losses))
    for epoch in range(1 + epochs):
        drawn = epoch_of(hard, epoch, lambda order: values[order])
        assert int(drawn.sum()) == len(losses) == len(hard)
        if epoch == 0:
            assert drawn.tolist() == [1] * len(losses)  # nothing is known yet
        else:
            total += drawn
    due = epochs * expected_draws(values, floor, ceiling)
    assert float((total - due).max()) <= 1 + 1e-6  # never far ahead, however many epochs
    if ceiling <= 4:
        assert float((due - total).max()) <= 2


@given(
    count=st.integers(1, 25),
    floor=FLOORS,
    ceiling=CEILINGS,
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 3.0]),
)
def test_no_sample_is_skipped_for_long(count: int, floor: float, ceiling: float, seed: int, scale: float) -> None:
    """No sample is skipped for more than 2 / floor epochs, for any losses."""
    noise = torch.Generator().manual_seed(seed)
    hard, waited = sampler(count, floor, ceiling), torch.zeros(count)
    for epoch in range(math.ceil(6 / floor)):
        drawn = epoch_of(hard, epoch, lambda order: (scale * torch.randn(len(order), generator=noise)).exp())
        waited = torch.where(drawn > 0, 0, waited + 1)
        assert float(waited.max()) <= 2 / floor
        assert abs(float(hard._credit.sum())) < 1e-6


def test_repetitions_are_spread_over_the_epoch() -> None:
    hard = sampler(100, max_draws=1e9)
    epoch_of(hard, 0, lambda order: torch.where(order == 7, 1e6, 1e-3))
    positions = (hard.order(1) == 7).nonzero().flatten()
    assert len(positions) > 50
    assert all(abs(int((positions < place).sum()) - place * len(positions) / 100) <= 3 for place in range(0, 100, 5))


def observed(parts: list[tuple[int, list[int], list[float]]], cuts: list[int]) -> HardExamples:
    """Returns a sampler after serving (update, samples, losses), with the losses observed in arbitrary chunks."""
    hard = sampler(6)
    for step, indices, _ in parts:
        hard.serve(step, torch.tensor(indices))
    losses = torch.tensor([value for _, _, values in parts for value in values], dtype=torch.float64)
    for piece in losses.tensor_split(sorted(cuts)):
        hard.observe(piece)
    assert hard._served == []
    return hard


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, list[int], list[float]]]:
    parts = []
    for step in range(draw(st.integers(1, 5))):
        indices = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
        size = len(indices)
        values = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, math.inf, math.nan]), min_size=size, max_size=size))
        parts.append((step, indices, values))
    return parts


@given(parts=histories(), cuts=st.lists(st.integers(0, 20), max_size=3))
def test_keeps_the_latest_loss(parts: list[tuple[int, list[int], list[float]]], cuts: list[int]) -> None:
    """The largest of several losses in a batch; never a non-finite one; in any chunks."""
    expected: dict[int, tuple[int, float]] = {}
    for step, indices, values in parts:
        for index, value in zip(indices, values, strict=True):
            if math.isfinite(value):
                before = expected.get(index, (-1, 0.0))
                expected[index] = (step, max(value, before[1]) if before[0] == step else value)
    state = observed(parts, [min(cut, sum(len(indices) for _, indices, _ in parts)) for cut in cuts]).state_dict()
    seen, losses = state["seen"].tolist(), state["losses"].tolist()
    assert {i: (seen[i], losses[i]) for i in range(6) if seen[i] >= 0} == expected


def test_samples_without_loss_count_as_average() -> None:
    hard = sampler(4, floor=0.2)
    hard.order(0)
    hard.serve(0, torch.tensor([0, 1]))
    hard.observe(torch.tensor([3.0, 1.0]))
    hard.order(1)
    due = hard._credit + hard._draws
    torch.testing.assert_close(due, expected_draws(torch.tensor([3.0, 1.0, 2.0, 2.0]), 0.2, 4.0))


def test_batches_that_were_not_trained_on_are_dropped() -> None:
    hard = sampler(4)
    hard.serve(0, torch.tensor([3]))  # looked at, as the first batch is for its pictures
    hard.begin()
    hard.serve(0, torch.tensor([1]))
    hard.observe(torch.tensor([2.0]))
    assert hard.state_dict()["losses"].tolist() == [0, 2, 0, 0]


def test_current_epoch_is_fixed_and_part_of_the_state() -> None:
    hard, losses = sampler(20), torch.linspace(0, 3, 20)
    epoch_of(hard, 0, lambda order: losses[order])
    order = hard.order(1)
    hard.begin()
    hard.serve(1, order[:5])
    hard.observe(9 * torch.ones(5))
    assert torch.equal(hard.order(1), order)
    other = sampler(20)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in hard.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other.order(1), order)
    assert torch.equal(other.order(2), hard.order(2))
    assert not torch.equal(hard.order(2), order)
    with pytest.raises(ValueError, match="epoch 1 is over"):
        hard.order(1)
    with pytest.raises(UserError, match=r"sampler=hard_examples: the checkpoint has losses of 20 .* has 21"):
        sampler(21).load_state_dict(state)


class Exchange:
    """Elementwise maximum over two ranks (threads)."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=300), [torch.empty(0), torch.empty(0)]

    def rank(self, number: int) -> Callable[[Tensor], Tensor]:
        def maximum(own: Tensor) -> Tensor:
            self.values[number] = own
            self.barrier.wait()
            both = torch.maximum(*self.values)
            self.barrier.wait()
            return both

        return maximum


def test_ranks_exchange_observed_losses() -> None:
    """Each rank observes the losses of its shard; the state equals that of one process."""
    exchange, hard = Exchange(), [sampler(30, max_draws=9.0) for _ in range(3)]
    found: dict[int, list[Tensor]] = {}

    def loss_of(indices: Tensor, step: int) -> Tensor:
        return ((indices * 7 + step * 3) % 11) ** 2 / 10

    def train(which: int, part: slice) -> None:
        own, step, orders = hard[which], 0, []
        for epoch in range(4):
            orders.append(own.order(epoch))
            own.begin()
            for batch in orders[-1].split(8):
                own.serve(step, batch[part])
                own.observe(loss_of(batch[part], step))
                step += 1
        orders += [value for value in own.state_dict().values() if isinstance(value, Tensor)]
        found[which] = orders

    for rank in range(2):
        hard[rank].maximum = exchange.rank(rank)
    threads = [threading.Thread(target=train, args=(rank, slice(rank, None, 2))) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(2, slice(None))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert not torch.equal(found[2][2].sort().values, torch.arange(30))


# -- the losses of the samples


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_sample_losses_match_torch(smoothing: float, mixed: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    outputs = torch.randn(9, 4, generator=draws)
    targets = torch.rand(9, 4, generator=draws).softmax(1) if mixed else torch.arange(9) % 4
    weights = (1.0, 2.0, 0.5, 1.5)
    loss = CrossEntropy(label_smoothing=smoothing, class_weights=weights, classes=4)
    found = sample_losses(loss, outputs, targets)
    double = targets.double() if mixed else targets
    expected = F.cross_entropy(
        outputs.double(), double, torch.tensor(weights).double(), label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.mean().float(), loss(outputs, targets))


@pytest.mark.parametrize("classes", [3, None])
def test_sample_squared_errors(classes: int | None) -> None:
    outputs = torch.randn(5, 3 if classes else 1)
    targets = torch.arange(5) % 3 if classes else torch.randn(5)
    expected_targets = F.one_hot(targets, 3) if classes else targets.unsqueeze(1)
    found = sample_losses(MSE(classes=classes), outputs, targets)
    torch.testing.assert_close(found, (outputs.double() - expected_targets).square().mean(1))


def test_sample_losses_do_not_depend_on_the_batch() -> None:
    """Otherwise a resumed run, which accumulates at other steps, would differ."""
    outputs, targets = 5 * torch.randn(257, 10), torch.arange(257) % 10
    for loss in (CrossEntropy(label_smoothing=0.1, class_weights=None, classes=10), MSE(classes=10)):
        together = sample_losses(loss, outputs, targets).float()
        alone = [sample_losses(loss, x, y).float() for x, y in zip(outputs.split(3), targets.split(3), strict=True)]
        assert torch.equal(torch.cat(alone), together)


def test_metric_sum_returns_losses_once_and_in_order() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    sums = MetricSum(REGRESSION, lambda outputs, targets: seen.append((outputs, targets)))
    outputs, targets = torch.randn(6, 1), torch.randn(6)
    for x, y in zip(outputs.split(2), targets.split(2), strict=True):
        sums.add(sums.keep(torch.zeros(()), x, y))
    assert seen == []
    sums.sync()
    sums.sync()
    assert len(seen) == 1 and torch.equal(seen[0][0], outputs) and torch.equal(seen[0][1], targets)


# -- whole runs

HARD = [*RICH, "sampler=hard_examples", "optimizer.lr=0.3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, *HARD)["status"] == "finished"
    return folder


def test_a_run_samples_by_its_losses(whole: Path, tmp_path: Path) -> None:
    """The observed losses are the model's, and the draws follow them."""
    still = [line for line in HARD if line != "model.dropout=0.3" and not line.startswith("augmentation")]
    start(tmp_path, *still, "epochs=1", "optimizer=sgd", "optimizer.lr=1e-9", "ema=null")
    state = result(tmp_path)["progress"]["sampler"]
    assert state["draws"].tolist() == [1] * 90 and sorted(set(state["seen"].tolist())) == [0, 1, 2, 3]
    assert float(state["losses"].mean()) == pytest.approx(metrics(tmp_path)[0]["train_loss"], rel=1e-5)
    assert float(state["losses"].std()) > 0.05
    draws = result(whole)["progress"]["sampler"]["draws"]
    assert int(draws.sum()) == 90 and int(draws.max()) > 1 and int(draws.min()) == 0


@pytest.mark.parametrize("step", [2, 6, STEPS_PER_EPOCH, 11])
def test_interrupted_and_resumed(whole: Path, tmp_path: Path, step: int) -> None:
    """Interrupts within epochs, and at the end of one (4)."""
    with at_update(step, terminate):
        assert start(tmp_path, *HARD)["status"] == "interrupted"
    assert resume(tmp_path, *HARD)["status"] == "finished"
    assert_same_run(tmp_path, whole)


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    overrides = [*HARD, "checkpoint.every_steps=3"]

    def until(step: int) -> None:
        with at_update(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            resume(tmp_path, *overrides)

    for step in (5, 8, 14):
        assert os.WTERMSIG(in_fork(lambda step=step: until(step))) == signal.SIGKILL  # type: ignore[misc]
    resume(tmp_path, *overrides)
    assert_same_run(tmp_path, whole)


def test_resuming_without_sampler_state_differs(whole: Path, tmp_path: Path) -> None:
    with at_update(6, terminate):
        start(tmp_path, *HARD)
    with patch.object(HardExamples, "load_state_dict", lambda self, state: None):
        resume(tmp_path, *HARD)
    assert not same(result(tmp_path)["model"], result(whole)["model"])


def test_streamed_micro_batches_and_regression(whole: Path, tmp_path: Path) -> None:
    start(tmp_path / "streamed", *HARD, "data.memory=false")
    assert timeless(tmp_path / "streamed") == timeless(whole)
    for name, extra in {
        "accumulate": ["accumulate=2", "data.drop_last=true", "augmentation=mixup"],
        "regression": ["data=polynomial", "data.subset=null", "data.batch_size=4", "augmentation=none", "loss=mse"],
    }.items():
        with at_update(3, terminate):
            start(tmp_path / name, *HARD, *extra, "epochs=2")
        assert resume(tmp_path / name, *HARD, *extra, "epochs=2")["status"] == "finished"
        start(tmp_path / f"{name}_whole", *HARD, *extra, "epochs=2")
        assert_same_run(tmp_path / name, tmp_path / f"{name}_whole")


@pytest.mark.parametrize("name", ["class_balanced", "class_interleaved", "diverse", "with_replacement"])
def test_runs_with_the_other_samplers_resume(tmp_path: Path, name: str) -> None:
    overrides = [*RICH, f"sampler={name}", "epochs=2"]
    start(tmp_path / "whole", *overrides)
    with at_update(6, terminate):
        start(tmp_path / "stopped", *overrides)
    resume(tmp_path / "stopped", *overrides)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert result(tmp_path / "whole")["progress"]["sampler"] is None
    assert ("batch_variation" in metrics(tmp_path / "whole")[0]) == (name == "diverse")


def test_too_many_draws_are_taken_from_the_samples_with_the_most() -> None:
    """Credits of many samples that sum to more than their number, as after a resume with other settings."""
    hard = HardExamples(targets=torch.zeros(6), seed=0, floor=0.5, max_draws=3.0)
    hard._epoch = 0
    hard._credit = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    hard._plan(torch.tensor([5, 4, 3, 2, 1, 0]))
    assert hard._draws.tolist() == [1, 1, 1, 1, 1, 1] and int(hard._draws.sum()) == 6
    assert hard._credit.tolist() == [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    hard._credit = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -0.5], dtype=torch.float64)
    hard._plan(torch.arange(6))
    assert hard._draws.tolist() == [2, 2, 1, 1, 0, 0]


def test_an_earlier_epoch_is_refused() -> None:
    hard = HardExamples(targets=torch.zeros(3), seed=0, floor=0.5, max_draws=3.0)
    assert hard.order(1).tolist() == hard.order(1).tolist()
    with pytest.raises(ValueError, match="epoch 0 is over: epoch 1 is the current one"):
        hard.order(0)
