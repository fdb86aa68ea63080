import gzip
import hashlib
import pickle
import struct
import tracemalloc
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from dlopt.basics.errors import UserError
from dlopt.data.images import downloads
from dlopt.data.images.downloads import cifar10, cifar100, fashion_mnist, mnist, read_idx
from tests.support.idx import idx_bytes, write
from tests.support.requires import requires


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_are_found_and_read(tmp_path: Path, place: str, zipped: bool) -> None:
    arrays = write(tmp_path / place, zipped)
    data = mnist(root=str(tmp_path), download=False)
    assert data.test is not None and data.classes == tuple("0123456789")
    for part, prefix in ((data.train, "train"), (data.test, "t10k")):
        images = torch.from_numpy(arrays[f"{prefix}-images-idx3-ubyte"]).unsqueeze(1)
        assert part.shape == (1, 4, 3) and torch.equal(part.fetch(torch.arange(len(part))).long(), images)
        assert part.targets.tolist() == arrays[f"{prefix}-labels-idx1-ubyte"].tolist()


def test_default_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "elsewhere", True)
    monkeypatch.setenv("DLOPT_DATA", str(tmp_path / "elsewhere"))
    assert len(mnist(root=None, download=False).train) == 12
    monkeypatch.delenv("DLOPT_DATA")
    write(tmp_path / "data" / "raw", True, train=11)
    monkeypatch.chdir(tmp_path)
    assert len(mnist(root=None, download=False).train) == 11


def test_debian_package_is_the_fallback_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "debian", True, train=10)
    monkeypatch.setattr(downloads, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    data = fashion_mnist(root=None, download=False)
    assert len(data.train) == 10 and data.classes is not None and data.classes[9] == "Ankle boot"
    with pytest.raises(UserError, match=r"data=fashion_mnist: no IDX files .* set data.root"):
        fashion_mnist(root=str(tmp_path), download=False)
    write(tmp_path / "data", False, train=20)
    assert len(fashion_mnist(root=None, download=False).train) == 20


@pytest.mark.slow
@requires("fashion-mnist")
def test_the_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLOPT_DATA", raising=False)
    data = fashion_mnist(root=None, download=False)
    assert data.test is not None and data.train.shape == (1, 28, 28)
    assert torch.bincount(data.train.targets).tolist() == [6000] * 10
    assert torch.bincount(data.test.targets).tolist() == [1000] * 10


def test_missing_files_are_downloaded_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, download_root: str, filename: str, **_: Any) -> None:
        prefix, kind = filename.split("-")[0], filename.split("-")[1]
        array = np.zeros((10, 4, 4)) if kind == "images" else np.arange(10)
        Path(download_root, filename.removesuffix(".gz")).write_bytes(idx_bytes(array))
        assert prefix in ("train", "t10k")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    assert len(mnist(root=str(tmp_path), download=True).train) == 10
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", None)
    assert len(mnist(root=str(tmp_path), download=True).train) == 10  # they are there now


def test_failed_download_suggests_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    with pytest.raises(
        UserError, match=rf"data=mnist: downloading to {tmp_path}/new failed .*no route to host"
    ) as caught:
        mnist(root=str(tmp_path / "new"), download=True)
    assert "\n" not in str(caught.value) and "data.download=false" in str(caught.value)
    assert not list(tmp_path.iterdir())  # torchvision makes new/MNIST/raw before the download


def test_messages_name_the_folder_of_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no IDX files .* in {tmp_path}/mine"):
        mnist(root="mine", download=False)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is not an IDX file"),
        (b"hello world", "is not an IDX file"),
        (struct.pack(">HBBI", 0, 9, 1, 3) + b"123", "is not an IDX file"),
        (struct.pack(">HBBI", 0, 8, 1, 3) + b"12", r"is damaged: 2 bytes of data for the shape \[3\]"),
        (struct.pack(">HBB", 0, 8, 3) + b"\0\0\0\5", "is damaged"),
        (struct.pack(">HBBI", 0, 8, 1, 3) + b"1234", "is damaged: more than 3 bytes of data"),
        (struct.pack(">HBBII", 0, 8, 2, 10**6, 10**6), "is damaged or too large"),
        (struct.pack(">HBB255I", 0, 8, 255, *[2**32 - 1] * 255), "is damaged or too large"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x-ubyte"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        read_idx(path)


def test_truncated_or_invalid_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)))
    for data in (whole[: len(whole) // 2], b"plain", whole[:15] + b"\xff" * 30 + whole[45:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read_idx(path)


def test_a_gzip_bomb_is_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 3))
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match="is damaged: more than 3 bytes"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("train-labels-idx1-ubyte", np.arange(11) % 10, "labels for 12 images"),
        ("train-labels-idx1-ubyte", np.full(12, 10), "has a label 10; 0 to 9"),
        ("t10k-images-idx3-ubyte", np.zeros((5, 3)), r"the shape \[5, 3\]"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 3, 3)), r"the shape \[0, 3, 3\]"),
    ],
)
def test_rejects_inconsistent_files(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    write(tmp_path, zipped=False)
    (tmp_path / name).write_bytes(idx_bytes(array))
    with pytest.raises(UserError, match=f"{tmp_path / name}.*{message}"):
        mnist(root=str(tmp_path), download=False)


# -- CIFAR


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def small_cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes pickles in torchvision's layout, with the expected checksums."""
    source = getattr(torchvision.datasets, request.param)
    folder = tmp_path / source.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)
    label_key = "labels" if request.param == "CIFAR10" else "fine_labels"
    classes = 10 if request.param == "CIFAR10" else 100

    def write_pickle(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        written = []
        for name, _ in getattr(source, attribute):
            pixels = draw.integers(0, 256, (6, 3072), dtype=np.uint8)
            written.append(write_pickle(name, {"data": pixels, label_key: list(range(6))}))
        monkeypatch.setattr(source, attribute, written)
    names = [f"class {i}" for i in range(classes)]
    name, digest = write_pickle(source.meta["filename"], {source.meta["key"]: names})
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": name, "md5": digest})
    return {"CIFAR10": cifar10, "CIFAR100": cifar100}[request.param], source, tmp_path


def test_reads_torchvisions_layout_of_cifar(small_cifar: Any) -> None:
    load, source, root = small_cifar
    data = load(root=str(root), download=False)
    reference = source(root, train=True)
    assert data.train.shape == (3, 32, 32) and data.classes == tuple(reference.classes)
    for index in (0, 5):
        image, label = reference[index]
        ours = data.train.fetch(torch.tensor([index]))[0]
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image)) and data.train.targets[index] == label
    assert data.test is not None and len(data.test) == 6 and len(data.train) == 6 * len(source.train_list)


def test_root_may_be_the_folder_of_the_batches(small_cifar: Any) -> None:
    load, source, root = small_cifar
    assert len(load(root=str(root / source.base_folder), download=False).train) > 0


def test_rejects_a_changed_file_before_unpickling(small_cifar: Any) -> None:
    load, source, root = small_cifar
    with (root / source.base_folder / source.test_list[0][0]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=rf"{root}: Dataset not found or corrupted.*data.download=true"):
        load(root=str(root), download=False)


def test_missing_cifar_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"data=cifar10: {tmp_path}: Dataset not found.*data.root"):
        cifar10(root=str(tmp_path), download=False)

    def download(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    with pytest.raises(UserError, match=rf"downloading to {tmp_path} failed .*data.download=false"):
        cifar10(root=str(tmp_path), download=True)
