"""Tests of the training loop with fakes for batches, tracking and checkpoints."""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.interruption import Interruption
from dlopt.data.batches import Batch
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.tasks.classification import Classification
from dlopt.training.averaging import ExponentialAverage, evaluation_weights
from dlopt.training.builders.precision import Precision
from dlopt.training.evaluate import evaluate
from dlopt.training.loop import Trainer
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import Intervals, Progress
from dlopt.training.step import Step, StepSettings, UpdateResult
from dlopt.training.stopping import Best, Early, Never
from tests.support.lengths import constant
from tests.support.runs import same, without_time
from tests.support.steps import whole
from tests.support.tasks import CLASSIFICATION

COUNT, SIZE = 23, 5  # 5 batches an epoch, the last of 3 samples
PER_EPOCH = 5
RATE = "samples_per_second"


def samples() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 4, generator=draws), torch.randint(3, (COUNT,), generator=draws)


@dataclass
class Batches:
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    bad_at: int | None = None

    def __len__(self) -> int:
        return PER_EPOCH

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        self.requests.append((epoch, start, step))
        inputs, targets = samples()
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(epoch))
        for number, part in enumerate(order.split(SIZE)[start:]):
            if step + number == self.bad_at:
                raise UserError("data.root=images: 7.png is damaged")
            yield whole(inputs[part], targets[part])


@dataclass
class Tracking:
    advanced: list[int] = field(default_factory=list)
    steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def advance(self, step: int) -> None:
        self.advanced.append(step)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, dict(values)))

    def epoch(self, metrics: Mapping[str, Any], *, improved: bool, best: Mapping[str, Any]) -> None:
        self.epochs.append(dict(metrics))
        self.best.append(dict(best))

    def rewind(self, epoch: int, step: int) -> None:
        self.epochs = [line for line in self.epochs if line["epoch"] <= epoch]


@dataclass
class Checkpoints:
    saved: list[dict[str, Any]] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    shards: None = None
    last = Path(__file__)  # it exists

    def refuse_moved(self) -> None:
        """The folder is where it was."""

    def save(self, state: dict[str, Any], *, best: bool, snapshot: str | None = None) -> None:
        self.saved.append(copy.deepcopy(state))
        if best:
            self.best.append(state["progress"]["step"])

    def wait(self) -> None:
        pass

    def has_best(self, epoch: int, run_id: str | None) -> bool:
        return True

    def restore_best(self, state: dict[str, Any]) -> None:
        self.restored.append(state["progress"]["step"])

    @property
    def steps(self) -> list[int]:
        return [state["progress"]["step"] for state in self.saved]


INTERVALS = (
    "evaluate_every", "evaluate_every_steps", "save_every_epochs", "save_every_steps", "log_every_steps", "snapshot",
)  # fmt: skip


def training(
    *, lr: float = 0.1, ema: float | None = None, loss: nn.Module | None = None, check_now: bool = True, **changed: Any
) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    average = None if ema is None else ExponentialAverage(model, ema)
    cpu = torch.device("cpu")
    train_metrics = MetricSum(CLASSIFICATION)
    step = Step(
        Network(model, model, loss or nn.CrossEntropyLoss()),
        optimizer,
        Scheduler(optimizer, lambda t: 1 / (1 + 0.1 * t)),
        Mode(cpu),
        StepSettings(check_now=check_now),
        precision=Precision("fp32", cpu),
        metrics=train_metrics,
        average=None if average is None else average.update,
    )
    inputs, targets = samples()

    def validate(interruption: Interruption) -> dict[str, float] | None:
        batches = (Batch(x, y, len(x)) for x, y in zip(inputs.split(7), targets.split(7), strict=True))
        with evaluation_weights(optimizer, average):
            return evaluate(
                model,
                model,
                batches,
                nn.CrossEntropyLoss(),
                task=Classification(3),
                split="val",
                interruption=interruption,
            )

    steps, steps_per_epoch = changed.pop("steps", 15), changed.pop("steps_per_epoch", 1)
    intervals = {key: changed.pop(key) for key in INTERVALS if key in changed}
    arguments: dict[str, Any] = {
        "batches": Batches(),
        "validate": validate,
        "tracking": Tracking(),
        "checkpoints": Checkpoints(),
        "stopping": Never(),
        "best": Best("val_loss"),
        "recovery": Recovery(attempts=1, log=print),
    }
    return Trainer(
        step=step,
        run_update=step.update,
        length=constant(steps, steps_per_epoch),
        intervals=Intervals(**intervals),
        average=average,
        normalize=nn.Identity(),
        config={"name": "try"},
        progress=Progress(),
        train_metrics=train_metrics,
        **arguments | changed,
    )


def run(t: Trainer, interruption: Any = None) -> tuple[str, Tracking, Checkpoints]:
    status = t.fit(Interruption() if interruption is None else interruption)
    assert isinstance(t.tracking, Tracking) and isinstance(t.checkpoints, Checkpoints)
    return status, t.tracking, t.checkpoints


class StopAtCheck:
    """An interruption that becomes true at the n-th check."""

    def __init__(self, look: float) -> None:
        self.left = look

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


# -- length


@pytest.mark.parametrize(("steps", "epochs"), [(1, [1]), (4, [4]), (5, [5]), (6, [5, 6]), (15, [5, 10, 15])])
def test_ends_at_the_last_step_and_evaluates_there(steps: int, epochs: list[int]) -> None:
    status, tracking, checkpoints = run(training(steps=steps))
    assert status == "finished"
    assert tracking.advanced == list(range(1, steps + 1))
    assert [line["step"] for line in tracking.epochs] == epochs
    assert [line["epoch"] for line in tracking.epochs] == list(range(1, len(epochs) + 1))
    assert checkpoints.steps == epochs


def test_requests_epochs_with_their_first_step() -> None:
    t = training()
    run(t)
    assert isinstance(t.batches, Batches)
    assert t.batches.requests == [(0, 0, 0), (1, 0, 5), (2, 0, 10)]


def test_logs_the_learning_rate_of_the_last_update() -> None:
    _, tracking, _ = run(training())
    assert [line["lr"] for line in tracking.epochs] == [0.1 * (1 / (1 + 0.1 * t)) for t in (4, 9, 14)]


# -- evaluation and checkpoints


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_evaluation_interval(every: int, expected: list[int]) -> None:
    _, tracking, _ = run(training(steps=25, evaluate_every=every))
    assert [line["epoch"] for line in tracking.epochs] == expected


def test_evaluates_once_after_the_last_update_of_a_partial_epoch() -> None:
    """Not as an evaluation within the epoch, too."""
    _, tracking, _ = run(training(steps=6, steps_per_epoch=5, evaluate_every_steps=3))
    assert [(line["step"], line["epoch"]) for line in tracking.epochs] == [(3, 0.6), (5, 1), (6, 2)]


def test_training_metrics_start_anew_in_each_epoch() -> None:
    _, every, _ = run(training())
    _, some, _ = run(training(evaluate_every=3))
    keys = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    assert {key: every.epochs[2][key] for key in keys} == {key: some.epochs[0][key] for key in keys}


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (1, None, [5, 10, 15]),
        (2, None, [10, 15]),
        (None, None, [15]),
        (None, 4, [4, 8, 12, 15]),
        (None, 7, [7, 14, 15]),
        (1, 4, [4, 5, 8, 10, 12, 15]),
        (1, 5, [5, 5, 10, 10, 15, 15]),
    ],
)
def test_checkpoint_intervals(epochs: int | None, steps: int | None, expected: list[int]) -> None:
    t = training(validate=None, save_every_epochs=epochs, save_every_steps=steps)
    _, _, checkpoints = run(t)
    assert checkpoints.steps == expected


def test_logs_an_epoch_before_its_checkpoint() -> None:
    order: list[str] = []

    class Lines(Tracking):
        def epoch(self, metrics: Mapping[str, Any], **_: Any) -> None:
            order.append(f"line {metrics['epoch']}")

    class Saves(Checkpoints):
        def save(self, state: dict[str, Any], *, best: bool, snapshot: str | None = None) -> None:
            order.append(f"save {state['progress']['epoch']}")

    run(training(tracking=Lines(), checkpoints=Saves()))
    assert order == ["line 1", "save 1", "line 2", "save 2", "line 3", "save 3"]


def test_without_a_validation_set() -> None:
    status, tracking, checkpoints = run(training(validate=None))
    assert status == "finished" and checkpoints.best == []
    assert set(tracking.epochs[0]) == {"epoch", "step", "lr", "train_loss", "train_accuracy", "seconds", RATE}


# -- logging


def test_logging_interval() -> None:
    _, tracking, _ = run(training(log_every_steps=4))
    assert [step for step, _ in tracking.steps] == [4, 8, 12, 15]  # the last update has a point in any case
    for step, values in tracking.steps:
        assert values["grad_norm/global"] > 0
        assert values["lr"] == 0.1 * (1 / (1 + 0.1 * (step - 1)))
        assert values["train/loss"] > 0 and 0 <= values["train/accuracy"] <= 1
        assert values["throughput/samples_per_second"] > 0


@pytest.mark.parametrize("every", [4, 7, 50])
def test_points_are_means_since_the_previous_point(every: int) -> None:
    """Weighted by their samples, the points of a run have the mean of its epochs."""
    _, tracking, _ = run(training(log_every_steps=every))
    before, total = 0, 0.0
    sizes = [SIZE, SIZE, SIZE, SIZE, COUNT - 4 * SIZE] * 3
    for step, values in tracking.steps:
        total += sum(sizes[before:step]) * values["train/loss"]
        before = step
    assert before == 15
    assert total / sum(sizes) == pytest.approx(fmean(line["train_loss"] for line in tracking.epochs), rel=1e-12)


@pytest.mark.parametrize("every", [1, 3, 5, 7])
def test_logging_does_not_change_results(every: int) -> None:
    quiet, logged = training(), training(log_every_steps=every)
    run(quiet), run(logged)
    assert same(dict(quiet.module.state_dict()), dict(logged.module.state_dict()))
    for a, b in zip(quiet.tracking.epochs, logged.tracking.epochs, strict=True):  # type: ignore[attr-defined]
        assert without_time(a) == without_time(b)


# -- stopping


def scripted(*losses: float) -> Callable[[Interruption], dict[str, float]]:
    remaining = iter(losses)
    return lambda interruption: {"val_loss": next(remaining), "val_accuracy": 0.5}


def test_early_stopping_saves_a_checkpoint() -> None:
    early = Early(monitor="val_loss", patience=2, min_delta=0.0)
    t = training(steps=50, stopping=early, validate=scripted(3, 2, 2.5, 2.5, 1), save_every_epochs=None)
    status, tracking, checkpoints = run(t)
    assert status == "stopped_early"
    assert [line["epoch"] for line in tracking.epochs] == [1, 2, 3, 4]
    assert checkpoints.best == [5, 10] and checkpoints.steps == [5, 10, 20]
    assert t.best.epoch == 2
    assert t.fit(Interruption()) == "stopped_early", "a run that stopped stays so"
    assert tracking.advanced[-1] == 20 and len(tracking.epochs) == 4


def test_patience_exhausted_in_the_last_epoch_is_finished() -> None:
    early = Early(monitor="val_loss", patience=1, min_delta=0.0)
    t = training(steps=10, stopping=early, validate=scripted(1, 2))
    assert run(t)[0] == "finished"


def test_nonfinite_validation_metrics_do_not_stop() -> None:
    t = training(validate=scripted(math.nan, 2.0, math.inf))
    status, _, checkpoints = run(t)
    assert (status, t.best.epoch, checkpoints.best) == ("finished", 2, [10])


# -- interruption


class StopAt(Tracking):
    """Requests a stop after update `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.is_requested = False

    def advance(self, step: int) -> None:
        super().advance(step)
        self.is_requested = step >= self.at

    def __bool__(self) -> bool:
        return self.is_requested


def resumed(state: dict[str, Any], **changed: Any) -> Trainer:
    t = training(**changed)
    t.load_state_dict(state)
    return t


def assert_equal_ends(t: Trainer, reference: Trainer, lines: list[dict[str, Any]]) -> None:
    left, right = t.state_dict(), reference.state_dict()
    for state in (left, right):
        changing = ("seconds", "peak_memory", "resumed_from")
        state["progress"] = {k: v for k, v in state["progress"].items() if k not in changing}
        state.pop("rng")
    assert same(left, right)
    expected = reference.tracking.epochs  # type: ignore[attr-defined]
    assert list(map(without_time, lines)) == list(map(without_time, expected))


def test_reports_the_end_of_every_update() -> None:
    """From then on a signal waits for the end of the next one."""
    steps = []
    trainer = training(steps=3)
    trainer.fit(Interruption(), lambda: steps.append(trainer.progress.step))
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(("at", "every"), [*((at, 1) for at in range(1, 13)), (5, 2), (7, 2)])
def test_interrupted_after_any_update_and_resumed(at: int, every: int) -> None:
    """12 updates end within the third epoch; 5 and 10 are the last of an epoch, 12 the last of all."""
    options: dict[str, Any] = {"steps": 12, "ema": 0.8, "evaluate_every": every}
    reference = training(**options)
    assert run(reference)[0] == "finished"

    stop = StopAt(at)
    first = training(tracking=stop, **options)
    assert first.fit(stop) == "interrupted"  # type: ignore[arg-type]
    assert isinstance(first.checkpoints, Checkpoints)
    assert stop.advanced == list(range(1, at + 1)), "stops after the update at which it was requested"
    second = resumed(first.checkpoints.saved[-1], **options)
    status, tracking, _ = run(second)
    assert status == "finished"
    assert second.progress.resumed_from == [at]
    assert_equal_ends(second, reference, stop.epochs + tracking.epochs)
    assert stop.best + tracking.best == reference.tracking.best  # type: ignore[attr-defined]
    assert isinstance(second.batches, Batches)
    assert second.batches.requests[0] == ((at - 1) // 5, (at - 1) % 5 + 1, at)


@cache
def uninterrupted() -> Trainer:
    trainer = training(ema=0.8)
    run(trainer)
    return trainer


@settings(max_examples=settings.default.max_examples // 3)  # each trains up to seven times
@given(looks=st.lists(st.integers(0, 9), min_size=2, max_size=6))
def test_interrupted_at_any_check_any_number_of_times(looks: list[int]) -> None:
    """Including checks during an evaluation."""
    reference = uninterrupted()
    state, lines, stops = None, [], []
    for look in [*looks, math.inf]:
        t = training(ema=0.8) if state is None else resumed(state, ema=0.8)
        status, tracking, checkpoints = run(t, StopAtCheck(look))
        lines += tracking.epochs
        if status == "finished":
            break
        assert status == "interrupted"
        state = checkpoints.saved[-1]
        stops.append(t.progress.step)
    assert_equal_ends(t, reference, lines)
    assert t.progress.resumed_from == stops


def test_resuming_from_any_checkpoint_gives_the_same_result() -> None:
    reference = training(save_every_steps=2, log_every_steps=3)
    _, _, checkpoints = run(reference)
    assert checkpoints.steps == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15]
    for state in checkpoints.saved:
        t = resumed(state)
        assert run(t)[0] == "finished"
        done = state["progress"]["epoch"]
        lines = reference.tracking.epochs[:done] + t.tracking.epochs  # type: ignore[attr-defined]
        assert_equal_ends(t, reference, lines)


def test_restores_best_from_the_best_checkpoint() -> None:
    t = training(validate=scripted(3, 2, 2.5), save_every_steps=2)
    _, _, checkpoints = run(t)
    restored: list[int] = []
    for state in checkpoints.saved:
        again = resumed(state)
        assert isinstance(again.checkpoints, Checkpoints)
        restored += again.checkpoints.restored
    assert restored == [5, 10]


# -- failures


def test_damaged_data_is_a_user_error_before_the_first_update_only() -> None:
    with pytest.raises(UserError, match=r"7\.png"):
        run(training(batches=Batches(bad_at=0)))
    t = training(batches=Batches(bad_at=7))
    with pytest.raises(RunError, match=r"7\.png"):
        run(t)
    assert isinstance(t.checkpoints, Checkpoints)
    assert t.checkpoints.steps == [5]
    with pytest.raises(UserError, match=r"7\.png"):
        run(resumed(t.checkpoints.saved[-1], batches=Batches(bad_at=5)))


class Explodes(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        return F.cross_entropy(outputs, targets) * (math.nan if self.left == 0 else 1.0)


@pytest.mark.parametrize("at", [1, 5, 6, 15])
def test_nonfinite_loss_leaves_finite_checkpoints(at: int) -> None:
    t = training(loss=Explodes(at), save_every_steps=1)
    with pytest.raises(RunError, match=f"nan at update {at} "):
        run(t)
    assert isinstance(t.checkpoints, Checkpoints) and isinstance(t.tracking, Tracking)
    assert all(bool(v.isfinite().all()) for s in t.checkpoints.saved for v in s["model"].values())
    assert max(t.checkpoints.steps, default=0) == at - 1
    assert len(t.tracking.epochs) == (at - 1) // PER_EPOCH


def test_deferred_check_prevents_saving_nonfinite_weights() -> None:
    """As on a GPU: the check comes before the next checkpoint at the latest."""
    t = training(loss=Explodes(7), check_now=False, save_every_steps=4)
    with pytest.raises(RunError, match="nan at update 7 "):
        run(t)
    assert isinstance(t.checkpoints, Checkpoints)
    assert t.checkpoints.steps == [4, 5]


class Node:
    """An object in a reference cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("bad_at", [None, 12])
def test_collects_the_garbage_of_updates_at_evaluations(bad_at: int | None) -> None:
    """And leaves the garbage collector as it was, also if the run fails."""
    t = training(batches=Batches(bad_at=bad_at))
    update, created = t.run_update, list[weakref.ref[Node]]()
    alive_at_evaluations: list[int] = []

    def update_with_garbage(batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult:
        created.append(weakref.ref(Node()))
        return update(batch, number, log_norm=log_norm)

    def validate(interruption: Interruption) -> dict[str, float]:
        alive_at_evaluations.append(sum(node() is not None for node in created))
        return {"val_loss": 1.0}

    t.run_update, t.validate = update_with_garbage, validate
    gc.unfreeze()  # what the test session has frozen
    try:
        with nullcontext() if bad_at is None else pytest.raises(RunError):
            run(t)
        assert gc.get_freeze_count() == 0 and gc.isenabled()
    finally:
        gc.freeze()
    assert alive_at_evaluations == [0] * (3 if bad_at is None else 2)
