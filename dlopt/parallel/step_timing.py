"""Step timing per rank. All ranks wait for the slowest one (the straggler), which therefore sets the throughput."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dlopt.parallel.processes.process_group import ProcessGroup

_LIMIT = 1024  # pairs of CUDA events kept between two logging points


class SyncWaitTimer:
    """Context manager around forward and backward that measures how long this rank waits for the others.

    The wait lasts from the rank's last local gradient to the end of its backward, when all gradients are averaged. On a
    GPU it is measured with events, which are read at logging points only, so the host does not synchronize every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def attach(self, model: nn.Module) -> None:
        # DDP returns from backward when all gradients are averaged. The hook of the last gradient, that of the first
        # layer, shows when this rank has finished its own computation.
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is not None:
            first.register_post_accumulate_grad_hook(self._mark_ready)

    def _mark_ready(self, _: Tensor) -> None:
        self._ready = self._now()

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._ready = None

    def __exit__(self, *error: object) -> None:
        ready, now = self._ready, self._now()
        if isinstance(ready, float) and isinstance(now, float):
            self._seconds += now - ready
        elif isinstance(ready, torch.cuda.Event) and isinstance(now, torch.cuda.Event) and len(self._events) < _LIMIT:
            self._events.append((ready, now))

    def pop_seconds(self) -> float:
        """Returns the seconds of waiting since the last call."""
        # Here and not after each update: the host waits at logging points, which wait for the device anyway.
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class StepTiming:
    """Seconds of computation per update, compared across ranks at logging points.

    With `wait_timer`: wall time minus waiting. Without: on a CPU, process time divided by threads, because a process
    that waits for a message uses no processor time; on a GPU, nothing is reported.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, wait_timer: SyncWaitTimer | None = None) -> None:
        self.group = group
        self.device = device
        self.wait_timer = wait_timer
        self.restart(0)

    def restart(self, step: int) -> None:
        """Discards the time before update `step` (an evaluation, a checkpoint)."""
        if self.wait_timer is not None:
            self.wait_timer.pop_seconds()
        self._step, self._since, self._processor = step, time.perf_counter(), time.process_time()

    def metrics(self, step: int) -> Mapping[str, float]:
        """Returns TensorBoard tags since the last call. All ranks call this together."""
        updates = step - self._step
        if updates == 0 or (self.wait_timer is None and self.device.type != "cpu"):
            return {}
        if self.wait_timer is not None:
            seconds = time.perf_counter() - self._since - self.wait_timer.pop_seconds()
        else:
            seconds = (time.process_time() - self._processor) / torch.get_num_threads()
        # Each rank has measured itself; the slowest rank, for which the others wait, follows from all measurements.
        gathered = self.group.all_gather(torch.tensor([seconds / updates], dtype=torch.float64))
        slowest, fastest = float(gathered.max()), float(gathered.min())
        self.restart(step)
        return {
            "step_time/slowest_rank": slowest,
            "step_time/fastest_rank": fastest,
            "step_time/spread": (slowest - fastest) / slowest if slowest > 0 else 0.0,
        }
