"""Equal samples, against counts of plain sets of bytes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dlopt.data import equal_samples
from dlopt.data.equal_samples import equal_sample_warnings
from dlopt.data.identity import identify
from dlopt.data.images.digits import digits
from dlopt.data.images.folder import image_folder
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.splits import prepare
from tests.support.data import data_settings as settings


def counted(splits: dict[str, tuple[Tensor, list[Any]]]) -> tuple[str, ...]:
    """Counts by a dictionary of bytes, as a user would."""
    labels = defaultdict(set)
    keys = {name: [row.numpy().tobytes() for row in rows] for name, (rows, _) in splits.items()}
    for key, label in zip(keys["train"], splits["train"][1], strict=True):
        labels[key].add(label)
    lines = []
    for name, shown in (("val", "validation"), ("test", "test")):
        held_out = list(zip(keys.get(name, []), splits.get(name, ((), []))[1], strict=True))
        found = [(key, label) for key, label in held_out if key in labels]
        others = sum(bool(labels[key] - {label}) for key, label in found)
        if found:
            are = "is" if len(found) == 1 else "are"
            line = f"warning: {len(found):,} of {len(held_out):,} {shown} samples {are} equal to training samples"
            lines.append(line + f", {others:,} of them to one with another label" * (others > 0))
    if total := sum(len(labels[key]) > 1 for key in keys["train"]):
        lines.append(f"warning: {total:,} training samples are equal to one with another label")
    count, total = len({*keys["train"]}), len(keys["train"])
    end = f" (of {total:,} training samples, {count:,} {'is' if count == 1 else 'are'} distinct)"
    return tuple(line + end * (count <= total / 2) for line in lines)


def found(splits: dict[str, tuple[Tensor, list[Any]]]) -> tuple[str, ...]:
    rows = {name: splits[name][0] if name in splits else None for name in ("train", "val", "test")}
    return equal_sample_warnings(rows, {name: torch.tensor(each[1]) for name, each in splits.items()}, has_classes=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (3,), (13,), (1, 5, 3), (2, 4, 4)])
@pytest.mark.parametrize("constant", [False, True])
def test_counts(dtype: torch.dtype, shape: tuple[int, ...], constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if constant:  # all rows have the same hash
        monkeypatch.setattr(equal_samples, "_hashes", lambda rows: np.zeros(len(rows), dtype=np.uint64))
    monkeypatch.setattr(equal_samples, "_CHUNK_BYTES", 256)
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.integers(0, 200, (300, *shape))).to(dtype)
    splits = {
        name: (pool[torch.from_numpy(rng.integers(0, 300, size))], rng.integers(0, 3, size).tolist())
        for name, size in (("train", 200), ("val", 50), ("test", 90))
    }
    lines = counted(splits)
    assert len(lines) == 3 and found(splits) == lines
    assert found({name: splits[name] for name in ("train", "test")}) == lines[1:]


@pytest.mark.parametrize(("values", "is_said"), [(1, True), (4, True), (10, True), (60, False)])
def test_few_distinct_samples_are_counted(values: int, is_said: bool) -> None:
    rows = torch.arange(60.0).remainder(values)[:, None]
    splits = {"train": (rows, [0] * 60), "test": (rows[:20], [1] * 20)}
    lines = found(splits)
    assert lines == counted(splits)
    [line] = lines
    assert line.startswith("warning: 20 of 20 test samples are equal to training samples, 20 of them")
    assert f"{values} {'is' if values == 1 else 'are'} distinct" in line or not is_said
    assert ("distinct" in line) == is_said


def test_no_line_without_equal_samples() -> None:
    rows = torch.arange(600, dtype=torch.float32).view(200, 3)
    splits = {"train": (rows[:150], [0] * 150), "test": (rows[150:], [1] * 50)}
    assert found(splits) == counted(splits) == ()
    zeros = {"train": (torch.zeros(1, 2), [0]), "test": (-torch.zeros(1, 2), [0])}
    assert found(zeros) == ("warning: 1 of 1 test samples is equal to training samples",), "0 equals -0"
    nan = {"train": (torch.full((3, 2), torch.nan), [0, 1, 0]), "test": (torch.zeros(1, 2), [0])}
    found(nan)  # reported where they are normalized
    other = equal_sample_warnings(
        {"train": rows, "val": None, "test": rows.double()},
        {"train": rows[:, 0], "test": rows[:, 0]},
        has_classes=False,
    )
    assert other == (), "another kind of inputs cannot be equal"


def test_values_and_several_labels() -> None:
    rows = torch.tensor([[1.0], [1.0], [2.0]])
    values = {"train": torch.tensor([0.5, 0.7, 0.1]), "test": torch.tensor([3.0])}
    splits = {"train": rows, "val": None, "test": rows[:1]}
    [line] = equal_sample_warnings(splits, values, has_classes=False)
    assert line == "warning: 1 of 1 test samples is equal to training samples", "values may have noise"
    flags = {"train": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), "test": torch.tensor([[1.0, 0.0]])}
    assert equal_sample_warnings(splits, flags, has_classes=True) == (
        "warning: 1 of 1 test samples is equal to training samples, 1 of them to one with another label",
        "warning: 2 training samples are equal to one with another label",
    )


def test_splits_and_noise_of_a_run() -> None:
    data = digits()
    assert prepare(data, settings(val_split=0.1)).notes == (), "the first run of the README"
    assert isinstance(data.train, InMemory) and isinstance(data.test, InMemory)
    both = [*range(len(data.train))] * 2
    part = data.train.select(torch.arange(37))
    leaking = InMemory(torch.cat([data.test.inputs, part.inputs]), torch.cat([data.test.targets, part.targets]))
    twice = Dataset(data.train.select(torch.tensor(both)), None, leaking, data.classes)
    found = prepare(twice, settings(label_noise=0.5, val_split=0.5))
    assert isinstance(found.train, InMemory) and isinstance(found.val, InMemory)
    known = {row.numpy().tobytes() for row in found.train.inputs}
    val, test = (sum(row.numpy().tobytes() in known for row in rows) for rows in (found.val.inputs, leaking.inputs))
    assert 0 < val < len(found.val) and 0 < test < 37
    assert found.notes == (  # label_noise does not count
        f"warning: {val} of {len(found.val):,} validation samples are equal to training samples",
        f"warning: {test} of {len(leaking)} test samples are equal to training samples",
    )
    assert prepare(twice, settings(), compare=False).notes == ()
    twice.is_generated = True
    assert prepare(twice, settings()).notes == ()


@pytest.mark.parametrize("memory", [True, False])
def test_image_files(tmp_path: Path, memory: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for part, name, numbers in (
        ("train", "a", range(10)), ("train", "b", range(8, 20)), ("test", "a", [1, 20]), ("test", "b", [2, 21, 22]),
    ):  # fmt: skip
        (tmp_path / part / name).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(images[number]).save(tmp_path / part / name / f"{number}.png")
    data = image_folder(root=str(tmp_path), image_size=None, channels=1, on_error="fail", max_skips=0)
    alone = prepare(data, settings(memory=memory)).notes
    assert not any("test" in note for note in alone), "files are not read for this"
    identify(data)
    found = prepare(data, settings(memory=memory))
    assert found.notes[1:] == (
        "warning: 2 of 5 test samples are equal to training samples, 1 of them to one with another label",
        "warning: 4 training samples are equal to one with another label",
    )
    assert any("validation" in note for note in prepare(data, settings(memory=memory, val_split=0.5)).notes)
