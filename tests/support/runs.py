"""Helpers for small runs in the test process, and for interrupting them."""

import copy
import functools
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dlopt.basics.interruption import Interruption
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import RunConfig
from dlopt.data.batches import Batch
from dlopt.metrics.measures import VARYING
from dlopt.metrics.sums import Kept
from dlopt.run import runner
from dlopt.training.builders.precision import torch_defaults
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.checkpoint import checkpoints
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from dlopt.training.run import train_run
from dlopt.training.step import Step, UpdateResult
from tests.support.sizes import RICH, RUN, SMALL, STEPS_PER_EPOCH  # noqa: F401  # used by importers


def run_config(*overrides: str) -> RunConfig:
    return parse(*copy.deepcopy(composed(*overrides)))


def small_workload(*overrides: str) -> Workload:
    """Builds data, model and loss of a small run with these overrides."""
    return build_workload(run_config(*SMALL, *overrides))


Composed = tuple[dict[str, Any], dict[str, Any]]
"""The arguments of `parse`."""


@functools.cache
def composed(*overrides: str) -> Composed:
    """Composes each config once for all tests, because composing takes as long as a small run."""
    return to_plain(Composer(words=overrides).compose(overrides))


def start(folder: Path, *overrides: str) -> dict[str, Any]:
    """Starts a new run in `folder`; returns its summary."""
    return run_job(TrainingRun(run_config(*overrides), folder))


def resume(folder: Path, *overrides: str) -> dict[str, Any]:
    """Resumes from the newest checkpoint in `folder`, or starts if there is none."""
    state = Checkpoints(folder / "checkpoints").load_newest()
    return run_job(TrainingRun(run_config(*overrides), folder, state))


def run_job(run: TrainingRun) -> dict[str, Any]:
    """Trains as a job does, in this process."""
    with Interruption(run.run_config.settings.max_time) as interruption, torch_defaults():
        return train_run(run, interruption, runner.tools(run, console=False), console=False)


@contextmanager
def at_update(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Calls `action` after update `number` (from 1) of the run."""
    original = Step.end

    def end(self: Step, result: UpdateResult, average: Callable[[], None] | None) -> None:
        original(self, result, average)
        if self.current.number + 1 == number:
            action()

    with patch.object(Step, "end", end):
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_fork(function: Callable[[], object]) -> int:
    """Runs `function` in a forked child; returns the wait status: 0 on success."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(300)  # seconds: a child that hangs fails its test, and does not outlive it
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the wall-clock time and what follows from it."""
    return [without_time(line) for line in metrics(folder)]


def without_time(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in VARYING}


def result(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """Returns the state that must not depend on interruptions."""
    state = checkpoints.load(folder / "checkpoints" / name).state
    progress = {k: v for k, v in state["progress"].items() if k not in ("seconds", "peak_memory", "resumed_from")}
    return {**{key: state[key] for key in ("model", "optimizer", "schedule", "ema", "normalize")}, "progress": progress}


def same(a: Any, b: Any) -> bool:
    """Returns whether nested dicts, lists and tensors are bitwise identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same_run(folder: Path, other: Path) -> None:
    """Compares metrics and checkpoints of two runs bitwise, except times."""
    assert timeless(folder) == timeless(other)
    for name in ("last.pt", "best.pt"):
        assert same(result(folder, name), result(other, name)), name


def execute(folder: Path, *overrides: str) -> int:
    """Runs a job that starts, or resumes from the newest checkpoint in `folder`; returns its exit code."""
    folder.mkdir(exist_ok=True)
    state = Checkpoints(folder / "checkpoints").load_newest()
    return runner.exit_code(TrainingRun(run_config(*overrides), folder, state, overrides=[*overrides]), console=False)


@contextmanager
def explosions(bad: Callable[[int, float], bool], on: str = "loss") -> Iterator[None]:
    """Makes the loss (or one gradient) NaN in updates (from 1) with learning rates for which `bad` is true."""
    original = Step.forward_backward

    def forward_backward(self: Step, batch: Batch) -> tuple[Tensor, list[Kept]]:
        value, measured = original(self, batch)
        if bad(self.current.number + 1, self.optimizer.param_groups[0]["lr"]):
            if on == "loss":
                return value * math.nan, measured
            self.parameters[0].grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        return value, measured

    with patch.object(Step, "forward_backward", forward_backward):
        yield


class Numbers(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """A regression: the sum of the inputs."""

    def __init__(self, count: int) -> None:
        self.inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return self.inputs[index], float(self.inputs[index].sum())


REGRESSION = [
    "data=custom", "data.train._target_=tests.support.runs.Numbers", "+data.train.count=60",
    "data.test={_target_:tests.support.runs.Numbers,count:17}", "data.batch_size=16", "data.workers=0",
    "allow_packages=[tests]", "model=mlp", "model.widths=[]", "normalize=none", "loss=mse", "tracking=[]",
    "device=cpu", "threads=1", "epochs=4",
]  # fmt: skip
