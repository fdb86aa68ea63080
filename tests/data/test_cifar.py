import hashlib
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from dlopt.data.cifar import cifar10, cifar100
from dlopt.errors import UserError


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes pickles in torchvision's layout, with the expected checksums."""
    source = getattr(torchvision.datasets, request.param)
    folder = tmp_path / source.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)
    label_key = "labels" if request.param == "CIFAR10" else "fine_labels"
    classes = 10 if request.param == "CIFAR10" else 100

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        written = []
        for name, _ in getattr(source, attribute):
            pixels = draw.integers(0, 256, (6, 3072), dtype=np.uint8)
            written.append(write(name, {"data": pixels, label_key: list(range(6))}))
        monkeypatch.setattr(source, attribute, written)
    names = [f"class {i}" for i in range(classes)]
    name, digest = write(source.meta["filename"], {source.meta["key"]: names})
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": name, "md5": digest})
    return {"CIFAR10": cifar10, "CIFAR100": cifar100}[request.param], source, tmp_path


def test_reads_torchvisions_layout(small: Any) -> None:
    load, source, root = small
    data = load(root=str(root), download=False)
    reference = source(root, train=True)
    assert data.train.shape == (3, 32, 32) and data.classes == tuple(reference.classes)
    for index in (0, 5):
        image, label = reference[index]
        ours = data.train.fetch(torch.tensor([index]))[0]
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image)) and data.train.targets[index] == label
    assert data.test is not None and len(data.test) == 6 and len(data.train) == 6 * len(source.train_list)


def test_root_may_be_the_folder_of_the_batches(small: Any) -> None:
    load, source, root = small
    assert len(load(root=str(root / source.base_folder), download=False).train) > 0


def test_rejects_a_changed_file_before_unpickling(small: Any) -> None:
    load, source, root = small
    with (root / source.base_folder / source.test_list[0][0]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=rf"{root}: Dataset not found or corrupted.*data.download=true"):
        load(root=str(root), download=False)


def test_missing_data_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"data=cifar10: {tmp_path}: Dataset not found.*data.root"):
        cifar10(root=str(tmp_path), download=False)

    def download(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    with pytest.raises(UserError, match=rf"downloading to {tmp_path} failed .*data.download=false"):
        cifar10(root=str(tmp_path), download=True)
