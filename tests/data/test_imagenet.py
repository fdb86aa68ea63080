from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlopt.data.imagenet import imagenet
from dlopt.data.samples import Dataset
from dlopt.data.splits import DataSettings, prepare
from dlopt.errors import UserError

WNIDS = ("n01440764", "n02012849", "n03126707")
NAMES = "n03126707 crane\nn01440764 tench, Tinca tinca\nn02012849 crane, bird\nn99999999 other\n"


@pytest.fixture
def root(tmp_path: Path, write_images: Callable[..., list[Path]]) -> Path:
    for number, wnid in enumerate(WNIDS):
        write_images(tmp_path / "train" / wnid, 10, size=(20 + number, 30), suffix=".JPEG", seed=number)
        write_images(tmp_path / "val" / wnid, 2, size=(30, 20 + number), suffix=".JPEG", seed=10 + number)
    return tmp_path


def load(root: Path, class_names: str | None = None) -> Dataset:
    return imagenet(root=str(root), class_names=class_names, on_error="fail", max_skips=0, image_size=16)


def test_the_published_validation_set_is_the_test_set(root: Path, settings: Callable[..., DataSettings]) -> None:
    data = load(root)
    assert data.val is None and data.test is not None and data.classes == WNIDS
    parts = prepare(data, settings(val_split=0.2, memory=False))
    assert parts.val is not None and parts.test is not None
    assert torch.bincount(parts.train.targets).tolist() == [8] * 3
    assert torch.bincount(parts.val.targets).tolist() == torch.bincount(parts.test.targets).tolist() == [2] * 3
    assert parts.train.fetch(torch.tensor([0, 23])).shape == (2, 3, 16, 16)


def test_class_names_are_unique(root: Path, tmp_path: Path) -> None:
    expected = ("tench", "crane (n02012849)", "crane (n03126707)")
    (tmp_path / "names.txt").write_text(NAMES)
    assert load(root, str(tmp_path / "names.txt")).classes == expected
    (root / "LOC_synset_mapping.txt").write_text(NAMES)
    assert load(root).classes == expected


def test_a_class_without_a_name_and_a_missing_file_of_names(root: Path) -> None:
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn02012849\n")
    with pytest.raises(UserError, match=r"data.class_names=.*LOC_synset_mapping.txt: has no line 'n02012849'"):
        load(root)
    with pytest.raises(UserError, match=r"data.class_names=.*none.txt: cannot be read"):
        load(root, str(root / "none.txt"))


def test_without_the_validation_images(root: Path) -> None:
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match=r"val has no class folders; images are expected as CLASS/IMAGE"):
        load(root)
    (root / "val").rmdir()
    assert load(root).test is None
