"""Files of the cache: their names, damage, and folders that cannot be written."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest

from dlopt.basics import cache


def test_names_depend_on_all_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache.cache_file("kind", "a", "b")
    digest = hashlib.sha256(b"kind\0a\0b").hexdigest()[:32]
    assert path == tmp_path / "dlopt" / f"kind-{digest}.npz"
    others = [cache.cache_file(*keys) for keys in (("kind", "ab"), ("kind", "b", "a"), ("kin", "da", "b"), ("kind",))]
    assert len({path, *others}) == 5 and cache.cache_file("kind", "\udcff").parent == path.parent
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_file("kind").parent == tmp_path / "home/.cache/dlopt"


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user of another number, of whom no file of the system says anything."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    path = cache.cache_file("kind")
    assert cache.save(path, b"x") is False and cache.load_arrays(path) is None
    with cache.exclusive(path):
        pass
    assert not list(tmp_path.iterdir())


def test_arrays_are_read_as_written_and_not_if_they_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "one/two/a.npz"
    arrays = {"x": np.arange(5), "y": np.array([b"y", b"zz"])}
    for _ in range(2):  # creates the folders, then replaces the file
        cache.save_arrays(path, arrays)
    found = cache.load_arrays(path)
    assert found is not None and {name: value.tolist() for name, value in found.items()} == {
        "x": [0, 1, 2, 3, 4], "y": [b"y", b"zz"],
    }  # fmt: skip
    data = path.read_bytes()
    assert data[:32] == hashlib.sha256(data[32:]).digest() and [each.name for each in path.parent.iterdir()] == [
        "a.npz"
    ]
    for damaged in (data[:-1], data[:40] + bytes([data[40] ^ 1]) + data[41:], b"", data[:31], bytes(32) + data[32:]):
        path.write_bytes(damaged)
        assert cache.load_arrays(path) is None
    assert cache.load_arrays(tmp_path / "none.npz") is None and cache.load_arrays(tmp_path) is None


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([{"a": 1}], dtype=object))
    content = buffer.getvalue()
    (tmp_path / "a.npz").write_bytes(hashlib.sha256(content).digest() + content)
    assert cache.load_arrays(tmp_path / "a.npz") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file/a.npz"
    assert cache.save(path, b"x") is False and cache.save(tmp_path / "b", b"x") is True
    cache.save_arrays(path, {"x": np.zeros(1)})
    with cache.exclusive(path):
        pass
    with cache.exclusive(tmp_path / "new/folder/c.npz"):
        assert (tmp_path / "new/folder/c.lock").exists()


def test_the_state_of_a_file_changes_with_its_content_and_its_times(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    status = path.stat()
    assert cache.file_state(path) == (status.st_ino, 1, status.st_mtime_ns, status.st_ctime_ns)
    os.utime(path, ns=(1, 2))
    assert cache.file_state(str(path))[2] == 2
