"""Tables with columns of several kinds: what each is taken for, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlopt as package
from dlopt.basics.errors import UserError
from dlopt.data.splits import DataSettings, prepare
from dlopt.data.tables.columns import Column
from dlopt.data.tables.kinds import Table, read_table
from tests.support.data import data_settings
from tests.support.line import dlopt

pandas = pytest.importorskip("pandas")

DEFAULTS: dict[str, Any] = {
    "delimiter": ",",
    "target": None,
    "ignore": (),
    "categories": (),
    "dates": (),
    "numbers": (),
    "labels": "class",
    "standardize_target": True,
    "split_column": None,
}


def patients() -> Any:
    rng = np.random.default_rng(0)
    count = 120
    frame = pandas.DataFrame(
        {
            "patient": [f"P{i:04}" for i in range(count)],
            "age": rng.integers(18, 90, count).astype(float),
            "city": rng.choice(["Rome", "Oslo", "Bern"], count),
            "smoker": rng.random(count) < 0.3,
            "zip": rng.choice([10115, 75001, 190], count),
            "visit": pandas.Timestamp("2023-01-01") + pandas.to_timedelta(rng.integers(0, 700, count), "D"),
            "outcome": rng.choice(["bad", "good"], count),
        }
    )
    frame.loc[[3, 50, 51], "age"] = np.nan
    frame.loc[[7], "city"] = None
    return frame


def write(folder: Path, text: str) -> str:
    (folder / "t.csv").write_text(text)
    return str(folder / "t.csv")


def read(file: str, **changes: Any) -> Table:
    return read_table(file=file, **{**DEFAULTS, **changes})


def of_column(folder: Path, fields: list[str], **changes: Any) -> Column:
    """Returns the column x of a table that also has numbers z, and classes y."""
    rows = [f"{field},{i * i % 7},{'ab'[i % 3 % 2]}" for i, field in enumerate(fields)]
    found = read(write(folder, "\n".join(["x,z,y", *rows, ""])), **changes).features
    assert isinstance(found, list)
    return found[0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_csv_and_parquet_have_one_meaning(tmp_path: Path, suffix: str) -> None:
    file, frame = str(tmp_path / f"t.{suffix}"), patients()
    if suffix == "csv":
        frame.to_csv(file, index=False)
    else:
        pytest.importorskip("pyarrow")
        frame.astype({"city": "category"}).to_parquet(file)
    table = read(file, ignore=("patient",), categories=("zip",))
    assert table.columns.features == ("age", "city", "smoker", "zip", "visit") and isinstance(table.features, list)
    assert [each.kind for each in table.features] == ["number", "category", "category", "category", "date"]
    assert [each.texts for each in table.features[1:4]] == [
        ("Bern", "Oslo", "Rome"), ("False", "True"), ("190", "10115", "75001")
    ]  # fmt: skip
    age, city, _, zips, visit = (each.values for each in table.features)
    assert np.array_equal(age, frame.age, equal_nan=True) and np.isnan(city).sum() == 1
    assert [table.features[3].texts[int(code)] for code in zips] == frame.zip.astype(str).tolist()
    assert visit.tolist() == [stamp.timestamp() for stamp in frame.visit]
    assert table.answers == frame.outcome.tolist()


def test_labels_and_categories_as_other_packages_store_them(tmp_path: Path) -> None:
    """Names of the package datasets, categories of pandas, labels as scikit-learn has them."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "t.parquet")
    numbers = [i % 3 for i in range(30)]
    values = pandas.Series(numbers)
    table = arrow.table({"x": [i * i % 7 / 2 for i in range(30)], "city": [i % 2 for i in range(30)], "y": numbers})
    names = {"city": {"names": ["Rome", "Bern"]}, "y": {"names": ["owl", "cat", "dog"]}}
    metadata = {b"huggingface": json.dumps({"info": {"features": names}}).encode()}
    writer.write_table(table.replace_schema_metadata(metadata), path)
    found = read(path)
    assert isinstance(found.features, list) and found.features[1].texts == ("Bern", "Rome")
    assert found.answers == [["owl", "cat", "dog"][number] for number in numbers]
    assert np.array_equal(read(path, labels="value").answers, numbers)
    missing = table.set_column(2, "y", arrow.array([*numbers[:-2], -1, -1])).replace_schema_metadata(metadata)
    writer.write_table(missing, path)
    with pytest.raises(
        UserError, match="row 28: y is -1, which means no label, in 2 of 30 rows: remove them from the file; "
    ):
        read(path)
    for labels, classes in (
        (values.astype("category"), ["0", "1", "2"]),
        (values.astype(float), ["0", "1", "2"]),
        (values.map({0: "a", 1: "b", 2: "c"}), [*"abc"]),
        (values > 1, ["False", "True"]),
    ):
        frame = pandas.DataFrame({"x": table["x"].to_pylist(), "zip": (values * 7 % 4).astype("category"), "y": labels})
        frame.loc[3, "zip"] = None
        frame.to_parquet(path)
        found = read(path, numbers=("x",), categories=("zip",))
        assert sorted(set(found.answers)) == classes, labels.dtype
        assert isinstance(found.features, list) and found.features[1].texts == ("0", "2", "3")
        assert np.isnan(found.features[1].values).tolist() == frame.zip.isna().tolist()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (["red", "green", "blue", "red"] * 5, "category"),
        (["1st", "2nd", "3rd", ""] * 5, "category"),
        (["A1", "12", "B3", "A1"] * 5, "category"),
        (["yes", "no"] * 10, "category"),
        (["1", "2", "", "NA"] * 5, "number"),
        (["2024-01-31", "2024-02-28"] * 10, "date"),
        (["2020", "2021", "?", "2022"] * 5, "number"),
        (["00501", "1234", "01234", "10115"] * 5, "category"),
        (["05112025", "", "28022025", "28022025"] * 5, "category"),
        (["+0049", "+0033"] * 10, "category"),
        (["007", "1.5", "", "2"] * 5, "number"),
        (["0.5", "0", "-0", ""] * 5, "number"),
        (["1/31/2024 14:05", "2/1/2024 9:00"] * 10, "date"),
    ],
)
def test_what_a_column_is(tmp_path: Path, fields: list[str], kind: str) -> None:
    assert of_column(tmp_path, fields).kind == kind


def test_codes_are_categories_unless_a_key_chooses_numbers(tmp_path: Path) -> None:
    """Integers that begin with 0, also in a table of numbers without gaps, and texts of a Parquet file."""
    codes, rng = ["00501", "1234", "01234", "10115"] * 10, np.random.default_rng(0)
    frame = pandas.DataFrame({"zip": codes, "x": rng.normal(size=40).round(2), "y": rng.choice([*"ab"], 40)})
    assert {*map(float, codes)} == {501, 1234, 10115}  # as numbers, two codes are one
    for suffix in ("csv", "parquet"):
        file = str(tmp_path / f"t.{suffix}")
        if suffix == "csv":
            frame.to_csv(file, index=False)
        else:
            pytest.importorskip("pyarrow")
            frame.to_parquet(file)
        found = read(file)
        assert isinstance(found.features, list)
        column = found.features[0]
        assert [column.texts[int(code)] for code in column.values] == codes
        assert "zip: texts such as 00501 are read as categories; for numbers, use data.numbers=[zip]" in found.notes
        assert "warning: zip has categories that differ in form only: '1234', '01234'" in found.notes
        numbers = read(file, numbers=("zip",))
        assert isinstance(numbers.features, np.ndarray) and numbers.features[:, 0].tolist() == [*map(float, codes)]
    frame.assign(zip=frame.zip.str.lstrip("0")).to_parquet(file)  # texts, whatever they look like
    found = read(file)
    assert isinstance(found.features, list) and found.features[0].texts == ("501", "1234", "10115")


@pytest.mark.parametrize("pair", [("1.1", "1.10"), ("1000", "1e3"), ("+1", "1")])
def test_texts_of_one_number_are_categories(tmp_path: Path, pair: tuple[str, str]) -> None:
    """Such as versions and codes."""
    rows = "".join(f"{(*pair, '2')[i % 3]},{i * i % 7},{'ab'[i % 5 % 2]}\n" for i in range(3000))
    file = write(tmp_path, "x,z,y\n" + rows)
    found = read(file)
    assert isinstance(found.features, list) and {*found.features[0].texts} == {*pair, "2"}
    assert any(note.startswith("x: texts such as ") and "data.numbers=[x]" in note for note in found.notes)
    assert f"warning: x has categories that differ in form only: {pair[0]!r}, {pair[1]!r}" in found.notes
    assert isinstance(read(file, numbers=("x",)).features, np.ndarray)


def test_a_column_of_numbers_that_determines_the_label_is_said(tmp_path: Path) -> None:
    labels = [i * 7 % 3 % 2 for i in range(60)]
    text = "a,b,y\n" + "".join(f"{i * i % 11},{2.5 * label + 1},{label}\n" for i, label in enumerate(labels))
    [line] = [note for note in read(write(tmp_path, text)).notes if "alone determines" in note]
    assert line.startswith("warning: b alone determines y, as a copy of the answer does: data.ignore=[b]")


def test_the_word_of_an_identifier_stands_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(0).permutation(3000)[:40]
    for name, refused in (("humid", False), ("turkey", False), ("casino", False), ("acid", False),
                          ("patient_id", True), ("PatientID", True), ("id2", True), ("userid", True)):  # fmt: skip
        rows = [f"{value},{'' if i == 5 else i % 7},{'ab'[i % 3 % 2]}" for i, value in enumerate(values)]
        file = write(tmp_path, "\n".join([f"{name},z,y", *rows, ""]))
        if not refused:
            assert read(file).columns.features == (name, "z")
            continue
        with pytest.raises(UserError, match=f"{name} has 40 different integers, as an identifier"):
            read(file)


@pytest.mark.parametrize(
    ("fields", "changes", "error"),
    [
        (["1.5", "2.5", "red"] * 7, {}, r", line 4: x is 'red', not a finite number; correct it, or use data\.categ"),
        (["1.5", "2.5", "1,5"] * 7, {"delimiter": ";"}, r"line 4: x is '1,5', not a finite number; write a decimal"),
        (["5 %", "7 %"] * 10, {}, r"line 2: x is '5 %', not a finite number; write the number without its unit"),
        (["1", "1e39", "3"] * 7, {}, r"line 3: x is '1e39', not a finite number"),
        (["1/2/2024", "3/2/2024"] * 10, {}, r": x has dates that may be day/month or month/day, such as 1/2/2024"),
        (["01.01.00", "02.01.00"] * 10, {}, r": x has dates, and '01\.01\.00' of a form that is not read"),
        (["31 Jan 2024", "1 Feb 2024"] * 10, {}, r": x has dates, and '31 Jan 2024' of a form that is not read"),
        (
            ["2024-01-31"] * 15 + ["soon"] * 5,
            {},
            r": x has dates, and 'soon' of a form .*; write 2024-01-31; or use data",
        ),
        (["2024-01-31T12:00Z", "2024-01-31"] * 10, {}, r": x has dates, and '2024-01-31' of .*not that of the first"),
        (["red", "blue"] * 10, {"numbers": ("x",)}, r"line 2: x is 'red', not a finite number"),
        (["2024-01-31", "soon"] * 10, {"dates": ("x",)}, r"line 3: x is 'soon', not a date in the form 2024-01-31"),
        ([""] * 20, {}, r": x has no values; leave it out with data\.ignore=\[x\]"),
        (["red", "blue"] * 10, {"numbers": ("y",)}, r"data\.numbers=\[y\]: y is the target"),
        (["1", "2"] * 10, {"numbers": ("x",), "categories": ("x",)}, r"x is also in data\.categories"),
        ([f"name {i}" for i in range(20)], {}, r": x has 20 different texts in 20 rows, as an identifier has"),
        (["a", "b", "a"] * 7, {}, r": x alone determines y, as a copy of the answer does: data\.ignore=\[x\], or keep"),
    ],
)
def test_refuses(tmp_path: Path, fields: list[str], changes: dict[str, Any], error: str) -> None:
    separator = changes.get("delimiter", ",")
    rows = [separator.join([field, str(i * i % 7 / 2) if i else "", "ab"[i % 3 % 2]]) for i, field in enumerate(fields)]
    if len(set(fields)) > 2 and fields[2] in ("red", "1,5", "3"):  # x determines y: not what this is about
        rows[-1] = rows[-1][:-1] + "b"
    with pytest.raises(UserError, match=error):
        read(write(tmp_path, "\n".join([separator.join("xzy"), *rows, ""])), **changes)


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    frame = patients()
    frame["PatientId"] = np.random.default_rng(1).permutation(10**6)[: len(frame)]
    frame["a copy"] = frame.outcome.map({"bad": "B", "good": "G"})
    frame["weight"] = [f"{60 + i / 4} kg" for i in range(len(frame))]
    frame["row"] = range(len(frame))
    file = str(tmp_path / "t.csv")
    frame.to_csv(file, index=False)
    with pytest.raises(UserError) as error:
        read(file, target="outcome")
    first, *lines = str(error.value).splitlines()
    assert first == f"data.file={file}: 5 problems"
    assert [line.split()[0] for line in lines] == ["line", "patient", "PatientId", "row", "a", "to"]
    assert "write the number without its unit" in lines[0] and "counts the rows" in lines[3]
    assert lines[-1].strip() == """to leave all of them out: 'data.ignore=["patient","PatientId","row","a copy"]'"""
    kept = {"numbers": ("PatientId", "row"), "categories": ("a copy", "patient"), "ignore": ("weight",)}
    assert len(read(file, target="outcome", **kept).columns.features) == 9


def test_numbers_without_gaps_stay_as_they_were(tmp_path: Path) -> None:
    """Also an index, or a copy of the label: the header warns of the former."""
    text = "i,x,y\n" + "".join(f"{i},{i % 2},{i % 2}\n" for i in range(30))
    table = read(write(tmp_path, text))
    assert isinstance(table.features, np.ndarray) and any("column i counts the rows" in note for note in table.notes)


def test_only_training_rows_are_learned_from(tmp_path: Path) -> None:
    """The encoding of a validation set that is split off, and of a column of splits, does not know their values."""
    from dlopt.data.tables.table import table

    rows = [f"{i % 5},{'ab'[i % 2]},{'yn'[i % 3 % 2]},train" for i in range(60)]
    held_out = [f"1000,c{i},y,test" for i in range(10)]
    file = write(tmp_path, "\n".join(["x,c,y,part", *rows, ",a,n,train", *held_out, ""]))
    keys = {"target": "y", "split_column": "part", "saved_columns": None}
    settings: DataSettings = data_settings(val_split=0.2)
    dataset = prepare(table(file=file, **{**DEFAULTS, **keys}), settings)
    assert dataset.columns is not None and dataset.columns.encoding is not None and dataset.test is not None
    x, c = dataset.columns.encoding.columns
    assert c.values == ("a", "b") and isinstance(x.fill, float) and x.fill < 5
    assert any(
        note.startswith("warning: the test set has 10 rows with a c that no training row") for note in dataset.notes
    )
    codes = dataset.test.fetch(torch.arange(10))[:, -2:]
    assert not codes.any()


def test_a_run_evaluates_resumes_and_exports_with_its_encoding(tmp_path: Path) -> None:
    frame = patients()
    frame.to_csv(tmp_path / "t.csv", index=False)
    line: tuple[str, ...] = (
        "data=table",
        "data.file=t.csv",
        "data.ignore=[patient]",
        "data.categories=[zip]",
        "model=mlp",
    )
    line += ("model.widths=[8]", "threads=1", "tracking=[]", "precision=fp64", "seed=1")
    whole = dlopt(tmp_path, "train", *line, "epochs=2", "hydra.run.dir=run")
    assert whole.code == 0 and "marked; 3 values: Bern, Oslo, Rome" in whole.out, whole.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    # Other rows of the file would change what is learned from it.
    frame.assign(age=frame.age + 1000 * (np.arange(120) % 2)).to_csv(tmp_path / "other.csv", index=False)
    assert dlopt(tmp_path, "eval", "run", "output=tested").code == 0
    assert json.loads((tmp_path / "tested/eval.json").read_text())["test_loss"] == summary["test_loss"]
    other = dlopt(tmp_path, "eval", "run", "data.file=other.csv", "output=tested2")
    assert other.code == 0 and "the data are not those of its run" in other.err + other.out
    lengthened = ("hydra.run.dir=run", "epochs=3", "schedule_epochs=3", "resume=auto")
    resumed = dlopt(tmp_path, "train", *line, *lengthened)
    assert resumed.code == 0 and "columns: 5, as 15 features" in resumed.out, resumed.err
    exported = dlopt(tmp_path, "export", "run", "format=safetensors")
    assert exported.code == 0 and "columns: run/best.columns.json" in exported.out, exported.err
    described = json.loads((tmp_path / "run/best.columns.json").read_text())
    model = package.load(tmp_path / "run")
    inputs = model.features(frame)
    assert inputs.shape == (120, len(described["inputs"])) and inputs[3, 1] == 1  # age is missing
    assert inputs[0, 2:5].tolist() == [float(frame.city[0] == city) for city in ("Bern", "Oslo", "Rome")]
    predicted = dlopt(tmp_path, "predict", "run", "file=t.csv", "output=p.csv")
    assert predicted.code == 0, predicted.err
    with torch.inference_mode():
        expected = model(inputs).softmax(1).max(1)
    found = pandas.read_csv(tmp_path / "p.csv")
    assert found.prediction.tolist() == [(model.classes or ())[i] for i in expected.indices.tolist()]
    assert found.probability.to_numpy() == pytest.approx(expected.values.numpy(), abs=1e-5)
    rows = frame.to_dict("records")
    for table in (frame, {name: list(frame[name]) for name in frame}, rows):
        predictions = model.predict(table, batch_size=50)
        assert [each.label for each in predictions] == found.prediction.tolist()
        assert [each.probability for each in predictions] == pytest.approx(found.probability.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="lacks the column zip, which the model reads"):
        model.features(frame.drop(columns=["zip"]))
    with pytest.raises(UserError, match=r"reads rows of a table, .* dlopt predict .* file=t\.csv"):
        model.predict("t.csv")
    with pytest.raises(UserError, match="reads rows of a table: columns by name"):
        model.predict(["a.png"])


def test_problems_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    patients().to_csv(tmp_path / "t.csv", index=False)
    code = (
        "import sys; from dlopt import cli; sys.argv = ['dlopt', 'train', 'data=table', 'data.file=t.csv']\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False" and "patient has 120 different texts" in result.stderr
