"""What looks wrong in data, in the same words for every reader."""

import contextlib
from collections import Counter

import numpy as np
import pytest

from dlopt.basics.errors import UserError
from dlopt.data.checks import (
    column_warnings,
    count_rows,
    ending,
    label_warnings,
    left_out_note,
    natural,
    number,
    problems,
    refuse_values,
)


def test_a_column_that_counts_the_rows() -> None:
    rows = np.arange(30.0)
    assert count_rows(100 - rows) and count_rows(np.random.default_rng(0).permutation(rows))
    assert not any(map(count_rows, (rows % 20, rows % 10, rows + 0.5, rows[:10], np.sort(rows // 2), np.ones(30))))
    assert count_rows(rows[:20]) and not count_rows(rows[:19])  # fewer may do so by chance
    # A time in steps of 2, ids with gaps, and descending ids.
    assert all(map(count_rows, (2 * rows, np.cumsum(rows % 7 + 1), -2 * rows)))
    assert not count_rows(np.random.default_rng(0).permutation(2 * rows))


def test_numbers_and_their_order() -> None:
    assert [number(text) for text in ("1e3", "-.5", "+2.")] == [1000, -0.5, 2]
    assert sorted(["10", "9", "b", "1_0", "a", "-1"], key=natural) == ["-1", "9", "10", "1_0", "a", "b"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # Texts of which more than half are different are values, but not two of them.
        ([*"abcda"], True),
        ([*"abca"], True),
        ([*"abcabc"], False),
        ([*"abcdabcdaa"], False),
        ([*"abc"], True),
        ([*"ab"], False),
        # Texts that repeat are values if they are more than 20 numbers with decimals.
        ([str(i / 2) for i in range(40)] * 3, True),
        ([str(i / 2) for i in range(21)] * 3, True),
        ([str(i / 2) for i in range(20)] * 3, False),
        ([str(i) for i in range(40)] * 3, False),
        ([*(str(i / 2) for i in range(40)), "none"] * 3, False),
        (["0.5", "1.5"] * 5, False),
    ],
)
def test_values_and_classes(labels: list[str], expected: bool) -> None:
    with pytest.raises(UserError, match="for a regression, use") if expected else contextlib.nullcontext():
        refuse_values("y", labels, len(labels))


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (["cat", "Cat", "cat", "Cat"], "y has classes that differ in form only: 'Cat', 'cat'"),
        (["1", "1.0", "1", "1.0"], "y has classes that differ in form only: '1', '1.0'"),
        (["a", "a", "b"], "y has 1 class with one sample: b"),
        (["a", "a", *"bcde"], "y has 4 classes with one sample: b, c, d, ..."),
        (["a", "a", *"bcd"], "y has 3 classes with one sample: b, c, d"),
        (["cat", '"cat"', "cat", '"cat"'], "y has classes that differ in form only: '\"cat\"', 'cat'"),
        (["ca\0t", "cat"] * 2, "y has classes that differ in form only: 'ca\\x00t', 'cat'"),
        (["new york", "New_York"] * 2, "y has classes that differ in form only: 'New_York', 'new york'"),
        (["caf\u00e9", "cafe\u0301"] * 2, "y has classes that differ in form only: 'cafe\u0301', 'caf\u00e9'"),
        (["NaN", "a"] * 2, "y has the class 'NaN', which usually means a missing value"),
        ([str(17 + i % 30) for i in range(300)], "the 30 classes of y are numbers; for a regression, use"),
        ([str(i % 51) for i in range(300)], "the 51 classes of y are numbers; for a regression, use"),
    ],
)
def test_warns(labels: list[str], warning: str) -> None:
    [found] = label_warnings("y", Counter(labels))
    assert found.startswith(f"warning: {warning}") and found.endswith("...") == warning.endswith("...")


def test_no_warning_of_ordinary_classes() -> None:
    assert label_warnings("y", Counter(["a", "b", "a", "b", "10", "9", "10", "9"])) == ()
    assert label_warnings("y", Counter([str(i) for i in range(50)] * 2)) == ()
    assert label_warnings("y", Counter([*(str(i) for i in range(60)), "other"] * 2)) == ()


def test_files_are_counted_by_ending() -> None:
    names = ["a.txt", "b.txt", "c.TXT", ".d.jpg", "README", "e.tar.gz", "f.an odd one", f"g.{'x' * 40}"]
    assert left_out_note(Counter(map(ending, names))) == (
        "left out: 8 files (2 *.txt, 2 with other endings, 1 *.TXT, 1 *.gz, 1 hidden, 1 without an ending)",
    )
    assert left_out_note({}) == ()
    [many] = left_out_note({f"*.{i}": 1 for i in range(15)})
    assert many.count("*.") == 10 and many.endswith(", 5 others)")


def test_the_lines_of_a_kind_are_limited() -> None:
    rows = np.arange(30.0)
    columns = [(f"x{i}", rows) for i in range(5)]
    found = column_warnings(columns, "leave out {name}")
    assert found[0] == "warning: column x0 counts the rows; leave out x0 if it is an index or a time"
    assert len(found) == 4 and found[-1] == "warning: the same holds for 2 more columns"
    assert column_warnings(columns[:1], "") == ()
    rounded = column_warnings([("time", 1.7e9 + rows / 7)], "")
    assert len(rounded) == 1 and rounded[0].startswith("warning: float32 rounds column time by up to ")
    odd = [np.array([]), np.array([np.nan, 1.0] * 20), np.full(30, 1e300), np.arange(2**60, 2**60 + 30), rows == 3,
           np.array([200, 100] * 20, dtype=np.uint8)]  # fmt: skip
    assert [len(column_warnings([("x", values), ("y", rows / 7)], "")) for values in odd] == [0, 0, 0, 2, 0, 0]


def test_columns_of_which_float32_keeps_few_values() -> None:
    rng = np.random.default_rng(0)
    seconds = 1.7e9 + rng.integers(0, 1000, 5000)
    columns = {
        "time": seconds,
        "with_gaps": np.where(rng.random(5000) < 0.5, -1.0, seconds),  # the extent alone does not show it
        "id": rng.permutation(10**12 + np.arange(5000) * 10**3),
        "nanoseconds": (seconds * 10**9).astype(np.int64),
        # float32 holds the differences of these:
        "exact": 16_000_000 + rng.integers(0, 10, 5000),
        "ordinary": rng.normal(size=5000),
        "hash": rng.integers(0, 2**62, 5000),
        "small": 1e-30 * rng.normal(size=5000),
        "cents": rng.integers(0, 10**6, 5000) / 100,
        "flags": rng.random(5000) < 0.5,
    }
    found = [line for name, values in columns.items() for line in column_warnings([(name, values)], "")]
    assert [line.split()[4] for line in found] == ["time", "with_gaps", "id", "nanoseconds"]
    for line, values in zip(found, columns.values(), strict=False):
        before, after = len(set(values.tolist())), len({float(np.float32(value)) for value in values})
        assert f"; of {before:,} distinct values {after:,} remain; subtract a constant" in line


def test_problems_are_what_was_left_out_or_looks_wrong() -> None:
    assert problems(["read: x", "left out: y", "warning: z", "no test set"]) == ["left out: y", "warning: z"]
