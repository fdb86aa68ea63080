"""CUDA graphs: work that is the same in every update is recorded once and then replayed by a single launch.

A recorded piece of work reads and writes tensors that stay where they are, and none of its Python runs again: whatever
changes from update to update has to be a tensor (inputs, learning rates) or a generator that is seeded anew.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

_WARM = 3  # runs before the recording: memory is allocated, kernels are chosen and compiled in them


class Recorder(Protocol):
    """What records work; `CudaRecorder` is the one, tests have another that runs on a CPU."""

    def warm(self, work: Callable[[], T]) -> T:
        """Runs the work as it will be recorded: beside the current stream, and finished before what comes after."""
        ...

    def record(self, work: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], T]:
        """Records the work, which is not done thereby: (what does it, its results, which each replay overwrites).

        `generators` are those besides the device's default one from which the work draws.
        """
        ...


class CudaRecorder:
    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

    def warm(self, work: Callable[[], T]) -> T:
        # Not on the default stream, with which nothing recorded may be connected, such as gradients' accumulators.
        side = self._side = self._side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = work()
        torch.cuda.current_stream().wait_stream(side)
        return results

    def record(self, work: Callable[[], T], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], T]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of the warm-up: a graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads (a checkpoint that is being copied) may do what they like
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


class Replayed(Generic[T]):
    """`work`, which is run as it is a few times, then recorded, and replayed from there on.

    Where the recording fails the work stays as it is, and a warning says so: nothing of it was done then.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], T],
        recorder: Recorder,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.name = name
        self._work = work
        self._recorder = recorder
        self._generators = generators
        self._is_possible = True
        self.forget()

    def forget(self) -> None:
        """The tensors that the work knows are other ones from now on: it will be recorded anew."""
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._results: T | None = None

    def __call__(self) -> T:
        if self._replay is None:
            if self._runs < _WARM or not self._is_possible:
                self._runs += 1
                return self._recorder.warm(self._work)
            self._record()
            if self._replay is None:
                return self._recorder.warm(self._work)
        self._replay()
        assert self._results is not None
        return self._results

    def _record(self) -> None:
        try:
            self._replay, self._results = self._recorder.record(self._work, self._generators)
        except RuntimeError as error:
            self._is_possible = False
            told = str(error).strip().splitlines()[0]
            log.warning("%s cannot be recorded as a CUDA graph (%s): it goes on without one", self.name, told)
