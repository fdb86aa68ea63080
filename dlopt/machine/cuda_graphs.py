"""Capture of a function as a CUDA graph, which a single launch replays.

A graph reads and writes the memory that was in use during capture, and a replay runs no Python. Whatever changes
between replays has to be in a tensor that is filled in place (inputs, learning rates) or in the state of a generator.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

# Eager runs before capture. The first one selects and compiles kernels, and creates the optimizer's state. The second
# one runs as the captured one will, with that state: a kernel that CUDA loads only now would fail during capture. torch
# recommends more (11) for DistributedDataParallel only, whose updates are not captured here.
_WARMUP_RUNS = 2


class Recorder:
    """Captures functions into `torch.cuda.CUDAGraph`s.

    All graphs of a recorder share their memory: only the latest one may be replayed.
    """

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None  # of memory, which all graphs of this recorder share

    def warm_up(self, function: Callable[[], T]) -> T:
        """Runs `function` eagerly on a side stream; later work on the current stream waits for it."""
        # Gradient accumulators remember the stream that created them. A graph must not depend on the default stream,
        # so they have to be created on a side stream.
        side = self._side = self._side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = function()
        torch.cuda.current_stream().wait_stream(side)
        return results

    def capture(self, function: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], T]:
        """Captures `function` without executing its kernels; returns (replay, results that each replay overwrites).

        `generators`: generators that `function` uses in addition to the device's default generator.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            return self._capture(function, generators)
        except RuntimeError:
            # torch leaves a failed capture half open: its stream stays current, its pool in use, and the generators
            # refuse to draw until another capture ends.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError):  # if it failed before it used the pool
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            self._capture(lambda: torch.zeros((), device="cuda"), generators)
            raise

    def _capture(
        self, function: Callable[[], T], generators: Sequence[torch.Generator]
    ) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # thread_local: a thread that copies a checkpoint may call CUDA functions during capture.
        # `torch.cuda.graph` synchronizes, and releases the memory of the eager runs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = function()
        return graph.replay, results


class GraphedFunction(Generic[T]):
    """Runs `function` eagerly a few times, then captures it, and replays the graph in all later calls.

    Logs a warning and stays eager if capture fails: a failed capture has executed no kernels.
    """

    def __init__(
        self, name: str, function: Callable[[], T], recorder: Recorder, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self.name = name
        self._function = function
        self._recorder = recorder
        self._generators = generators
        self._can_capture = True
        self._former: Callable[[], None] | None = None
        self._replay: Callable[[], None] | None = None
        self.reset()

    def reset(self, warmup_runs: int = _WARMUP_RUNS) -> None:
        """Discards the graph, which is captured again after `warmup_runs` eager calls.

        For calls after the function's tensors were replaced, or its operations have changed.
        """
        self._runs = 0
        self._warmup_runs = warmup_runs
        # Kept until the next capture, which then finds its memory in the pool instead of allocating it.
        self._former = self._replay or self._former
        self._replay = None
        self._results: T | None = None

    def __call__(self) -> T:
        if self._replay is None:
            if self._runs < self._warmup_runs or not self._can_capture:
                self._runs += 1
                return self._recorder.warm_up(self._function)
            self._capture()
            if self._replay is None:
                return self._recorder.warm_up(self._function)
        self._replay()  # capture executed nothing: the first captured call has to be replayed, too
        assert self._results is not None
        return self._results

    def _capture(self) -> None:
        try:
            self._replay, self._results = self._recorder.capture(self._function, self._generators)
            self._former = None
        except RuntimeError as error:
            self._can_capture, self._former = False, None
            reason = str(error).strip().splitlines()[0]
            log.warning("%s could not be captured as a CUDA graph (%s); it runs eagerly", self.name, reason)
