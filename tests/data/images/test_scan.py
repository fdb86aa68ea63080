import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlopt.data.images import folder as module
from dlopt.data.images.folder import Listing, scan


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, one with a subfolder; every scan is cached at once."""
    monkeypatch.setattr(module, "CACHE_MIN_IMAGES", 1)
    monkeypatch.setattr(module, "_SETTLED", -(10**12))
    folder = tmp_path / "images"
    for name in ("b/2.jpg", "b/1.PNG", "a/x/y.jpg", "a/z.jpg", "a/notes.txt", "a/.hidden.jpg", "a/.thumbs/t.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def same(one: Listing, other: Listing) -> bool:
    arrays = zip((one.counts, one.paths), (other.counts, other.paths), strict=True)
    return one.classes == other.classes and all(np.array_equal(a, b) for a, b in arrays)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Records the folders that a scan lists, by names in bytes."""
    names: list[bytes] = []
    scandir = os.scandir

    def record(path: bytes | Path) -> object:
        if isinstance(path, bytes):
            names.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", record)
    return names


def test_scan_lists_images_by_class(folder: Path) -> None:
    found = scan(folder)
    assert found.classes == ("a", "b") and found.counts.tolist() == [2, 2]
    assert found.paths.tolist() == [b"a/x/y.jpg", b"a/z.jpg", b"b/1.PNG", b"b/2.jpg"]


def test_second_scan_uses_the_cache(folder: Path, listed: list[bytes]) -> None:
    first = scan(folder)
    assert len(listed) == 4 and first.left_out == {"*.txt": 1, "hidden": 1}
    second = scan(folder)
    assert same(second, first) and len(listed) == 4 and second.left_out == first.left_out


def replace_folder(folder: Path) -> None:
    (folder / "b").rename(folder.parent / "old")
    (folder / "b").mkdir()
    (folder / "b/9.jpg").touch()


def add_and_set_the_time_back(folder: Path) -> None:
    """Sets the times back, as copying tools do."""
    before = (folder / "a").stat()
    (folder / "a/new.jpg").touch()
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "add": lambda folder: (folder / "a/new.jpg").touch(),
    "add deep": lambda folder: (folder / "a/x/new.jpg").touch(),
    "add class": lambda folder: ((folder / "c").mkdir(), (folder / "c/0.jpg").touch()),
    "remove": lambda folder: (folder / "b/2.jpg").unlink(),
    "rename": lambda folder: (folder / "b/2.jpg").rename(folder / "b/3.jpg"),
    "replace folder": replace_folder,
    "remove folder": lambda folder: ((folder / "a/x/y.jpg").unlink(), (folder / "a/x").rmdir()),
    "add and set the time back": add_and_set_the_time_back,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_stale_cache_is_ignored(
    folder: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(folder)
    time.sleep(0.02)  # file systems tell times apart by ticks of a few milliseconds
    change(folder)
    changed = scan(folder)
    monkeypatch.setattr(module, "_cached", lambda *_: None)
    assert same(changed, scan(folder)) and not same(changed, first)


def test_recently_changed_folder_is_not_cached(
    folder: Path, listed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED", 10**12)
    scan(folder)
    scan(folder)
    assert len(listed) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_damaged_cache_is_ignored(folder: Path, listed: list[bytes], own_cache: Path, damage: str) -> None:
    first = scan(folder)
    [name] = os.listdir(own_cache)
    file = own_cache / name
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    whole = file.read_bytes()
    contents = {"flip": bytes(data), "cut": whole[:-10], "empty": b"", "foreign": b"x" * 100}
    file.write_bytes(contents[damage])
    assert same(scan(folder), first) and len(listed) == 8
    assert same(scan(folder), first) and len(listed) == 8  # it was rewritten


def test_small_folders_and_unwritable_caches_are_not_cached(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_MIN_IMAGES", 5)
    scan(folder)
    assert not own_cache.exists()
    monkeypatch.setattr(module, "CACHE_MIN_IMAGES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert same(scan(folder), scan(folder))


def test_follows_links_but_not_loops(folder: Path) -> None:
    (folder / "b/again").symlink_to(folder / "b")
    (folder / "b/other").symlink_to(folder / "a/x")
    (folder / "b/up").symlink_to(folder)  # the other classes are not images of this one
    found = scan(folder)
    assert found.paths.tolist()[2:] == [b"b/1.PNG", b"b/2.jpg", b"b/other/y.jpg"]
