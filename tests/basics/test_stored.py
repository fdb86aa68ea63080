import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.stored import Stored


@dataclass(frozen=True)
class Point:
    place: tuple[int, ...]
    name: str = "origin"


@pytest.mark.parametrize(
    "name, content",
    [
        ("point.json", '{"place": [1, 2]}'),
        ("point.yaml", "place: [1, 2]\n"),
        ("point.yaml", "place:\n  - 1\n  - 2\nname: origin\n"),
    ],
)
def test_reads_a_file_by_its_type(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert Stored(tmp_path / name, Point).read() == Point((1, 2))


def test_reads_a_value_per_line(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text('{"place": [1]}\n{"place": [], "name": "a"}\n')
    assert Stored(tmp_path / "points.jsonl", Point).lines() == [Point((1,)), Point((), "a")]


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "x.json", tmp_path / "x.yaml", tmp_path / "file/x.json"):
        assert Stored(path, Point).read() is None
        assert Stored(path, Point).lines() == []


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("x.json", '{"place": ["1"]}', "place.0: Input should be a valid integer"),
        ("x.json", '{"place": [true]}', "place.0: Input should be a valid integer"),
        ("x.json", "{}", "place: Field required"),
        ("x.json", "{", "is not JSON"),
        ("x.json", "", "is not JSON"),
        ("x.json", '{"place": [NaN]}', "which is not finite"),
        ("x.json", '{"place": [], "place": []}', "has a key twice"),
        ("x.json", b"\xff", "is not text in UTF-8"),
        ("x.json", '{"place": [1]}' + " " * 100, "has more than 64 bytes"),
        ("x.yaml", "place: [a]", "place.0: Input should be a valid integer"),
        ("x.yaml", "place: [", "is not valid YAML"),
        ("x.yaml", "", "Input should be"),
    ],
)
def test_refuses_what_is_damaged_in_one_line(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        Stored(path, Point, limit=64, cure="sail on").read()
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{path}: is damaged: ") and line.endswith("; sail on")
    assert reason in line


def test_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"place": [1]}\n{"place": 1}\n')
    with pytest.raises(UserError, match="is damaged: line 2: place: Input should be a valid"):
        Stored(path, Point).lines()


def test_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="is not a regular file"):
        Stored(tmp_path / "x.json", Point).read()


def test_infinity_of_yaml_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("rate: .inf\n")
    assert Stored[dict[str, float]](tmp_path / "x.yaml", dict[str, float]).read() == {"rate": math.inf}
