"""Capture of a function as a CUDA graph, which a single launch replays.

A graph reads and writes the memory that was in use during capture, and a replay runs no Python. Whatever changes
between replays has to be in a tensor that is filled in place (inputs, learning rates) or in the state of a generator.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

_WARMUP_RUNS = 3  # eager runs before capture: allocate memory, select and compile kernels


class Recorder:
    """Captures functions into `torch.cuda.CUDAGraph`s."""

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

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

        `generators`: those that `function` draws from in addition to the device's default generator.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # releases the warm-up's memory: a graph allocates from a private pool
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # thread_local: a thread that copies a checkpoint may call CUDA functions during capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
        self.reset()

    def reset(self) -> None:
        """Discards the graph, which is captured again; for calls after the function's tensors were replaced."""
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._results: T | None = None

    def __call__(self) -> T:
        if self._replay is None:
            if self._runs < _WARMUP_RUNS or not self._can_capture:
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
        except RuntimeError as error:
            self._can_capture = False
            reason = str(error).strip().splitlines()[0]
            log.warning("%s could not be captured as a CUDA graph (%s); it runs eagerly", self.name, reason)
