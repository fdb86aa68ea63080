import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlopt.basics.errors import RunError, UserError
from dlopt.data.batches import Batches, Delivery
from dlopt.data.images.files import Files, ImageList
from dlopt.data.loading import Loader
from dlopt.data.normalization import Standardize
from dlopt.data.samplers import Random
from dlopt.data.samples import InMemory, Samples

Pairs = list[tuple[Tensor, Tensor]]


def numbered(count: int) -> InMemory:
    return InMemory(torch.arange(count, dtype=torch.float32).view(count, 1), torch.arange(count))


def batches(samples: Samples, **changed: Any) -> Batches:
    options: dict[str, Any] = {"device": torch.device("cpu"), "in_memory": True, "workers": 0}
    options |= {key: changed.pop(key) for key in (field.name for field in fields(Delivery)) if key in changed}
    return Batches(samples, Delivery(**options), **{"batch_size": 4, **changed})


def shuffled(samples: Samples, **changed: Any) -> Batches:
    return batches(samples, sampler=Random(targets=samples.targets, seed=5, epoch_size=None), **changed)


def numbers(pairs: Iterator[tuple[Tensor, Tensor]] | Pairs) -> list[list[int]]:
    return [targets.tolist() for _, targets in pairs]


def equal(a: Pairs, b: Pairs) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def flip_or_shift(
    inputs: Tensor, targets: Tensor, *, generator: torch.Generator, total: int, shard: slice, **_: Any
) -> tuple[Tensor, Tensor]:
    """Draws for the whole batch and uses the shard's draws, as an augmentation should."""
    draws = torch.rand(total, generator=generator, device=generator.device)[shard]
    return (inputs.float() + draws.view(-1, *[1] * (inputs.dim() - 1))), targets


@given(count=st.integers(1, 60), size=st.integers(1, 70) | st.just("full") | st.just(10**9), in_memory=st.booleans())
def test_an_epoch_visits_each_sample_once(count: int, size: Any, in_memory: bool) -> None:
    loop = shuffled(numbered(count), batch_size=size, in_memory=in_memory)
    seen = numbers(loop.epoch(0))
    assert sorted(number for batch in seen for number in batch) == list(range(count)) and loop.count == count
    width = count if size == "full" else min(size, count)
    assert len(loop) == len(seen) == math.ceil(count / width)
    assert all(len(batch) == width for batch in seen[:-1])
    for inputs, targets in loop.epoch(1):
        assert inputs.flatten().tolist() == targets.tolist()


@given(count=st.integers(1, 60), size=st.integers(1, 60))
def test_drop_last_skips_only_the_smaller_batch(count: int, size: int) -> None:
    if size > count:
        with pytest.raises(UserError, match=f"data.drop_last=true: the {count} training samples"):
            shuffled(numbered(count), batch_size=size, drop_last=True)
        return
    loop = shuffled(numbered(count), batch_size=size, drop_last=True)
    seen = numbers(loop.epoch(0))
    assert len(seen) == len(loop) == count // size and loop.count == count // size * size
    assert all(len(batch) == size for batch in seen)


@given(count=st.integers(1, 50), size=st.integers(1, 20), start=st.integers(0, 60), in_memory=st.booleans())
def test_start_skips_the_first_batches(count: int, size: int, start: int, in_memory: bool) -> None:
    loop = shuffled(numbered(count), batch_size=size, in_memory=in_memory, augment=flip_or_shift)
    whole = list(loop.epoch(3, step=100))
    tail = list(loop.epoch(3, start=start, step=100 + start))
    assert equal(tail, whole[start:])


@given(count=st.integers(1, 50), size=st.integers(1, 20), ranks=st.integers(1, 5), in_memory=st.booleans())
def test_ranks_partition_each_batch_with_the_same_draws(count: int, size: int, ranks: int, in_memory: bool) -> None:
    def shard(rank: int) -> Callable[[int], slice]:
        return lambda n: slice(n * rank // ranks, n * (rank + 1) // ranks)

    options: dict[str, Any] = {"batch_size": size, "augment": flip_or_shift, "in_memory": in_memory}
    whole = list(shuffled(numbered(count), **options).epoch(0))
    parts = [list(shuffled(numbered(count), shard=shard(rank), **options).epoch(0)) for rank in range(ranks)]
    joined = [(torch.cat([i for i, _ in same]), torch.cat([t for _, t in same])) for same in zip(*parts, strict=True)]
    assert equal(joined, whole)


def test_draws_are_a_function_of_seed_and_step() -> None:
    samples = numbered(8)
    loops = {s: batches(samples, augment=flip_or_shift, seed=s) for s in (0, 1)}
    assert equal(list(loops[0].epoch(0, step=7)), list(loops[0].epoch(1, step=7)))
    assert not equal(list(loops[0].epoch(0, step=7)), list(loops[0].epoch(0, step=8)))
    assert not equal(list(loops[0].epoch(0, step=7)), list(loops[1].epoch(0, step=7)))


def test_augmentation_receives_positions_and_epoch() -> None:
    calls: list[Any] = []

    def note(inputs: Tensor, targets: Tensor, **keys: Any) -> tuple[Tensor, Tensor]:
        calls.append((inputs.dtype, keys["total"], keys["shard"], keys["indices"].tolist(), keys["epoch"]))
        return inputs, targets

    images = InMemory(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
    list(batches(images, batch_size=3, augment=note, shard=lambda n: slice(1, n)).epoch(2))
    assert calls == [(torch.uint8, 3, slice(1, 3), [1, 2], 2), (torch.uint8, 2, slice(1, 2), [4], 2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    paths = []
    for number in range(23):
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(draw.integers(0, 256, (8, 6, 3), dtype=np.uint8)).save(paths[-1])
    return Files(ImageList.of(paths, torch.arange(23) % 4), None, 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_streamed_batches_equal_those_in_memory(files: Files, workers: int, memory_format: torch.memory_format) -> None:
    normalize = Standardize(per="channel", input_shape=files.shape)
    normalize.fit(files)
    options: dict[str, Any] = {"augment": flip_or_shift, "normalize": normalize, "memory_format": memory_format}
    resident = shuffled(files, in_memory=True, **options)
    streamed = shuffled(files, in_memory=False, workers=workers, **options)
    try:
        for epoch, start in ((0, 0), (1, 0), (1, 3), (0, 5)):
            a, b = (list(loop.epoch(epoch, start, step=10 * epoch + start)) for loop in (resident, streamed))
            assert equal(a, b) and len(a) == 6 - start
            assert all(inputs.is_contiguous(memory_format=memory_format) for inputs, _ in a + b)
            assert all(inputs.dtype == torch.float32 for inputs, _ in a)
        left = streamed.epoch(0)  # a run may stop within an epoch, with batches fetched ahead
        next(left)
        assert equal(list(streamed.epoch(2)), list(resident.epoch(2)))
    finally:
        streamed.close()


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 0), (False, 1)])
def test_the_global_generator_is_not_consumed(files: Files, in_memory: bool, workers: int) -> None:
    before = torch.get_rng_state()
    loop = shuffled(files, in_memory=in_memory, workers=workers, augment=flip_or_shift)
    list(loop.epoch(0))
    list(loop.epoch(1))
    loop.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_have_the_requested_dtype(files: Files, dtype: torch.dtype) -> None:
    ((inputs, targets),) = batches(files, batch_size="full", dtype=dtype).epoch(0)
    assert inputs.dtype == dtype and targets.dtype == torch.int64 and inputs.max() > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named_with_and_without_workers(tmp_path: Path, files: Files, workers: int) -> None:
    good = [files.path(i) for i in range(5)]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    samples = Files(ImageList.of([*good, str(bad)], torch.zeros(6, dtype=torch.int64)), (8, 6), 3)
    loop = batches(samples, batch_size=2, in_memory=False, workers=workers)
    try:
        with pytest.raises(UserError) as caught:
            list(loop.epoch(0))
    finally:
        loop.close()
    assert str(caught.value).startswith(f"{bad}: cannot be read as an image") and "\n" not in str(caught.value)


class ProbeSamples(Samples):
    """Samples that report on the process that fetches them."""

    def __init__(self, probe: Callable[[], float]) -> None:
        super().__init__(torch.zeros(12, dtype=torch.int64), (1,))
        self._probe = probe

    def read(self, rows: Tensor) -> Tensor:
        return torch.full((len(rows), 1), self._probe(), dtype=torch.float64)


def test_workers_use_one_thread_and_survive_sigterm() -> None:
    loader = Loader(ProbeSamples(lambda: os.getpid() + torch.get_num_threads() / 8), workers=1)
    parts = list(torch.arange(12).split(1))
    run = loader.run(parts)
    first = next(run).item()
    assert first % 1 == 1 / 8 and int(first) != os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(int(first), number)
    assert [value.item() for value in run] == [first] * 11
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_a_full_shared_memory_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the workers are forked
    loader = Loader(ProbeSamples(os.getpid), workers=1)
    with pytest.raises(RunError, match=r"No space left on device \(28\)\): enlarge /dev/shm .* data\.workers=0"):
        next(loader.run(list(torch.arange(12).split(1))))
    loader.close()


@pytest.mark.slow  # torch looks after its workers every five seconds
def test_a_killed_worker_fails_the_run() -> None:
    loader = Loader(ProbeSamples(os.getpid), workers=1)
    run = loader.run(list(torch.arange(12).split(1)))
    worker = int(next(run).item())
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RunError, match="data loader worker died"):
        for _ in range(12):
            next(run)
    loader.close()


@pytest.mark.gpu
def test_on_a_gpu_both_paths_are_equal_and_a_step_does_not_synchronize(files: Files) -> None:
    options: dict[str, Any] = {
        "device": torch.device("cuda"),
        "augment": flip_or_shift,
        "memory_format": torch.channels_last,
    }
    resident = shuffled(files, in_memory=True, **options)
    streamed = shuffled(files, in_memory=False, workers=2, **options)
    assert equal(list(resident.epoch(0)), list(streamed.epoch(0)))
    streamed.close()
    epoch = resident.epoch(1)
    next(epoch)  # the order goes to the device with the first batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(epoch)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
