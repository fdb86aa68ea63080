"""Tables of numbers, and the data sets bundled with scikit-learn."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from dlopt.basics.errors import UserError
from dlopt.data.checks import natural
from dlopt.data.normalization import moments, standardized
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.splits import with_test_set
from dlopt.data.tables.table import breast_cancer, diabetes, table, wine
from tests.support.line import dlopt
from tests.support.runs import run_config

DEFAULTS: dict[str, Any] = {
    "delimiter": ",",
    "target": None,
    "ignore": (),
    "labels": "class",
    "standardize_target": True,
    "split_column": None,
    "saved_columns": None,
}
ROWS = "id,height,weight,kind\n" + "".join(f"row{i},{i / 10},{100 - i},{'ab'[i % 2]}\n" for i in range(40))


def load(folder: Path, text: str, *, test_split: float = 0.25, **changes: Any) -> Dataset:
    (folder / "t.csv").write_text(text)
    keys = {**DEFAULTS, **changes}
    dataset = table(file=str(folder / "t.csv"), **keys)
    if keys["split_column"] is None and test_split:
        dataset = with_test_set(dataset, test_split, "data=table")
    return standardized(dataset, keys["saved_columns"], is_enabled=keys["standardize_target"])


def rows(dataset: Dataset) -> dict[tuple[float, ...], float]:
    """Returns the features and target of all samples."""
    result: dict[tuple[float, ...], float] = {}
    for samples in (dataset.train, dataset.test):
        assert isinstance(samples, InMemory)
        result |= dict(zip(map(tuple, samples.inputs.tolist()), samples.targets.tolist(), strict=True))
    return result


def test_a_tab_separates_fields(tmp_path: Path) -> None:
    text = ROWS.replace(",", "\t")
    assert load(tmp_path, text, ignore=("id",), delimiter=r"\t").train.shape == (2,)
    with pytest.raises(UserError, match=r"must be one character, or \\t for a tab"):
        load(tmp_path, text, delimiter="tab")


def test_the_scale_of_the_training_targets_holds_for_other_files(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"labels": "value", "test_split": 0.0}
    trained = load(tmp_path, "x,y\n" + "".join(f"{i},{3 * i}\n" for i in range(20)), **keys)
    assert trained.columns is not None
    other = load(tmp_path, "x,y\n1,100\n2,-7\n", **keys, saved_columns=trained.columns)
    expected = (np.array([100.0, -7.0]) - 3 * 9.5) / (3 * np.std(np.arange(20)))
    np.testing.assert_allclose(other.train.targets.numpy(), expected, rtol=1e-6)


def test_columns_of_other_files_are_those_of_the_training_by_name(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"labels": "value", "test_split": 0.0, "standardize_target": False}
    trained = load(tmp_path, "a,b,y\n1,10,2\n2,21,3\n4,13,5\n", **keys)
    other = load(tmp_path, "b,a,y\n30,7,1\n40,8.5,2\n", **keys, saved_columns=trained.columns)
    assert isinstance(other.train, InMemory) and other.train.inputs.tolist() == [[7.0, 30.0], [8.5, 40.0]]
    assert other.columns is not None and other.columns.features == ("a", "b")
    more = load(tmp_path, "y,c,b,a\n1,5,30,7\n2,6,40,8.5\n", **keys, saved_columns=trained.columns)
    assert isinstance(more.train, InMemory) and torch.equal(more.train.inputs, other.train.inputs)
    assert more.train.targets.tolist() == [1, 2] and "left out: columns that the model does not read: c" in more.notes
    with pytest.raises(UserError, match=r"data\.file=.*: lacks the column b, which the model reads; it has c, a, y"):
        load(tmp_path, "c,a,y\n30,7,1\n40,8.5,2\n", **keys, saved_columns=trained.columns)


def test_a_constant_target_is_not_scaled_by_its_rounding_error(tmp_path: Path) -> None:
    """The mean of six times 0.1 is not 0.1; the deviation from it is not a unit."""
    text = "x,y,part\n" + "1,0.1,train\n" * 6 + "1,0.2,test\n"
    dataset = load(tmp_path, text, target="y", labels="value", split_column="part")
    assert list(rows(dataset).values()) == pytest.approx([0.1]) and dataset.train.targets.abs().max() < 1e-9


def test_reads_features_and_classes(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS, ignore=("id",))
    assert dataset.classes == ("a", "b") and dataset.train.shape == (2,) and dataset.val is None
    assert dataset.test is not None and (len(dataset.train), len(dataset.test)) == (30, 10)
    expected = {(float(np.float32(i / 10)), 100.0 - i): i % 2 for i in range(40)}
    assert rows(dataset) == expected
    assert dataset.test.targets.bincount().tolist() == [5, 5], "stratified"
    again = load(tmp_path, ROWS, ignore=("id",)).test
    assert again is not None and torch.equal(dataset.test.fetch(torch.arange(10)), again.fetch(torch.arange(10)))


def test_a_regression_standardizes_its_target(tmp_path: Path) -> None:
    text = "".join(line.replace(",", ";") + "\n" for line in ROWS.splitlines())
    keys: dict[str, Any] = {"delimiter": ";", "target": "weight", "ignore": ("id", "kind"), "labels": "value"}
    dataset = load(tmp_path, text, **keys)
    assert dataset.classes is None
    train = dataset.train.targets
    assert train.mean().abs() < 1e-6 and train.std(correction=0) == pytest.approx(1)
    raw = load(tmp_path, text, **keys, standardize_target=False).train.targets.double()
    assert dataset.notes == (f"targets and outputs: (value - {raw.mean():.6g}) / {raw.std(correction=0):.6g} "
                             "(data.standardize_target)",)  # fmt: skip
    torch.testing.assert_close(train.double(), (raw - raw.mean()) / raw.std(correction=0), rtol=1e-5, atol=1e-6)


def test_splits_of_a_column(tmp_path: Path) -> None:
    parts = ("train", "train", "train", "val", "test")
    text = "x,y,part\n" + "".join(f"{i},{i % 3},{parts[i % 5]}\n" for i in range(60))
    dataset = load(tmp_path, text, target="y", split_column="part")
    assert dataset.val is not None and dataset.test is not None
    assert dataset.test.fetch(torch.arange(12)).flatten().tolist() == [float(i) for i in range(4, 60, 5)]
    assert (len(dataset.train), len(dataset.val)) == (36, 12)


def test_the_test_split_is_rounded_to_the_nearest_row(tmp_path: Path) -> None:
    for count, fraction, expected in ((10, 0.19, 2), (10, 0.11, 1), (10, 0.01, 1)):
        text = "x,y\n" + "".join(f"{i},{i / 7}\n" for i in range(count))
        test = load(tmp_path, text, labels="value", test_split=fraction).test
        assert test is not None and len(test) == expected


def test_classes_are_sorted_as_numbers_and_then_as_names(tmp_path: Path) -> None:
    """In every order of the rows: set and sort would otherwise number the classes differently in each process."""
    for names in (["none", "3", "1", "b", "2", "a"], ["3", "b", "none", "2", "1", "a"]):
        text = "x,y\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names * 3))
        assert load(tmp_path, text, test_split=0.0).classes == ("1", "2", "3", "a", "b", "none")
    text = "x,y\n" + "".join(f"{i},{(2, 10, 9)[i % 3]}\n" for i in range(12))
    assert load(tmp_path, text, test_split=0.0).classes == ("2", "9", "10")
    assert sorted(["nan", "2", "a", "1"], key=natural) == sorted(["1", "a", "2", "nan"], key=natural)


def test_warns_about_columns_that_float32_rounds(tmp_path: Path) -> None:
    text = "time,year,flag,y\n" + "".join(f"{1.7e9 + 3 * i},{1990 + 2 * i},0.1,{i % 2}\n" for i in range(20))
    notes = load(tmp_path, text).notes
    [rounded] = [note for note in notes if "float32" in note]
    assert rounded.startswith(
        "warning: float32 rounds column time by up to 57, its values differ by up to 57; of 20 distinct values 1 "
    )
    counted = [note for note in notes if "counts the rows" in note]
    assert [name in note for name, note in zip(("time", "year"), counted, strict=True)] == [True, True]
    assert "data.ignore=[year] if it is an index or a time" in counted[1]
    target = load(tmp_path, text, target="time", labels="value", standardize_target=False).notes
    assert any(note.startswith("warning: float32 rounds the target time by up to 57") for note in target)
    assert not any("float32" in note for note in load(tmp_path, text, target="time", labels="value").notes)


def test_a_single_feature_may_be_sorted(tmp_path: Path) -> None:
    text = "x,y\n" + "".join(f"{i},{i * i / 7}\n" for i in range(40))
    assert not any("counts" in note for note in load(tmp_path, text, labels="value").notes)


def test_a_table_is_read_without_its_texts_in_memory(tmp_path: Path) -> None:
    """Ignored columns, which may have empty fields, are not kept, and numbers are converted a few rows at a time."""
    count, columns = 3000, 30
    names = ",".join(f"x{i}" for i in range(columns))
    row = ",".join(["123.4567890123"] * columns)
    text = f"{names},comment,y\n" + "".join(f"{row},{'' if i % 2 else 'a' * 200},{i % 2}\n" for i in range(count))
    (tmp_path / "t.csv").write_text(text)
    tracemalloc.start()
    try:
        dataset = table(file=str(tmp_path / "t.csv"), **{**DEFAULTS, "ignore": ("comment",)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.train.shape == (columns,) and dataset.source == "3,000 rows; 30 features, target y"
    assert peak < 8 * 8 * count * columns  # bytes; the texts of all fields alone need 71 each


@pytest.mark.parametrize(
    ("text", "changes", "error"),
    [
        (ROWS, {}, r"id has 40 different texts in 40 rows, as an identifier has: data\.ignore=\[id\], or keep it with"),
        (ROWS, {"ignore": ("name",)}, r"has no column 'name'; it has id, height, weight, kind"),
        ("x,y\n1,a\n2\n", {}, r"line 3: has 1 fields instead of 2"),
        ("x,y\n1,a\n2,\n3,b\n4,\n", {}, r"line 3: y is empty, and in 1 more; fill it in or remove the line"),
        ("x,y\n1,2\n2,nan\n", {"labels": "value"}, r"line 3: y is 'nan', not a finite number; fill in the"),
        ("x,y\n1,a\n2,NA\n3,b\n4,nan\n", {}, r"line 3: y is 'NA', a missing label, as in 1 more; remove"),
        ("x,y\n1,a\n1e39,a\n", {}, r"line 3: x is '1e39', not a finite number"),
        ("x;y\n1;a\n", {}, r"has 1 columns; set data\.delimiter=';'"),
        ("x,x,y\n1,2,a\n", {}, r"two columns have the same name"),
        ("x,y\n", {}, r"has no rows"),
        ("y\n1\n", {}, r"has 1 columns"),
        (ROWS, {"ignore": ("id", "height", "weight")}, r"no column is left as a feature"),
        (ROWS, {"ignore": ("id",), "split_column": "kind"}, r"line 2: kind is 'a'; must be train, val or test"),
        ("x,y\n" + "".join(f"1,{i / 7}\n" for i in range(20)), {}, r"20 different values in 20 rows; for a regression"),
        ("x,y,p\n1,a,train\n2,b,test\n", {"target": "y", "split_column": "p"}, r"line 3: y is 'b', a class that no"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        load(tmp_path, text, **changes)


@pytest.mark.parametrize(("ours", "theirs"), [(wine, datasets.load_wine), (breast_cancer, datasets.load_breast_cancer)])
def test_classes_of_scikit_learn(ours: Callable[..., Dataset], theirs: Callable[[], Any]) -> None:
    dataset, expected = with_test_set(ours(), 0.2, ""), theirs()
    assert dataset.classes is not None and set(dataset.classes) == set(expected.target_names)
    names = [expected.target_names[target] for target in expected.target]
    reference = dict(zip(map(tuple, expected.data.astype(np.float32).tolist()), names, strict=True))
    assert {features: dataset.classes[int(target)] for features, target in rows(dataset).items()} == reference
    inputs = dataset.train.fetch(torch.arange(len(dataset.train))).double()
    mean, deviation = moments(dataset.train)
    torch.testing.assert_close(mean, inputs.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(deviation, inputs.std(0, correction=0), rtol=1e-9, atol=0)


def test_diabetes_of_scikit_learn() -> None:
    expected = datasets.load_diabetes(scaled=False)
    reference = dict(zip(map(tuple, expected.data.astype(np.float32).tolist()), expected.target, strict=True))
    assert rows(standardized(with_test_set(diabetes(), 0.2, ""), None, is_enabled=False)) == reference
    scaled = standardized(with_test_set(diabetes(), 0.2, ""), None)
    assert scaled.train.targets.std(correction=0) == pytest.approx(1)
    assert "/ 7" in scaled.notes[0], "the constants are shown"


def test_newton_solves_the_linear_regression(tmp_path: Path) -> None:
    """One update on the whole table gives the least-squares solution of NumPy."""
    line = (
        "data=diabetes",
        "data.batch_size=full",
        "data.val_split=0",
        "model=mlp",
        "model.widths=[]",
        "model.norm=none",
    )
    more = ("loss=mse", "optimizer=newton", "epochs=2", "precision=fp64", "tracking=[]", "threads=1")
    result = dlopt(tmp_path, "train", *line, *more, "hydra.run.dir=run")
    assert result.code == 0, result.err
    data = standardized(with_test_set(diabetes(), 0.2, ""), None)
    train, test = data.train, data.test
    assert isinstance(train, InMemory) and isinstance(test, InMemory)
    inputs, tested = train.inputs.double().numpy(), test.inputs.double().numpy()
    mean, deviation = inputs.mean(0), inputs.std(0)

    def with_bias(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([(rows - mean) / deviation, np.ones(len(rows))])

    weights = np.linalg.lstsq(with_bias(inputs), train.targets.double().numpy(), rcond=None)[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    expected = np.square(with_bias(tested) @ weights - test.targets.double().numpy()).mean()
    assert summary["test_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0", "1", "2", "0.0", "1.00", "2."], ("0", "1", "2")),
        (["0.0", "1.0", "0.0", "1.0"], ("0", "1")),
        (["0.0", "1.5", "0.0", "1.5"], ("0.0", "1.5")),
        (["0", "1.0", "1", "1.5"], ("0", "1", "1.5")),
        (["1", "1.0", "v1", "v1.0"], ("1", "1.0", "v1", "v1.0")),
    ],
)
def test_classes_with_and_without_decimals(tmp_path: Path, labels: list[str], classes: tuple[str, ...]) -> None:
    """One column of integers, of which a program wrote some as 1.0, has as many classes as integers."""
    dataset = load(tmp_path, "x,y\n" + "".join(f"{i % 5}.5,{label}\n" for i, label in enumerate(labels * 3)))
    assert dataset.classes == classes
    merged = [note for note in dataset.notes if "is read as the class" in note]
    assert len(merged) == (not {*labels} <= {*classes})


def test_a_weight_is_no_feature_and_follows_its_row(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS, ignore=("id",), weight="weight", target="kind")
    assert dataset.train.shape == (1,) and dataset.test is not None
    for samples in (dataset.train, dataset.test):
        assert isinstance(samples, InMemory)
        torch.testing.assert_close(
            samples.further["weight"], 100 - 10 * samples.inputs[:, 0].double(), atol=1e-5, rtol=0
        )


def test_a_weight_below_0_is_refused_in_any_split(tmp_path: Path) -> None:
    lines = ["a,w,kind,part", "1,2,x,train", "2,1,y,train", "3,-1,x,test"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    words = ["data=table", f"data.file={tmp_path}/t.csv", "data.target=kind", "data.split_column=part", "model=mlp"]
    with pytest.raises(UserError, match=r"t\.csv, line 4: w is -1; data\.weight needs numbers of 0 or more"):
        run_config(*words, "data.weight=w").read_data()


@pytest.mark.parametrize(
    ("column", "message"),
    [("kind", "data.weight=kind: is also data.target"), ("id", "row0'; data.weight needs a column of finite numbers")],
)
def test_refuses_a_weight_that_is_no_number(tmp_path: Path, column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, ROWS, weight=column, target="kind")
