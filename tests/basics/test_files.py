"""Files: atomic writes by several processes, and lines that another process appends."""

import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from dlopt.basics.errors import refused_path
from dlopt.basics.files import NewLines, write_atomically


def write_often(path: Path, text: str) -> None:
    for _ in range(50):
        write_atomically(path, text * 1000)


def test_processes_that_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fails, and the file is always a whole one."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long on a busy disk
    path = tmp_path / "file"
    processes = [get_context("fork").Process(target=write_often, args=(path, text), daemon=True) for text in "abcd"]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        if path.exists():
            text = path.read_text()
            assert len(text) == 1000 and len(set(text)) == 1
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as raised:
        write_atomically(tmp_path, "text")
    assert str(raised.value) == f"[Errno 21] Is a directory: '{tmp_path}'"
    assert refused_path(raised.value) == f"{tmp_path}: Is a directory"


def test_what_a_killed_process_has_left_is_removed_later(tmp_path: Path) -> None:
    for name, age in ((".file.1-1.tmp", 7200), (".file.2-2.tmp", 60), (".other.1-1.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically(tmp_path / "file", "")
    assert sorted(os.listdir(tmp_path)) == [".file.2-2.tmp", ".other.1-1.tmp", "file"]


def test_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb")
    lines = NewLines(path)
    assert lines.read() == b"a"
    assert lines.read() == b""
    path.write_bytes(b"a\nbc\nd\n")
    assert lines.read() == b"bc\nd"
    path.write_bytes(b"a\n")  # shorter: a resumed run removes the lines after its checkpoint
    assert lines.read() == b"a"
