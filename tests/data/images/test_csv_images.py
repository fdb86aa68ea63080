from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.images.csv_images import csv
from dlopt.data.images.decoding import decode
from dlopt.data.samples import Dataset


@pytest.fixture
def table(tmp_path: Path, write_images: Callable[..., list[Path]]) -> Callable[..., Dataset]:
    write_images(tmp_path / "images", 6)

    def load(text: str | bytes, **changed: Any) -> Dataset:
        file = tmp_path / "list.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        options: dict[str, Any] = {
            "root": None,
            "path_column": "path",
            "label_column": "label",
            "split_column": None,
            "labels": "class",
            "label_separator": ";",
            "channels": 3,
            "on_error": "fail",
            "max_skips": 0,
            "image_size": None,
        }
        return csv(**{"file": str(file), **options, **changed})

    return load


ROWS = "path,label\nimages/003.png,zebra\nimages/000.png,ant\nimages/001.png,zebra\n"


def test_rows_become_samples(tmp_path: Path, table: Callable[..., Dataset]) -> None:
    data = table(ROWS)
    assert data.classes == ("ant", "zebra") and data.train.targets.tolist() == [1, 0, 1]
    assert data.val is None and data.test is None
    expected = decode(str(tmp_path / "images" / "003.png"), None, 3)
    assert torch.equal(data.train.fetch(torch.tensor([0]))[0], expected)


def test_other_names_absolute_paths_and_a_byte_order_mark(tmp_path: Path, table: Callable[..., Dataset]) -> None:
    text = f'"a file";kind\n{tmp_path}/images/000.png;1\n'.replace(";", ",")
    data = table(b"\xef\xbb\xbf" + text.encode(), path_column="a file", label_column="kind", image_size=4, channels=1)
    assert data.classes == ("1",) and data.train.shape == (1, 4, 4)
    assert len(table("path,label\n000.png,a\n", root=str(tmp_path / "images")).train) == 1


def test_a_split_column(table: Callable[..., Dataset]) -> None:
    rows = ["train,a", "test,b", "train,b", "val,a", "train,a", "test,a"]
    text = "path,split,label\n" + "\n".join(f"images/00{i}.png,{row}" for i, row in enumerate(rows))
    data = table(text, split_column="split")
    assert data.val is not None and data.test is not None
    assert [part.targets.tolist() for part in (data.train, data.val, data.test)] == [[0, 1, 0], [0], [1, 0]]


def test_regression_labels(table: Callable[..., Dataset]) -> None:
    data = table("path,label\nimages/000.png,1.5\nimages/001.png,-2e3\n", labels="value")
    assert data.classes is None and torch.equal(data.train.targets, torch.tensor([1.5, -2000.0]))


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, r"has no column 'path'; it has none"),
        ("file,label\na,b\n", {}, r"has no column 'path'; it has file, label"),
        (ROWS, {"label_column": "class"}, r"has no column 'class'; it has path, label"),
        (ROWS, {"split_column": "fold"}, r"has no column 'fold'"),
        ("path,label\n", {}, "has no rows"),
        ("path,label\nimages/000.png,\n", {}, "line 2: label is empty"),
        ("path,label\nimages/000.png\n", {}, "line 2: has 1 fields instead of 2"),
        ("path,label\nimages/000.png, \n", {}, "line 2: label is empty"),
        ("path,label\nimages/000.png,a\nimages/9.png,b\n", {}, r"line 3: .*images/9.png is missing"),
        ("path,label\nimages,a\n", {}, "images is missing or not a file"),
        (f"path,label\n{'x' * 300},a\n", {}, "x is missing or not a file"),
        ("path,label,s\nimages/000.png,a,dev\n", {"split_column": "s"}, "s is 'dev'; must be train, val or test"),
        ("path,label,s\nimages/000.png,a,test\n", {"split_column": "s"}, "has no training rows"),
        ("path,label,s\nimages/000.png,a,train\nimages/001.png,b,test\n", {"split_column": "s"},
         "line 3: label is 'b', a class that no training row has"),
        ("path,label\nimages/000.png,high\n", {"labels": "value"}, "label is 'high', not a finite number; data"),
        ("path,label\nimages/000.png,nan\n", {"labels": "value"}, "is 'nan', not a finite number; fill in the"),
        (b"path,label\n\xff\xfe,a\n", {}, "line 2: is not UTF-8"),
        (b"path,label\nimages/000.png,a\0\n" + b"x" * 200000, {}, "data.file="),
    ],
)  # fmt: skip
def test_rejects_invalid_settings(
    tmp_path: Path, table: Callable[..., Dataset], text: str | bytes, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        table(text, **options)
    assert str(caught.value).startswith(f"data.file={tmp_path / 'list.csv'}")


def test_a_missing_file(tmp_path: Path, table: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match=r"none.csv: cannot be read \(No such file"):
        table(ROWS, file=str(tmp_path / "none.csv"))


SEVERAL = "path,label\nimages/000.png,red; round\nimages/001.png,\nimages/002.png,round;round\n"


def test_several_labels_per_image(table: Callable[..., Dataset]) -> None:
    data = table(SEVERAL, labels="several")
    assert data.classes == ("red", "round") and data.task.kind == "multi-label"
    assert data.train.targets.tolist() == [[1, 1], [0, 0], [0, 1]]
    spaced = table(SEVERAL.replace(";", " "), labels="several", label_separator=" ")
    assert spaced.classes == data.classes and torch.equal(spaced.train.targets, data.train.targets)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (SEVERAL, {"labels": "class"}, "line 3: label is empty"),
        ("path,label\nimages/000.png,\n", {}, "no training row has a label in label"),
        (
            "path,label,split\nimages/000.png,red,train\nimages/001.png,red;blue,test\n",
            {"split_column": "split"},
            "label is 'blue', a class that no training row has",
        ),
    ],
)
def test_several_labels_refused(text: str, more: dict[str, Any], message: str, table: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match=message):
        table(text, **{"labels": "several", **more})


def test_what_looks_wrong(table: Callable[..., Dataset]) -> None:
    text = "path,label\n" + "".join(f"images/00{i % 6}.png,{('cat', 'Cat', 'dog')[i % 3]}\n" for i in range(12))
    dataset = table(text + "images/000.png,eel\n")
    assert dataset.source == "13 images and their label" and dataset.notes == (
        "warning: label has classes that differ in form only: 'Cat', 'cat'",
        "warning: label has 1 class with one sample: eel",
    )
    times = "path,label\n" + "".join(f"images/00{i % 6}.png,{1.7e9 + i}\n" for i in range(30))
    [note] = table(times, labels="value").notes
    assert note.startswith("warning: float32 rounds label by up to 29, ")
    numbers = "path,label\n" + "".join(f"images/00{i % 6}.png,{i / 2}\n" for i in range(60)) * 2
    with pytest.raises(UserError, match=r"data\.labels=class: label has 60 different numbers; for a regression, use"):
        table(numbers)
    assert table("path,label\n" + "".join(f"images/00{i % 6}.png,{i}\n" for i in range(12))).classes == (
        *map(str, range(12)),
    )
