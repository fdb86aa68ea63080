import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batches, Delivery
from dlopt.data.images.decoding import decode
from dlopt.data.images.folder import image_folder, imagenet
from dlopt.data.samples import Dataset
from dlopt.data.splits import DataSettings, prepare

WriteImages = Callable[..., list[Path]]


def load(root: Path, size: int | tuple[int, int] | None = None) -> Dataset:
    return image_folder(root=str(root), channels=3, on_error="fail", max_skips=0, image_size=size)


@pytest.fixture
def root(tmp_path: Path, write_images: WriteImages) -> Path:
    for part, cats, dogs in (("train", 4, 3), ("val", 2, 1), ("test", 1, 2)):
        write_images(tmp_path / part / "cat", cats, suffix=".jpg", seed=cats)
        write_images(tmp_path / part / "dog", dogs, suffix=".jpg", seed=10 + dogs)
    return tmp_path


def test_folders_become_classes(root: Path, write_images: WriteImages) -> None:
    nested = write_images(root / "train" / "dog" / "more", 1)[0]
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._000.jpg").write_text("of a file system")
    (root / "train" / ".cache").mkdir()
    write_images(root / "train" / "dog" / ".thumbnails", 1)
    data = load(root)
    assert data.classes == ("cat", "dog") and data.train.shape == (3, 6, 5)
    assert data.val is not None and data.test is not None
    assert [part.targets.tolist() for part in (data.train, data.val, data.test)] == [
        [0] * 4 + [1] * 4, [0, 0, 1], [0, 1, 1],
    ]  # fmt: skip
    first = decode(str(root / "train" / "cat" / "000.jpg"), None, 3)
    assert torch.equal(data.train.fetch(torch.tensor([0]))[0], first)
    assert torch.equal(data.train.fetch(torch.tensor([7]))[0], decode(str(nested), None, 3))


def test_without_val_and_test(tmp_path: Path, write_images: WriteImages, settings: Callable[..., DataSettings]) -> None:
    for name in "ab":
        write_images(tmp_path / "train" / name, 10, seed=ord(name))
    parts = prepare(load(tmp_path), settings(val_split=0.2))
    assert parts.test is None and parts.val is not None and parts.val.targets.tolist() == [0, 0, 1, 1]


def test_any_size_with_image_size(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "train" / "a", 1, size=(9, 30))
    write_images(tmp_path / "train" / "b", 1, size=(50, 20), mode="L")
    assert load(tmp_path, 8).train.fetch(torch.arange(2)).shape == (2, 3, 8, 8)
    assert load(tmp_path, (4, 6)).train.shape == (3, 4, 6)
    with pytest.raises(UserError, match=r"data.image_size=null"):
        load(tmp_path)


def test_one_sample_per_class_and_one_channel(
    tmp_path: Path, write_images: WriteImages, settings: Callable[..., DataSettings]
) -> None:
    for name in "abc":
        write_images(tmp_path / "train" / name, 1, mode="L", seed=ord(name))
    data = image_folder(root=str(tmp_path), channels=1, on_error="fail", max_skips=0, image_size=None)
    parts = prepare(data, settings(val_split=0.1))
    assert parts.val is None
    delivery = Delivery(torch.device("cpu"), parts.in_memory, workers=0)
    ((inputs, targets),) = Batches(parts.train, delivery, batch_size=128).epoch(0)
    assert inputs.shape == (3, 1, 6, 5) and targets.tolist() == [0, 1, 2]


def test_class_folders_without_splits_are_a_training_set(
    tmp_path: Path, write_images: WriteImages, settings: Callable[..., DataSettings]
) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 10, seed=ord(name[0]))
    data = load(tmp_path)
    assert data.classes == ("cat", "dog") and len(data.train) == 20 and data.val is None and data.test is None
    [note] = data.notes
    assert str(tmp_path) in note and "one set" in note
    parts = prepare(data, settings(val_split=0.2))
    assert parts.val is not None and len(parts.val) == 4


@pytest.mark.parametrize("more", ["pets/train/cat", "test/cat", "a/b"])
def test_other_folders_are_not_classes(tmp_path: Path, write_images: WriteImages, more: str) -> None:
    write_images(tmp_path / "cat", 2)
    write_images(tmp_path / more, 2)
    with pytest.raises(UserError, match=r"train is missing; images are expected as train/CLASS/IMAGE, or as CLASS"):
        load(tmp_path)


def test_a_single_class_folder_is_named(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "cat", 2)
    with pytest.raises(UserError, match=r"has one class folder, cat; images are expected as CLASS/IMAGE of two"):
        load(tmp_path)


def remove(path: Path) -> None:
    for name in path.iterdir():
        name.unlink()
    path.rmdir()


def test_a_missing_root_or_train_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.root={tmp_path}/none: is missing"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=rf"data.root=none: is missing in {Path.cwd()}"):
        load(Path("none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is not a folder"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match=rf"{tmp_path}/train is missing; images are expected as train/CLASS/IMAGE"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/train has no class folders"):
        load(tmp_path)


def test_an_empty_class_folder_is_named(root: Path) -> None:
    (root / "train" / "eel").mkdir()
    with pytest.raises(UserError, match=rf"{root}/train/eel has no images$"):
        load(root)
    (root / "train" / "eel" / "0.heic").write_text("")
    with pytest.raises(UserError, match=rf"{root}/train/eel has no images \(left out: 1 file \(1 \*\.heic\)\)"):
        load(root)


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("layout", ["missing", "empty"])
def test_a_class_without_images_in_one_part(
    root: Path, part: str, layout: str, settings: Callable[..., DataSettings]
) -> None:
    remove(root / part / "cat")
    if layout == "empty":
        (root / part / "cat").mkdir()
    dataset = load(root)
    samples = getattr(dataset, part)
    assert set(samples.targets.tolist()) == {1} and dataset.classes == ("cat", "dog")
    name = "validation" if part == "val" else "test"
    assert f"warning: the {name} set has no sample of class cat" in prepare(dataset, settings()).notes
    remove(root / part / "dog")
    with pytest.raises(UserError, match=rf"{root}/{part} has no (images|class folders)"):
        load(root)


def test_a_misnamed_class_folder_is_named(root: Path) -> None:
    (root / "test/dog").rename(root / "test/Dog")
    with pytest.raises(UserError, match=rf"train has no class folder like {root}/test/Dog, and dog is missing there"):
        load(root)


def test_what_is_left_out_is_counted(root: Path) -> None:
    (root / "train/cat/000.jpg").rename(root / "train/cat/000.JFIF")
    for name in ("train/cat/a.txt", "train/dog/b.TXT", "test/dog/c.txt", "train/d.jpg", "val/dog/README", "val/.e.jpg"):
        (root / name).write_text("")
    (root / "valid").mkdir()
    dataset = load(root)
    assert dataset.source == "13 images in 2 class folders"
    assert dataset.notes == (
        "left out: 6 files (2 *.txt, 1 *.TXT, 1 hidden, 1 outside of the class folders, 1 without an ending)",
        "left out: folder valid (train, val and test are read)",
    )


def test_numbered_class_folders_keep_the_order_of_their_names(tmp_path: Path, write_images: WriteImages) -> None:
    """As in torchvision; weights that were trained elsewhere depend on it."""
    for name in ("0", "1", "2", "10"):
        write_images(tmp_path / "train" / name, 2)
    dataset = load(tmp_path)
    assert dataset.classes == ("0", "1", "10", "2")
    assert dataset.notes == ("the class folders are in the order of their names, not of their numbers: 0, 1, 10, 2",)


def test_a_class_that_train_lacks_is_named(root: Path) -> None:
    remove(root / "train" / "dog")
    with pytest.raises(UserError, match=rf"train has no class folder like {root}/val/dog"):
        load(root)


def test_an_unreadable_folder_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(name: str) -> Callable[[bytes], object]:
        def failing(path: bytes) -> object:
            if os.fsdecode(path).rstrip("/").endswith(name):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        return failing

    monkeypatch.setattr(os, "scandir", refuse("val"))
    with pytest.raises(UserError, match=rf"{root}/val: cannot be read \(Permission denied\)"):
        load(root)
    monkeypatch.setattr(os, "scandir", refuse("dog"))
    with pytest.raises(UserError, match=rf"{root}/train/dog: cannot be read \(Permission denied\)"):
        load(root)


def test_a_corrupt_image_is_named(root: Path, settings: Callable[..., DataSettings]) -> None:
    bad = root / "train" / "cat" / "000.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) * 3 // 4])  # the header is whole, the pixels are not
    with pytest.raises(UserError, match=rf"{bad}: cannot be read as an image"):
        prepare(load(root), settings())
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{bad}: cannot be read as an image"):
        load(root)


# -- ImageNet


WNIDS = ("n01440764", "n02012849", "n03126707")
NAMES = "n03126707 crane\nn01440764 tench, Tinca tinca\nn02012849 crane, bird\nn99999999 other\n"


@pytest.fixture
def imagenet_root(tmp_path: Path, write_images: WriteImages) -> Path:
    for number, wnid in enumerate(WNIDS):
        write_images(tmp_path / "train" / wnid, 10, size=(20 + number, 30), suffix=".JPEG", seed=number)
        write_images(tmp_path / "val" / wnid, 2, size=(30, 20 + number), suffix=".JPEG", seed=10 + number)
    return tmp_path


def load_imagenet(root: Path, class_names: str | None = None) -> Dataset:
    return imagenet(root=str(root), class_names=class_names, on_error="fail", max_skips=0, image_size=16)


def test_the_published_validation_set_is_the_test_set(
    imagenet_root: Path, settings: Callable[..., DataSettings]
) -> None:
    data = load_imagenet(imagenet_root)
    assert data.val is None and data.test is not None and data.classes == WNIDS
    parts = prepare(data, settings(val_split=0.2, memory=False))
    assert parts.val is not None and parts.test is not None
    assert torch.bincount(parts.train.targets).tolist() == [8] * 3
    assert torch.bincount(parts.val.targets).tolist() == torch.bincount(parts.test.targets).tolist() == [2] * 3
    assert parts.train.fetch(torch.tensor([0, 23])).shape == (2, 3, 16, 16)


def test_class_names_are_unique(imagenet_root: Path, tmp_path: Path) -> None:
    expected = ("tench", "crane (n02012849)", "crane (n03126707)")
    (tmp_path / "names.txt").write_text(NAMES)
    assert load_imagenet(imagenet_root, str(tmp_path / "names.txt")).classes == expected
    (imagenet_root / "LOC_synset_mapping.txt").write_text(NAMES)
    assert load_imagenet(imagenet_root).classes == expected


def test_a_class_without_a_name_and_a_missing_file_of_names(imagenet_root: Path) -> None:
    (imagenet_root / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn02012849\n")
    with pytest.raises(UserError, match=r"data.class_names=.*LOC_synset_mapping.txt: has no line 'n02012849'"):
        load_imagenet(imagenet_root)
    with pytest.raises(UserError, match=r"data.class_names=.*none.txt: cannot be read"):
        load_imagenet(imagenet_root, str(imagenet_root / "none.txt"))


def test_without_the_validation_images(imagenet_root: Path) -> None:
    for path in sorted((imagenet_root / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match=r"val has no class folders; images are expected as CLASS/IMAGE"):
        load_imagenet(imagenet_root)
    (imagenet_root / "val").rmdir()
    assert load_imagenet(imagenet_root).test is None
