"""Rows that are nearly equal across a split: planted ones are found, and tables of independent rows have none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets
from torch import Tensor

from dlopt.data import near_duplicates as module
from dlopt.data.near_duplicates import near_duplicate_warnings, near_duplicates
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.splits import prepare
from tests.support.data import data_settings
from tests.support.runs import run_config


def divided(rows: np.ndarray, seed: int, fraction: float = 0.2) -> tuple[Tensor, Tensor]:
    """Returns held-out and training rows at random."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    held_out, train = order.tensor_split([round(fraction * len(rows))])
    values = torch.from_numpy(np.asarray(rows, np.float64)).float()
    return values[held_out], values[train]


def one_hot(draw: np.random.Generator, count: int) -> np.ndarray:
    return np.concatenate([np.eye(kinds)[draw.integers(0, kinds, count)] for kinds in (2, 3, 4, 5, 7)], 1)


def independent(seed: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tables whose rows are drawn independently."""
    draw = np.random.default_rng(seed)
    normal = draw.normal(size=(count, 20))
    indices, block = draw.normal(size=(20, 2)) * 3, draw.integers(0, 20, count)
    yield "5 columns", normal[:, :5]
    yield "20 columns", normal
    yield "of 3 variables", np.tanh(normal[:, :3] @ draw.normal(size=(3, 20))) + 0.05 * normal
    yield "heavy tails", draw.standard_cauchy((count, 8))
    yield "scales", normal[:, :10] * np.exp(1.5 * draw.normal(size=(count, 1)))
    yield "one decimal", normal[:, :6].round(1)
    yield "two decimals", normal[:, :6].round(2)
    yield "integers", draw.integers(0, 100, (count, 6))
    yield "few integers", draw.integers(0, 12, (count, 10))
    yield "counts", draw.poisson(60, (count, 8))
    yield "categories", one_hot(draw, count)
    yield "numbers and categories", np.concatenate([normal[:, :6].round(2), one_hot(draw, count)], 1)
    yield "mostly zeros", np.exp(normal) * (draw.random((count, 20)) < 0.2)
    yield "dates", np.c_[draw.integers(2000, 2024, count), draw.integers(1, 29, (count, 2)), normal[:, :3].round(1)]
    yield "houses", np.c_[
        (indices[block] + 0.3 * normal[:, :2]).round(2), np.exp(1.3 + 0.5 * normal[:, 2]).round(4),
        draw.integers(1, 53, count), np.exp(0.3 * normal[:, 3:5]), np.exp(7 + 0.7 * normal[:, 5]).round(),
    ]  # fmt: skip


REAL = {
    "digits": lambda: datasets.load_digits().data,
    "breast_cancer": lambda: datasets.load_breast_cancer().data,
    "wine": lambda: datasets.load_wine().data,
    "diabetes": lambda: datasets.load_diabetes(scaled=False).data,
    "iris": lambda: datasets.load_iris().data,
}


@pytest.mark.parametrize("name", REAL)
def test_real_tables_have_none(name: str) -> None:
    rows = REAL[name]()
    for seed in range(10):
        assert not len(near_duplicates(*divided(rows, seed, 0.1 if seed % 2 else 0.3))[0])


@pytest.mark.parametrize("count", [50, 100, 400, 3000])
def test_independent_rows_have_none(count: int) -> None:
    """One table of a hundred may have a pair by chance."""
    tables = [(name, seed, rows) for seed in range(2) for name, rows in independent(seed, count)]
    found = [(name, seed) for name, seed, rows in tables if len(near_duplicates(*divided(rows, seed))[0])]
    assert len(found) <= 1, found


def planted(kind: str, rows: Tensor, draw: np.random.Generator) -> Tensor:
    """Returns the rows with one changed column, with noise, or rounded: the table is standardized."""
    if kind == "column":
        changed = rows.clone()
        columns = torch.from_numpy(draw.integers(0, rows.shape[1], len(rows)))
        changed[torch.arange(len(rows)), columns] += torch.from_numpy(draw.choice([-1, 1], len(rows)) * 1.5).float()
        return changed
    if kind == "noise":
        return rows + 0.001 * torch.from_numpy(draw.normal(size=rows.shape)).float()
    return (rows * 100).round() / 100


@pytest.mark.parametrize("kind", ["column", "noise", "decimals"])
@pytest.mark.parametrize("table, share", [("breast_cancer", 0.75), ("wine", 0.5), ("diabetes", 0.3), ("normal", 0.9)])
def test_planted_rows_are_found(kind: str, table: str, share: float) -> None:
    """Where the columns are integers, or have one or two decimals, fewer are distinguished from chance."""
    found = total = 0
    for seed in range(5):
        draw = np.random.default_rng(seed)
        rows = draw.normal(size=(1000, 10)) if table == "normal" else REAL[table]()
        held_out, train = divided((rows - rows.mean(0)) / rows.std(0), seed)
        count = len(held_out) // 5
        sources = torch.from_numpy(draw.permutation(len(train))[:count])
        held_out[:count] = planted(kind, train[sources], draw)
        indices, nearest = near_duplicates(held_out, train)
        assert (indices < count).all() and torch.equal(nearest, sources[indices])
        found, total = found + len(indices), total + count
    assert found >= share * total, (found, total)


def test_all_rows_twice() -> None:
    draw = np.random.default_rng(0)
    rows = np.repeat(draw.normal(size=(300, 8)), 2, 0) + 0.001 * draw.normal(size=(600, 8))
    indices, _ = near_duplicates(*divided(rows, 0, 0.1))
    assert len(indices) > 45, "54 of 60 held-out rows have their other half in the training set"


def test_the_line_names_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(200, 6)).round(4)
    rows[150, 1:] = rows[20, 1:]  # measured twice: line 152 and line 22
    lines = [f"{','.join(map(str, row))},{'ab'[i % 2]},{'val' if i >= 140 else 'train'}" for i, row in enumerate(rows)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,c,d,e,f,label,part", *lines]) + "\n")
    words = [f"data.file={tmp_path}/rows.csv", "data.target=label", "data.split_column=part", "model=mlp"]
    dataset = run_config("data=table", *words).read_data()
    expected = (
        "warning: 1 of 60 validation samples is nearly equal to training samples (line 152 and line 22); "
        "data.group=COLUMN keeps rows that belong together in one split"
    )
    assert prepare(dataset, data_settings()).notes[-1] == expected
    assert expected not in prepare(dataset, data_settings(), compare=False).notes
    monkeypatch.setitem(module._COMPARED, "val", 59)
    rows[[12, 140]] = rows[[140, 12]]
    some = {"train": InMemory(torch.from_numpy(rows[:140]).float(), torch.zeros(140)), "val": None, "test": None}
    some["val"] = InMemory(torch.from_numpy(rows[[150, *range(140, 199)]]).float(), torch.zeros(60))
    [line] = near_duplicate_warnings(some)
    assert line.startswith("warning: 2 of 59 compared validation samples are nearly equal to training samples; data")
    dataset.is_generated = True
    assert not any("nearly" in note for note in prepare(dataset, data_settings()).notes)


def test_other_samples_are_left_out() -> None:
    inputs = torch.rand(200, 8)
    labels = torch.arange(200) % 2
    near = inputs[:50] + 1e-5
    for train, test in (
        (inputs.view(200, 1, 2, 4), near.view(50, 1, 2, 4)), (inputs.mul(255).byte(), inputs[:50].mul(255).byte()),
        (inputs, inputs[:50]), (inputs[:50], near), (inputs[:, :4], near[:, :4]), (inputs * torch.nan, near),
    ):  # fmt: skip
        splits = {"train": InMemory(train, labels[: len(train)]), "val": None, "test": InMemory(test, labels[:50])}
        assert near_duplicate_warnings(splits) == ()
    data = Dataset(InMemory(inputs, labels), None, InMemory(near, labels[:50]), ("a", "b"))
    assert any("of 50 test samples are nearly equal" in line for line in prepare(data, data_settings()).notes)
