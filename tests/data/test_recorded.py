"""What seeds draw, and what statistics and hashes of given data are, as recorded: a run can be repeated later.

    REGENERATE_GOLDEN=1 python -m pytest tests/data/test_recorded.py

writes tests/data/recorded.txt; a change of it changes the runs of all users.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.data import generated, identity, normalization, whitening
from dlopt.data import samples as of_samples
from dlopt.data.batches import Batches, Delivery
from dlopt.data.division import stratified
from dlopt.data.images import digits
from dlopt.data.images.resampling import filter_taps, resize_box
from dlopt.data.samplers import (
    ClassBalanced,
    ClassInterleaved,
    ClassSorted,
    Diverse,
    HardExamples,
    Random,
    ShiftedWindows,
    WithReplacement,
)
from dlopt.data.samplers.diverse import batch_variation, input_features, k_means
from dlopt.data.samplers.hard import expected_draws
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.splits import evaluation_subset, prepare
from dlopt.data.texts.text import _cut, python_source
from dlopt.data.texts.tokenizer import _chunks
from dlopt.data.texts.windows import Windows
from tests.support.data import data_settings

FILE = Path(__file__).with_name("recorded.txt")
TARGETS = torch.tensor([0, 1, 2, 1, 1, 0, 1, 3, 1, 2, 1, 0, 1, 1, 3, 1, 1, 2, 1, 1])
SIZES = {"train_size": 3, "val_size": 2, "test_size": 1, "seed": 5}


def numbers(value: Any) -> str:
    items = value.flatten().tolist() if isinstance(value, Tensor | np.ndarray) else list(value)
    return " ".join(f"{item:.5g}" for item in items)


def images(count: int = 20, side: int = 10) -> InMemory:
    """Returns coloured images: three patterns with noise."""
    noise = np.random.default_rng(0).integers(0, 60, (count, 3, side, side))
    rows = np.arange(side)[None, None, :, None] * 12 * (np.arange(count) % 3)[:, None, None, None]
    return InMemory(torch.from_numpy((noise + rows).astype(np.uint8)), TARGETS[:count])


def vectors(count: int = 20) -> InMemory:
    rows = np.random.default_rng(1).normal(size=(count, 3)) * [0.5, 10.0, 0.0] + [0.0, 5.0, 2.0]
    return InMemory(torch.from_numpy(rows).float(), TARGETS[:count])


def orders() -> Iterator[str]:
    keys: dict[str, Any] = {"targets": TARGETS, "seed": 3}
    samplers: dict[str, Any] = {
        "random": Random(epoch_size=None, **keys),
        "some": Random(epoch_size=7, **keys),
        "with replacement": WithReplacement(**keys),
        "balanced": ClassBalanced(**keys),
        "sorted": ClassSorted(**keys),
        "interleaved, a large class": ClassInterleaved(**keys),
        "interleaved, half": ClassInterleaved(targets=TARGETS[:9], seed=1),
        "interleaved, small classes": ClassInterleaved(targets=torch.arange(24) % 5 // 2, seed=1),
        "interleaved, a quarter": ClassInterleaved(targets=torch.arange(16) % 4, seed=1),
        "diverse": Diverse(samples=images(), batch_size=6, clusters=3, **keys),
        "diverse, vectors": Diverse(samples=vectors(), batch_size=7, clusters=2, **keys),
        "diverse, regression": Diverse(
            targets=TARGETS.float(), samples=images(), batch_size="full", seed=3, clusters=3
        ),
        "shifted": ShiftedWindows(
            Random(targets=TARGETS[:6], seed=3, epoch_size=None), Windows(np.arange(50), 8), seed=4
        ),
    }
    for name, sampler in samplers.items():
        for epoch in (0, 1, 5):
            yield f"{name}, epoch {epoch}: {numbers(sampler.order(epoch))}"
        if hasattr(sampler, "metrics"):
            yield f"{name}: {numbers(sampler.metrics().values())}"
    hard = HardExamples(targets=TARGETS, seed=3, floor=0.3, max_draws=2.5)
    for epoch in range(4):
        order = hard.order(epoch)
        yield f"hard examples, epoch {epoch}: {numbers(order)}"
        hard.begin()
        for step, batch in enumerate(order.split(6)):
            hard.serve(epoch * 4 + step, batch)
        hard.observe(torch.where(order % 7 == 0, torch.nan, order.float() ** 2 / 10 + epoch))
    yield f"losses: {numbers(hard.state_dict()['losses'])}; credit: {numbers(hard.state_dict()['credit'])}"
    for losses in ([1.0, 2, 3, 4], [0.0] * 4, [100.0, 1, 1, 1, 1, 1], [-1.0, 0, 5, 1000]):
        yield f"draws for {losses}: {numbers(expected_draws(torch.tensor(losses), 0.2, 2.0))}"


def features() -> Iterator[str]:
    for samples in (images(), vectors(), InMemory(torch.rand(2, 1, 4, 20), TARGETS[:2])):
        found = input_features(samples)
        shown = found if len(samples) > 2 else found.shape
        yield f"features: {numbers(shown.abs().sum(0) if isinstance(shown, Tensor) else shown)}"
    clusters = k_means(input_features(images()), 4, torch.Generator().manual_seed(0))
    yield f"clusters: {numbers(clusters)}"
    yield f"one row: {numbers(k_means(torch.ones(3, 2), 2, torch.Generator().manual_seed(0)))}"
    rows = input_features(vectors())
    orders = (torch.arange(20), torch.arange(20).flip(0), rows[:, 1].argsort())
    yield f"variation: {numbers([batch_variation(rows, order, size) for order in orders for size in (3, 7, 19, 1)])}"
    yield f"of equal rows: {batch_variation(torch.ones(4, 2), torch.arange(4), 2)}"


def splits() -> Iterator[str]:
    for count in (0, 3, 7, 20):
        for keep_one in (False, True):
            selected, rest = stratified(TARGETS, count, 3, 1, keep_one=keep_one)
            yield f"{count} of the targets, keep_one={keep_one}: {numbers(selected)} | {numbers(rest)}"
    dataset = Dataset(images(), None, None, ("a", "b", "c", "d"))
    for keys in ({"subset": 9}, {"subset": 0.5, "split_seed": 1}, {"val_split": 0.23}, {"label_noise": 0.35},
                 {"subset": 10, "val_split": 0.3, "label_noise": 0.5}):  # fmt: skip
        parts = prepare(dataset, data_settings(memory=False, **keys))
        val = [] if parts.val is None else parts.val.targets
        pixels = parts.train.fetch(torch.arange(len(parts.train)))[:, 0, 0, 0]
        yield f"{keys}: {numbers(parts.train.targets)} | {numbers(val)} | {numbers(pixels)}"
    for count in (4, 11):
        chosen = evaluation_subset(dataset.train, count, 2).fetch(torch.arange(count))
        yield f"evaluated, {count}: {numbers(chosen[:, 0, 0, 0])}"


def statistics() -> Iterator[str]:
    for name, samples in (
        ("images", images()),
        ("vectors", vectors()),
        ("floats", floats(1.0)),
        ("wide", floats(255.0)),
    ):
        shape = samples.shape
        yield f"{name}: white {samples.white()}"
        modules: dict[str, Any] = {
            "nothing": normalization.Nothing(input_shape=shape),
            "unit": normalization.Unit(input_shape=shape),
            "standardize": normalization.Standardize(per="channel", input_shape=shape),
            "mean pixel": normalization.MeanPixel(values=None, scale=0.5, input_shape=shape),
            "given mean": normalization.MeanPixel(values=(1.0, 2.0, 3.0), scale=2.0, input_shape=shape),
            "fixed": normalization.Fixed(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), input_shape=shape),
            "mean image": normalization.MeanImage(scale=0.25, input_shape=shape),
            "pixel": normalization.Standardize(per="pixel", input_shape=shape),
        }
        if name == "vectors":
            modules |= {
                "pca": whitening.PCA(input_shape=shape),
                "pca whiten": whitening.PCAWhiten(epsilon=0.1, input_shape=shape),
                "zca": whitening.ZCAWhiten(epsilon=0.1, input_shape=shape),
            }
        for kind, module in modules.items():
            module.fit(samples)
            outputs = module(samples.fetch(torch.tensor([0, 7])))
            yield f"{name}, {kind}: {numbers(outputs.flatten(1)[:, :: max(1, outputs[0].numel() // 4)])}"
    small = InMemory(images().inputs[:, :1, :3, :3].contiguous(), TARGETS)
    for module in (whitening.PCA(input_shape=(1, 3, 3)), whitening.ZCAWhiten(epsilon=0.01, input_shape=(1, 3, 3))):
        module.fit(small)
        yield f"{type(module).__name__} of images: {numbers(module(small.inputs[:2]).flatten(1)[:, ::3])}"


def floats(top: float) -> Samples:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(20, 3, 4, 4, generator=draw) * top
    return InMemory(inputs - (0.5 if top == 1 else 0.0), TARGETS)


def drawn() -> Iterator[str]:
    keys: dict[str, Callable[..., Dataset]] = {
        "sine": lambda **size: generated.polynomial(function="sine", interval=(-1, 2), noise=0.1, **size),
        "runge": lambda **size: generated.polynomial(function="runge", interval=(-1, 1), noise=0.0, **size),
        "cubic": lambda **size: generated.polynomial(function="cubic", interval=(-1, 1), noise=0.0, **size),
        "step": lambda **size: generated.polynomial(function="step", interval=(-1, 1), noise=0.0, **size),
        "linear": lambda **size: generated.linear(intervals=((1, 2), (-100, 200)), noise=0.5, **size),
        "copying": lambda **size: generated.copying(length=3, symbols=2, noise=0.5, **size),
        "recall": lambda **size: generated.recall(length=9, symbols=3, **size),
        "short recall": lambda **size: generated.recall(length=2, symbols=2, **size),
    }
    for name, make in keys.items():
        dataset = make(**SIZES)
        for samples in (dataset.train, dataset.val, dataset.test):
            assert isinstance(samples, InMemory)
            yield f"{name}: {numbers(samples.inputs)} -> {numbers(samples.targets)}"
    pairs = digits.digit_pairs(train_size=3, val_size=2, test_size=2)
    for dataset in (digits.digits(), digits.shaded_digits(), pairs):
        for samples in (dataset.train, dataset.val, dataset.test):
            if samples is not None:
                first = samples.fetch(torch.arange(2)).float()
                yield f"digits {len(samples)}: {numbers(first.sum(2))} {numbers(samples.targets[:3])}"


def resampled() -> Iterator[str]:
    for length, centres, scale, shrink in ((5, [0.5, 2.0, 4.9], 1.0, 1.0), (6, [1.0, 3.1, 5.0], 2.0, 2.0),
                                           (4, [0.2, 2.5], -0.5, 0.5), (9, [1.5, 4.5, 7.5], 3.0, 3.2)):  # fmt: skip
        taps = filter_taps(torch.tensor([centres]), torch.tensor([[scale]]), length, shrink)
        yield f"taps {length}: " + "; ".join(f"{numbers(pixels)}: {numbers(weights)}" for pixels, weights in taps)
    picture = images(1).inputs[0]
    for box, size in (((0.0, 0.0, 10.0, 10.0), (3, 4)), ((1.5, 2.0, 6.0, 9.0), (2, 3)), ((2.0, 2.0, 4.0, 4.0), (4, 4))):
        yield f"box {box}: {numbers(resize_box(picture, box, size)[1])}"
        yield f"in floats: {numbers(resize_box(picture.double() / 255, box, size)[2])}"


def hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    text = np.arange(5000) % 251
    dataset = Dataset(images(), vectors(), None, ("a", "b"))
    texts = Dataset(Windows(text.astype(np.uint8), 8), None, None, None)
    for _ in range(2):
        for found in map(identity.identify, (dataset, texts)):
            yield f"identity: {found}"
        monkeypatch.setattr(of_samples, "WHOLE", 1000)
        monkeypatch.setattr(of_samples, "_BLOCK", 700)
        monkeypatch.setattr(of_samples, "_BLOCKS", 3)


def texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    lines = np.frombuffer(b"".join(b"line %d\n" % (i * i) for i in range(60)), dtype=np.uint8)
    ends = [40, 100, 130, 300, 420, len(lines)]
    fractions = (0.0, 0.07, 0.2, 0.3, 0.5, 0.61, 0.8, 0.97, 1.0)
    for tolerance in (0.3, 0.05, 0.01):
        yield f"cuts: {numbers(_cut(lines, ends, fraction, tolerance) for fraction in fractions)}"
    yield f"without lines: {numbers(_cut(lines[:5], [5], fraction, 0.1) for fraction in fractions)}"
    monkeypatch.setattr("dlopt.data.texts.tokenizer._CHUNK", 50)
    content = lines.tobytes() + "→".encode() * 60 + b"a\n\nb" * 40
    yield f"chunks: {numbers(map(len, _chunks(content)))}"


def batches() -> Iterator[str]:
    def augment(inputs: Tensor, labels: Tensor, *, generator: torch.Generator, **keys: Any) -> tuple[Tensor, Tensor]:
        found = [keys["total"], keys["shard"].start, keys["epoch"], float(torch.rand((), generator=generator))]
        return torch.tensor(found).expand(len(inputs), 4), labels

    delivery = Delivery(torch.device("cpu"), True, 0)
    for keys in ({}, {"drop_last": True}, {"shard": lambda total: slice(total // 2, total)}):
        sampler = Random(targets=TARGETS, seed=1, epoch_size=17)
        made = Batches(images(), delivery, batch_size=6, sampler=sampler, seed=2, augment=augment, **keys)  # type: ignore[arg-type]
        for epoch, start, step in ((0, 0, 0), (1, 1, 10)):
            for batch in made.epoch(epoch, start, step):
                yield f"batch {sorted(keys)}: {numbers(batch.inputs[0])} {numbers(batch.targets)} {batch.total}"
        yield f"{len(made)} batches of {made.batch_size}, {made.count} samples"


def test_draws_statistics_and_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        *orders(), *features(), *splits(), *statistics(), *drawn(), *resampled(), *hashes(monkeypatch), *batches(),
        *texts(monkeypatch),
    ]  # fmt: skip
    if os.environ.get("REGENERATE_GOLDEN"):
        FILE.write_text("".join(f"{line}\n" for line in found))
    recorded = FILE.read_text().splitlines()
    for line, expected in zip(found, recorded, strict=True):
        (text, values), (words, target) = parsed(line), parsed(expected)
        assert text == words and values == pytest.approx(target, rel=1e-3, abs=1e-5), line


def parsed(line: str) -> tuple[str, list[float]]:
    """Returns the words of a line that are no numbers, and the numbers, of which the last digit may differ."""
    words = line.split(" ")
    values, others = [], []
    for word in words:
        try:
            values.append(float(word.rstrip(";:,|")))
        except ValueError:
            others.append(word)
    return " ".join(others), values


def test_modules_of_python_are_assigned_by_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"module_{number}.py" for number in range(12)] + ["tests/x.py", "site-packages/y.py", "package/z.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 3)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    dataset = python_source(sequence_length=4, val_split=0.3, test_split=0.2)
    found = [bytes(part.tokens).decode().split("\n")[::3] for part in (dataset.train, dataset.val, dataset.test)]  # type: ignore[union-attr]
    shown = [sorted(line.strip("\0# ") for line in part if line.strip("\0")) for part in found]
    assert sorted(name for part in shown for name in part) == sorted([*names[:12], "package/z.py"])
    for number, part in enumerate(shown):
        for name in part:
            position = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64
            assert number == (2 if position < 0.2 else 1 if position < 0.5 else 0), name
    assert dataset.facts["files"] == 13 and dataset.facts["bytes"] == sum(
        3 * len(f"# {n}\n") + 1 for p in shown for n in p
    )
