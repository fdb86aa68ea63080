from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.images import unreadable
from dlopt.data.images.csv_images import csv
from dlopt.data.images.decoding import decode
from dlopt.data.images.folder import image_folder
from dlopt.data.samples import Dataset
from dlopt.data.splits import prepare

WriteImages = Callable[..., list[Path]]


@pytest.fixture
def root(tmp_path: Path, write_images: WriteImages) -> Path:
    for name in "ab":
        write_images(tmp_path / "train" / name, 6, seed=ord(name))
    (tmp_path / "train/a/003.png").write_bytes(b"")
    return tmp_path


def load(root: Path) -> Dataset:
    return image_folder(root=str(root), channels=3, on_error="skip", max_skips=2, image_size=None)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the images that are checked."""
    paths: list[str] = []

    def record(path: str, size: tuple[int, int] | None, channels: int) -> torch.Tensor:
        paths.append(path)
        return decode(path, size, channels)

    monkeypatch.setattr(unreadable, "decode", record)
    monkeypatch.setattr(unreadable, "_reason", lambda path: f"{path}: broken")
    return paths


def test_only_changed_files_are_checked_again(root: Path, checked: list[str], write_images: WriteImages) -> None:
    first = load(root)
    assert len(checked) == 12 and len(first.train) == 11
    checked.clear()
    # a change of an empty file cannot be detected, so it is checked every time
    again = load(root)
    assert checked == [str(root / "train/a/003.png")] and again.notes == first.notes
    assert torch.equal(again.train.targets, first.train.targets)

    checked.clear()
    (root / "train/a/003.png").write_bytes((root / "train/a/002.png").read_bytes())  # repaired
    (root / "train/b/001.png").write_bytes(b"damaged")
    write_images(root / "train/b/new", 1)
    changed = load(root)
    assert sorted(checked) == [str(root / f"train/{name}") for name in ("a/003.png", "b/001.png", "b/new/000.png")]
    assert len(changed.train) == 12 and "train/b/001.png" in changed.notes[1]


def test_damaged_cache_is_ignored(root: Path, checked: list[str], own_cache: Path) -> None:
    load(root)
    (file,) = own_cache.glob("readable-*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    checked.clear()
    assert len(load(root).train) == 11 and len(checked) == 12


def test_without_cache_folder_every_image_is_checked(
    root: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(load(root).train) == len(load(root).train) == 11
    assert len(checked) == 24


def test_workers_give_the_same_results(root: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    alone = load(root)
    for file in own_cache.iterdir():
        file.unlink()
    monkeypatch.setattr(unreadable, "worker_count", lambda *_: 2)
    assert load(root).notes == alone.notes and len(load(root).train) == 11


def test_long_checks_report_progress(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unreadable, "_PROGRESS", -1.0)  # seconds: at every piece
    load(root)
    messages = [record.getMessage() for record in caplog.records if record.name == unreadable.__name__]
    assert messages == ["data.on_error=skip: checked 12 of 12 images"]


def test_long_list_is_truncated_and_written_to_a_file(
    tmp_path: Path, write_images: WriteImages, own_cache: Path
) -> None:
    write_images(tmp_path / "train/a", 2)
    bad = [tmp_path / "train/a" / f"bad{number:02d}.jpg" for number in range(23)]
    for path in bad:
        path.write_text("no image")
    data = image_folder(root=str(tmp_path), channels=3, on_error="skip", max_skips=1.0, image_size=None)
    assert len(data.notes) == 22 and data.notes[-1].startswith("  and 3 more: ")
    (listed,) = own_cache.glob("skipped-*.txt")
    assert str(listed) in data.notes[-1] and listed.read_text().splitlines() == [str(path) for path in bad]


def test_notes_reach_the_run(root: Path, settings: Callable[..., object]) -> None:
    data = load(root)
    notes = prepare(data, settings()).notes  # type: ignore[arg-type]
    assert notes[0] == "read: 12 images in 2 class folders" and notes[1:-1] == data.notes != ()
    assert notes[-1].startswith("no test set: ")


def test_rows_of_a_table_whose_image_is_missing_or_broken(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "001.png").write_text("no image")
    rows = "".join(f"{number:03d}.png,{number}.5\n" for number in range(4))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)

    def table(max_skips: int) -> Dataset:
        return csv(
            file=str(tmp_path / "list.csv"), root=None, path_column="path", label_column="label", split_column=None,
            labels="value", label_separator=";", channels=3, on_error="skip", max_skips=max_skips, image_size=None,
        )  # fmt: skip

    data = table(2)
    assert data.train.targets.tolist() == [0.5, 2.5]
    assert [line.split("(")[-1] for line in data.notes[1:]][1] == "No such file or directory)"
    with pytest.raises(UserError, match=r"data.max_skips=1: more than 1 of 4 images"):
        table(1)


def test_a_fraction_allows_at_least_one_image(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "train/a", 6)
    (tmp_path / "train/a/003.png").write_bytes(b"")
    data = image_folder(root=str(tmp_path), channels=3, on_error="skip", max_skips=0.01, image_size=None)
    assert len(data.train) == 5


def test_error_about_an_image_names_the_key_that_skips_it(root: Path) -> None:
    message = r"003\.png: cannot be read .*; to skip unreadable images, set data\.on_error=skip"
    with pytest.raises(UserError, match=message):
        image_folder(root=str(root), channels=3, on_error="fail", max_skips=2, image_size=None)
    data = image_folder(root=str(root), channels=3, on_error="fail", max_skips=2, image_size=(8, 8))
    with pytest.raises(UserError, match=message):
        data.train.fetch(torch.arange(12))
