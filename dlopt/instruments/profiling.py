"""`profile=true`: profiles time and memory of some updates."""

import contextlib
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from dlopt.basics.files import write_json
from dlopt.basics.formats import format_bytes
from dlopt.data.batches import Batch
from dlopt.instruments.model_summary import kept_for_backward
from dlopt.machine.device import synchronized_time
from dlopt.metrics.sums import Kept
from dlopt.training.builders.workload import Workload
from dlopt.training.micro_loss import Network
from dlopt.training.step import EpochBatches, ForwardBackward, Observer, Step

P = ParamSpec("P")
R = TypeVar("R")
_TOP = 10
_PREFIX = "dlopt: "


@dataclass(frozen=True)
class ProfiledOperation:
    name: str
    calls: int
    seconds: float  # self time on the device


@dataclass
class Profile:
    """Profile per update; `communication` overlaps with the other parts, mostly with the backward pass."""

    updates: int
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    communication: float = 0.0
    operations: list[ProfiledOperation] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    peaks: dict[str, int] = field(default_factory=dict)  # peak bytes allocated on a GPU, by part


class Profiling(Observer):
    """Profiles the updates first .. last - 1: memory in the first one, time in the others.

    Calls `report` after the last one. On a GPU, synchronizes at the end of each part to attribute time correctly, which
    prevents overlap between parts.
    """

    def __init__(
        self, workload: Workload, steps: tuple[int, int], folder: Path, report: Callable[[Profile], None]
    ) -> None:
        self.workload = workload
        self.first, self.last = steps
        self.folder = folder
        self.report = report
        self.result = Profile(updates=self.last - self.first - 1)
        self.seconds = dict.fromkeys(("data", "forward", "forward and backward", "update"), 0.0)
        self._profiler: profile | None = None
        self._start = 0.0
        self._measures_peaks = False  # of GPU memory: of forward and backward, and of the rest of the update

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        """Times the model and the loss as `forward`, and fetching a batch as `data`."""
        if network.task_loss is not None:
            return replace(network, task_loss=self._timed("forward", network.task_loss)), TimedBatches(batches, self)
        # Compiled alone: a compiler cannot see through the timers.
        model, loss = self._timed("forward", self.workload.model), self._timed("forward", network.loss)
        return replace(network, model=model, loss=loss, compile=None), TimedBatches(batches, self)

    def around_forward_backward(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Times forward and backward, and measures its peak memory in the first update."""

        def measured(batch: Batch) -> tuple[Tensor, list[Kept]]:
            if self._measures_peaks:
                torch.cuda.reset_peak_memory_stats(self.workload.device)
            with self.timer("forward and backward"):
                results = forward_backward(batch)
            if self._measures_peaks:
                self.result.peaks["forward and backward"] = torch.cuda.max_memory_allocated(self.workload.device)
                torch.cuda.reset_peak_memory_stats(self.workload.device)
            return results

        return measured

    def around_update(
        self, step: Step, inputs: Tensor, targets: Tensor, number: int
    ) -> contextlib.AbstractContextManager[None] | None:
        if number == self.first:
            return self._measuring_memory(step, inputs, targets)
        return self._timing(number) if self.first < number < self.last and self._profiler is not None else None

    # -- time

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the time of the context to a part while the profiler runs."""
        if self._profiler is None:
            yield
            return
        start = synchronized_time(self.workload.device)
        with record_function(_PREFIX + name):
            yield
            end = synchronized_time(self.workload.device)
        self.seconds[name] += end - start

    def _timed(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.timer(name):
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def _timing(self, number: int) -> Iterator[None]:
        """Times the whole update; `_finish` subtracts the evaluations, which leaves clipping, optimizer, schedule and
        weight averaging."""
        with self.timer("update"):
            yield
        if number + 1 == self.last:
            self._finish()

    def _begin(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if self.workload.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Kineto warns on stderr that there is no GPU
        self._profiler = profile(activities=kinds)
        self._profiler.start()
        self._start = synchronized_time(self.workload.device)

    def _finish(self) -> None:
        profiler, result = self._profiler, self.result
        assert profiler is not None
        elapsed = synchronized_time(self.workload.device) - self._start
        profiler.stop()
        self._profiler = None
        evaluation, update = self.seconds["forward and backward"], self.seconds["update"]
        sums = {"data": self.seconds["data"], "forward": self.seconds["forward"]}
        sums |= {"backward": evaluation - self.seconds["forward"], "optimizer": update - evaluation}
        result.parts = {name: value / result.updates for name, value in sums.items()}
        result.seconds = elapsed / result.updates
        result.communication = collective_times(profiler.events() or [], self.workload.device)[0] / result.updates
        result.operations = _costliest(profiler, self.workload.device, result.updates)
        with contextlib.suppress(OSError):  # the profile is printed anyway
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "updates.pt.trace.json"))
            write_json(self.folder / "profile.json", asdict(result), indent=1)
        self.report(result)

    # -- memory

    @contextlib.contextmanager
    def _measuring_memory(self, step: Step, inputs: Tensor, targets: Tensor) -> Iterator[None]:
        module, optimizer, device = self.workload.module, step.optimizer, self.workload.device
        self._measures_peaks = device.type == "cuda"
        try:
            with kept_for_backward(module) as saved:
                yield
        finally:
            self._measures_peaks = False
        if device.type == "cuda":
            self.result.peaks["optimizer"] = torch.cuda.max_memory_allocated(device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.result.memory = {
            "weights": tensor_bytes([*module.parameters()]),
            "buffers": tensor_bytes([*module.buffers()]),
            "gradients": tensor_bytes([p.grad for p in module.parameters()]),
            "optimizer": state_bytes(optimizer),
            "batch": tensor_bytes([inputs, targets]),
            "activations kept for the backward pass": sum(saved.values()),
            "peak of the process": peak * (1 if sys.platform == "darwin" else 1024),
        }
        self._begin()


class TimedBatches:
    """Batches with the time of fetching profiled as `data`."""

    def __init__(self, batches: EpochBatches, profiling: Profiling) -> None:
        self.inner = batches
        self.profiling = profiling

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        batches = iter(self.inner.epoch(epoch, start, step))
        while True:
            with self.profiling.timer("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def collective_times(events: Iterable[Any], device: torch.device) -> tuple[float, float]:
    """Returns the seconds with a collective in flight, and the part in which this rank computed nothing.

    `events`: from a torch profiler. Counts kernels on a GPU, and torch's operators and gloo's transfers on a CPU.
    """
    on_gpu = device.type == "cuda"
    communicating, computing = [], []
    for event in events:
        interval = event.time_range.start, event.time_range.end
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu:
            continue
        if ("nccl" in event.name) if on_gpu else event.name.startswith("gloo:"):
            communicating.append(interval)
        elif on_gpu or event.name.startswith(("aten::", "dlopt::")):
            computing.append(interval)
    waiting = covered([*communicating, *computing]) - covered(computing)
    return covered(communicating) * 1e-6, waiting * 1e-6


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def _costliest(profiler: profile, device: torch.device, updates: int) -> list[ProfiledOperation]:
    """Returns the operations with the largest self time."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operations = [
        ProfiledOperation(str(event.key), round(event.count / updates), getattr(event, attribute) * 1e-6 / updates)
        for event in profiler.key_averages()
        if not str(event.key).startswith(_PREFIX)
    ]
    return sorted(operations, key=lambda event: event.seconds, reverse=True)[:_TOP]


def state_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes of the tensors in an optimizer's state, including lists (the history of L-BFGS)."""
    return tensor_bytes(list(optimizer.state.values()))


def tensor_bytes(tree: Any) -> int:
    """Returns the bytes of the tensors in nested lists, tuples and mappings."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def table(result: Profile, folder: Path) -> list[str]:
    """Formats the profile for the console."""
    total = max(result.seconds, 1e-12)
    lines = [f"profile of {result.updates} updates: {result.seconds * 1e3:.2f} ms each, under the profiler"]
    split = {**result.parts, "other": max(result.seconds - sum(result.parts.values()), 0.0)}
    lines.append("  " + ", ".join(f"{name} {value / total:.0%}" for name, value in split.items()))
    lines.append(f"  communication (overlaps with the above): {result.communication / total:.0%}")
    width = max((len(operation.name) for operation in result.operations), default=0)
    lines.append(f"  {'top operations':{width}}  {'calls':>6}  {'ms':>8}   time")
    for operation in result.operations:
        calls, seconds = operation.calls, operation.seconds
        lines.append(f"  {operation.name:{width}}  {calls:6}  {seconds * 1e3:8.3f}  {seconds / total:5.1%}")
    lines.append("  memory: " + ", ".join(_sizes(result.memory)))
    if result.peaks:
        lines.append("  peak on the device: " + ", ".join(_sizes(result.peaks)))
    lines.append(f"  trace for Perfetto (ui.perfetto.dev) and TensorBoard: {folder / 'updates.pt.trace.json'}")
    return lines


def _sizes(sizes: Mapping[str, int]) -> Sequence[str]:
    return [f"{name} {format_bytes(number)}" for name, number in sizes.items()]
