"""Fetching samples in worker processes, ahead of their use."""

import atexit
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.util import Finalize
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dlopt.data.samples import InMemory, Samples
from dlopt.errors import RunError, UserError
from dlopt.processor import M_MMAP_THRESHOLD, end_with_parent, set_malloc

_CHUNK_BYTES = 1 << 22  # of inputs that pass through at once where a dataset is read from end to end
_WORTH_WORKERS = 1000  # samples; below, starting processes takes longer than decoding
_MAX_WORKERS = 16
_PIECE = 32  # samples that a worker fetches at a time: all workers share in a batch, so the first one comes early
_AHEAD = 2  # batches that are fetched ahead of their use
_MAPPED = 1 << 20  # bytes from which on memory for inputs is mapped for itself
_GRACE = 60  # seconds for which a worker outlives a termination signal, see `_start_worker`


def worker_count(workers: int | Literal["auto"], samples: Samples, processes: int = 1) -> int:
    """Worker processes for `samples`, when `processes` training processes share this machine.

    `auto`: the cores that this process may use, shared among the training processes; none where the samples are in
    memory already, or so few that starting workers would take longer than the work.
    """
    if workers != "auto":
        return workers
    if isinstance(samples, InMemory) or len(samples) < _WORTH_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // processes, _MAX_WORKERS))


class Loader:
    """Fetches batches of samples in order, in `workers` processes (0: in this one) that live until `close`.

    Workers fetch pieces of batches, which are put together here, in page-locked memory where `pin` asks for it. They
    work two batches ahead, and at least two pieces each; that bounds the memory.
    """

    def __init__(self, samples: Samples, workers: int, pin: bool = False) -> None:
        self._samples = samples
        self._workers = workers
        self._pin = pin
        self._plan = _Plan()
        self._loader: DataLoader[Any] | None = None

    def run(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Inputs for each tensor of indices in `parts`. A new run ends an unfinished one.

        Raises:
            UserError: a sample cannot be read.
            RunError: a worker process was killed.
        """
        if not parts:
            return
        longest = max(len(part) for part in parts)
        pieces = [part.split(_PIECE) if self._workers else (part,) for part in parts]
        self._plan.parts = [piece.numpy() for cut in pieces for piece in cut]
        try:
            fetched = self._start(longest)
            for part, cut in zip(parts, pieces, strict=True):
                yield self._assemble(len(part), [len(piece) for piece in cut], fetched)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # A worker that dies while it hands a batch over breaks the connection; otherwise torch finds it missing.
            # What a worker itself has raised comes as "Caught ...", and is no death.
            told = str(error) or type(error).__name__
            broken = not isinstance(error, RuntimeError) or told.startswith("DataLoader worker (pid")
            if self._workers > 0 and broken and not told.startswith("Caught"):
                raise RunError(f"a data loader worker died (out of memory?): {told}") from error
            raise

    def _assemble(self, total: int, lengths: list[int], fetched: Iterator[Any]) -> Tensor:
        """The next `total` samples, from pieces of the given lengths."""
        batch: Tensor | None = None
        filled = 0
        for length in lengths:
            piece = next(fetched)
            if isinstance(piece, UserError):
                raise piece
            if length == total and not self._pin:
                return piece
            if batch is None:
                batch = _empty((total, *piece.shape[1:]), piece.dtype, self._pin)
            batch[filled : filled + length] = piece
            filled += length
        assert batch is not None
        return batch

    def _start(self, longest: int) -> Iterator[Any]:
        if self._loader is not None:
            return iter(self._loader)
        ahead = max(_AHEAD, -(-_AHEAD * longest // (_PIECE * max(1, self._workers))))
        self._loader = DataLoader(
            _Fetch(self._samples),  # type: ignore[arg-type]
            batch_sampler=self._plan,  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=self._workers,
            multiprocessing_context=_start_method() if self._workers else None,
            prefetch_factor=ahead if self._workers else None,
            persistent_workers=self._workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: the global one must not depend on how data is read
        )
        if self._workers == 0:
            return iter(self._loader)
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch installs a handler that raises wherever the main thread happens to be when a worker dies.
            # Waiting for the next batch notices it as well, and there the error can be told properly.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        # Before multiprocessing closes the queues through which workers are told to end (priority 10) and sends them a
        # signal that they outlive for a while: ahead of its exit hook, or within it in a job of a sweep, which has no
        # other.
        atexit.register(_close, weakref.ref(self))
        Finalize(None, _close, args=(weakref.ref(self),), exitpriority=100)
        return iterator

    def close(self) -> None:
        """Ends the worker processes."""
        if self._loader is None:
            return
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def chunks(samples: Samples, workers: int | Literal["auto"] = "auto") -> Iterator[Tensor]:
    """All inputs in order, in chunks of a few megabytes whose borders depend on the shape alone."""
    size = max(1, _CHUNK_BYTES // max(1, int(np.prod(samples.shape))))
    if isinstance(samples, InMemory):
        yield from samples.inputs.split(size)
        return
    loader = Loader(samples, worker_count(workers, samples))
    try:
        yield from loader.run(torch.arange(len(samples)).split(size))
    finally:
        loader.close()


def materialize(samples: Samples, workers: int | Literal["auto"] = "auto") -> InMemory:
    """The samples read into one tensor."""
    if isinstance(samples, InMemory):
        return samples
    inputs: Tensor | None = None
    filled = 0
    for chunk in chunks(samples, workers):
        if inputs is None:
            inputs = torch.empty((len(samples), *samples.shape), dtype=chunk.dtype)
        inputs[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert inputs is not None and filled == len(samples)  # no dataset is empty
    return InMemory(inputs, samples.targets)


class _Plan:
    """The batches of the run to come; iterated in the main process, so that setting it is enough."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _Fetch:
    """Samples as the data loader wants them: a whole batch in one call."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> Tensor:
        return self._samples.fetch(torch.tensor([index]))[0]

    def __getitems__(self, indices: np.ndarray) -> Tensor | UserError:
        try:
            return self._samples.fetch(torch.from_numpy(indices))
        except UserError as error:
            return UserError(str(error))  # handed over as it is: an exception would come wrapped in tracebacks


def _unchanged(batch: Any) -> Any:
    return batch


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    """Memory for a batch that goes back to the system as a whole: from the heap, batches would be cut up by what is
    allocated between them, and the process would grow by hundreds of megabytes."""
    size = math.prod(shape) * dtype.itemsize
    if pin or size < _MAPPED:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def _start_method() -> str | None:
    """Forked workers share what this process has imported and read: on Linux they cost 13 MiB each and start at once,
    others 290 MiB and three seconds. What the program that calls dlopt has chosen holds."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return "fork" if chosen is None and sys.platform.startswith("linux") else chosen


def _start_worker(worker: int) -> None:
    """One thread each; signals are the main process's business.

    A cluster's signal reaches the whole process group. A worker that died of it would take the main process along
    before that has written its checkpoint, so a worker stays for a while after a termination signal.
    """
    torch.set_num_threads(1)
    set_malloc({M_MMAP_THRESHOLD: _MAPPED})  # returns large blocks to the system, as `_empty` does
    end_with_parent()  # elsewhere than on Linux they notice after some seconds
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


def _close(reference: "weakref.ref[Loader]") -> None:
    if (loader := reference()) is not None:
        loader.close()


class Lane(Protocol):
    """The way to a device; `CudaLane` is the one, tests have another."""

    def send(self, batch: Tensor) -> tuple[Tensor, Any]:
        """Starts copying a batch from page-locked memory: (where it will be, a mark to wait for)."""
        ...

    def receive(self, batch: Tensor, mark: Any) -> Tensor:
        """The batch; what is computed from here on comes after its arrival."""
        ...


class CudaLane:
    """A stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self._stream)
        return moved, mark

    def receive(self, batch: Tensor, mark: torch.cuda.Event) -> Tensor:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(mark)
        batch.record_stream(computing)  # its memory is not for the next copy before it has been used
        return batch


def ahead(batches: Iterable[Tensor], lane: Lane) -> Iterator[Tensor]:
    """The batches on the device; each copy is started before the batch in front of it is given out."""
    under_way: tuple[Tensor, Any] | None = None
    for batch in batches:
        sent = lane.send(batch)
        if under_way is not None:
            yield lane.receive(*under_way)
        under_way = sent
    if under_way is not None:
        yield lane.receive(*under_way)
