"""The recorded and the compiled data path give the same batches as the eager one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.augment import AlternatingFlip, HorizontalFlip, PadCrop, Pipeline
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.data.batches import Batches, Delivery
from dlopt.data.loading import prefetch
from dlopt.data.normalization import Standardize
from dlopt.data.samplers import Random
from dlopt.data.samples import InMemory
from tests.support.processes import run
from tests.support.recorded import SimulatedRecorder
from tests.support.runs import same

CONF = Path(__file__).parents[2] / "conf" / "augmentation"
CHOICES = sorted(path.stem for path in CONF.glob("[a-z]*.yaml") if path.stem != "none")


def samples(count: int = 70, size: int = 12) -> InMemory:
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=draws)
    return InMemory(inputs, torch.randint(10, (count,), generator=draws))


def batches(augment: Any, *, source: InMemory | None = None, **keys: Any) -> Batches:
    source = samples() if source is None else source
    normalize = Standardize(per="channel", input_shape=source.shape)
    normalize.fit(source)
    sampler = Random(targets=source.targets, seed=3, epoch_size=None)
    acceleration = {key: keys.pop(key) for key in ("recorder", "compiled") if key in keys}
    cpu, order = torch.device("cpu"), torch.channels_last
    delivery = Delivery(cpu, True, 0, normalize=normalize, memory_format=order, **acceleration)
    return Batches(source, delivery, batch_size=16, sampler=sampler, augment=augment, seed=5, **keys)


def pipeline(*operations: Any, border: Any = "reflect") -> Pipeline:
    return Pipeline(operations=list(operations), border=border, input_shape=(3, 12, 12))


def drawn(batches: Batches, epochs: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Returns the batches of several epochs, with consecutive update numbers."""
    found, step = [], 0
    for epoch in range(epochs):
        for inputs, targets in batches.epoch(epoch, 0, step):
            found.append((inputs.clone(), targets.clone()))
            step += 1
    return found


def test_replayed_batches_equal_eager_ones() -> None:
    """Also after an epoch's smaller last batch, with per-update seeds and the epoch as a tensor."""
    augment = pipeline(PadCrop(padding=2), AlternatingFlip())
    recorder = SimulatedRecorder()
    assert same(drawn(batches(augment, recorder=recorder)), drawn(batches(augment)))
    assert (recorder.warmed, recorder.recorded) == (2, 1)
    assert recorder.replayed == 12 - 2  # four full batches in each epoch


def test_later_replays_do_not_overwrite_a_batch() -> None:
    """Metrics and loss-aware samplers read the targets of many batches at once."""
    loop = batches(pipeline(HorizontalFlip(p=0.5)), recorder=SimulatedRecorder())
    kept = [(inputs, targets) for epoch in range(3) for inputs, targets in loop.epoch(epoch, 0, 5 * epoch)]
    assert same(kept, drawn(batches(pipeline(HorizontalFlip(p=0.5)))))


def test_replays_without_augmentation() -> None:
    recorder = SimulatedRecorder()
    assert same(drawn(batches(None, recorder=recorder)), drawn(batches(None)))
    assert recorder.replayed > 0


def test_sharded_batches_are_not_recorded() -> None:
    recorder = SimulatedRecorder()
    source = samples()
    found = drawn(batches(None, source=source, recorder=recorder, shard=lambda total: slice(0, total // 2)), 1)
    assert len(found) == 5 and recorder.recorded == 0


def augmentation(choice: str, source: InMemory) -> Any:
    size = source.shape[1]
    typed = [f"augmentation={choice}", *(["augmentation.operations.0.size=12"] if choice in LARGE else [])]
    run_config = parse(to_plain(Composer().compose(typed))[0])
    return run_config.augmentation.build(input_shape=(3, size, size), classes=10, train=source)


LARGE = {"alexnet", "imagenet"}  # crops of 224 pixels
QUICK = "crop_flip"
SLOW = [choice for choice in CHOICES if choice not in (QUICK, "custom")]  # custom needs a callable
DRAWING = {"noise", "random_mix"}  # they draw while they render: the compiled function falls into parts


@pytest.mark.parametrize(
    "choices",
    [[QUICK], *(pytest.param(SLOW[first::4], marks=pytest.mark.slow) for first in range(4))],
    ids=",".join,
)
def test_every_augmentation_compiles_without_graph_breaks(choices: list[str]) -> None:
    """`fullgraph`: there is no graph break, and the results are equal.

    Runs in a child process: the compiler starts threads, after which later tests could not fork. Several choices share
    a child, in which the compiler is imported for seconds.
    """
    done = run(_compile_augmentations, choices)
    assert done.returncode == 0, done.stderr


def _compile_augmentations(choices: list[str]) -> None:
    source = samples(40, 32)
    for choice in choices:
        print(choice, file=sys.stderr)  # the last one is at fault
        torch.compiler.reset()
        compiled_is_plain(augmentation(choice, source), source, fullgraph=choice not in DRAWING)


def compiled_is_plain(augment: Any, source: InMemory, *, fullgraph: bool) -> None:
    plain, compiled = (batches(augment, source=source) for _ in range(2))
    compiled._compiled_render = torch.compile(compiled._render, backend="aot_eager", dynamic=False, fullgraph=fullgraph)
    for (x, y), (u, v) in zip(drawn(plain, 1), drawn(compiled, 1), strict=True):
        torch.testing.assert_close(u, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v, y)


@pytest.mark.slow
def test_the_compiled_data_path_gives_the_same_pixels() -> None:
    done = run(_compile_data_path)
    assert done.returncode == 0, done.stderr


def _compile_data_path() -> None:
    augment = pipeline(PadCrop(padding=2), HorizontalFlip(p=0.5))
    for (x, y), (u, v) in zip(drawn(batches(augment)), drawn(batches(augment, compiled=True)), strict=True):
        torch.testing.assert_close(u, x)
        assert torch.equal(v, y)


class FakeTransferStream:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def send(self, batch: Tensor) -> tuple[Tensor, str]:
        self.calls.append(f"send {int(batch)}")
        return batch.clone(), f"event {int(batch)}"

    def receive(self, batch: Tensor, event: str) -> Tensor:
        assert event == f"event {int(batch)}"
        self.calls.append(f"receive {int(batch)}")
        return batch


@pytest.mark.parametrize("count", [0, 1, 4])
def test_next_copy_starts_before_the_batch_is_used(count: int) -> None:
    stream = FakeTransferStream()
    used = []
    for batch in prefetch([torch.tensor(number) for number in range(count)], stream):  # type: ignore[arg-type]
        used.append(int(batch))
        stream.calls.append(f"use {int(batch)}")
    assert used == list(range(count))
    for number in range(count - 1):
        assert stream.calls.index(f"send {number + 1}") < stream.calls.index(f"use {number}")
        assert stream.calls.index(f"use {number}") < stream.calls.index(f"receive {number + 1}")


def test_a_compiled_path_draws_outside_of_the_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: what is compiled is a function of tensors; a smaller last batch is not."""
    calls: list[int] = []

    def record(function: Any, *, dynamic: bool) -> Any:
        assert dynamic is False
        return lambda *arguments: calls.append(len(arguments[2])) or function(*arguments)

    monkeypatch.setattr(torch, "compile", record)
    for augment in (pipeline(PadCrop(padding=2), HorizontalFlip(p=0.5)), None):
        plain, compiled = batches(augment), batches(augment, compiled=True)
        for (x, y), (u, v) in zip(drawn(plain), drawn(compiled), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
    assert calls == [16] * 4 * 3 * 2
    assert batches(lambda *_, **__: None, compiled=True)._compiled_render is None, "it cannot be rendered"


def test_a_reader_gets_the_update_and_the_position_of_each_sample() -> None:
    class Reader:
        def fetch(self, requests: Tensor) -> Tensor:
            return torch.stack([requests[:, 0], requests[:, 1], requests[:, 2]], 1).float()

    source = samples()
    delivery = Delivery(torch.device("cpu"), True, 0)
    keys: dict[str, Any] = {"batch_size": 16, "sampler": Random(targets=source.targets, seed=3, epoch_size=None)}
    made = Batches(source, delivery, reader=Reader(), shard=lambda total: slice(total // 2, total), **keys)
    order = keys["sampler"].order(1)
    for number, batch in enumerate(made.epoch(1, 2, 50)):
        total = 16 if number < 2 else 6
        expected = [[int(order[(number + 2) * 16 + i]), 50 + number, i] for i in range(total // 2, total)]
        assert batch.inputs.tolist() == expected and batch.total == total
        assert torch.equal(batch.targets, source.targets[[row[0] for row in expected]])
    made.close()
