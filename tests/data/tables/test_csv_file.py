"""The reader of CSV files: any table survives, and what is no table of names and values is refused or reported."""

import csv
import importlib
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.data.tables import csv_file
from dlopt.data.tables.csv_file import TableFile, read_columns, read_header

pandas = pytest.importorskip("pandas")

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=5)


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    (folder / "t.csv").write_bytes(text.encode(encoding))
    return str(folder / "t.csv")


def read(file: str, texts: list[str], numbers: list[str], delimiter: str = ",") -> TableFile:
    return read_columns(read_header(file, delimiter), texts, dict.fromkeys(numbers, "ADVICE"))


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
    file = write(tmp_path_factory.mktemp("csv"), text.getvalue(), encoding)
    header = read_header(file, delimiter)
    assert header.names == ("a name", "value") and header.notes == ()
    content = read(file, ["a name"], ["value"], delimiter)
    assert content.texts == {"a name": [name.strip() for name, _ in rows]}
    assert content.numbers.tolist() == [[value] for _, value in rows]


def test_points_between_thousands(tmp_path: Path) -> None:
    for column, found in (("987 1.234 12.500", True), ("0.987 1.234 2", False), ("1.5 987 1.234", False),
                          ("1.234 2.345 3.456", False), ("1234 1.234 12", False), ("1 2 3", False)):  # fmt: skip
        content = read(write(tmp_path, "x\n" + "\n".join(column.split()) + "\n"), [], ["x"])
        expected = "warning: column x may have points between thousands: 1.234 is read as a decimal"
        assert content.notes == ((expected,) if found else ())


def test_integers_that_float64_makes_equal(tmp_path: Path) -> None:
    for start, step, found in ((2**53 - 40, 1, False), (2**53, 1, True), (2**60, 1, True), (-(2**60), -1, True),
                               (2**60, 256, False), (2**53, 2, False)):  # fmt: skip
        integers = [start + step * i for i in range(30)]
        assert (len({*map(float, integers)}) < 30) == found
        content = read(write(tmp_path, "x\n" + "\n".join(map(str, integers)) + "\n"), [], ["x"])
        equal = next(((a, b) for a, b in itertools.pairwise(integers) if float(a) == float(b)), None)
        lines = () if equal is None else (
            f"warning: column x: float64 makes {equal[0]} and {equal[1]} equal; subtract a constant from them in the "
            "file",
        )  # fmt: skip
        assert content.notes == lines
    again = read(write(tmp_path, "x\n" + f"{2**60}\n{2**60}.0\n1152921504606846976e0\n" * 3), [], ["x"])
    assert again.notes == (), "one number in several forms"


@pytest.mark.parametrize("count", [1000, 1001, 3500])
def test_many_comments_above_the_names(tmp_path: Path, count: int) -> None:
    file = write(tmp_path, "# of an instrument\n" * count + "x,y\n1,a\n2,b\n")
    content = read(file, ["y"], ["x"])
    assert content.numbers.tolist() == [[1.0], [2.0]] and content.texts == {"y": ["a", "b"]}
    assert read_header(write(tmp_path, "# of an instrument\n" * count)).names == ()


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma", "zipfile"])
def test_a_compressed_file_is_named(tmp_path: Path, module: str) -> None:
    path, kind = tmp_path / "t.csv", {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz", "zipfile": "zip"}[module]
    packer = importlib.import_module(module)
    if module == "zipfile":
        with packer.ZipFile(path, "w") as archive:
            archive.writestr("t.csv", "x,y\n1,2\n")
    else:
        path.write_bytes(packer.compress(b"x,y\n1,2\n", **({"format": packer.FORMAT_XZ} if module == "lzma" else {})))
    with pytest.raises(UserError, match=rf"t\.csv: is compressed \({kind}.*\); unpack it"):
        read_header(str(path))


def test_units_are_left_out_only_where_they_may_be(tmp_path: Path) -> None:
    file = write(tmp_path, "a,b\nunknown,missing\n" + "1,2\n" * 5)
    assert read_header(file).has_units and not read_header(file, may_have_units=False).has_units
    with pytest.raises(UserError, match="line 2: a is 'unknown', not a finite number"):
        read_columns(read_header(file, may_have_units=False), [], {"a": "ADVICE"})


def test_an_index_is_left_out(tmp_path: Path) -> None:
    for name in ("", "Unnamed: 0", "Unnamed: 0.1"):
        file = write(tmp_path, f"{name},x,y\n1,0.5,a\n2,0.25,b\n")
        content = read(file, ["y"], ["x"])
        assert content.texts == {"y": ["a", "b"]} and content.numbers.tolist() == [[0.5], [0.25]]
        assert read_header(file).names == ("x", "y")
        assert read_header(file).notes == (f"left out: column 1{f' ({name})' if name else ', which has no name'}",)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,a,b\n1,2,3\n", "two columns have the same name, a"),
        (" a,a ,b\n1,2,3\n", "two columns have the same name, a"),
        (
            "a,b\n1,2,3\n",
            r"has 3 fields instead of 2 \(if the first column is an index, the header lacks a name for it",
        ),
        ("a,b\n1,2\n1,2,3\n", "line 3: has 3 fields instead of 2$"),
        ('a,b\n1,"2\n2"\n1\n', "line 4: has 1 fields instead of 2"),
        ("0.1,0.2,a\n0.3,0.4,b\n0.5,0.6,a\n", r"line 1 has values \(0.1, 0.2, a\); insert a line with the names"),
        ("0.1,0.2\n0.3,0.4\n", "line 1 has values"),
        ("5.1,3.5,a1\n4.9,3.0,a2\n", "line 1 has values"),
        ("1,1,x\n1,2,x\n", "line 1 has values"),
        ("a/0.png,cat\n1.JPG,dog\n", r"line 1 has values \(a/0\.png, cat\); insert a line with the names"),
        ("a\n1,5;2\n", r"line 2: has 2 fields instead of 1$"),
        ("a\0,\0b\0\n", "has zero bytes, as UTF-16 without a byte order mark"),
    ],
)
def test_refuses(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        read(write(tmp_path, text), [], [])


@pytest.mark.parametrize(
    "text",
    [
        "0,1,2\n5,6,7\n",
        "1990,2000,label\n5,6,a\n8,9,b\n",
        "400.5,401,401.5,402,402.5,403,403.5,404,name\n1,2,3,4,5,6,7,8,a\n1,2,3,4,5,6,7,9,b\n",
        "x,y\n1,2\n",
        "x,y\na,b\n",
        "x.png,y\na.png,b\nb,b\n",
        "x,y\n",
    ],
)
def test_names_that_are_numbers(tmp_path: Path, text: str) -> None:
    assert read_header(write(tmp_path, text)).names == (*text.splitlines()[0].split(","),)


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("NA", "fill in the missing value or remove the line"),
        ("?", "fill in the missing value"),
        ("True", "write 1 and 0"),
        ('"1,234,567"', "without separators of thousands"),
        ("1\u00a0000", "without separators of thousands"),
        ("$5", "write the number without its unit"),
        ('"12,5 %"', "write the number without its unit"),
        ("-3 kg", "write the number without its unit"),
        ("2024-01-05", "ADVICE"),
        ("1_000", "without separators of thousands"),
        ('"1,5"', "write a decimal point"),
        ("100_0", "ADVICE"),
        ("\u0661", "ADVICE"),
        ("inf", "ADVICE"),
        ("red", "ADVICE"),
    ],
)
def test_fields_that_are_no_numbers(tmp_path: Path, field: str, remedy: str) -> None:
    file = write(tmp_path, f"x,y\n1,2\n{field},3\n")
    with pytest.raises(UserError, match=r"line 3: x is .*, not a finite number; .*" + remedy):
        read(file, [], ["x"])


ROWS = [f"{i},{i % 7}.5,note {i},{'ab'[i % 2]}\n" for i in range(60)]


def table_of(changed: dict[int, str]) -> str:
    return "id,x,note,y\n" + "".join(changed.get(i, row) for i, row in enumerate(ROWS))


@pytest.mark.parametrize(
    ("changed", "notes"),
    [
        ({}, ()),
        ({5: '5,1.5,"a ""word"", and",a\n', 6: '6,1.5,"note" ,"b" \n', 7: '7,1.5,5" pipe,b\n'}, ()),
        # An open quote, in a column that is ignored and in the labels, up to another quote or the end of the file.
        (
            {5: '5,1.5,"note,a\n', 45: '45,1.5,note",b\n'},
            ("1 field has line breaks, up to 41 lines, the first in line 7, column note",),
        ),
        (
            {5: '5,1.5,note,"a\n', 45: '45,1.5,note,b"\n'},
            ("1 field has line breaks, up to 41 lines, the first in line 7, column y",),
        ),
        (
            {50: '50,1.5,note,"a\n'},
            ("1 field has line breaks, up to 10 lines, the first in line 52, column y.*; the file ends within",),
        ),
        ({59: '59,1.5,note,"a'}, ("the file ends within quotes",)),
        (
            {5: '5,1.5,"one\ntwo",a\n', 6: '6,1.5,"one\r\ntwo\r\n3",a\n'},
            ("2 fields have line breaks, up to 3 lines, the first in line 7",),
        ),
        # A quote that closes early.
        (
            {5: '5,1.5,note,"a"b\n', 9: '9,1.5,"no"te,b\n'},
            ("2 rows have text after a closing quote, the first in line 7;",),
        ),
        (
            {5: '5,1.5,"note,a\n', 45: '45,1.5,"note",b\n'},
            ("1 field has line breaks, up to 41 lines", "1 row has text after a closing quote, the first in line 7;"),
        ),
    ],
)
def test_doubtful_quotes_are_reported(tmp_path: Path, changed: dict[int, str], notes: tuple[str, ...]) -> None:
    text = table_of(changed)
    content = read(write(tmp_path, text), ["note", "y"], ["x"])
    expected = [row for row in csv.reader(io.StringIO(text, newline="")) if row][1:]
    assert content.texts["note"] == [row[2].strip() for row in expected]
    assert content.texts["y"] == [row[3].strip() for row in expected]
    assert content.numbers[:, 0].tolist() == [float(row[1]) for row in expected]
    assert len(content.notes) == len(notes)
    for note, start in zip(content.notes, notes, strict=True):
        assert re.match(f"warning: {start}", note), note


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_ends_of_lines(tmp_path: Path, end: str) -> None:
    text = f"x,y{end}1,a{end}{end}2,b{end}3,c"
    content = read(write(tmp_path, text), ["y"], ["x"])
    assert content.texts["y"] == ["a", "b", "c"] and not content.notes and [*content.lines] == [2, 4, 5]


NUMBERS = "".join(f"{i / 4},{i * i},{'ab'[i % 2]}\n" for i in range(30))


@pytest.mark.parametrize(
    ("above", "keys", "note"),
    [
        ("sep=,\nx,z,y\n", {"skiprows": 1}, "line 1, which sets the delimiter ','"),
        ('"sep=;"\r\nx;z;y\n', {"skiprows": 1, "sep": ";"}, "line 1, which sets the delimiter ';'"),
        ("sep=\t\nx\tz\ty\n", {"skiprows": 1, "sep": "\t"}, r"line 1, which sets the delimiter '\t'"),
        ("# a, b, c, d\n\n# e\nx,z,y\n", {"comment": "#"}, "2 lines above the names of the columns (# a, b, c, ...)"),
        ("# a, b, c\nx,z,y\n", {"comment": "#"}, "1 line above the names of the columns (# a, b, c)"),
        ("#x,z,y\n", {}, None),
        ("# written by\n#x,z,y\n", {"skiprows": 1}, "1 line above the names of the columns (# written by)"),
        ("x,z,y\nm/s,µg,-\n", {"skiprows": [1]}, "line 2, the units of the columns (m/s, µg, -)"),
        ("x,z,y\n[°C],%,name\n", {"skiprows": [1]}, "line 2, the units of the columns ([°C], %, name)"),
        ("\n\nx,z,y\n", {}, None),
    ],
)
def test_lines_above_the_data(tmp_path: Path, above: str, keys: dict[str, Any], note: str | None) -> None:
    delimiter = keys.get("sep", ",")
    file = write(tmp_path, above + NUMBERS.replace(",", delimiter))
    expected = pandas.read_csv(file, **keys)
    header = read_header(file)
    assert header.names == (*expected.columns,) and header.notes == (() if note is None else (f"left out: {note}",))
    first, second, last = header.names
    content = read_columns(header, [last], {first: "", second: ""})
    assert content.texts[last] == expected[last].tolist()
    assert content.numbers.tolist() == expected[[first, second]].astype(float).values.tolist()
    line = 1 + len(above.splitlines())
    assert content.place(0).endswith(f"line {line}") and len(content) == 30


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "A title\n\nx,z,y\n1,2,a\n",
            r"line 1: has 1 fields \(A title\), the lines below have 3; remove the lines above",
        ),
        ("m,kg,\nx,z,y\n1,2,a\n3,4,b\n", "line 1: lacks the name 'y' of line 2; remove a line"),
        ("x,y\nred,1\n0.5,2\n0.25,1\n", "line 2: x is 'red', not a finite number"),
        ("x,z,y\nNA,?,a\n1,2,b\n3,4,c\n", "line 2: x is 'NA', not a finite number; fill in"),
        (
            "x,z,y\n5kg,m,b\n1,2,b\n3,4,c\n",
            "line 2: x is '5kg', not a finite number; write the number without its unit",
        ),
        ("x,z,y\nkg,m,b\n1,2,b\n3,4,c\n", "line 2: x is 'kg', not a finite number"),
    ],
)
def test_lines_that_are_not_left_out(tmp_path: Path, text: str, error: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError, match=error):
        read(file, [], ["x"])


def test_names_the_encoding_that_fits(tmp_path: Path) -> None:
    for encoding, word in (("cp1252", "Grüße"), ("shift_jis", "日本語のテキスト"), ("cp1251", "Привет")):
        file = write(tmp_path, f"x,y\n1,a\n2,{word}\n", encoding)
        error = rf"line 3: is not UTF-8; it fits {encoding} \({word}\): convert .* iconv -f .* -t UTF-8 t.csv > NEW"
        with pytest.raises(UserError, match=error):
            read_header(file)
        assert pandas.read_csv(file, encoding=encoding)["y"].tolist() == ["a", word]


def test_long_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, f"x,note,y\n1,{'k' * 200_000},a\n2,b,b\n")
    assert read(file, ["y"], ["x"]).numbers.tolist() == [[1.0], [2.0]]
    before = csv.field_size_limit(1000)
    monkeypatch.setattr(csv_file, "_LONGEST_FIELD", 1000)
    try:
        with pytest.raises(
            UserError, match=r"field larger than field limit .* may have 1,000 characters: check its quotes"
        ):
            read(file, ["y"], ["x"])
    finally:
        csv.field_size_limit(before)
