import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import RunError, UserError
from dlopt.data import loading
from dlopt.data.loading import Loader
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import InMemory, Samples
from dlopt.data.texts.windows import Windows
from tests.support.runs import in_fork


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_larger_than_a_worker_chunk(numbered: Callable[..., InMemory], workers: int) -> None:
    samples = numbered(250)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(0))
    loader = Loader(samples, workers)
    for size in (100, 32, 33, 7, 250):
        parts = list(order.split(size))
        for indices, inputs in zip(parts, loader.run(parts), strict=True):
            assert torch.equal(inputs[:, 0, 0, 0].long(), indices)
    assert list(loader.run([])) == []
    loader.close()


class Large(Samples):
    """Images of 256 x 256, each with small persistent allocations, like a decoder's tables."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(100_000, dtype=torch.int64), (3, 256, 256))
        self._kept: list[Tensor] = []

    def read(self, rows: Tensor) -> Tensor:
        result = torch.zeros(len(rows), *self.shape, dtype=torch.uint8)
        self._kept = [*self._kept[-500:], *(torch.zeros(200) for _ in rows)]
        return result


def private_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat() -> None:
    """No process grows by more than the prefetched batches (24 MiB each) while a gigabyte is loaded."""
    import multiprocessing

    loader = Loader(Large(), workers=2)
    kept: list[Tensor] = []
    grown: list[list[float]] = []
    for _ in loader.run(torch.arange(6_000).split(128)):
        kept = [*kept[-500:], *(torch.zeros(200) for _ in range(20))]
        processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
        grown.append([private_mib(process) for process in processes])
    loader.close()
    assert len(grown[0]) == 3
    of_process = torch.tensor(grown)  # a busy machine has more batches waiting at one moment than at another
    assert (of_process[-15:].median(0).values - of_process[5:20].median(0).values).max() < 4 * 24


@pytest.mark.parametrize(
    ("workers", "samples", "processes", "cores", "expected"),
    [
        ("auto", range(1000), 1, 4, 4),
        ("auto", range(999), 1, 4, 0),
        ("auto", range(1000), 3, 4, 1),
        ("auto", range(1000), 8, 4, 1),
        ("auto", range(1000), 1, 64, 16),
        ("auto", InMemory(torch.zeros(2000, 1), torch.zeros(2000)), 1, 4, 0),
        ("auto", Windows(np.zeros(5000), 1), 1, 4, 0),
        (3, range(5), 8, 4, 3),
        (0, range(5000), 1, 4, 0),
    ],
)
def test_number_of_workers(
    workers: Any, samples: Any, processes: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "usable_cores", lambda: cores)
    assert loading.worker_count(workers, samples, processes) == expected


def test_a_whole_dataset_is_read_in_chunks_of_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 100)
    for shape, sizes in (((3, 4), [8, 2]), ((101,), [1] * 10), ((0,), [10])):
        samples = InMemory(torch.zeros(10, *shape), torch.zeros(10))
        assert [len(chunk) for chunk in loading.chunks(samples)] == sizes
    wrapped = Wrapped([(torch.full((3, 4), float(i)), i) for i in range(10)], None, "data.train")
    assert [len(chunk) for chunk in loading.chunks(wrapped)] == [8, 2]
    read = loading.materialize(wrapped)
    assert isinstance(read, InMemory) and read.inputs[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.equal(loading.on_device(wrapped, 0, torch.device("cpu")), read.inputs)


@pytest.mark.parametrize(("count", "is_mapped"), [(1 << 18, True), ((1 << 18) - 1, False)])
def test_large_batches_have_mappings_of_their_own(count: int, is_mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = loading.mmap.mmap
    monkeypatch.setattr(loading.mmap, "mmap", lambda *keys: sizes.append(keys) or original(*keys))
    batch = loading._empty((count, 1), torch.float32, False)
    assert batch.shape == (count, 1) and batch.dtype == torch.float32
    assert sizes == ([(-1, 4 * count)] if is_mapped else [])


def test_the_next_batch_is_sent_before_the_current_one_is_used() -> None:
    events: list[str] = []

    class Stream:
        def send(self, batch: int) -> tuple[int, str]:
            events.append(f"send {batch}")
            return batch, "event"

        def receive(self, batch: int, event: str) -> int:
            events.append(f"receive {batch}")
            return 10 * batch

    for batch in loading.prefetch([1, 2, 3], Stream()):  # type: ignore[list-item, arg-type]
        events.append(f"use {batch}")
    assert events == [
        "send 1", "send 2", "receive 1", "use 10", "send 3", "receive 2", "use 20", "receive 3", "use 30",
    ]  # fmt: skip
    assert not list(loading.prefetch([], Stream()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "error", "is_death"),
    [
        (1, RuntimeError("DataLoader worker (pid 7) is killed by signal"), True),
        (1, EOFError(), True),
        (1, ConnectionResetError("gone"), True),
        (0, RuntimeError("DataLoader worker (pid 7) is killed by signal"), False),
        (1, RuntimeError("another one"), False),
        (1, FileNotFoundError("Caught FileNotFoundError in DataLoader worker"), False),
    ],
)
def test_the_death_of_a_worker_is_named(
    workers: int, error: Exception, is_death: bool, numbered: Callable[..., InMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    loader = Loader(numbered(3), workers)
    monkeypatch.setattr(loader, "_start", fail)
    expected = RunError if is_death else type(error)
    message = str(error) or type(error).__name__
    prefix = r"^a data loader worker died \(out of memory\?\): " if is_death else "^"
    with pytest.raises(expected, match=prefix + re.escape(message)):
        list(loader.run([torch.arange(3)]))


def test_errors_of_workers_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def fetch(self, requests: Tensor) -> Tensor:
            raise UserError(f"row {int(requests[0])}")

    with pytest.raises(UserError, match="row 2"):
        list(Loader(Broken(), 0).run([torch.tensor([2])]))
    assert loading._share("no tensor") == "no tensor"
    shared = loading._share(torch.ones(2))
    assert shared.is_shared()

    def full(_: Tensor) -> None:
        raise RuntimeError("unable to write\nmore")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    found = loading._share(torch.ones(2))
    assert isinstance(found, RunError) and "no shared memory left (unable to write): enlarge" in str(found)


def _is_set_up() -> None:
    """Checks what a worker does with signals, threads and memory."""
    called: list[Any] = []
    loading.end_with_parent = lambda: called.append("parent")  # type: ignore[attr-defined]
    loading.set_malloc = lambda options: called.append(options)  # type: ignore[attr-defined]
    _, writer = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    loading._start_worker(0)
    assert torch.get_num_threads() == 1 and called == [{loading.M_MMAP_THRESHOLD: 1 << 20}, "parent"]
    assert signal.set_wakeup_fd(-1) == -1
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        assert signal.getsignal(getattr(signal, name)) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    assert 59 <= signal.alarm(0) <= 60  # seconds until it ends


def test_a_worker_outlives_the_signals_of_its_group() -> None:
    assert in_fork(_is_set_up) == 0


def test_workers_are_forked_unless_the_program_has_chosen_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, platform, expected in (
        (None, "linux", "fork"), (None, "darwin", None), ("spawn", "linux", "spawn"), ("spawn", "darwin", "spawn"),
    ):  # fmt: skip
        monkeypatch.setattr(loading.multiprocessing, "get_start_method", lambda allow_none, method=method: method)
        monkeypatch.setattr(loading.sys, "platform", platform)
        assert loading._start_method() == expected


@pytest.mark.parametrize(
    ("workers", "batch", "expected"), [(1, 8, 2), (1, 32, 2), (1, 96, 6), (1, 97, 7), (3, 320, 7), (0, 64, None)]
)
def test_two_batches_are_prefetched(
    workers: int, batch: int, expected: int | None, numbered: Callable[..., InMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    class Recorded(list[Any]):
        def __init__(self, dataset: Any, **keys: Any) -> None:
            super().__init__()
            made.update(keys)

        def __iter__(self) -> Any:
            if workers:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as torch sets its own
            return super().__iter__()

    monkeypatch.setattr(loading, "DataLoader", Recorded)
    loader = Loader(numbered(3), workers)
    handler = signal.getsignal(signal.SIGCHLD)
    loader._start(batch)
    assert signal.getsignal(signal.SIGCHLD) == (handler or signal.SIG_DFL)
    assert made["prefetch_factor"] == expected and made["num_workers"] == workers
    assert made["persistent_workers"] == (workers > 0) == (made["collate_fn"] is loading._share)
    loader._loader = None


def test_copies_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: which stream copies, waits, and keeps the memory."""
    log: list[Any] = []

    class Event:
        def record(self, stream: str) -> None:
            log.append(("record", stream))

    class Compute:
        def wait_event(self, event: Event) -> None:
            log.append("wait")

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        log.append(("enter", stream))
        yield
        log.append("leave")

    class Batch:
        def to(self, device: str, *, non_blocking: bool) -> "Batch":
            log.append(("to", device, non_blocking))
            return self

        def record_stream(self, stream: object) -> None:
            log.append(("keep", type(stream)))

    compute, batch = Compute(), Batch()
    for name, value in (
        ("Stream", lambda device: f"stream of {device}"), ("stream", on), ("Event", Event),
        ("current_stream", lambda device: compute),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    stream = loading.CudaTransferStream("gpu")  # type: ignore[arg-type]
    assert stream.receive(*stream.send(batch)) is batch  # type: ignore[arg-type, comparison-overlap]
    own = "stream of gpu"
    assert log == [("enter", own), ("to", "gpu", True), ("record", own), "leave", "wait", ("keep", Compute)]
