"""The reader of CSV files: any table survives, and what is no table of names and values is refused or reported."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.data.csv_file import are_values, count_rows, label_warnings, natural, number, read_csv

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=5)


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    (folder / "t.csv").write_bytes(text.encode(encoding))
    return str(folder / "t.csv")


@given(
    rows=st.lists(st.tuples(TEXTS, st.floats(allow_nan=False, allow_infinity=False, width=32)), min_size=1, max_size=6),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    delimiter=st.sampled_from([",", ";", "\t"]),
)
def test_any_table_survives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, float]], encoding: str, delimiter: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("a name", "value"), *rows])
    content = read_csv(write(tmp_path_factory.mktemp("csv"), text.getvalue(), encoding), delimiter)
    assert content.header == ["a name", "value"] and content.notes == ()
    assert content.column("a name", may_be_empty=True) == [name.strip() for name, _ in rows]
    assert content.numbers("value", "").tolist() == [value for _, value in rows]


def test_an_index_is_left_out(tmp_path: Path) -> None:
    for name in ("", "Unnamed: 0"):
        content = read_csv(write(tmp_path, f"{name},x,y\n1,0.5,a\n2,0.25,b\n"))
        assert content.header == ["x", "y"] and content.rows == [["0.5", "a"], ["0.25", "b"]]
        assert content.notes == (f"left out: column 1{f' ({name})' if name else ', which has no name'}",)


def test_a_column_that_counts_the_rows() -> None:
    rows = np.arange(30.0)
    assert count_rows(100 - rows) and count_rows(np.random.default_rng(0).permutation(rows))
    assert not any(map(count_rows, (2 * rows, rows % 20, rows + 0.5, rows[:10])))
    assert count_rows(rows[:20]) and not count_rows(rows[:19])  # fewer may do so by chance


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,a,b\n1,2,3\n", "two columns have the same name, a"),
        (" a,a ,b\n1,2,3\n", "two columns have the same name, a"),
        ("a,b\n1,2\n1,2,3\n", "line 3: has 3 fields instead of 2"),
        ('a,b\n1,"2\n2"\n1\n', "line 4: has 1 fields instead of 2"),
        ("0.1,0.2,a\n0.3,0.4,b\n0.5,0.6,a\n", r"line 1 has values \(0.1, 0.2, a, ...\); insert a line with the names"),
        ("0.1,0.2\n0.3,0.4\n", "line 1 has values"),
    ],
)
def test_refuses(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        read_csv(write(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["0,1,2\n5,6,7\n", "1990,2000,label\n5,6,a\n8,9,b\n", "x,y\n1,2\n", "x,y\na,b\n", "x,y\n"]
)
def test_names_that_are_numbers(tmp_path: Path, text: str) -> None:
    assert read_csv(write(tmp_path, text)).header == text.splitlines()[0].split(",")


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("NA", "fill in the missing value or remove the line"),
        ("?", "fill in the missing value"),
        ("True", "write 1 and 0"),
        ('"1,234,567"', "without separators of thousands"),
        ("1_000", "without separators of thousands"),
        ('"1,5"', "write a decimal point"),
        ("100_0", "ADVICE"),
        ("\u0661", "ADVICE"),
        ("inf", "ADVICE"),
        ("red", "ADVICE"),
    ],
)
def test_fields_that_are_no_numbers(tmp_path: Path, field: str, remedy: str) -> None:
    content = read_csv(write(tmp_path, f"x,y\n1,2\n{field},3\n"))
    with pytest.raises(UserError, match=r"line 3: x is .*, not a finite number; .*" + remedy):
        content.numbers("x", "ADVICE")


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
    assert are_values(labels) == expected


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (["cat", "Cat", "cat", "Cat"], "y has classes that differ in form only: 'Cat', 'cat'"),
        (["1", "1.0", "1", "1.0"], "y has classes that differ in form only: '1', '1.0'"),
        (["a", "a", "b"], "y has 1 class with one sample: b"),
        (["a", "a", *"bcde"], "y has 4 classes with one sample: b, c, d, ..."),
        (["a", "a", *"bcd"], "y has 3 classes with one sample: b, c, d"),
        ([str(i % 51) for i in range(300)], "the 51 classes of y are numbers; for a regression, use"),
    ],
)
def test_warns(labels: list[str], warning: str) -> None:
    [found] = label_warnings("y", labels)
    assert found.startswith(f"warning: {warning}") and found.endswith("...") == warning.endswith("...")


def test_no_warning_of_ordinary_classes() -> None:
    assert label_warnings("y", ["a", "b", "a", "b", "10", "9", "10", "9"]) == ()
    assert label_warnings("y", [str(i) for i in range(50)] * 2) == ()
    assert label_warnings("y", [*(str(i) for i in range(60)), "other"] * 2) == ()
