import errno
import os
from pathlib import Path

import pytest

from dlopt.tracking.metrics import AppendFile


def test_full_disk_is_reported_once_and_no_record_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    file = AppendFile(tmp_path / "records", warnings.append)
    file.write(b"first\n")
    file.flush()

    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 3:
            return write(descriptor, data[:3])  # a part still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for record in (b"second\n", b"third\n"):
        file.write(record)
        file.flush()
    assert (tmp_path / "records").read_bytes() == b"first\n", "half-written records must not stay"
    monkeypatch.undo()

    file.write(b"fourth\n")
    file.close()
    assert (tmp_path / "records").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert str(tmp_path / "records") in warnings[0]


def test_a_file_that_is_removed_is_written_again_but_not_its_folder(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = AppendFile(tmp_path / "run" / "records", warnings.append)
    for name in ("a", "b", "c"):
        file.write(name.encode())
        file.flush()
        if name == "a":
            file.path.unlink()
    assert file.path.read_bytes() == b"bc"
    file.path.parent.rename(tmp_path / "renamed")
    file.write(b"d")
    file.close()
    assert not file.path.parent.exists() and not warnings
    assert (tmp_path / "renamed/records").read_bytes() == b"bcd"


def test_a_folder_that_cannot_be_made_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    file = AppendFile(tmp_path / "file" / "below", warnings.append)
    for _ in range(3):
        file.write(b"x")
        file.flush()
    file.close()
    assert len(warnings) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_pending_records_are_limited(tmp_path: Path) -> None:
    (tmp_path / "records").symlink_to("/dev/full")
    warnings: list[str] = []
    file = AppendFile(tmp_path / "records", warnings.append, limit=1000)
    for _ in range(100):
        file.write(b"x" * 100)
        file.flush()
        assert len(file.pending) <= 1000
    file.close()
    assert len(warnings) == 1
