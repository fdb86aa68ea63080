"""Columns of a table as features: what is learned, compared with scikit-learn and pandas."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dlopt.basics.errors import UserError
from dlopt.data.tables.columns import (
    Column,
    ColumnEncoding,
    Kind,
    TableEncoding,
    as_dates,
    categorical,
    column_of,
)

pandas = pytest.importorskip("pandas")


def fields(values: Sequence[Any], kind: Kind) -> Column:
    return column_of("x", kind, ["" if value is None else str(value) for value in values], "row {}".format)


def test_gaps_of_numbers_are_filled_as_scikit_learn_fills_them() -> None:
    from sklearn.impute import SimpleImputer

    rng = np.random.default_rng(0)
    train, test = rng.normal(size=41).round(3), rng.normal(size=9).round(3)
    train[[3, 30, 31]] = test[[0, 4]] = np.nan
    encoding = ColumnEncoding.fitted(Column("x", "number", train))
    reference = SimpleImputer(strategy="median", add_indicator=True).fit(train[:, None])
    for values in (train, test):
        expected = reference.transform(values[:, None]).astype(np.float32)
        assert np.array_equal(encoding.apply(Column("x", "number", values)), expected)
    assert encoding.features == ["x", "x is missing"]


def test_categories_are_one_hot_as_in_scikit_learn() -> None:
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder

    train = ["b", "a", "", "b", "10", "9", "b", "NA"]
    test = ["a", "c", "?", "9", "b"]
    encoding = ColumnEncoding.fitted(categorical("x", train))
    assert encoding.features == ["x=9", "x=10", "x=a", "x=b", "x is missing"] and encoding.fill == "b"
    imputer = SimpleImputer(strategy="most_frequent", missing_values=None)
    known: Any = [[each if each not in ("", "NA", "?") else None] for each in train]
    hot = OneHotEncoder(categories=[["9", "10", "a", "b"]], handle_unknown="ignore", sparse_output=False)
    hot.fit(imputer.fit_transform(np.array(known, dtype=object)))
    for values in (train, test):
        gaps = np.array([[value in ("", "NA", "?")] for value in values])
        raw: Any = np.array([[None if gap else value] for value, [gap] in zip(values, gaps, strict=True)], dtype=object)
        expected = np.column_stack([hot.transform(imputer.transform(raw)), gaps])
        assert np.array_equal(encoding.apply(categorical("x", values)), expected)


def test_what_the_training_rows_lack_has_its_way() -> None:
    encoding = TableEncoding.fitted(
        [categorical("city", ["Rome", "Oslo"] * 3), Column("age", "number", np.arange(6.0))]
    )
    rows = [categorical("city", ["Bern", "", "Bern"]), Column("age", "number", np.array([1.0, np.nan, 3.0]))]
    assert encoding.apply(rows).tolist() == [[0, 0, 1], [1, 0, 2.5], [0, 0, 3]]
    assert encoding.warnings(rows, "the test set has ") == (
        "warning: the test set has 1 gap in city, which has none in the training rows: filled with Oslo",
        "warning: the test set has 2 rows with a city that no training row has (Bern): 0 in all of its features",
        "warning: the test set has 1 gap in age, which has none in the training rows: filled with 2.5",
    )


@pytest.mark.parametrize("is_timed", [True, False])
def test_dates_become_the_numbers_of_pandas(is_timed: bool) -> None:
    stamps = pandas.date_range("1969-11-30", "2031-02-03", periods=50)
    stamps = stamps.floor("s") if is_timed else stamps.normalize()
    texts = [str(stamp) if is_timed else str(stamp.date()) for stamp in stamps]
    column = as_dates("x", texts)
    assert column is not None
    encoding = ColumnEncoding.fitted(column)
    expected = [stamps.year, stamps.month, stamps.day, stamps.day_of_week]
    if is_timed:
        expected.append(stamps.hour + stamps.minute / 60 + stamps.second / 3600)
    assert np.array_equal(encoding.apply(column), np.stack(expected, 1).astype(np.float32))
    assert encoding.features[-1] == ("x hour" if is_timed else "x weekday")
    gap = Column("x", "date", np.array([np.nan]))
    filled = encoding.apply(gap)[0, :3].tolist()
    middle = pandas.Series(stamps).median()
    assert filled == [middle.year, middle.month, middle.day]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["2024-01-31", "", "2024-02-01T12:30:00"], [1706659200.0, None, 1706790600.0]),
        (["2024-02-01T14:30:00+02:00", "2024-02-01T12:30:00Z"], [1706790600.0, 1706790600.0]),
        (["2024-02-01T12:30:00", "2024-02-01T12:30:00Z"], None),  # of which one has no offset
        (["2024-01-31", "2024-02-01T12:30:00Z"], None),
        (["31.1.2024 14:05", "1.2.2024 4:05:30"], [1706709900.0, 1706760330.0]),
        (["1/31/2024 2:05 PM", "1/5/2024 12:00 AM"], [1706709900.0, 1704412800.0]),
        (["31-1-2024 14:05", "1-2-2024"], [1706709900.0, 1706745600.0]),
        (["1/31/2024 14:05", "31/1/2024 14:05"], None),
        (["1/1/2024", "2/2/2024"], None),  # equal in both orders, which later dates are not
        (["1/31/2024 13:05 PM"], None),
        (["2024/1/31", "2024/02/01"], [1706659200.0, 1706745600.0]),
        (["31.1.2024", "1.2.2024"], [1706659200.0, 1706745600.0]),
        (["31/1/2024", "1/2/2024"], [1706659200.0, 1706745600.0]),
        (["1/31/2024", "2/1/2024"], [1706659200.0, 1706745600.0]),
        (["1/2/2024", "3/2/2024"], None),  # two readings
        (["2024-01-31", "soon"], None),
        (["2024-13-01"], None),
        (["", "NA"], None),
        (["20240131"], None),
    ],
)
def test_forms_of_dates(texts: list[str], expected: list[float | None] | None) -> None:
    column = as_dates("x", texts)
    found = None if column is None else [None if np.isnan(value) else value for value in column.values.tolist()]
    assert found == expected


@pytest.mark.parametrize(
    ("trained", "later", "expected"),
    [
        (["31/1/2024", "1/2/2024"], "5/3/2024", "2024-03-05"),
        (["1/31/2024 9:00", "2/1/2024 8:00"], "5/3/2024 14:05", "2024-05-03 14:05"),
        (["2024-01-31T12:00+02:00"], "2024-07-01T00:30+02:00", "2024-06-30 22:30"),
        (["2024-01-31"], "31.1.2024", "2024-01-31"),
        (["31/1/2024", "1/2/2024"], "3/25/2024", "31/1/2024"),
        (["2024-01-31"], "5/3/2024", "2024-01-31"),
        (["2024-01-31"], "2024-01-31T12:00Z", "2024-01-31"),
        (["2024-01-31T12:00Z"], "2024-01-31T12:00", "2024-01-31T14:05Z"),
    ],
)
def test_one_row_is_read_in_the_form_of_the_training_rows(trained: list[str], later: str, expected: str) -> None:
    """As pandas reads it with a format, also after the encoding was stored; another form is refused."""
    encoding = ColumnEncoding.fitted(column_of("x", "date", trained, "row {}".format))
    [encoding] = TableEncoding.restored(TableEncoding((encoding,)).saved).columns
    place = "row {}".format
    if expected in ("31/1/2024", "2024-01-31", "2024-01-31T14:05Z") and later != "31.1.2024":
        with pytest.raises(UserError, match=rf"row 0: x is '.*', not a date in the form {re.escape(expected)}$"):
            column_of("x", "date", [later], place, encoding.form)
        return
    [seconds] = column_of("x", "date", [later], place, encoding.form).values
    assert seconds == pandas.Timestamp(expected).timestamp()


def test_dates_of_a_key_have_one_form() -> None:
    with pytest.raises(UserError, match="row 1: x is '1/31/2024', not a date in the form 2024-01-31"):
        fields(["31/1/2024", "1/31/2024"], "date")
    older = [{key: value for key, value in TableEncoding.fitted([fields(["2024-01-31"], "date")]).saved[0].items()
              if key != "form"}]  # fmt: skip
    assert TableEncoding.restored(older).columns[0].form == "2024-01-31"


def test_an_encoding_is_plain_values() -> None:
    columns = [fields([1, None, 3], "number"), fields(["a", None, "b"], "category"),
               fields(["2024-01-31", None, "2024-02-01 12:00"], "date")]  # fmt: skip
    encoding = TableEncoding.fitted(columns)
    assert TableEncoding.restored(encoding.saved) == encoding
    first = encoding.saved[0]
    damaged: list[Any] = [[{}], [{**first, "kind": "text"}], [{**first, "code": 1}], 3]
    for wrong in damaged:
        with pytest.raises(ValueError, match=r": "):
            TableEncoding.restored(wrong)


@pytest.mark.parametrize(("kind", "field"), [("number", "red"), ("number", "inf"), ("date", "1/2/2024")])
def test_a_value_of_another_kind_is_refused(kind: Kind, field: str) -> None:
    with pytest.raises(UserError, match=rf"row 2: x is '{field}', not a "):
        fields([None, None, field], kind)


def test_the_description_has_a_line_per_column() -> None:
    columns = [Column("age", "number", np.array([1, np.nan, 4])), categorical("a city", ["b", "c", "c"])]
    described = TableEncoding.fitted(columns).describe(columns)
    assert described.splitlines() == [
        "columns: 2, as 4 features; gaps have the median, or the most frequent value",
        "  age     number    1 gap: 2.5, marked",
        "  a city  category  2 values: b, c",
    ]
