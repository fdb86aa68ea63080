"""Step timing of slow and fast ranks at logging points."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.parallel.step_timing import StepTiming, SyncWaitTimer
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    """Identity whose backward sleeps for `seconds`."""

    @staticmethod
    def forward(ctx: object, inputs: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds  # type: ignore[attr-defined]
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None


def slow_on_rank_1(updates: int) -> None:
    """Called on all ranks: rank 1 needs 300 ms for backward; rank 0 waits for it in the gradient all-reduce."""
    world = rendezvous.current()
    assert world is not None
    group, wait_timer = ProcessGroup(world, CPU, minutes=1.0), SyncWaitTimer(CPU)
    model = nn.Linear(3, 2)
    placed = nn.parallel.DistributedDataParallel(model)
    wait_timer.attach(model)
    timing = StepTiming(group, CPU, wait_timer)
    for logged in (0, updates):
        timing.restart(logged)
        for _ in range(updates):
            with wait_timer:
                Slow.apply(placed(torch.ones(1, 3)), 0.3 * world.rank).sum().backward()
        metrics = timing.metrics(logged + updates)
    assert timing.metrics(2 * updates) == {}  # no update since the last call
    assert metrics["step_time/slowest_rank"] > 0.3 > 0.2 > metrics["step_time/fastest_rank"]
    assert metrics["step_time/spread"] == pytest.approx(
        1 - metrics["step_time/fastest_rank"] / metrics["step_time/slowest_rank"]
    )


def test_waiting_is_not_counted_as_computation(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_step_timing:slow_on_rank_1", 2, tmp_path, 2)
