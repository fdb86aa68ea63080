"""`profile=true`: where the time and the memory of some updates go."""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dlopt.analysis.bench.communication import times
from dlopt.analysis.model_summary import kept_for_backward
from dlopt.parallel.mode import EpochBatches
from dlopt.tracking.layout import size
from dlopt.training.build import Workload
from dlopt.training.step import Network, Observer, Step

_COSTLIEST = 10
_PREFIX = "dlopt: "


@dataclass(frozen=True)
class Operation:
    name: str
    calls: int
    seconds: float  # its own, on the device


@dataclass
class Profile:
    """Per update; `communication` overlaps with the other parts, mostly with the backward pass."""

    updates: int
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    communication: float = 0.0
    operations: list[Operation] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    peaks: dict[str, int] = field(default_factory=dict)  # bytes allocated on a GPU at most, by part


class Profiling(Observer):
    """Observes the updates first .. last - 1: memory in the first of them, time in the others.

    `report` takes what was found after the last. On a GPU the parts wait for the device at their ends, so that the
    split is true; what overlaps without a profiler no longer does.
    """

    def __init__(
        self, workload: Workload, steps: tuple[int, int], folder: Path, report: Callable[[Profile], None]
    ) -> None:
        self.workload = workload
        self.first, self.last = steps
        self.folder = folder
        self.report = report
        self.found = Profile(updates=self.last - self.first - 1)
        self.seconds = dict.fromkeys(("data", "forward", "forward and backward", "update"), 0.0)
        self._profiler: profile | None = None
        self._start = 0.0
        self._evaluation: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        self._measures_peaks = False

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        """Forward is what the model and the loss compute; fetching a batch is the part `data`."""
        model, loss = self._timed("forward", network.model), self._timed("forward", network.loss)
        return Network(network.module, model, loss), TimedBatches(batches, self)

    def around(
        self, step: Step, inputs: Tensor, targets: Tensor, number: int
    ) -> contextlib.AbstractContextManager[None] | None:
        if number == self.first:
            return self._measuring_memory(step, inputs, targets)
        return self._timing(number) if self.first < number < self.last and self._profiler is not None else None

    def evaluation_begins(self) -> None:
        if self._measures_peaks:
            torch.cuda.reset_peak_memory_stats(self.workload.device)
        self._evaluation = self.part("forward and backward")
        self._evaluation.__enter__()

    def evaluation_ends(self) -> None:
        self._evaluation.__exit__(None, None, None)
        if self._measures_peaks:
            self.found.peaks["forward and backward"] = torch.cuda.max_memory_allocated(self.workload.device)
            torch.cuda.reset_peak_memory_stats(self.workload.device)

    # -- time

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books the time within, while the profiler runs."""
        if self._profiler is None:
            yield
            return
        start = self._now()
        with record_function(_PREFIX + name):
            yield
            end = self._now()
        self.seconds[name] += end - start

    def _now(self) -> float:
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize(self.workload.device)
        return time.perf_counter()

    def _timed(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **words: Any) -> Tensor:
            with self.part(name):
                return function(*arguments, **words)

        return call

    @contextlib.contextmanager
    def _timing(self, number: int) -> Iterator[None]:
        """An evaluation is forward and backward; the rest of an update is clipping, the optimizer, the schedule and
        averages of weights."""
        with self.part("update"):
            yield
        if number + 1 == self.last:
            self._finish()

    def _begin(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if self.workload.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its library tells on stderr that there is no GPU
        self._profiler = profile(activities=kinds)
        self._profiler.start()
        self._start = self._now()

    def _finish(self) -> None:
        profiler, found = self._profiler, self.found
        assert profiler is not None
        elapsed = self._now() - self._start
        profiler.stop()
        self._profiler = None
        both, update = self.seconds["forward and backward"], self.seconds["update"]
        sums = {"data": self.seconds["data"], "forward": self.seconds["forward"]}
        sums |= {"backward": both - self.seconds["forward"], "optimizer": update - both}
        found.parts = {name: value / found.updates for name, value in sums.items()}
        found.seconds = elapsed / found.updates
        found.communication = times(profiler.events() or [], self.workload.device)[0] / found.updates
        found.operations = _costliest(profiler, self.workload.device, found.updates)
        with contextlib.suppress(OSError):  # the figures are shown all the same
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "updates.pt.trace.json"))
            (self.folder / "profile.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        self.report(found)

    # -- memory

    @contextlib.contextmanager
    def _measuring_memory(self, step: Step, inputs: Tensor, targets: Tensor) -> Iterator[None]:
        module, optimizer = self.workload.module, step.optimizer
        with self._peaks(), kept_for_backward(module) as kept:
            yield
        state = [value for each in optimizer.state.values() for value in _tensors(each)]
        self.found.memory = {
            "weights": _bytes(module.parameters()),
            "buffers": _bytes(module.buffers()),
            "gradients": _bytes(p.grad for p in module.parameters() if p.grad is not None),
            "optimizer": _bytes(state),
            "batch": _bytes([inputs, targets]),
            "activations kept for the backward pass": sum(kept.values()),
            "peak of the process": _process_peak(),
        }
        self._begin()

    @contextlib.contextmanager
    def _peaks(self) -> Iterator[None]:
        """On a GPU: the peak memory of the forward and backward passes, and of the rest."""
        if self.workload.device.type != "cuda":
            yield
            return
        self._measures_peaks = True
        try:
            yield
        finally:
            self._measures_peaks = False
            self.found.peaks["optimizer"] = torch.cuda.max_memory_allocated(self.workload.device)


class TimedBatches:
    """Batches whose fetching a profile books as `data`."""

    def __init__(self, batches: EpochBatches, profiling: Profiling) -> None:
        self.inner = batches
        self.profiling = profiling

    def __len__(self) -> int:
        return len(self.inner)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.inner.epoch(epoch, start, step))
        while True:
            with self.profiling.part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _costliest(profiler: profile, device: torch.device, updates: int) -> list[Operation]:
    """By the time that each spends itself, without what it calls."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    own = [
        Operation(str(each.key), round(each.count / updates), getattr(each, name) * 1e-6 / updates)
        for each in profiler.key_averages()
        if not str(each.key).startswith(_PREFIX)
    ]
    return sorted(own, key=lambda each: each.seconds, reverse=True)[:_COSTLIEST]


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, Mapping) else [state]
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _process_peak() -> int:
    """The most memory that this process has had in its life."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(found: Profile, folder: Path) -> list[str]:
    """The figures as lines for the console."""
    total = max(found.seconds, 1e-12)
    lines = [f"profile of {found.updates} updates: {found.seconds * 1e3:.2f} ms each, under the profiler"]
    split = {**found.parts, "other": max(found.seconds - sum(found.parts.values()), 0.0)}
    lines.append("  " + ", ".join(f"{name} {value / total:.0%}" for name, value in split.items()))
    lines.append(f"  communication, which overlaps with them: {found.communication / total:.0%}")
    width = max((len(each.name) for each in found.operations), default=0)
    lines.append(f"  {'costliest operations':{width}}  {'calls':>6}  {'ms':>8}  share")
    for each in found.operations:
        share = each.seconds / total
        lines.append(f"  {each.name:{width}}  {each.calls:6}  {each.seconds * 1e3:8.3f}  {share:5.1%}")
    lines.append("  memory: " + ", ".join(_sizes(found.memory)))
    if found.peaks:
        lines.append("  peak on the device: " + ", ".join(_sizes(found.peaks)))
    lines.append(f"  trace for Perfetto (ui.perfetto.dev) and TensorBoard: {folder / 'updates.pt.trace.json'}")
    return lines


def _sizes(sizes: Mapping[str, int]) -> Sequence[str]:
    return [f"{name} {size(number)}" for name, number in sizes.items()]
