"""Prefetches samples in worker processes."""

import atexit
import math
import mmap
import multiprocessing
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.interruption import end_with_parent
from dlopt.basics.scratch import own_multiprocessing_folder
from dlopt.data.samples import InMemory, Reader, Samples
from dlopt.machine.memory import M_MMAP_THRESHOLD, set_malloc
from dlopt.machine.threads import usable_cores

_CHUNK_BYTES = 1 << 22  # chunk of inputs when a whole dataset is read
_MIN_SAMPLES_FOR_WORKERS = 1000  # below, starting processes takes longer than decoding
_MAX_WORKERS = 16
_FETCH_SIZE = 32  # samples per request to a worker; all workers contribute to a batch, so the first one is ready early
_PREFETCH = 2  # batches
_MMAP_MIN_BYTES = 1 << 20  # larger buffers are mapped separately, see `_empty`
_GRACE = 60  # seconds that a worker stays alive after SIGTERM, see `_start_worker`


def worker_count(workers: int | Literal["auto"], samples: Sized, processes: int = 1) -> int:
    """Returns the number of worker processes for `samples` if `processes` training processes share this machine.

    `auto`: the usable cores divided by the training processes; 0 for samples in memory and for small datasets.
    """
    if workers != "auto":
        return workers
    if len(samples) < _MIN_SAMPLES_FOR_WORKERS or not getattr(samples, "uses_workers", True):
        return 0
    return max(1, min(usable_cores() // processes, _MAX_WORKERS))


@dataclass
class Loader:
    """Fetches batches in order, in `workers` processes (0: in this process) that live until `close`.

    Workers fetch chunks of a batch; this process assembles them, in page-locked memory if `pin`. Prefetching is limited
    to two batches, but at least two chunks per worker, which bounds the memory.
    """

    reader: Reader
    workers: int
    pin: bool = False
    # The batch sampler of the current run; only the main process iterates it.
    _chunks: list[np.ndarray] = field(default_factory=list, init=False)
    _loader: DataLoader[Any] | None = field(default=None, init=False)

    def run(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the inputs of each batch, given by the requests to the reader. A new run ends an unfinished one.

        Raises:
            UserError: a sample cannot be read.
            RunError: a worker process was killed.
        """
        if not batches:
            return
        batch_chunks = [batch.split(_FETCH_SIZE) if self.workers else (batch,) for batch in batches]
        self._chunks[:] = [chunk.numpy() for chunks in batch_chunks for chunk in chunks]
        try:
            fetched = self._start(max(map(len, batches)))
            for batch, chunks in zip(batches, batch_chunks, strict=True):
                yield self._assemble(len(batch), [len(chunk) for chunk in chunks], fetched)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # A worker that dies while sending a batch breaks the connection; otherwise torch reports its exit. An
            # exception raised in a worker arrives as "Caught ..." and is re-raised as it is.
            message = str(error) or type(error).__name__
            died = not isinstance(error, RuntimeError) or message.startswith("DataLoader worker (pid")
            if self.workers > 0 and died and not message.startswith("Caught"):
                raise RunError(f"a data loader worker died (out of memory?): {message}") from error
            raise

    def _assemble(self, total: int, lengths: list[int], fetched: Iterator[Any]) -> Tensor:
        """Concatenates the next chunks, of the given lengths, to a batch of `total` samples."""
        batch: Tensor | None = None
        filled = 0
        for length in lengths:
            chunk = next(fetched)
            if isinstance(chunk, UserError | RunError):
                raise chunk
            if length == total and not self.pin:
                return chunk
            if batch is None:
                batch = _empty((total, *chunk.shape[1:]), chunk.dtype, self.pin)
            batch[filled : filled + length] = chunk
            filled += length
        assert batch is not None
        return batch

    def _start(self, batch_size: int) -> Iterator[Any]:
        if self._loader is not None:
            return iter(self._loader)
        prefetch_factor = max(_PREFETCH, -(-_PREFETCH * batch_size // (_FETCH_SIZE * max(1, self.workers))))
        self._loader = DataLoader(
            _ChunkDataset(self.reader),  # type: ignore[arg-type]
            batch_sampler=self._chunks,  # type: ignore[arg-type]
            collate_fn=_share if self.workers else lambda chunk: chunk,
            num_workers=self.workers,
            multiprocessing_context=_start_method() if self.workers else None,
            prefetch_factor=prefetch_factor if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # so that data loading does not advance the global RNG
        )
        if self.workers == 0:
            return iter(self._loader)
        own_multiprocessing_folder()
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises at an arbitrary point of the main thread when a worker dies. `run` detects the
            # death too, and there it becomes a proper error message.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        # Close before multiprocessing closes the queues that stop the workers (exit priority 10) and sends SIGTERM,
        # which workers survive for `_GRACE` seconds. atexit covers normal exits; Finalize covers the jobs of a sweep,
        # where only multiprocessing's exit hook runs.
        atexit.register(_close, weakref.ref(self))
        Finalize(None, _close, args=(weakref.ref(self),), exitpriority=100)
        return iterator

    def close(self) -> None:
        """Stops the worker processes."""
        if self._loader is None:
            return
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def chunks(samples: Samples, workers: int | Literal["auto"] = "auto") -> Iterator[Tensor]:
    """Yields all inputs in order, in chunks of a few megabytes whose size depends only on the shape."""
    size = max(1, _CHUNK_BYTES // max(1, int(np.prod(samples.shape))))
    if not samples.uses_workers:
        yield from (samples.fetch_range(start, start + size) for start in range(0, len(samples), size))
        return
    with closing(Loader(samples, worker_count(workers, samples))) as loader:
        yield from loader.run(torch.arange(len(samples)).split(size))


def materialize(samples: Samples, workers: int | Literal["auto"] = "auto") -> Samples:
    """Reads all samples into one tensor, or the tokens of a text."""
    if (loaded := samples.loaded()) is not None:
        return loaded
    inputs: Tensor | None = None
    filled = 0
    for chunk in chunks(samples, workers):
        if inputs is None:
            inputs = torch.empty((len(samples), *samples.shape), dtype=chunk.dtype)
        inputs[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert inputs is not None and filled == len(samples)  # no dataset is empty
    return InMemory(inputs, samples.targets, samples.origin, samples.further)


def on_device(samples: Samples, workers: int | Literal["auto"], device: torch.device) -> Tensor:
    """Returns all inputs [N, *shape] on the device; the windows of a text are a view of its tokens."""
    return materialize(samples, workers).on(device)


@dataclass(frozen=True)
class _ChunkDataset:
    """Dataset whose `__getitems__` fetches a chunk in one call."""

    reader: Reader

    def __getitems__(self, requests: np.ndarray) -> Tensor | UserError:
        try:
            return self.reader.fetch(torch.from_numpy(requests))
        except UserError as error:
            return UserError(str(error))  # returned: DataLoader would wrap a raised error in the worker's traceback


def _share(batch: Any) -> Any:
    """Moves a chunk to shared memory in a worker; returns a `RunError` if shared memory is full.

    If the worker's queue moved the chunk, it would drop one that does not fit, and the main process would wait forever.
    """
    if not isinstance(batch, Tensor):
        return batch
    try:
        return batch.share_memory_()
    except RuntimeError as error:
        return RunError(
            f"a data loader worker has no shared memory left ({str(error).splitlines()[0]}): enlarge /dev/shm "
            "(docker run --shm-size=8g; Kubernetes: an emptyDir with medium: Memory), or set data.workers=0"
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    """Allocates memory for a batch.

    Large batches get their own mapping, which returns to the system when freed. On the heap they would fragment it, and
    the process would grow by hundreds of megabytes.
    """
    size = math.prod(shape) * dtype.itemsize
    if pin or size < _MMAP_MIN_BYTES:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def _start_method() -> str | None:
    """Returns "fork" on Linux unless the calling program has set another start method.

    Forked workers share this process's imports and data: 13 MiB each and no start-up time, against 290 MiB and 3 s.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    return "fork" if method is None and sys.platform.startswith("linux") else method


def _start_worker(worker: int) -> None:
    """Sets up a worker: one thread, and signals left to the main process.

    Schedulers signal the whole process group. If a worker died at once, the main process would fail before it could
    write its checkpoint; so a worker stays alive for `_GRACE` seconds after SIGTERM.
    """
    torch.set_num_threads(1)
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # the inherited one is the main process's
    set_malloc({M_MMAP_THRESHOLD: _MMAP_MIN_BYTES})  # returns large blocks to the system, as `_empty` does
    end_with_parent()  # Linux only; elsewhere workers notice after some seconds
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


def _close(reference: "weakref.ref[Loader]") -> None:
    if (loader := reference()) is not None:
        loader.close()


class CudaTransferStream:
    """Asynchronous copies on a CUDA stream separate from the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Starts copying a batch from page-locked memory; returns (the copy, an event to wait for)."""
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return moved, event

    def receive(self, batch: Tensor, event: torch.cuda.Event) -> Tensor:
        """Returns the copy; later work on the compute stream waits for the event."""
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_event(event)
        # The allocator must not give this memory to the next copy while the compute stream still reads it.
        batch.record_stream(compute_stream)
        return batch


def prefetch(batches: Iterable[Tensor], stream: CudaTransferStream) -> Iterator[Tensor]:
    """Yields the batches on the device; starts the copy of the next batch before yielding the current one."""
    in_flight: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        sent = stream.send(batch)
        if in_flight is not None:
            yield stream.receive(*in_flight)
        in_flight = sent
    if in_flight is not None:
        yield stream.receive(*in_flight)
