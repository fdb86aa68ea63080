"""Step timing: how long each rank computes per update. The slowest one sets the pace, since the others wait for it."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlopt.parallel.process_group import Group


_KEPT = 1024  # pairs of events on a GPU between two looks


class Waiting:
    """The time from a rank's last own gradient to the end of its backward, which ends when all ranks' are averaged.

    A context manager around forward and backward. On a GPU events are read when somebody asks, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, model: nn.Module) -> None:
        """The first parameter belongs to the layer that is used first, and so has its gradient last."""
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is not None:
            first.register_post_accumulate_grad_hook(self._note)

    def _note(self, _: Tensor) -> None:
        self._ready = self._now()

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._ready = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ready, now = self._ready, self._now()
        if isinstance(ready, float) and isinstance(now, float):
            self._seconds += now - ready
        elif isinstance(ready, torch.cuda.Event) and isinstance(now, torch.cuda.Event) and len(self._events) < _KEPT:
            self._events.append((ready, now))

    def taken(self) -> float:
        """Seconds since the last call."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class StepTiming:
    """Seconds of computation per update of all ranks, exchanged at logging points only.

    With `waiting` that is the elapsed time without the time spent waiting. Without it, on a CPU, it is the processor
    time by threads: a process that waits for a message uses none. On a GPU nothing is reported then.
    """

    def __init__(self, group: "Group", device: torch.device, waiting: Waiting | None = None) -> None:
        self.group = group
        self.device = device
        self.waiting = waiting
        self.restart(0)

    def restart(self, step: int) -> None:
        """Discards the time before update `step` (an evaluation, a checkpoint)."""
        if self.waiting is not None:
            self.waiting.taken()
        self._step, self._since, self._processor = step, time.perf_counter(), time.process_time()

    def metrics(self, step: int) -> Mapping[str, float]:
        """Returns TensorBoard tags since the last call. All ranks call this together."""
        updates = step - self._step
        if updates == 0 or (self.waiting is None and self.device.type != "cpu"):
            return {}
        if self.waiting is not None:
            own = time.perf_counter() - self._since - self.waiting.taken()
        else:
            own = (time.process_time() - self._processor) / torch.get_num_threads()
        gathered = self.group.gathered(torch.tensor([own / updates], dtype=torch.float64))
        slowest, fastest = float(gathered.max()), float(gathered.min())
        self.restart(step)
        return {
            "step_time/slowest_rank": slowest,
            "step_time/fastest_rank": fastest,
            "step_time/spread": (slowest - fastest) / slowest if slowest > 0 else 0.0,
        }
