"""The identity of data: equal for equal content wherever it lies, another one for every change."""

import hashlib
import io
import os
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.data import identity as module
from dlopt.data import samples as of_samples
from dlopt.data.generated import polynomial
from dlopt.data.identity import difference, identify
from dlopt.data.images import files
from dlopt.data.images.csv_images import csv
from dlopt.data.images.files import Files, ImageList
from dlopt.data.images.folder import image_folder
from dlopt.data.rows.arrow import Columns, parquet
from dlopt.data.rows.custom import custom
from dlopt.data.rows.webdataset import webdataset
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import Content, Dataset, InMemory
from dlopt.data.tables.table import table
from dlopt.data.texts.text import text, tokens
from tests.support.runs import run_config

COUNT = 24
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % 2
ROWS: dict[str, Any] = {
    "val_file": None, "test_file": None, "input": "image", "target": "label", "labels": "class", "channels": None,
    "image_size": None,
}  # fmt: skip
FILES: dict[str, Any] = {"on_error": "fail", "max_skips": 0.01, "image_size": None}

Read = Callable[[Path, np.ndarray, np.ndarray], Dataset]


def read_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> Dataset:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"train/{'ab'[label]}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return image_folder(root=str(folder), channels=3, **FILES)


def read_csv(folder: Path, images: np.ndarray, labels: np.ndarray) -> Dataset:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (folder / "list.csv").write_text("\n".join(["path,label", *lines]))
    keys = {
        "root": None,
        "path_column": "path",
        "label_column": "label",
        "split_column": None,
        "labels": "class",
        "label_separator": ";",
    }
    return csv(file=str(folder / "list.csv"), channels=3, **keys, **FILES)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def written_parquet(folder: Path, column: list[Any], labels: np.ndarray, rows: int) -> Dataset:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    writer.write_table(arrow.table({"image": column, "label": labels.tolist()}), folder / "a.parquet", rows)
    return parquet(file=str(folder / "a.parquet"), **ROWS)


def read_parquet(folder: Path, images: np.ndarray, labels: np.ndarray, nested: bool) -> Dataset:
    rows = len(str(folder)) % 5 + 2  # in every folder other row groups
    files = [png(image) for image in images]
    column = [{"bytes": each, "path": None} for each in files] if nested else files
    return written_parquet(folder, column, labels, rows)


def read_paths(folder: Path, images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Parquet with the paths of images outside of it, as the package datasets writes it."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    column = [{"bytes": None, "path": str(folder / f"{number}.png")} for number in range(len(images))]
    return written_parquet(folder, column, labels, 5)


def read_shard(folder: Path, images: np.ndarray, labels: np.ndarray) -> Dataset:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, content in ((f"{number}.png", png(image)), (f"{number}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return webdataset(file=str(folder / "a.tar"), **{**ROWS, "input": "png", "target": "cls"})


def read_table(folder: Path, images: np.ndarray, labels: np.ndarray) -> Dataset:
    folder.mkdir()
    numbers = images.reshape(len(images), -1)[:, :4].tolist()
    rows = [",".join(map(str, [*row, "ab"[label]])) for row, label in zip(numbers, labels, strict=True)]
    (folder / "a.csv").write_text("\n".join(["p,q,r,s,label", *rows]))
    keys = run_config("data=table", f"data.file={folder / 'a.csv'}", "data.target=label", "model=mlp").data.arguments
    return table(**keys, standardize_target=True, saved_columns=None)


READERS = {
    "folder": read_folder,
    "csv": read_csv,
    "parquet": partial(read_parquet, nested=False),
    "parquet of structs": partial(read_parquet, nested=True),
    "paths": read_paths,
    "shard": read_shard,
    "table": read_table,
}
CHANGES = {
    "an image": lambda images, labels: (np.concatenate([images[:7], images[7:8] ^ 1, images[8:]]), labels),
    "two inputs swapped": lambda images, labels: (images[[*range(4), 6, 5, 4, *range(7, COUNT)]], labels),
    "labels flipped": lambda images, labels: (images, 1 - labels),
    "shuffled": lambda images, labels: (images[::-1], labels[::-1]),
    "a sample less": lambda images, labels: (images[:-1], labels[:-1]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_moved_data_are_the_same_and_changed_data_are_not(read: Read, tmp_path: Path) -> None:
    first = identify(read(tmp_path / "first", IMAGES, LABELS))
    moved = identify(read(tmp_path / "moved elsewhere", IMAGES, LABELS))
    assert moved == first and difference(first, moved) is None
    for number, (name, change) in enumerate(CHANGES.items()):
        changed = identify(read(tmp_path / f"{number}", *change(IMAGES, LABELS)))
        assert difference(first, changed) is not None, name


def test_a_text_and_its_tokens(tmp_path: Path) -> None:
    words = b"the quick brown fox jumps over the lazy dog\n" * 40
    keys = {"pattern": "*", "sequence_length": 8, "val_split": 0.1, "test_split": 0.1, "saved_tokenizer": None}
    keys |= {"val_file": None, "column": None, "tokenizer": "bytes", "vocabulary": None}

    def found(name: str, content: bytes, **changes: object) -> module.Identity:
        (tmp_path / name).write_bytes(content)
        return identify(text(file=str(tmp_path / name), **{**keys, **changes}))  # type: ignore[arg-type]

    first = found("a", words)
    assert difference(first, found("b", words)) is None
    assert difference(first, found("b", words, sequence_length=16)) is None, "the length belongs to the config"
    block = hashlib.sha256(words[: first["train"]["tokens"]]).digest()
    assert first["train"]["content"] == hashlib.sha256(block).hexdigest()
    assert " tokens, not " in str(difference(first, found("c", words[:-440])))
    assert "other inputs" in str(difference(first, found("d", words.replace(b"quick", b"quack", 1))))
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    numbers = identify(tokens(root=str(tmp_path), sequence_length=8, vocabulary=100))
    assert numbers["train"]["tokens"] == 100 and "test" not in numbers


def test_large_contents_are_hashed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_samples, "WHOLE", 1 << 10)
    monkeypatch.setattr(of_samples, "_BLOCK", 16)
    inputs = torch.arange(1 << 16, dtype=torch.int16).view(torch.uint8)
    changed = inputs.clone()
    changed[:16], changed[-1] = 1, 0
    found = [identify(Dataset(InMemory(each, torch.zeros(len(each))), None, None, None)) for each in (inputs, changed)]
    assert "other inputs" in str(difference(*found))
    assert InMemory(inputs, inputs).content().digest() == found[0]["train"]["content"]


def test_many_files_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_folder(tmp_path / "a", IMAGES, LABELS)
    monkeypatch.setattr(files, "_MOST_FILES", COUNT - 1)
    monkeypatch.setattr(os, "stat", lambda *_: pytest.fail("measured"))
    first = identify(dataset)
    monkeypatch.undo()
    monkeypatch.setattr(files, "_MOST_FILES", COUNT - 1)
    assert identify(read_folder(tmp_path / "b", IMAGES, LABELS)) == first
    assert identify(read_folder(tmp_path / "c", IMAGES ^ 1, LABELS)) != first


def test_a_dataset_of_the_user() -> None:
    class Mine(torch.utils.data.Dataset):
        def __init__(self, offset: float, noise: float = 0.0) -> None:
            self.offset, self.noise = offset, noise

        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((3,), index + self.offset) + self.noise * torch.rand(3), index % 2

    def found(*arguments: float) -> module.Identity:
        return identify(custom(train=Mine(*arguments), val=None, test=None, classes=None, image_size=None))

    assert found(0.0) == found(0.0) != found(1.0)
    assert "content" not in found(0.0, 1.0)["train"], "augmented at random: every reading differs"
    assert difference(found(0.0), found(0.0, 1.0)) is None


def test_generated_data_are_identified_by_their_config() -> None:
    keys = run_config("data=polynomial", "model=mlp", "loss=mse").data.arguments
    assert set(identify(polynomial(**keys))["train"]) == {"samples"}


def test_the_first_difference_is_named() -> None:
    train = {"samples": 1200, "targets": "a", "content": "b"}
    old = {"train": train, "test": {"samples": 5}}
    order = "or the same ones in another order"
    cases = {
        "the training set has 1,000 samples, not 1,200": {**old, "train": {**train, "samples": 1000}},
        f"the training set has other labels, {order}": {**old, "train": {**train, "targets": "c"}},
        f"the training set has other inputs, {order}": {**old, "train": {**train, "content": "c"}},
        "they have no test set": {"train": train},
        "they have a validation set": {**old, "val": {"samples": 1}},
    }
    for message, new in cases.items():
        assert difference(old, new) == message
    assert difference(old, None) is difference(None, old) is None
    assert difference(old, {**old, "train": {"samples": 1200}}) is None, "not hashed: not compared"


def test_missing_and_special_files_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    os.mkfifo(tmp_path / "fifo")
    assert files._read(str(tmp_path / "a")) == b"content" and files._size(str(tmp_path / "a")) == 7
    assert files._read(str(tmp_path / "fifo")) == files._read(str(tmp_path)) == b""
    assert files._read(str(tmp_path / "none")) == b"" and files._size(str(tmp_path / "none")) == 0


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (
            100,
            1000,
            [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 60), (60, 70), (70, 80), (80, 90), (90, 100)],
        ),
        (15, 150, [(0, 10), (10, 15)]),
        (3, 900, [(0, 1), (1, 2), (2, 3)]),
        (100, 1010, [(0, 9), (30, 39), (60, 69), (91, 100)]),
        (5, 0, [(0, 5)]),
        (1, 5000, [(0, 1)]),
    ],
)
def test_blocks_of_a_content_that_are_hashed(
    count: int, size: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WHOLE", 1000), ("_BLOCK", 100), ("_BLOCKS", 4), ("_THREADS", 1)):
        monkeypatch.setattr(f"dlopt.data.samples.{name}", value)
    read: list[tuple[int, int]] = []
    content = Content(count, size, lambda start, stop: read.append((start, stop)) or b"x")
    assert content.digest() == hashlib.sha256(hashlib.sha256(b"x").digest() * len(expected)).hexdigest()
    assert read == expected


def test_what_is_hashed_is_the_size_and_the_content_of_each_input(tmp_path: Path) -> None:
    """Eight bytes for the size, so that no two lists of contents are equal when they are joined."""
    contents = [b"first", b"", b"the third"]
    framed = [struct.pack("<Q", len(content)) + content for content in contents]
    paths = [str(tmp_path / f"{number}") for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    files = Files(ImageList.of(paths, torch.arange(3)), (1, 1), 3).content()
    assert (files.count, files.size) == (3, 14) and files.read(0, 3) == b"".join(framed)
    assert files.read(1, 3) == b"".join(framed[1:])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            for name, content in ((f"{number}.json", b"[%d]" % number), (f"{number}.cls", b"0")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    shards = webdataset(file=str(tmp_path / "a.tar"), **{**ROWS, "input": "json", "target": "cls"})
    table = shards.train.table  # type: ignore[attr-defined]
    assert table.size == 6 and table.read(0, 2) == b"".join(struct.pack("<Q", 3) + b"[%d]" % i for i in range(2))


def test_paths_in_a_table_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "x").write_bytes(b"content")
    rows = [{"bytes": None, "path": str(tmp_path / "x")}, {"bytes": b"own", "path": None}]
    table = Columns("data.file", arrow.table({"image": rows, "label": [0, 1]}), [], ["image"], "label")
    assert table.read(0, 2) == b"".join(struct.pack("<Q", len(each)) + each for each in (b"content", b"own"))
    assert table.size == 2 << 17, "estimated: the files are not measured"
    stored = arrow.table({"image": [b"a", b"bc"], "label": [0, 1]})
    assert Columns("data.file", stored, [], ["image"], "label").size == stored.select(["image"]).nbytes


def test_evenly_spaced_items_of_a_dataset_are_read() -> None:
    read: list[int] = []

    class Items:
        targets = torch.zeros(31, dtype=torch.int64)

        def __len__(self) -> int:
            return 31

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            read.append(int(index))
            return torch.full((2,), float(index)), 0

    samples = Wrapped(Items(), None, "data.train")
    read.clear()
    content = samples.content()
    assert content is not None and read == [*range(0, 31, 2)] * 2
    expected = torch.arange(0, 31, 2).float()[:, None].expand(16, 2).contiguous().numpy().tobytes()
    assert content.read(0, 16) == expected
