"""Tar shards in the format of the package webdataset, written by tarfile."""

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batches, Delivery
from dlopt.data.images.folder import image_folder
from dlopt.data.rows import webdataset as module
from dlopt.data.rows.rows import find_files
from dlopt.data.rows.webdataset import webdataset
from dlopt.data.samplers import Random
from dlopt.data.samples import Dataset
from tests.support.line import dlopt
from tests.support.runs import resume, same, start

read = partial(
    webdataset, val_file=None, test_file=None, input="png", target="cls", labels="class", channels=None,
    image_size=None,
)  # fmt: skip
MLP = ("model=mlp", "model.widths=[4]", "threads=1", "device=cpu", "tracking=[]", "data.batch_size=8")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def write(path: Path, members: Iterable[tuple[str, bytes | str]], format: int = tarfile.PAX_FORMAT) -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def shard(path: Path, images: np.ndarray, labels: Iterable[Any], first: int = 0) -> str:
    """Writes images with the labels in `cls`."""
    pairs = enumerate(zip(images, labels, strict=True), first)
    members: list[tuple[str, Any]] = []
    for number, (image, label) in pairs:
        members += [(f"{number:04d}.png", png(image)), (f"{number:04d}.cls", str(label))]
    return write(path, members)


def inputs(dataset: Dataset) -> torch.Tensor:
    return dataset.train.fetch(torch.arange(len(dataset.train)))


def test_images_in_shards_equal_those_of_an_image_folder(tmp_path: Path) -> None:
    images, labels = pictures(9), [0, 1, 0, 2, 1, 2, 0, 1, 2]
    for number, label in enumerate(labels):
        folder = tmp_path / f"folder/train/{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(images[number]))
    shard(tmp_path / "shards/001.tar", images[5:], labels[5:], first=5)
    shard(tmp_path / "shards/000.tar", images[:5], labels[:5])
    test = shard(tmp_path / "test.tar", images[:2], labels[:2])
    folder = image_folder(
        root=str(tmp_path / "folder"), channels=3, on_error="fail", max_skips=0, image_size=None
    )  # sorted by class
    order = torch.tensor(labels).argsort(stable=True)
    for file in ("shards/*.tar", "shards/{000..001}.tar", "shards/{000,001}.tar", "shards"):
        dataset = read(file=str(tmp_path / file), test_file=test)
        assert torch.equal(inputs(dataset), torch.from_numpy(images).permute(0, 3, 1, 2))
        assert torch.equal(inputs(dataset)[order], inputs(folder))
        assert torch.equal(dataset.train.targets[order], folder.train.targets) and dataset.classes == folder.classes
        assert dataset.val is None and dataset.test is not None and dataset.test.targets.tolist() == [0, 1]
        mixed = torch.tensor([8, 0, 4])
        assert torch.equal(dataset.train.fetch(mixed), inputs(dataset)[mixed])
    assert read(file=file, image_size=4).train.shape == (3, 4, 4) if Path(file).exists() else True
    assert read(file=test, channels=1, image_size=(4, 2)).train.shape == (1, 4, 2)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_split_as_by_the_package(format: int, tmp_path: Path) -> None:
    images, name = pictures(4), f"./{'x' * 80}.d/{'y' * 80}/"
    members = [
        ("dataset.d/", b""), ("._a.png", b"of a file system"), ("README", b""), ("a.seg.PNG", png(images[0])),
        ("a.cls", "3"), (f"{name}a.seg.png", png(images[1])), (f"{name}a.cls", " 12\n"),
        ("größe.cls", "3"), ("größe.seg.png", png(images[2])), ("a.cls", "-1"), ("a.seg.png", png(images[3])),
    ]  # fmt: skip
    dataset = read(file=write(tmp_path / "a.tar", members, format), input="seg.png")
    assert torch.equal(inputs(dataset), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert dataset.classes == ("-1", "3", "12") and dataset.train.targets.tolist() == [1, 2, 1, 0]
    assert dataset.notes[0] == "left out: 2 files (1 hidden, 1 without an ending)"


def test_the_first_extension_that_a_sample_has(tmp_path: Path) -> None:
    images = pictures(2)
    buffer = io.BytesIO()
    Image.fromarray(images[1]).save(buffer, "webp", lossless=True)
    members = [("0.png", png(images[0])), ("0.cls", "0"), ("1.webp", buffer.getvalue()), ("1.cls", "1")]
    dataset = read(file=write(tmp_path / "a.tar", members), input=["webp", "png"])
    assert torch.equal(inputs(dataset), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_arrays_numbers_and_names(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors, pixels = draw.normal(size=(3, 4)), pictures(3)
    names, kinds = ["dog", "cat", "dog"], [["red", "round"], [], ["round"]]
    members: list[tuple[str, bytes | str]] = []
    for i in range(3):
        facts = {"label": names[i], "size": {"width": i + 0.5}, "pair": [i, 2 * i], "kinds": kinds[i]}
        members += [
            (f"{i}.npy", npy(vectors[i])), (f"{i}.pixels.npy", npy(pixels[i])), (f"{i}.txt", f"{names[i]}\n"),
            (f"{i}.json", json.dumps(facts)), (f"{i}.value.json", str(i / 4)), (f"{i}.cls", "7"),
            (f"{i}.value.npy", npy(vectors[i, 0])),
        ]  # fmt: skip
    load = partial(read, file=write(tmp_path / "a.tar", members))
    for target in ("txt", "json.label"):
        classes = load(input="npy", target=target)
        assert torch.equal(inputs(classes), torch.from_numpy(vectors).float())
        assert classes.classes == ("cat", "dog") and classes.train.targets.tolist() == [1, 0, 1]
    images = load(input="pixels.npy")
    assert torch.equal(inputs(images), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    values = load(input="json.pair", target="json.size.width", labels="value")
    assert inputs(values).tolist() == [[0, 0], [1, 2], [2, 4]] and values.train.targets.tolist() == [0.5, 1.5, 2.5]
    number = load(input="value.json", target="npy", labels="value")
    assert inputs(number).tolist() == [[0], [0.25], [0.5]]
    assert torch.equal(number.train.targets, torch.from_numpy(vectors).float())
    scalar = load(input="npy", target="value.npy", labels="value")
    assert torch.equal(scalar.train.targets, torch.from_numpy(vectors[:, 0]).float())
    several = load(input="npy", target="json.kinds", labels="several")
    assert several.classes == ("red", "round") and several.train.targets.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_the_index_of_many_samples_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHE_MIN_SAMPLES", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = shard(tmp_path / "a.tar", pictures(5), range(5))
    first = read(file=file)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_index", None)
        again = read(file=file)
    assert torch.equal(inputs(first), inputs(again)) and torch.equal(first.train.targets, again.train.targets)
    shard(tmp_path / "a.tar", pictures(7, seed=1), range(7))
    assert torch.equal(inputs(read(file=file)), torch.from_numpy(pictures(7, seed=1)).permute(0, 3, 1, 2))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    image = png(pictures(1)[0])
    pair = [("0.png", image), ("0.cls", "1")]
    vector = [("0.npy", npy([1.0])), ("0.cls", "1")]
    number = iter(range(99))

    def tar(*members: tuple[str, bytes | str]) -> str:
        return write(tmp_path / f"{next(number)}.tar", members)

    def raw(content: bytes) -> str:
        path = tmp_path / f"{next(number)}.tar"
        path.write_bytes(content)
        return str(path)

    good = tar(*pair, ("1.png", image), ("1.cls", "2"))
    data = Path(good).read_bytes()
    # One block less than a record: after the two blocks that end the archive, another record is filled with zeros.
    filling = tarfile.RECORDSIZE - 6 * tarfile.BLOCKSIZE  # three headers, an image, a label
    filled = Path(tar(*pair, ("0.txt", "x" * filling))).read_bytes()
    assert len(image) <= tarfile.BLOCKSIZE and len(filled) == 2 * tarfile.RECORDSIZE
    files = f"data\\.file: {tmp_path}/\\d+\\.tar: "
    sample = rf"sample \S+ of {tmp_path}/\d+\.tar"
    for keys, message in (
        ({"file": "none/*.tar"}, r"data\.file=none/\*\.tar: no such file; a name, a pattern \(shards/\*\.tar\)"),
        ({"file": f"{tmp_path}/{{0..99}}.tar"}, r"data\.file=.*/\{0\.\.99\}\.tar: .*/\d+\.tar: no such file"),
        ({"file": f"{tmp_path}/{{3..0}}.tar"}, r"data\.file=.*/\{3\.\.0\}\.tar: at least one file"),
        ({"file": "pipe:curl -s x"}, r"data\.file=pipe:curl -s x: no such file"),
        ({"input": "jpg"}, rf"^data\.input=jpg: {sample} has no such member; it has png, cls$"),
        ({"input": ["jpg", "webp"]}, r"^data\.input=\[jpg,webp\]: "),
        ({"target": "txt"}, rf"^data\.target=txt: {sample} has no such member; it has png, cls$"),
        ({"file": tar(*pair, ("1.png", image))}, r"data\.target=cls: sample 1 of .* it has png \(.*tar --sort=name"),
        ({"file": tar(("0.png", image), ("1.png", image), ("0.cls", "1"))}, r"sample 0 of .* it has png \(.*consecut"),
        ({"file": tar(*pair, ("0.png", image))}, rf"data\.file: {sample} has two members \.png"),
        ({"file": tar(("README", ""))}, rf"{files}has no samples; members are named KEY\.EXTENSION"),
        ({"file": tar()}, rf"{files}has no samples"),
        ({"file": raw(b"")}, rf"{files}cannot be read as a tar file \(empty file\)"),
        ({"file": raw(b"no tar" * 200)}, rf"{files}cannot be read as a tar file"),
        ({"file": str(tmp_path)[:-1] + "[" + str(tmp_path)[-1] + "]"}, r"data\.file: .*: cannot be read as a tar file \(Is a"),  # noqa: E501
        ({"file": raw(gzip.compress(data))}, rf"{files}is compressed; samples are read in any order, .* with gunzip"),
        ({"file": raw(data[:700])}, rf"{files}cannot be read as a tar file \(unexpected end of data\)"),
        ({"file": raw(data + data)}, rf"{files}has more than one archive"),
        ({"file": raw(filled + data)}, rf"{files}has more than one archive"),
        ({"file": raw(data[:1024])}, rf"{files}is damaged or truncated at byte 1024"),
        ({"file": raw(data[:1100])}, rf"{files}is damaged or truncated at byte 1024"),
        ({"file": raw(data[:1024] + b"x" * 512 + data[1536:])}, rf"{files}is damaged or truncated at byte 1024"),
        ({"file": tar(("0.png", "no image"), ("0.cls", "1"))}, rf"data\.file: {sample}: png: cannot be read as an image"),  # noqa: E501
        ({"file": tar(("0.png", image), ("0.cls", "dog"))}, rf"{sample}: cls is 'dog', not an integer; txt and json may"),  # noqa: E501
        ({"target": "png"}, rf"{sample}: png: has no decoder; data\.input may be an image, npy or json, and data\.target"),  # noqa: E501
        ({"file": tar(*pair, ("0.mp4", "")), "input": "mp4"}, rf"{sample}: mp4: has no decoder; data\.input may be"),
        ({"input": "cls", "channels": 1}, r"data\.channels=1: only image files are converted"),
        ({"file": tar(*vector, ("0.txt", "a")), "input": "txt"}, rf"{sample}: txt is 'a', not a finite number"),
        ({"file": tar(("0.npy", npy([np.nan])), ("0.cls", "1")), "input": "npy"}, rf"{sample}: npy\[0\] is nan, not"),
        ({"file": tar(("0.npy", "x"), ("0.cls", "1")), "input": "npy"}, rf"{sample}: npy: cannot be read \("),
        (
            {"file": tar(("0.npy", npy([1.0]).replace(b"(1,)", b"(%d,)" % 10**13)), ("0.cls", "1")), "input": "npy"},
            rf"{sample}: npy: cannot be read \(",
        ),
        (
            {"file": tar(("0.npy", npy(np.array([{}]))), ("0.cls", "1")), "input": "npy"},
            rf"{sample}: npy: cannot be read \(Object arrays cannot be loaded when allow_pickle=False\)",
        ),
        ({"file": tar(("0.png", image), ("0.json", "{")), "target": "json"}, rf"{sample}: json: cannot be read \(Expec"),  # noqa: E501
        (
            {"file": tar(("0.png", image), ("0.json", '{"a": 1, "b": 2}')), "target": "json"},
            rf"{sample}: json is an object; name a field of it: json\.a, json\.b",
        ),
        (
            {"file": tar(("0.png", image), ("0.json", '{"a": 1}')), "target": "json.b"},
            rf"{sample}: json\.b: json has no field b; it has a",
        ),
        (
            {"file": tar(("0.png", image), ("0.json", '{"a": 1}')), "target": "json.a.b"},
            rf"{sample}: json\.a\.b: json\.a has no field b; it has the type int",
        ),
        ({"file": tar(("0.png", image), ("0.json", "null")), "target": "json"}, rf"{sample}: json is missing"),
        (
            {"file": tar(("0.png", image), ("0.json", "0.5")), "target": "json"},
            r"data\.labels=class: json of sample 0 is of the type float; classes are .*data\.labels=value",
        ),
        ({"labels": "several"}, rf"data\.labels=several: data\.file: {sample}: cls must be a list"),
        ({"test_file": tar(("0.png", image), ("0.cls", "5"))}, rf"data\.test_file: {sample}: cls is 5, a class that no"),  # noqa: E501
        (
            {"file": tar(*pair, ("1.png", png(pictures(1)[0, :3])), ("1.cls", "1"))},
            r"data\.file\[1\]: has shape \(3, 3, 5\), the first .*data\.image_size resizes images",
        ),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            inputs(read(**{"file": good, **keys}))
        assert "\n" not in str(caught.value)
    dataset = read(file=good)
    Path(good).write_bytes(data[:600])
    with pytest.raises(UserError, match=rf"data\.file: {sample}: the file has been cut since its samples were listed"):
        inputs(dataset)
    Path(good).unlink()
    with pytest.raises(UserError, match=rf"data\.file: {sample}: cannot be read \(No such file or directory\)"):
        inputs(dataset)


def test_braces(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10", "{c,d}"):
        (tmp_path / f"{name}.tar").touch()

    def found(pattern: str) -> list[str]:
        return [Path(path).stem for path in find_files("data.file", f"{tmp_path}/{pattern}", ".tar")[0]]

    assert found("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert found("{b,a}-{09..10}.tar") == ["b-09", "b-10", "a-09", "a-10"]
    assert found("{b,a}-*9.tar") == ["b-09", "a-09"]
    assert found("{c,d}.tar") == ["{c,d}"]


def test_a_resumed_run_is_bitwise_identical(tmp_path: Path) -> None:
    shard(tmp_path / "shards/a.tar", pictures(40), [i % 3 for i in range(40)])
    shard(tmp_path / "shards/b.tar", pictures(30, seed=1), [i % 3 for i in range(30)])
    line = [
        "data=webdataset",
        f"data.file={tmp_path}/shards/*.tar",
        "data.input=png",
        *MLP,
        "data.memory=false",
        "epochs=2",
    ]
    start(tmp_path / "whole", *line)
    stopped = start(tmp_path / "parts", *line, "max_time=0.0001")
    assert stopped["status"] == "interrupted" and stopped["steps"] % 8  # within an epoch
    assert resume(tmp_path / "parts", *line)["status"] == "finished"
    states = [torch.load(tmp_path / each / "checkpoints/last.pt", weights_only=True) for each in ("whole", "parts")]
    assert same(states[0]["model"], states[1]["model"]) and same(states[0]["optimizer"], states[1]["optimizer"])


def test_two_ranks_read_the_batches_of_one_process(tmp_path: Path) -> None:
    images = pictures(23)
    for number in range(3):
        part = slice(8 * number, 8 * number + 8)
        shard(tmp_path / f"{number}.tar", images[part], range(23)[part])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)

    def epoch(rank: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        samples = read(file=str(tmp_path / "*.tar")).train  # each rank has its own index
        sampler = Random(targets=samples.targets, seed=5, epoch_size=None)
        part = lambda total: slice(total * rank // ranks, total * (rank + 1) // ranks)  # noqa: E731
        delivery = Delivery(torch.device("cpu"), in_memory=False, workers=0)
        return list(Batches(samples, delivery, batch_size=8, sampler=sampler, shard=part).epoch(0))

    whole, first, second = epoch(0, 1), epoch(0, 2), epoch(1, 2)
    for (x, y), *halves in zip(whole, first, second, strict=True):
        assert torch.equal(x, torch.cat([inputs for inputs, _ in halves]))
        assert torch.equal(y, torch.cat([targets for _, targets in halves]))
        assert torch.equal(x, pixels[y].float())


def test_a_run_ends_and_is_evaluated(tmp_path: Path) -> None:
    shard(tmp_path / "shards/0.tar", pictures(30), [i % 3 for i in range(30)])
    shard(tmp_path / "test.tar", pictures(6, seed=1), [i % 3 for i in range(6)])
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.png").write_bytes(png(pictures(1)[0]))
    line = ["data=webdataset", "data.file='shards/{0..0}.tar'", "data.input=png", "data.test_file=test.tar", "epochs=2"]
    done = dlopt(tmp_path, "train", *line, *MLP, "hydra.run.dir=run")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "finished"
    evaluated = dlopt(tmp_path, "eval", "checkpoint=run", "device=cpu")
    assert evaluated.code == 0 and f"{summary['test_loss']:.4f}" in evaluated.out, evaluated.err
    predicted = dlopt(tmp_path, "predict", "checkpoint=run", "images=new", "device=cpu")
    assert predicted.code == 0, predicted.err
    assert "a.png" in (tmp_path / "predictions.csv").read_text()


def test_metadata_of_a_shard_is_skipped(tmp_path: Path) -> None:
    """As the package webdataset does: `__meta__/...`, and names between double underscores."""
    images = pictures(4)
    members: list[tuple[str, bytes | str]] = [("__meta__/info.json", "{}"), ("__index__", "1"), ("__x__/a/b.cls", "7")]
    for number, image in enumerate(images):
        members += [(f"{number}.png", png(image)), (f"{number}.cls", str(number % 2))]
        members += [(f"__meta__/{number}.json", "{}")]
    dataset = read(file=write(tmp_path / "a.tar", members))
    assert dataset.train.targets.tolist() == [0, 1, 0, 1]
    assert (inputs(dataset).numpy() == np.moveaxis(images, 3, 1)).all()


def test_labels_of_texts_and_what_looks_wrong(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = []
    for number in range(24):
        members += [(f"{number:02d}.npy", npy([1.7e9 + number, number % 5])), (f"{number:02d}.txt", f"{number % 12}")]
    write(tmp_path / "shards/a.TAR", members)
    (tmp_path / "shards/index.json").write_text("{}")
    dataset = read(file=str(tmp_path / "shards"), input="npy", target="txt")
    assert dataset.classes == tuple(map(str, range(12))) and dataset.source == "24 samples of 1 file"
    assert [note[:40] for note in dataset.notes] == [
        "left out: 1 file (1 *.json)",
        "warning: feature 1 counts the rows; leav",
        "warning: float32 rounds feature 1 by up ",
    ]
    mixed = write(tmp_path / "b.tar", [("0.png", png(pictures(1)[0])), ("0.json", "1"),
                                       ("1.png", png(pictures(1)[0])), ("1.json", '"a"')])  # fmt: skip
    with pytest.raises(UserError, match=r"json has integers and texts such as 'a'; classes must be of one type"):
        read(file=mixed, target="json")


def test_links_are_counted_also_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU tar stores a file that occurs twice as a link to its first copy."""
    monkeypatch.setattr(module, "_CACHE_MIN_SAMPLES", 1)
    file = shard(tmp_path / "a.tar", pictures(4), [0, 1, 0, 1])
    with tarfile.open(file, "a") as tar:
        for name in ("png", "cls"):
            entry = tarfile.TarInfo(f"0004.{name}")
            entry.type, entry.linkname = tarfile.LNKTYPE, f"0000.{name}"
            tar.addfile(entry)
    for _ in range(2):
        dataset = read(file=file)
        assert len(dataset.train) == 4 and dataset.notes == ("left out: 2 files (2 links in shards)",)


@pytest.mark.parametrize("label", ["1_0", "\u0661", "1.0", ""])
def test_labels_that_are_no_integers(label: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", [("0.png", png(pictures(1)[0])), ("0.cls", label)])
    with pytest.raises(UserError, match=r"cls is '.*', not an integer; txt and json may have names"):
        read(file=file)


# -- hostile archives, written block by block


def blocks(name: str, content: bytes = b"", *, claims: int | None = None, kind: bytes = b"0", link: str = "") -> bytes:
    """Returns a header and its content; `claims`: the size in the header."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(content) if claims is None else claims
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


IMAGE = png(pictures(1)[0])
PAIR = blocks("0.png", IMAGE) + blocks("0.cls", b"1")
NEXT = blocks("1.png", IMAGE) + blocks("1.cls", b"1")
SECRET = "/etc/passwd"
HOSTILE = {
    "a name outside": (blocks("../../0.png", IMAGE) + blocks("../../0.cls", b"1"), 1),
    "an absolute name": (blocks("/etc/0.png", IMAGE) + blocks("/etc/0.cls", b"1"), 1),
    "letters of a terminal": (blocks("\x1b[31m\n.png", IMAGE) + blocks("\x1b[31m\n.cls", b"1"), 1),
    "a symbolic link": (PAIR + blocks("1.png", IMAGE) + blocks("1.cls", kind=b"2", link=SECRET), "cls: sample 1 of"),
    "a hard link": (PAIR + blocks("1.png", kind=b"1", link=SECRET) + blocks("1.cls", b"1"), "png: sample 1 of"),
    "a device": (PAIR + blocks("1.png", kind=b"3") + blocks("1.cls", b"1"), "png: sample 1 of"),
    "a pipe": (PAIR + blocks("1.png", kind=b"6") + blocks("1.cls", b"1"), "png: sample 1 of"),
    "a folder": (PAIR + blocks("1.png", kind=b"5") + blocks("1.cls", b"1"), "png: sample 1 of"),
    "a sparse file": (PAIR + blocks("1.png", IMAGE, kind=b"S") + blocks("1.cls", b"1"), "png: sample 1 of"),
    "a huge member": (PAIR + blocks("1.png", claims=10**17), "cannot be read as a tar file"),
    "a larger size than any file": (PAIR + blocks("1.png", claims=2**70), "cannot be read as a tar file"),
    "a negative size": (PAIR + blocks("1.png", claims=-1), "sample 1 of .* has no such member"),
    "a huge name": (PAIR + blocks("1", claims=10**15, kind=b"L"), "cannot be read as a tar file"),
    "a size of digits": (PAIR + blocks("1", b"28 size=" + b"9" * 19 + b"\n", kind=b"x") + NEXT, "cannot be read as"),
    "a size of letters": (PAIR + blocks("1", b"9 size=x\n", kind=b"x") + NEXT, "is damaged or truncated"),
    "a record without a length": (PAIR + blocks("1", b"0 path=x\n", kind=b"x") + NEXT, "is damaged or truncated"),
    "a map of a sparse file": (PAIR + blocks("1", b"22 GNU.sparse.map=0,x\n", kind=b"x") + NEXT, "cannot be read as"),
    "a label of 5,000 digits": (blocks("0.png", IMAGE) + blocks("0.cls", b"9" * 5000), "cls is '9+', not an integer"),
    "an empty image": (blocks("0.png") + blocks("0.cls", b"1"), "png: cannot be read as an image"),
    "no header": (PAIR + b"\1" * 512, "is damaged or truncated at byte"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives(content: bytes, expected: int | str, tmp_path: Path) -> None:
    """Nothing is unpacked, followed or allocated before it is believed."""
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    tracemalloc.start()
    try:
        if isinstance(expected, int):
            assert len(inputs(read(file=str(tmp_path / "a.tar")))) == expected
        else:
            with pytest.raises(UserError, match=expected):
                inputs(read(file=str(tmp_path / "a.tar")))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
