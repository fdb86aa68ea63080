"""A small network, its batches, and steps that train it in one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.data.batches import Batch
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.training.around import surround
from dlopt.training.builders.precision import Precision
from dlopt.training.clipping import Clip, Unclipped
from dlopt.training.closure import ClosureStep
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Diverged
from dlopt.training.step import Step, StepSettings, UpdateResult
from tests.support.tasks import CLASSIFICATION

CPU = torch.device("cpu")
SEED = 11  # of the random numbers of a step's model


def net(dropout: float = 0.3, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def whole(inputs: Tensor, targets: Tensor) -> Batch:
    """Returns the batch of one process."""
    return Batch(inputs, targets, len(targets))


def batch(number: int, size: int = 10, dtype: torch.dtype = torch.float32) -> Batch:
    """Returns random inputs and labels for `net`."""
    draws = torch.Generator().manual_seed(number)
    return whole(torch.randn(size, 6, generator=draws, dtype=dtype), torch.randint(3, (size,), generator=draws))


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    factor: Callable[[int], float] = lambda t: 1.0,
    loss: nn.Module | None = None,
    precision: Precision | None = None,
    clip: Clip | None = None,
    average: Callable[[], None] | None = None,
    after_change: Callable[[], None] | None = None,
    skip: Callable[[Diverged], bool] | None = None,
    evaluates_once: bool = True,
    **settings: Any,
) -> Step:
    """Returns a step whose `update` has around it what the arguments enable."""
    step = (Step if evaluates_once else ClosureStep)(
        Network(model, model, loss or nn.CrossEntropyLoss()),
        optimizer,
        Scheduler(optimizer, factor),
        Mode(CPU),
        StepSettings(**{"seed": SEED, **settings}),
        precision=precision or Precision("fp32", CPU),
        metrics=MetricSum(CLASSIFICATION),
        clip=clip or Unclipped(),
        average=average,
    )
    step.update = surround(step, step.update, after_change=after_change, skip=skip)  # type: ignore[method-assign]
    return step


def make_closure(model: nn.Module, optimizer: torch.optim.Optimizer, **keys: Any) -> ClosureStep:
    """Returns a step whose evaluations a test calls itself."""
    step = make_step(model, optimizer, evaluates_once=False, **keys)
    assert isinstance(step, ClosureStep)
    return step


def train(step: Step, batch: Batch, number: int, sums: MetricSum, *, log_norm: bool = False) -> UpdateResult:
    """Runs an update and adds its metrics, as the trainer does."""
    result = step.update(batch, number, log_norm=log_norm)
    sums.add(*result.micro_batches)
    return result


def begin(step: Step, batch: Batch, number: int = 0, *, log_norm: bool = False) -> None:
    """Starts an update, of which a test calls the evaluations itself."""
    step.begin(batch, number, log_norm=log_norm)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
