"""`profile=true`: profiles time and memory of some updates."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from dlopt.machine.memory import process_memory
from dlopt.training.builders.workload import Workload
from dlopt.training.micro_loss import Network
from dlopt.training.step import EpochBatches, Observer, Step

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
    """Profiles the updates first .. last - 1: memory in the first one, time in the others; then prints the profile.

    On a GPU, synchronizes at the end of each part to attribute time correctly, which prevents overlap between parts.
    """

    def __init__(
        self, workload: Workload, steps: tuple[int, int], folder: Path, message: Callable[[str], None]
    ) -> None:
        self.workload, self.folder, self.message = workload, folder, message
        self.first, self.last = steps
        self.result = Profile(updates=self.last - self.first - 1)
        self.seconds = dict.fromkeys(("data", "forward", "forward and backward", "update"), 0.0)
        self._profiler: profile | None = None
        self._start = 0.0
        self._measures_peaks = False  # of GPU memory: of forward and backward, and of the rest of the update

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        forward, timed = self.timer("forward"), TimedBatches(batches, self)
        if network.task_loss is not None:
            return replace(network, task_loss=forward(network.task_loss)), timed
        # Compiled alone: a compiler cannot see through the timers.
        model, loss = forward(self.workload.model), forward(network.loss)
        return replace(network, model=model, loss=loss, compile=None), timed

    @contextlib.contextmanager
    def around_forward_backward(self) -> Iterator[None]:
        """Times forward and backward, and measures its peak memory in the first update."""
        if self._measures_peaks:
            torch.cuda.reset_peak_memory_stats(self.workload.device)
        with self.timer("forward and backward"):
            yield
        if self._measures_peaks:
            self.result.peaks["forward and backward"] = torch.cuda.max_memory_allocated(self.workload.device)
            torch.cuda.reset_peak_memory_stats(self.workload.device)

    def around_update(
        self, step: Step, inputs: Tensor, targets: Tensor, number: int
    ) -> contextlib.AbstractContextManager[None] | None:
        if number == self.first:
            return self._measuring_memory(step, inputs, targets)
        return self._timing(number) if self.first < number < self.last and self._profiler is not None else None

    # -- time

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the time of the context, or of a function that it decorates, to a part while the profiler runs."""
        if self._profiler is None:
            yield
            return
        start = synchronized_time(self.workload.device)
        with record_function(_PREFIX + name):
            yield
            end = synchronized_time(self.workload.device)
        self.seconds[name] += end - start

    @contextlib.contextmanager
    def _timing(self, number: int) -> Iterator[None]:
        """Times the whole update; after the last one, writes and prints the profile."""
        with self.timer("update"):
            yield
        if number + 1 < self.last:
            return
        profiler, result, device = self._profiler, self.result, self.workload.device
        assert profiler is not None
        elapsed = synchronized_time(device) - self._start
        profiler.stop()
        self._profiler = None
        forward, evaluation = self.seconds["forward"], self.seconds["forward and backward"]
        parts = {"data": self.seconds["data"], "forward": forward, "backward": evaluation - forward}
        parts["optimizer"] = self.seconds["update"] - evaluation  # clipping, optimizer, schedule and weight averaging
        result.parts = {name: value / result.updates for name, value in parts.items()}
        result.seconds = elapsed / result.updates
        result.communication = collective_times(profiler.events() or [], device)[0] / result.updates
        self_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        operations = [
            ProfiledOperation(
                str(event.key), round(event.count / result.updates), getattr(event, self_time) * 1e-6 / result.updates
            )
            for event in profiler.key_averages()
            if not str(event.key).startswith(_PREFIX)
        ]
        result.operations = sorted(operations, key=lambda each: each.seconds, reverse=True)[:_TOP]
        with contextlib.suppress(OSError):  # the profile is printed anyway
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "updates.pt.trace.json"))
            write_json(self.folder / "profile.json", asdict(result), indent=1)
        for line in table(result, self.folder):
            self.message(line)

    # -- memory

    @contextlib.contextmanager
    def _measuring_memory(self, step: Step, inputs: Tensor, targets: Tensor) -> Iterator[None]:
        module, device = self.workload.module, self.workload.device
        self._measures_peaks = device.type == "cuda"
        try:
            with kept_for_backward(module) as saved:
                yield
        finally:
            self._measures_peaks = False
        if device.type == "cuda":
            self.result.peaks["optimizer"] = torch.cuda.max_memory_allocated(device)
        self.result.memory = {
            "weights": tensor_bytes([*module.parameters()]),
            "buffers": tensor_bytes([*module.buffers()]),
            "gradients": tensor_bytes([p.grad for p in module.parameters()]),
            "optimizer": state_bytes(step.optimizer),
            "batch": tensor_bytes([inputs, targets]),
            "activations kept for the backward pass": sum(saved.values()),
            "peak of the process": process_memory("VmHWM"),
        }
        # The time of the updates that follow.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Kineto warns on stderr that there is no GPU
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profiler.start()
        self._start = synchronized_time(device)


class TimedBatches:
    """Batches, with the time of fetching them as `data`."""

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
    """Returns the seconds with a collective in flight, and the part of them in which this rank computed nothing.

    `events`: of a torch profiler: kernels on a GPU, torch's operators and gloo's transfers on a CPU.
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


def state_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes of the tensors in an optimizer's state, also in lists (the history of L-BFGS)."""
    return tensor_bytes(list(optimizer.state.values()))


def tensor_bytes(tree: Any) -> int:
    """Returns the bytes of the tensors in nested lists, tuples and mappings."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def table(result: Profile, folder: Path) -> list[str]:
    """Returns the lines of the profile for the console."""
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
