"""Groups stay together, an order divides strictly, and classes have their proportions as far as groups allow."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.division import divide, grouped, ordered, partition
from dlopt.data.identity import difference, identify
from dlopt.data.normalization import Standardize, fit
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.splits import prepare, with_test_set
from tests.support.data import data_settings
from tests.support.runs import run_config

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=12)


def parts(selected: Tensor, rest: Tensor) -> Tensor:
    both = torch.cat([selected, rest])
    assert torch.equal(both.sort().values, torch.arange(len(both)))
    assert torch.equal(selected, selected.sort().values) and torch.equal(rest, rest.sort().values)
    return both


@given(SIZES, st.integers(0, 3), st.floats(0.05, 0.95))
def test_groups_stay_together(sizes: list[int], seed: int, fraction: float) -> None:
    groups = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    classes = torch.arange(len(groups)) % 2
    count = max(1, round(fraction * (len(groups) - 1)))
    selected, rest = grouped(classes, groups, count, seed)
    parts(selected, rest)
    assert len(selected) and len(rest) and not torch.isin(groups[selected], groups[rest]).any()
    assert abs(len(selected) - count) <= max(sizes)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 20))
def test_an_order_divides_strictly(values: list[int], count: int) -> None:
    count, order = min(count, len(values)), torch.tensor(values, dtype=torch.float64)
    if len(set(values)) == 1 and count < len(values):
        with pytest.raises(UserError, match=r"data\.order: all \d+ samples have one value"):
            ordered(order, count)
        return
    selected, rest = ordered(order, count)
    parts(selected, rest)
    assert len(selected) and (not len(rest) or order[selected].min() > order[rest].max())
    assert abs(len(selected) - count) < max(Counter(values).values())


def test_proportions_are_as_close_as_those_of_scikit_learn() -> None:
    """The largest distance of a class's share from that of all samples, of 100 draws."""
    draw, ours, theirs = np.random.default_rng(0), [], []
    for seed in range(100):
        groups = np.repeat(np.arange(40), draw.integers(3, 30, 40))
        classes = (draw.random(len(groups)) < draw.random(40)[groups]).astype(np.int64)
        share = classes.mean()
        selected, _ = grouped(torch.from_numpy(classes), torch.from_numpy(groups), round(len(groups) / 5), seed)
        [*_, (_, test)] = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(groups, classes, groups)
        ours.append(abs(classes[selected.numpy()].mean() - share))
        theirs.append(abs(classes[test].mean() - share))
    assert np.mean(ours) < 1.1 * np.mean(theirs) < 0.05


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 7), st.integers(0, 3))
def test_parts_are_equal_and_stratified(labels: list[int], folds: int, seed: int) -> None:
    classes = torch.tensor(labels)
    if len(labels) < folds:
        with pytest.raises(UserError, match=rf"data\.folds={folds}: .* only {len(labels)} samples; use at most"):
            partition(classes, {}, folds, seed)
        return
    found = partition(classes, {}, folds, seed)
    assert sorted(set(found.tolist())) == list(range(folds))
    for among in (classes >= 0, *(classes == each for each in set(labels))):
        counts = torch.bincount(found[among], minlength=folds)
        assert counts.max() - counts.min() <= 1 and counts.sum() == among.sum()


@given(SIZES, st.integers(2, 5), st.integers(0, 3))
def test_parts_have_whole_groups(sizes: list[int], folds: int, seed: int) -> None:
    groups = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    classes = torch.arange(len(groups)) % 2
    if len(sizes) < folds:
        with pytest.raises(UserError, match=rf"only {len(sizes)} groups \(data\.group\); use at most"):
            partition(classes, {"group": groups}, folds, seed)
        return
    found = partition(classes, {"group": groups}, folds, seed)
    assert len(found.unique()) == folds
    assert all(len(found[groups == each].unique()) == 1 for each in groups.unique())


@pytest.mark.parametrize("words", [["data=digits", "data.subset=100"], ["data=wine", "data.test_split=0.1"]])
def test_every_sample_validates_once_at_any_seed(words: list[str]) -> None:
    folds = []
    for fold in range(3):
        config = run_config(*words, "data.folds=3", f"data.fold={fold}", f"seed={fold}", "model=mlp")
        dataset = prepare(config.read_data(), config.data_settings, compare=False)
        assert dataset.val is not None
        folds.append((dataset.train.fetch_range(0, 10**4), dataset.val.fetch_range(0, 10**4)))
    whole = torch.cat([val for _, val in folds]).unique(dim=0)
    for train, val in folds:
        assert torch.equal(torch.cat([train, val]).unique(dim=0), whole)


def test_a_fold_alone_has_a_class() -> None:
    targets = torch.tensor([0] * 8 + [1])
    parts = partition(targets, {}, 3, 0)
    dataset = Dataset(InMemory(torch.arange(9.0)[:, None], targets), None, None, ("a", "b"))
    prepared = prepare(dataset, data_settings(folds=3, fold=int(parts[8])))
    assert "warning: 1 of 3 validation samples is of a class that no training sample has" in prepared.notes
    dataset.val = dataset.train
    with pytest.raises(UserError, match=r"data\.folds=3: the data have a validation set of 9 samples, which no fold"):
        prepare(dataset, data_settings(folds=3, fold=0))


def test_a_class_of_one_group_is_trained() -> None:
    groups = torch.arange(10).repeat_interleave(3)
    classes = (groups == 4).long()
    for seed in range(20):
        selected, _ = grouped(classes, groups, 15, seed)
        assert len(selected) in (12, 15) and not classes[selected].any()


def test_one_group_is_not_divided() -> None:
    with pytest.raises(UserError, match=r"data\.group: all samples are of one group"):
        divide(torch.zeros(5), {"group": torch.ones(5, dtype=torch.int64)}, 2, 0)


# -- as users name the columns

ROWS = [(f"p{i % 6}", f"2024-{1 + i % 12:02}-01", i * 1.7 % 5, "ab"[i % 2]) for i in range(48)]


def written(folder: Path, kind: str) -> list[str]:
    if kind == "parquet":
        columns = dict(zip(("patient", "day", "x", "label"), map(list, zip(*ROWS, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
        return ["data=parquet", f"data.file={folder}/rows.parquet", "data.input=[x]", "data.target=label"]
    lines = ["patient,day,x,label", *(",".join(map(str, row)) for row in ROWS)]
    if kind == "csv":
        for number in range(48):
            Image.new("L", (4, 4), number * 5).save(folder / f"{number}.png")
        lines = ["path,patient,day,label", *(f"{i}.png,{a},{b},{c}" for i, (a, b, _, c) in enumerate(ROWS))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return [f"data={kind}", f"data.file={folder}/rows.csv", *(["data.target=label"] if kind == "table" else [])]


def read(*words: str, **settings: object) -> Dataset:
    config = run_config(*words, "model=mlp")
    keys = {"val_split": 0.2, "group": config.data_settings.group, "order": config.data_settings.order} | settings
    return prepare(config.read_data(), data_settings(**keys))


@pytest.mark.parametrize("kind", ["table", "csv", "parquet"])
@pytest.mark.parametrize("key", ["group", "order"])
def test_columns_divide_the_rows(tmp_path: Path, kind: str, key: str) -> None:
    words = [*written(tmp_path, kind), "data.test_split=0.2", f"data.{key}={'patient' if key == 'group' else 'day'}"]
    ignored = "day" if key == "group" else "patient"
    dataset = read(*words, *([f"data.ignore=[{ignored}]"] if kind == "table" else []))
    assert dataset.val is not None and dataset.test is not None
    splits = [each.further[key] for each in (dataset.train, dataset.val, dataset.test)]
    assert sum(map(len, splits)) == 48 and len(torch.cat(splits).unique()) == (6 if key == "group" else 12)
    if key == "group":
        assert sum(len(each.unique()) for each in splits) == 6
        assert "data.group=patient: 4 training, 1 validation, 1 test groups" in dataset.notes
    else:
        assert splits[0].max() < splits[1].min() and splits[1].max() < splits[2].min()
        assert any(line.startswith("data.order=day: training before validation") for line in dataset.notes)
    subset = read(*words, *([f"data.ignore=[{ignored}]"] if kind == "table" else []), subset=20)
    assert len(subset.train) + len(subset.val or ()) in range(16, 25)
    if key == "order":
        assert subset.train.further[key].min() > splits[0].min(), "the newest rows"
    if kind != "csv":
        assert dataset.train.shape == (1,), "the column is no feature"


def test_given_splits_are_checked(tmp_path: Path) -> None:
    lines = ["patient,day,x,label,part"]
    lines += [f"p{i % 6},{i},{i % 5},{'ab'[i % 2]},{['train', 'val', 'test'][i % 3]}" for i in range(48)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    words = ["data=table", f"data.file={tmp_path}/rows.csv", "data.target=label", "data.split_column=part"]
    grouping = read(*words, "data.group=patient", "data.ignore=[day]")
    assert not any("share a group" in line for line in grouping.notes), "6 is a multiple of 3"
    ordering = read(*words, "data.order=day", "data.ignore=[patient]")
    assert "warning: 15 of 16 validation samples are not after those before them" in ordering.notes
    text = (tmp_path / "rows.csv").read_text().replace("p3,9,4,b,train", "p4,9,4,b,train")
    (tmp_path / "rows.csv").write_text(text)
    shared = read(*words, "data.group=patient", "data.ignore=[day]")
    assert "warning: 8 of 16 validation samples share a group with training samples" in shared.notes
    (tmp_path / "rows.csv").write_text(text.replace("p5,47,2,b,test", "p1,47,2,b,test"))
    shared = read(*words, "data.group=patient", "data.ignore=[day]")
    assert [line for line in shared.notes if "share a group" in line] == [
        "warning: 8 of 16 validation samples share a group with training samples",
        "warning: 1 of 16 test samples share a group with validation samples",
    ]


@pytest.mark.parametrize(
    "sizes, settings, expected",
    [
        ([10] * 10, {"val_split": 0.2}, None),
        ([50, 50], {"val_split": 0.1}, ("data.val_split=0.1", "validation", "50 %", "10 %", 50)),
        ([80, 10, 10], {"folds": 2, "fold": 0}, ("data.folds=2", "validation", "80 %", "50 %", 80)),
        ([30] * 3, {"test_split": 0.1, "val_split": 0.5}, ("data.test_split=0.1", "test", "33.3 %", "10 %", 30)),
    ],
)
def test_sizes_that_groups_change_are_named(
    sizes: list[int], settings: dict[str, float], expected: tuple[object, ...] | None
) -> None:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = InMemory(torch.rand(len(groups), 2), torch.arange(len(groups)) % 2, None, {"group": groups})
    dataset = Dataset(rows, None, None, ("a", "b"))
    if "test_split" in settings:
        dataset = with_test_set(dataset, settings["test_split"], "data=mine")
    found = prepare(dataset, data_settings(**settings))
    text = "{}: groups stay together, so the {} set has {} of the samples, not {}; the largest group has {}"
    lines = [] if expected is None else [text.format(*expected)]
    assert [line for line in found.notes if "stay together" in line] == lines
    dataset.val = dataset.train
    given = prepare(dataset, data_settings(val_split=settings.get("val_split", 0)))
    assert not any("stay together" in line for line in given.notes), "dlopt has not divided these"


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.group=label"], r"data\.group=label: is also data\.target; give another column"),
        (
            ["data.group=patient", "data.order=day"],
            r"data\.order=day: data\.group=patient may keep .*; use one of them",
        ),
        (["data.group=nope"], "has no column 'nope'"),
        (["data.order=patient"], r"line 2: patient is 'p0'; data\.order needs a column of numbers or of dates"),
    ],
)
def test_what_cannot_divide_is_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(*written(tmp_path, "table"), "data.ignore=[day]", *words, "model=mlp").read_data()


def test_other_groups_are_other_data(tmp_path: Path) -> None:
    words = [*written(tmp_path, "table"), "data.group=patient", "data.ignore=[day]", "model=mlp"]
    before = identify(run_config(*words).read_data())
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace("p0", "q0"))
    message = "the training set has other groups, weights, times or further tensors"
    assert difference(before, identify(run_config(*words).read_data())) == message
    (tmp_path / "rows.csv").write_text(text)
    assert difference(before, identify(run_config(*words).read_data())) is None


def test_the_test_set_is_the_same_for_all_seeds(tmp_path: Path) -> None:
    words = [*written(tmp_path, "table"), "data.group=patient", "data.ignore=[day]", "model=mlp"]
    tests = []
    for seed in (0, 1):
        dataset = with_test_set(run_config(*words, "data.test_split=0", f"seed={seed}").read_data(), 0.3, "data=table")
        assert dataset.test is not None
        tests.append(dataset.test.further["group"])
    assert torch.equal(*tests)


@pytest.mark.parametrize("words", ["data.order=day data.ignore=[patient]", "data.group=patient data.ignore=[day]"])
def test_normalization_sees_training_rows_only(tmp_path: Path, words: str) -> None:
    dataset = read(*written(tmp_path, "table"), *words.split(), "data.test_split=0.3")
    module = Standardize(per="channel", input_shape=(1,))
    fit(module, dataset, count=None, kind="standardize")
    values = module(dataset.train.fetch_range(0, 48))
    assert abs(float(values.mean())) < 1e-6 and abs(float(values.std(correction=0)) - 1) < 1e-6


def test_a_source_may_bring_what_divides_it() -> None:
    """Without a key: further tensors of a source of the user's own."""
    rows = torch.arange(20)
    of_groups = InMemory(torch.rand(20, 2), rows % 2, None, {"group": rows // 4})
    dataset = prepare(Dataset(of_groups, None, None, ("a", "b")), data_settings(val_split=0.2))
    assert "group of the samples: 4 training, 1 validation groups" in dataset.notes
    of_times = InMemory(torch.rand(20, 2), rows % 2, None, {"order": rows.double()})
    dataset = prepare(Dataset(of_times, None, None, ("a", "b")), data_settings(val_split=0.2))
    assert dataset.val is not None and dataset.val.further["order"].tolist() == [16, 17, 18, 19]
    with pytest.raises(UserError, match=r"data\.folds=2: the samples have an order, which folds would mix"):
        prepare(Dataset(of_times, None, None, ("a", "b")), data_settings(folds=2, fold=0))
