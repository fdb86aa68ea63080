"""Who waits for whom, told at logging points."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.parallel import rendezvous
from dlopt.parallel.pace import StepTiming, Waiting
from dlopt.parallel.process_group import Group
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    """Work that takes its time in the backward."""

    @staticmethod
    def forward(ctx: object, inputs: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds  # type: ignore[attr-defined]
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None


def slow_on_rank_1(updates: int) -> None:
    """In each rank: rank 1 needs 60 ms for a backward, rank 0 waits for it in the averaging of gradients."""
    this = rendezvous.current()
    assert this is not None
    group, waiting = Group(this, CPU, minutes=1.0), Waiting(CPU)
    model = nn.Linear(3, 2)
    placed = nn.parallel.DistributedDataParallel(model)
    waiting.watch(model)
    pace = StepTiming(group, CPU, waiting)
    for logged in (0, updates):
        pace.restart(logged)
        for _ in range(updates):
            with waiting:
                Slow.apply(placed(torch.ones(1, 3)), 0.06 * this.rank).sum().backward()
        figures = pace.metrics(logged + updates)
    assert pace.metrics(2 * updates) == {}  # no update since
    assert figures["step_time/slowest_rank"] > 0.06 > 0.04 > figures["step_time/fastest_rank"]
    assert figures["step_time/spread"] == pytest.approx(
        1 - figures["step_time/fastest_rank"] / figures["step_time/slowest_rank"]
    )


def test_the_rank_that_waits_is_the_fast_one(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_pace:slow_on_rank_1", 2, tmp_path, 5)
