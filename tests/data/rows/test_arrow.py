"""Columns of Parquet files and of datasets of the package datasets."""

import contextlib
import io
import json
import resource
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.basics.errors import UserError
from dlopt.data.identity import identify
from dlopt.data.rows import arrow as module
from dlopt.data.rows.arrow import huggingface, parquet
from dlopt.data.samples import Dataset
from dlopt.data.splits import prepare
from dlopt.data.tables import parquet as reading
from dlopt.data.texts.text import text
from dlopt.machine import memory
from tests.support.data import data_settings
from tests.support.runs import resume, same, start

arrow = pytest.importorskip("pyarrow")
writer = pytest.importorskip("pyarrow.parquet")
COLUMNS: dict[str, Any] = {"labels": "class", "channels": None, "image_size": None}
read = partial(parquet, val_file=None, test_file=None, input="image", target="label", **COLUMNS)
hub = partial(
    huggingface, configuration=None, revision=None, val=None, test=None, offline=True, input="image", target="label",
    **COLUMNS,
)  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pictures(count: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (count, 6, 5, 3) if channels == 3 else (count, 6, 5)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, images: np.ndarray, labels: list[Any], *, nested: bool = False, rows: int = 3) -> str:
    """Writes images as bytes, or as {bytes, path}, in row groups of `rows`."""
    files = [png(image) for image in images]
    column = [{"bytes": each, "path": None} for each in files] if nested else files
    path.parent.mkdir(exist_ok=True)
    writer.write_table(arrow.table({"image": column, "label": labels, "id": range(len(labels))}), path, rows)
    return str(path)


def inputs(dataset: Dataset) -> torch.Tensor:
    return dataset.train.fetch(torch.arange(len(dataset.train)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_images_in_shards(nested: bool, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mapped:
        monkeypatch.setattr(reading, "_MAX_READ", 0)
    images = pictures(9)
    labels = ["dog", "cat", "dog", "cat", "cow", "dog", "cat", "cow", "dog"]
    write(tmp_path / "shards/b.parquet", images[5:], labels[5:], nested=nested)
    write(tmp_path / "shards/a.parquet", images[:5], labels[:5], nested=nested)
    test = write(tmp_path / "test.parquet", images[:2], labels[:2], nested=nested)
    for file in (str(tmp_path / "shards/*.parquet"), str(tmp_path / "shards"), [str(tmp_path / "shards/?.parquet")]):
        dataset = read(file=file, test_file=test)
        assert torch.equal(inputs(dataset), torch.from_numpy(images).permute(0, 3, 1, 2))
        assert dataset.classes == ("cat", "cow", "dog")
        assert [dataset.classes[label] for label in dataset.train.targets.tolist()] == labels
        assert dataset.val is None and dataset.test is not None and dataset.test.targets.tolist() == [2, 0]
        order = torch.tensor([8, 0, 4])
        assert torch.equal(dataset.train.fetch(order), inputs(dataset)[order])
    resized = read(file=file, image_size=4)
    assert resized.train.shape == (3, 4, 4)
    grey = read(file=file, channels=1)
    assert grey.train.shape == (1, 6, 5)


def test_large_tables_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", pictures(40), [i % 2 for i in range(40)])
    monkeypatch.setattr(reading, "_MAX_READ", 0)
    before = arrow.total_allocated_bytes()
    table, _ = reading.read_parquet("data.file", [file], ["image", "label"], "label")
    deadline = time.monotonic() + 60  # Arrow's threads free what they have read a little later
    while arrow.total_allocated_bytes() - before >= table.nbytes / 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert table.nbytes > 1000 and arrow.total_allocated_bytes() - before < table.nbytes / 4
    monkeypatch.setattr(reading, "_batches", None)  # the second time, the file in the cache is used
    assert reading.read_parquet("data.file", [file], ["image", "label"], "label")[0].equals(table)
    monkeypatch.undo()
    monkeypatch.setattr(reading, "_MAX_READ", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", file)  # not a folder
    assert reading.read_parquet("data.file", [file], ["image", "label"], "label")[0].equals(table)


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_text_that_a_file_repeats_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_schema: bool
) -> None:
    """Of which a Parquet file has one copy, and a batch of rows one (with Arrow's schema) or one for each row."""
    path = str(tmp_path / "a.parquet")
    texts = arrow.DictionaryArray.from_arrays(arrow.array([0] * 1024, arrow.int32()), arrow.array(["x" * 2000]))
    writer.write_table(arrow.table({"x": [1.0] * 1024, "text": texts}), path, store_schema=store_schema)
    assert Path(path).stat().st_size < 1 << 14 < 1024 * 2000
    for most, fits in ((1 << 24, True), (1 << 21, False)):
        monkeypatch.setattr(reading, "half_of_memory", lambda most=most: contextlib.nullcontext(most))
        _, batches = reading.open_parquet("file=a.parquet", path)
        if fits:
            assert sum(map(len, batches)) == 1024
            continue
        with pytest.raises(UserError, match=r"^file=a\.parquet: a batch of rows .* takes more than half of the avail"):
            next(batches)


def test_numbers_and_lists_of_numbers(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    columns = {
        "width": [1, 2, 3], "length": [0.5, 1.5, 2.5], "price": [1.0, 2.0, 4.0],
        "pair": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "list": [[1, 2], [3, 4], [5, 6]],
        "kind": arrow.array([7, 3, 10]), "flag": [True, False, True],
    }  # fmt: skip
    pixels = pictures(3, channels=1)
    columns["pixels"] = arrow.array(pixels.tolist(), arrow.list_(arrow.list_(arrow.uint8())))
    writer.write_table(arrow.table(columns), path)
    vectors = read(file=path, input=["width", "length"], target="price", labels="value")
    assert inputs(vectors).tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]] and vectors.classes is None
    assert vectors.train.targets.tolist() == [1, 2, 4] and vectors.train.targets.dtype == torch.float32
    lists = read(file=path, input="list", target="kind")
    assert inputs(lists).tolist() == [[1, 2], [3, 4], [5, 6]] and inputs(lists).dtype == torch.float32
    assert lists.classes == ("3", "7", "10") and lists.train.targets.tolist() == [1, 0, 2]
    single = read(file=path, input="flag", target="pair", labels="value")
    assert inputs(single).tolist() == [[1], [0], [1]] and single.train.targets.shape == (3, 2)
    assert torch.equal(inputs(read(file=path, input="pixels", target="kind")), torch.from_numpy(pixels).unsqueeze(1))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    table = {"image": [b"no image", b"x"], "label": ["a", "b"], "ratio": [0.5, None], "text": ["a", "b"], "n": [1, 2]}
    writer.write_table(arrow.table(table), path)
    other = str(tmp_path / "b.parquet")
    writer.write_table(arrow.table({**table, "image": [[1], [2]], "label": ["a", "c"]}), other)
    (tmp_path / "c.parquet").write_text("nothing")
    everything = "image, label, ratio, text, n"
    for keys, message in (
        ({"file": "none/*.parquet"}, r"data\.file=none/\*\.parquet: no such file; a name, a pattern"),
        ({"file": str(tmp_path / "c.parquet")}, r"c\.parquet: cannot be read as a Parquet file"),
        ({"file": path, "input": "img"}, rf"data\.file: .*a\.parquet has no column 'img'; it has {everything}"),
        ({"file": path, "target": "class"}, rf"has no column 'class'; it has {everything}"),
        (
            {"file": [path, other]},
            r"the column image has the type list<.*> in .*b\.parquet, and binary in .*a\.parquet",
        ),
        ({"file": path}, r"data\.file, row 0: image: cannot be read as an image"),
        ({"file": path, "input": "text"}, r"data\.input=text: the column has the type string; image"),
        ({"file": path, "input": ["n", "text"]}, r"the column text has the type string; several columns must all be"),
        ({"file": path, "input": "n", "target": "ratio"}, r"data\.file, row 1: ratio is missing"),
        ({"file": path, "input": "ratio", "target": "n"}, r"data\.file, row 1: ratio is None, not a finite number"),
        ({"file": path, "input": "n", "labels": "value"}, r"data\.labels=value: the column label has the type string"),
        ({"file": path, "input": "n", "channels": 1}, r"data\.channels=1: only image files are converted"),
        ({"file": path, "input": "n", "test_file": other}, r"data\.test_file, row 1: label is 'c', a class that no tr"),
    ):
        with pytest.raises(UserError, match=message):
            inputs(read(**keys))
    with pytest.raises(UserError, match=r"data\.labels=class: the column w has the type double; .*data\.labels=value"):
        writer.write_table(arrow.table({"n": [1], "w": [0.5]}), path)
        read(file=path, input="n", target="w")


def test_a_resumed_run_on_mapped_shards_is_bitwise_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shards/a.parquet", pictures(40), [i % 3 for i in range(40)])
    write(tmp_path / "shards/b.parquet", pictures(30, seed=1), [i % 3 for i in range(30)])
    line = [
        "data=parquet", f"data.file={tmp_path}/shards/*.parquet", "data.batch_size=8", "data.memory=false", "model=mlp",
        "model.widths=[4]", "threads=1", "device=cpu", "tracking=[]", "epochs=2",
    ]  # fmt: skip
    start(tmp_path / "memory", *line)
    monkeypatch.setattr(reading, "_MAX_READ", 0)
    start(tmp_path / "parts", *line, "max_time=0.0001")
    assert resume(tmp_path / "parts", *line)["status"] == "finished"
    states = [torch.load(tmp_path / each / "checkpoints/last.pt", weights_only=True) for each in ("memory", "parts")]
    assert same(states[0]["model"], states[1]["model"])


def test_a_column_of_texts(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    documents = [f"document {number} →\n" * 4 for number in range(20)]
    writer.write_table(arrow.table({"text": documents, "n": range(20)}), path, 3)
    keys: dict[str, Any] = {"tokenizer": "bytes", "vocabulary": None, "saved_tokenizer": None, "sequence_length": 8}
    load = partial(text, file=path, val_file=None, pattern="*.txt", val_split=0, test_split=0, **keys)
    dataset = load(column="text")
    assert bytes(dataset.train.tokens).decode() == "".join(f"{each}\0" for each in documents)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"data\.file: row 0: n is no text, but of the type int64"):
        load(column="n")
    with pytest.raises(UserError, match=r"has no column 'body'; it has text, n"):
        load(column="body")


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package datasets, with a cache of its own and without a network."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise AssertionError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return package


def test_a_local_folder_is_loaded_offline(datasets: Any, tmp_path: Path) -> None:
    images = pictures(8)
    write(tmp_path / "mine/train-0.parquet", images[:5], [0, 1, 0, 1, 0], nested=True)
    write(tmp_path / "mine/train-1.parquet", images[5:], [1, 0, 1], nested=True)
    write(tmp_path / "mine/test-0.parquet", images[:2], [1, 0], nested=True)
    dataset = hub(name=str(tmp_path / "mine"), split="train[:6]", val="train[6:]", test="test")
    assert torch.equal(inputs(dataset), torch.from_numpy(images[:6]).permute(0, 3, 1, 2))
    assert dataset.val is not None and dataset.val.targets.tolist() == [0, 1]
    assert dataset.test is not None and dataset.test.targets.tolist() == [1, 0] and dataset.classes == ("0", "1")
    with pytest.raises(UserError, match=r"data\.split=dev cannot be loaded: Unknown split \"dev\""):
        hub(name=str(tmp_path / "mine"), split="dev")
    with pytest.raises(UserError, match=r"data\.input=img: data\.split has no such column; it has image, label, id"):
        hub(name=str(tmp_path / "mine"), split="train", input="img")
    with pytest.raises(UserError, match=r"data\.name=nobody/nothing: data\.split=train cannot be loaded: "):
        hub(name="nobody/nothing", split="train")


def test_a_saved_dataset_has_names_of_classes(datasets: Any, tmp_path: Path) -> None:
    images = pictures(4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [{"bytes": png(image), "path": None} for image in images], "label": [1, 0, 1, 1]}
    saved = datasets.Dataset.from_dict(columns, features=features).select([3, 1, 0])
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    dataset = hub(name=str(tmp_path / "saved"), split="train")
    assert torch.equal(inputs(dataset), torch.from_numpy(images[[3, 1, 0]]).permute(0, 3, 1, 2))
    assert dataset.classes == ("cat", "dog") and dataset.train.targets.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"data\.split=dev: .*saved has no such split; it has train"):
        hub(name=str(tmp_path / "saved"), split="dev")
    with pytest.raises(UserError, match=r"data\.revision=v1: .* is a folder of save_to_disk, which has none"):
        hub(name=str(tmp_path / "saved"), split="train", revision="v1")


def test_lists_of_labels(tmp_path: Path) -> None:
    images, labels = pictures(4), [["red", "round"], [], ["round"], ["red"]]
    file = write(tmp_path / "train.parquet", images, labels)
    dataset = read(file=file, labels="several")
    assert dataset.classes == ("red", "round") and dataset.task.kind == "multi-label"
    assert dataset.train.targets.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
    other = write(tmp_path / "test.parquet", images[:1], [["blue"]])
    with pytest.raises(UserError, match=r"data\.test_file, row 0: label is 'blue', a class that no training row has"):
        read(file=file, test_file=other, labels="several")
    with pytest.raises(UserError, match=r"for lists of labels: data\.labels=several"):
        read(file=file)
    single = write(tmp_path / "single.parquet", images, ["a", "b", "a", "b"])
    with pytest.raises(UserError, match=r"data\.labels=several: data\.file, row 0: label must be a list"):
        read(file=single, labels="several")
    empty = write(tmp_path / "empty.parquet", images[:1], arrow.array([[]], arrow.list_(arrow.string())))
    with pytest.raises(UserError, match=r"data\.labels=several: no row of data\.file has a label in label"):
        read(file=empty, labels="several")


def test_lists_of_labels_of_the_package_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sequence = datasets.Sequence(datasets.ClassLabel(names=["red", "green", "round"]))
    features = datasets.Features({"image": datasets.Sequence(datasets.Value("float32")), "label": sequence})
    rows = {"image": [[0.0], [1.0]], "label": [[0, 2], [1]]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    dataset = hub(name=str(tmp_path / "saved"), split="train", labels="several")
    assert dataset.classes == ("red", "green", "round") and dataset.train.targets.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_names_of_classes_belong_to_their_numbers(tmp_path: Path) -> None:
    """Also if no row has the first class."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["cat", "dog", "bird"])
    features = datasets.Features({"image": datasets.Sequence(datasets.Value("float32")), "label": label})
    rows = {"image": [[0.0], [1.0], [2.0]], "label": [2, 1, 2]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    dataset = hub(name=str(tmp_path / "saved"), split="train")
    assert dataset.classes == ("dog", "bird") and dataset.train.targets.tolist() == [1, 0, 1]


def test_scripts_of_datasets_are_not_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "foreign"
    write(folder / "train.parquet", pictures(3), [0, 1, 0])
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"^data\.name=.*foreign: data\.split=train cannot be loaded: "):
        hub(name=str(folder), split="train")
    assert not (tmp_path / "started").exists()


NAMED = b'{"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}'


@pytest.mark.parametrize(("labels", "message"), [
    ([0, -1, 2, -1], r"row 1: label is -1, which means no label, in 2 of 4 rows"),
    ([0, 1, 2, 3], r"row 3: label is 3, which means none of its 3 classes, in 1 of 4 rows"),
])  # fmt: skip
def test_labels_that_stand_for_no_class(labels: list[int], message: str, tmp_path: Path) -> None:
    """In Parquet files with the names of the package datasets, in any split; without names -1 is a class."""

    def file(name: str, values: list[int], metadata: dict[bytes, bytes] | None) -> str:
        table = arrow.table({"image": [[float(each)] for each in values], "label": values})
        writer.write_table(table.replace_schema_metadata(metadata), tmp_path / name)
        return str(tmp_path / name)

    good, bad = (file(name, values, {b"huggingface": NAMED}) for name, values in (("a", [0, 1, 2, 1]), ("b", labels)))
    assert read(file=good).classes == ("cat", "dog", "owl")
    with pytest.raises(UserError, match=rf"^data\.file, {message}: remove them from the files$"):
        read(file=bad)
    advice = r"remove them from the files, or set data\.test_file=null"
    with pytest.raises(UserError, match=rf"^data\.test_file, {message}: {advice}$"):
        read(file=good, test_file=bad)
    assert read(file=file("c", [-1, 1, -1, 1], None)).classes == ("-1", "1")


def test_names_of_a_list_of_labels(tmp_path: Path) -> None:
    """As the package datasets stores them: a list with the feature of an entry, in older files under `feature`."""
    table = arrow.table({"image": [[0.0], [1.0], [2.0]], "label": [[0], [1, 2], [2]]})
    label = json.loads(NAMED)["info"]["features"]["label"]
    for kind in ([label], {"feature": label}):
        metadata = {b"huggingface": json.dumps({"info": {"features": {"label": kind}}}).encode()}
        writer.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
        assert read(file=str(tmp_path / "a.parquet"), labels="several").classes == ("cat", "dog", "owl")


def test_unlabelled_rows_of_the_package_datasets(datasets: Any, tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Sequence(datasets.Value("float32")), "label": label})
    rows = {"image": [[0.0], [1.0], [2.0]], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    message = r"data\.split, row 2: label is -1, which means no label, in 1 of 3 rows: choose another split$"
    with pytest.raises(UserError, match=message):
        hub(name=str(tmp_path / "saved"), split="train")


def test_arrays_of_images_with_their_channels_first(tmp_path: Path) -> None:
    """As Array3D(shape=(3, H, W)) stores them; [H, W, 3] gives the same images."""
    pixels = pictures(3)  # [N, H, W, 3]
    nested = arrow.list_(arrow.list_(arrow.list_(arrow.uint8())))
    columns = {"last": pixels.tolist(), "first": np.moveaxis(pixels, 3, 1).tolist()}
    table = {name: arrow.array(values, nested) for name, values in columns.items()}
    writer.write_table(arrow.table({**table, "label": [0, 1, 0]}), tmp_path / "a.parquet")
    first, last = (inputs(read(file=str(tmp_path / "a.parquet"), input=name)) for name in ("first", "last"))
    assert torch.equal(first, last) and torch.equal(first, torch.from_numpy(np.moveaxis(pixels, 3, 1).copy()))


def test_shards_that_differ_in_the_kind_of_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Not null", dictionaries, large and viewed strings and lists: programs write the same column in all of them."""
    names, values = ["b", "a", "b"], [[1.0], [2.0], [3.0]]
    strings = (
        arrow.string(),
        arrow.large_string(),
        arrow.string_view(),
        arrow.dictionary(arrow.int32(), arrow.string()),
    )
    kinds = (arrow.list_(arrow.float32()), arrow.list_(arrow.float32(), 1), arrow.large_list(arrow.float32()))
    for number in range(6):
        fields = [
            arrow.field("image", kinds[number % 3], nullable=number > 1),
            arrow.field("label", strings[number % 4], nullable=number != 3),
        ]
        columns = [arrow.array(values, fields[0].type), arrow.array(names, arrow.string()).cast(fields[1].type)]
        writer.write_table(arrow.table(columns, arrow.schema(fields)), tmp_path / f"{number}.parquet")
    for size in (reading._MAX_READ, 0):  # in memory, and mapped
        monkeypatch.setattr(reading, "_MAX_READ", size)
        dataset = read(file=str(tmp_path))
        assert dataset.classes == ("a", "b") and dataset.train.targets.tolist() == [1, 0, 1] * 6
        assert inputs(dataset).flatten().tolist() == [1, 2, 3] * 6 and dataset.source == "18 rows of 6 files"


def test_shards_that_differ_in_the_width_of_numbers(tmp_path: Path) -> None:
    for number, (kind, label) in enumerate(((arrow.int32(), arrow.int64()), (arrow.float32(), arrow.uint8()))):
        columns = {"x": arrow.array([1, 2], kind), "label": arrow.array([number, 1], label)}
        writer.write_table(arrow.table(columns), tmp_path / f"{number}.parquet")
    dataset = read(file=str(tmp_path), input="x")
    assert inputs(dataset).flatten().tolist() == [1, 2, 1, 2] and dataset.train.targets.tolist() == [0, 1, 1, 1]
    twice = arrow.table([[1], [2], [3]], names=["x", "x", "label"])
    writer.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has two columns 'x'; it has x, x, label"):
        read(file=str(tmp_path / "twice.parquet"), input="x")


def test_what_looks_wrong_in_columns(tmp_path: Path) -> None:
    path = str(tmp_path / "a.PARQUET")
    count = 40
    columns = {
        "time": [1.7e9 + i for i in range(count)], "x": [i % 7 / 3 for i in range(count)],
        "list": [[1.7e9 + i, i % 3] for i in range(count)], "kind": [str((2, 10, 9)[i % 3]) for i in range(count)],
        "form": [("Cat", "cat")[i % 2] for i in range(count)], "size": [f"{i / 2}" for i in range(count)],
    }  # fmt: skip
    writer.write_table(arrow.table(columns), path)
    (tmp_path / "b.csv").write_text("")
    dataset = read(file=str(tmp_path), input=["time", "x"], target="kind")
    assert dataset.classes == ("2", "9", "10") and dataset.train.targets[:3].tolist() == [0, 2, 1]
    assert dataset.notes[:2] == (
        "left out: 1 file (1 *.csv)",
        "warning: column time counts the rows; leave it out of data.input if it is an index or a time",
    )
    assert dataset.notes[2].startswith("warning: float32 rounds column time by up to 39,") and len(dataset.notes) == 3
    lists = read(file=path, input="list", target="form").notes
    assert [note.split(";")[0][:48] for note in lists] == [
        "warning: form has classes that differ in form on",
        "warning: feature 1 counts the rows",
        "warning: float32 rounds feature 1 by up to 39, i",
    ]
    target = read(file=path, input="x", target="time", labels="value").notes
    assert len(target) == 1 and target[0].startswith("warning: float32 rounds time by up to 39,")
    with pytest.raises(UserError, match=r"data\.labels=class: size has 40 different numbers; for a regression, use"):
        read(file=path, input="x", target="size")


def test_slices_of_a_saved_dataset(datasets: Any, tmp_path: Path) -> None:
    columns = {"image": datasets.Sequence(datasets.Value("float32")), "label": datasets.Value("int64")}
    parts = {}
    for name, count in (("train", 10), ("a.b", 4)):
        rows = {"image": [[float(i)] for i in range(count)], "label": [i % 2 for i in range(count)]}
        parts[name] = datasets.Dataset.from_dict(rows, datasets.Features(columns))
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    load = partial(hub, name=str(tmp_path / "saved"))
    dataset = load(split="train[:70%]", val="train[70%:]", test="a.b")
    assert inputs(dataset).flatten().tolist() == list(range(7))
    assert dataset.val is not None and dataset.val.fetch(torch.arange(3)).flatten().tolist() == [7, 8, 9]
    assert dataset.test is not None and len(dataset.test) == 4
    both = load(split="train[-2:]+train[:3]")
    assert inputs(both).flatten().tolist() == [8, 9, 0, 1, 2]
    for split in ("dev", "train[", "dev[:2]"):
        with pytest.raises(UserError, match=r"data\.split=.*: .*saved has no such split; it has train, a\.b"):
            load(split=split)


def test_paths_of_images_are_below_the_folder_of_the_file(tmp_path: Path) -> None:
    """A table of others must not read any picture of this machine."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link.png").symlink_to(tmp_path / "private.png")
    for path in (tmp_path / "private.png", tmp_path / "data/own.png"):
        Image.new("L", (4, 4)).save(path)
    others = [str(tmp_path / "private.png"), str(tmp_path / "data/../private.png"), str(tmp_path / "data/link.png")]
    for paths, is_allowed in {(str(tmp_path / "data/own.png"),): True, **{(each,): False for each in others}}.items():
        column = [{"bytes": None, "path": path} for path in paths * 2]
        file = tmp_path / "data/a.parquet"
        writer.write_table(arrow.table({"image": column, "label": [0, 1]}), file)
        with contextlib.nullcontext() if is_allowed else pytest.raises(UserError, match="is not in the folder of the"):
            read(file=str(file), input="image", target="label")


def test_values_of_a_regression_are_finite(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    for values, row in (([1.0, 2.0, float("inf")], 2), ([[1.0, 2.0], [float("nan"), 1.0], [0.0, 0.0]], 1)):
        writer.write_table(arrow.table({"n": [1, 2, 3], "y": values}), path)
        with pytest.raises(UserError, match=rf"data\.file, row {row}: y is .*, not a finite number"):
            read(file=path, input="n", target="y", labels="value")


def test_values_beyond_float32_are_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    writer.write_table(arrow.table({"x": [1.0, 2.0, 1.797e308], "list": [[0.0], [-4e38], [1.0]], "y": [0, 1, 0]}), path)
    for name, message in (
        ("x", r"data\.file, row 2: x is 1\.797e\+308, not a finite number of float32"),
        ("list", r"data\.file, row 1: list\[0\] is -4e\+38, not a finite number of float32"),
    ):
        with pytest.raises(UserError, match=message):
            read(file=path, input=name, target="y").train.fetch(torch.arange(3))


@pytest.mark.parametrize("input", ["image", "bytes", "list", ["x", "n"], "x"])
def test_equal_rows_of_two_files(tmp_path: Path, input: Any) -> None:
    images = [png(picture) for picture in pictures(6)]
    for name, rows, labels in (("train", [0, 1, 2, 3, 3], "ababa"), ("test", [4, 1, 5, 0], "abab")):
        columns = {
            "image": [{"bytes": images[i], "path": None} for i in rows],
            "bytes": [images[i] for i in rows],
            "list": [[i / 7, 2.0] for i in rows],
            "x": [i / 7 for i in rows],
            "n": [i % 2 == 0 for i in rows],
            "y": [*labels],
        }
        writer.write_table(arrow.table(columns), tmp_path / f"{name}.parquet", row_group_size=2)
    train, test = (str(tmp_path / f"{name}.parquet") for name in ("train", "test"))
    data = read(file=train, test_file=test, input=input, target="y")
    identify(data)
    found = prepare(data, data_settings(memory=False)).notes
    assert [note for note in found if "equal" in note] == [
        "warning: 2 of 4 test samples are equal to training samples, 1 of them to one with another label",
        "warning: 2 training samples are equal to one with another label",
    ]


def test_files_that_expand_to_more_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes: a value that repeats is stored once. The sizes and counts in the file are only claims."""
    monkeypatch.setattr(memory, "available_memory", lambda: 64 << 20)
    path = str(tmp_path / "a.parquet")
    long, count = "a" * (1 << 16), 1000
    texts = arrow.DictionaryArray.from_arrays(arrow.array([0] * count, arrow.int32()), [long])
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(np.zeros(count << 11)), 1 << 11)
    writer.write_table(arrow.table({"n": range(count), "text": texts, "list": lists}), path)
    assert Path(path).stat().st_size < 1 << 17
    before = resource.getrlimit(resource.RLIMIT_DATA)
    half = r"takes more than half of the available memory \(32 MiB\)$"
    for keys, message in (
        ({"input": "n", "target": "text"}, rf"^data\.file: (the column text|a batch of rows .*) {half}"),
        ({"input": "n", "target": "list", "labels": "value"}, rf"^data\.file: (the column list|a batch of .*) {half}"),
    ):
        with pytest.raises(UserError, match=message):
            read(file=path, **keys)
    with pytest.raises(UserError, match=half):
        text(
            file=path,
            pattern="*",
            column="text",
            val_file=None,
            tokenizer="bytes",
            vocabulary=None,
            sequence_length=8,
            val_split=0,
            test_split=0,
            saved_tokenizer=None,
        )
    writer.write_table(arrow.table({"n": np.zeros(600_000), "y": np.zeros(600_000)}), path)
    with pytest.raises(UserError, match=rf"^data\.file: the column y with 600,000 rows {half}"):
        read(file=path, input="n", target="y", labels="value")
    writer.write_table(arrow.table({"n": np.zeros(400_000), "y": np.zeros(400_000)}), path)  # 64 and 4 * 8 bytes each
    with pytest.raises(UserError, match=rf"^data\.file: the column y {half}"):
        read(file=path, input="n", target="y", labels="value")
    writer.write_table(arrow.table({"n": np.zeros(100_000), "y": np.zeros(100_000)}), path, 50_000)
    claimed = Path(path).read_bytes()
    Path(path).write_bytes(claimed.replace(varint(100_000), varint(90_000)))
    with pytest.raises(UserError, match=r"a\.parquet: is damaged: has 100,000 rows, not 90,000$"):
        read(file=path, input="n", target="y", labels="value")
    writer.write_table(arrow.table({"n": [np.zeros(2000)], "y": [1]}), path)
    monkeypatch.setattr(module, "_MAX_VALUE", 8000)
    with pytest.raises(UserError, match=r"^data\.file, row 0: n has 15\.. KiB of numbers; at most 7\.81 KiB are allow"):
        read(file=path, input="n", target="y")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before and not list(tmp_path.rglob("*.tmp"))


def varint(number: int) -> bytes:
    """Returns a positive number as the metadata of Parquet files has it."""
    bits = 2 * number
    return bytes([bits & 127 | 128, bits >> 7 & 127 | 128, bits >> 14])


def test_a_table_that_expands_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.parquet")
    writer.write_table(arrow.table({"n": np.zeros(50_000), "y": [i % 2 for i in range(50_000)]}), path)
    mapped = []
    monkeypatch.setattr(reading, "_MAX_READ", 1 << 17)  # more than the size in the file
    monkeypatch.setattr(reading, "_mapped", lambda *arguments: mapped.append(arguments))
    assert len(read(file=path, input="n", target="y").train) == 50_000 and len(mapped) == 1


def named(path: Path, names: list[str] | None, labels: list[Any]) -> str:
    """Writes labels as the package datasets does: as numbers in `names`; the input tells the first letter."""
    flat = [each for label in labels for each in (label if isinstance(label, list) else [label])]
    letters = [ord((label if isinstance(label, str) else (label or flat)[0])[0]) for label in labels]
    order = names or sorted({*flat})
    numbers = [
        [order.index(each) for each in label] if isinstance(label, list) else order.index(label) for label in labels
    ]
    feature: Any = {"names": names, "_type": "ClassLabel"}
    if isinstance(labels[0], list):
        feature = {"feature": feature, "_type": "List"}
    table = arrow.table({"x": list(map(float, letters)), "label": numbers})
    if names is not None:
        content = {"info": {"features": {"x": {"dtype": "float64", "_type": "Value"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(content)})
    writer.write_table(table, path)
    return str(path)


def letters(dataset: Dataset, split: str = "train") -> list[tuple[str, str]]:
    """Returns the first letters of the classes that inputs and targets tell."""
    samples = getattr(dataset, split)
    x, classes = samples.fetch(torch.arange(len(samples))).flatten().tolist(), dataset.classes
    assert classes is not None
    return [(chr(int(value)), classes[target][0]) for value, target in zip(x, samples.targets.tolist(), strict=True)]


@pytest.mark.parametrize("order", [["eel", "dog", "cat"], ["dog", "eel", "cat"], ["ant", "cat", "eel", "dog"]])
def test_classes_of_other_files_are_those_of_the_same_name(tmp_path: Path, order: list[str]) -> None:
    words = ["cat", "eel", "dog", "eel", "cat"]
    train = named(tmp_path / "train.parquet", ["cat", "dog", "eel"], words)
    other = named(tmp_path / "other.parquet", order, words)
    x = {"input": "x"}
    for dataset in (read(file=train, test_file=other, **x), read(file=train, val_file=other, test_file=other, **x)):
        assert dataset.classes == ("cat", "dog", "eel") and not dataset.notes
        assert all(a == b for a, b in letters(dataset, "test"))
    several = read(file=[train, other], test_file=train, **x)
    assert several.classes == ("cat", "dog", "eel") and all(
        a == b for a, b in letters(several) + letters(several, "test")
    )
    texts = str(tmp_path / "texts.parquet")
    writer.write_table(arrow.table({"x": [float(ord(word[0])) for word in words], "label": words}), texts)
    for pair in ({"file": train, "test_file": texts}, {"file": texts, "test_file": other}):
        assert all(a == b for a, b in letters(read(**pair, **x), "test"))
    values = read(file=train, test_file=other, labels="value", **x)
    assert values.test is not None and values.test.targets.tolist() == values.train.targets.tolist()


def test_lists_of_labels_are_those_of_the_same_names(tmp_path: Path) -> None:
    words = [["cat"], ["eel", "cat"], ["dog"]]
    train = named(tmp_path / "train.parquet", ["cat", "dog", "eel"], words)
    other = named(tmp_path / "other.parquet", ["eel", "dog", "cat"], words)
    dataset = read(file=train, test_file=other, input="x", labels="several")
    assert dataset.test is not None and dataset.test.targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_names_that_the_training_set_lacks(tmp_path: Path) -> None:
    train = named(tmp_path / "train.parquet", ["cat", "dog", "eel", "gnu"], ["cat", "eel", "dog"])
    other = named(tmp_path / "other.parquet", ["eel", "fox", "gnu", "owl"], ["eel", "fox", "gnu", "owl"])
    with pytest.raises(
        UserError, match=r"^data\.test_file, row 1: label is 'fox', a class that .* has; nor 'gnu', 'owl'$"
    ):
        read(file=train, test_file=other, input="x")
    with pytest.raises(
        UserError, match=r"^data\.test_file, row 1: label is 'fox', a class that the training set lacks$"
    ):
        read(file=train, test_file=other, input="x", labels="value")


def test_numbers_without_names_are_reported(tmp_path: Path) -> None:
    words = ["cat", "eel", "dog"]
    train = named(tmp_path / "train.parquet", ["cat", "dog", "eel"], words)
    bare = named(tmp_path / "bare.parquet", None, words)
    [note] = read(file=train, test_file=bare, input="x").notes
    assert note.startswith("warning: data.test_file has no names of the classes of label; its numbers are taken for")
    [note] = read(file=bare, test_file=train, input="x").notes
    assert note.startswith("warning: data.file has no names of the classes of label")
    [note] = read(file=[bare, train], input="x").notes
    assert note.startswith("warning: data.file: 1 of 2 files have no names of the classes of label")
    digits = named(tmp_path / "digits.parquet", ["0", "1", "2"], ["0", "2", "1"])
    assert not read(file=digits, test_file=bare, input="x").notes


@pytest.mark.parametrize("most", [0, 1 << 28])
def test_dictionaries_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(reading, "_MAX_READ", most)
    files = []
    for number, words in enumerate((["cat", "eel", "dog"], ["eel", "cat", "dog", "cat"])):
        files.append(str(tmp_path / f"{number}.parquet"))
        labels = arrow.array(words).dictionary_encode()
        writer.write_table(arrow.table({"x": [float(ord(word[0])) for word in words], "label": labels}), files[-1])
    dataset = read(file=files, test_file=files[1], input="x")
    assert all(a == b for a, b in letters(dataset) + letters(dataset, "test"))


def test_a_folder_whose_files_name_classes_differently(tmp_path: Path) -> None:
    """The package datasets takes the names of one file for all."""
    pytest.importorskip("datasets")
    named(tmp_path / "train.parquet", ["cat", "dog", "eel"], ["cat", "eel", "dog"])
    named(tmp_path / "test.parquet", ["eel", "dog", "cat"], ["cat", "eel", "dog"])
    with pytest.raises(UserError, match=r"train\.parquet and .*test\.parquet have other names .* use data=parquet"):
        hub(name=str(tmp_path), split="train", test="test", input="x")


def in_modes(path: Path, modes: list[str], *, seed: int = 0) -> str:
    """Writes images of the given modes, of random colours; "grey": of mode RGB without a colour."""
    files = []
    for mode, pixels in zip(modes, pictures(len(modes), seed), strict=True):
        image = Image.fromarray(pixels)
        image = image.convert("L").convert("RGB") if mode == "grey" else image.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        files.append(buffer.getvalue())
    writer.write_table(arrow.table({"image": files, "label": [i % 2 for i in range(len(files))]}), path)
    return str(path)


def test_a_first_image_in_grey_does_not_decide(tmp_path: Path) -> None:
    mixed = in_modes(tmp_path / "mixed.parquet", ["L", "L", "RGB", "P"])
    grey = in_modes(tmp_path / "grey.parquet", ["L", "grey", "LA", "1"])
    [note] = read(file=mixed).notes
    assert note == "the first image is grey, others have colour (data.file, row 2): all are read in colour"
    assert torch.equal(inputs(read(file=mixed))[2], torch.from_numpy(pictures(4)[2]).permute(2, 0, 1))
    assert read(file=grey).train.shape == (1, 6, 5) and not read(file=grey).notes
    assert torch.equal(inputs(read(file=grey)), inputs(read(file=grey, channels=1)))
    assert read(file=grey, test_file=mixed).train.shape == (3, 6, 5)
    assert read(file=mixed, channels=1).train.shape == (1, 6, 5)


def test_a_colour_that_no_image_looked_at_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.data.rows.rows._LOOKED_AT", 2)
    file = in_modes(tmp_path / "a.parquet", ["L", "grey", "RGB", "L"])
    dataset = read(file=file)
    assert dataset.train.fetch(torch.tensor([0, 1, 3])).shape == (3, 1, 6, 5)
    with pytest.raises(
        UserError, match=r"^data\.channels=null: data\.file, row 2: has colour, .*; set data\.channels=3"
    ):
        dataset.train.fetch(torch.tensor([2]))


def test_kinds_of_lists_and_labels(tmp_path: Path) -> None:
    """The same values as list, large_list and list of one size; labels as pandas and scikit-learn write them."""
    vectors = np.random.default_rng(0).normal(size=(30, 3)).tolist()
    labels = [i % 3 for i in range(30)]
    path = str(tmp_path / "a.parquet")
    keys: dict[str, Any] = {"file": path, "input": "v"}

    def loaded(kind: Any, target: Any) -> Dataset:
        writer.write_table(arrow.table({"v": arrow.array(vectors, kind), "label": target}), path)
        return read(**keys)

    double = arrow.float64()
    first = loaded(arrow.list_(double), labels)
    assert identify(loaded(arrow.large_list(double), labels)) == identify(first)
    for target in (
        arrow.array(labels, double),
        arrow.array([*map(str, labels)]).dictionary_encode(),
        arrow.array([*map(str, labels)], arrow.large_string()),
        arrow.array(labels, arrow.int8()).dictionary_encode(),
    ):
        found = loaded(arrow.list_(double, 3), target)
        assert found.classes == first.classes == ("0", "1", "2")
        assert torch.equal(found.train.targets, first.train.targets)
        is_float = target.type == double
        assert found.notes == (("label: 0.0 is read as the class 0",) if is_float else ()), target.type
    vectors[4] = None
    with pytest.raises(
        UserError, match=r"a\.parquet, row 4: v has no list \(null\), which pyarrow cannot read; remove the row"
    ):
        loaded(arrow.list_(double, 3), labels)
    with pytest.raises(UserError, match="row 4: v is missing"):
        loaded(arrow.list_(double), labels).train.fetch(torch.arange(30))
    vectors[4] = [1.0, None, 2.0]
    for kind in (arrow.list_(double, 3), arrow.list_(double)):
        with pytest.raises(UserError, match=r"row 4: v\[1\] is missing \(null\)"):
            loaded(kind, labels).train.fetch(torch.arange(30))
