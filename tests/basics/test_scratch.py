"""Temporary folders: what a killed process leaves is removed, what is in use or of another user is not."""

import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import current_process, get_context
from multiprocessing.util import get_temp_dir
from pathlib import Path
from unittest.mock import patch

import pytest

from dlopt.basics.scratch import own_multiprocessing_folder, remove_abandoned, scratch
from tests.support.runs import in_fork


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by_a_killed_process() -> int:
    def work() -> None:
        with scratch() as folder:
            (folder / "store").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    return in_fork(work)


def test_what_a_killed_process_leaves_is_removed_by_the_next(place: Path) -> None:
    assert left_by_a_killed_process() == signal.SIGKILL
    [left] = place.iterdir()
    with scratch() as folder:
        assert not left.exists() and folder.is_dir()
        assert in_fork(remove_abandoned) == 0 and folder.is_dir()  # this process holds it
    assert not list(place.iterdir())


def test_nothing_else_is_removed(place: Path) -> None:
    """Folders of other users and programs, links, and one that a child of a killed process still uses."""
    (place / "data").mkdir()
    (place / "dlopt-scratch-link").symlink_to("data")
    (place / "dlopt-scratch-file").touch()
    (place / "pymp-other").mkdir()
    assert left_by_a_killed_process() == signal.SIGKILL
    before = set(place.iterdir())
    with patch("os.geteuid", lambda: os.getuid() + 1):
        remove_abandoned()
    assert set(place.iterdir()) == before
    remove_abandoned()
    assert len(before - set(place.iterdir())) == 1

    reading, writing = os.pipe()
    ending, end = os.pipe()

    def parent() -> None:
        with scratch():
            if os.fork() == 0:
                os.close(end)
                os.write(writing, b"x")
                os.read(ending, 1)  # until the test closes the pipe
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(parent) == signal.SIGKILL
    os.read(reading, 1)
    before = set(place.iterdir())
    remove_abandoned()
    assert set(place.iterdir()) == before
    for descriptor in (reading, writing, ending, end):
        os.close(descriptor)


def test_a_folder_that_is_taken_for_abandoned_is_made_again(place: Path) -> None:
    """Another process may look between the creation of a folder and its lock."""
    original, made = tempfile.mkdtemp, []

    def removed_at_once(**options: str) -> str:
        made.append(original(**options))
        if len(made) == 1:
            remove_abandoned()
        return made[-1]

    with patch("tempfile.mkdtemp", removed_at_once), scratch() as folder:
        assert len(made) == 2 and str(folder) == made[1]


def test_sockets_of_multiprocessing_are_in_a_scratch_folder(place: Path) -> None:
    def work() -> None:
        current_process()._config["tempdir"] = None  # type: ignore[attr-defined]
        own_multiprocessing_folder()
        first = get_temp_dir()
        child = get_context("fork").Process(target=lambda: None)  # drops its copy of the finalizer
        child.start()
        child.join(60)
        own_multiprocessing_folder()
        assert get_temp_dir() == first and Path(first).parent == place
        assert in_fork(lambda: other(first)) == 0

    def other(first: str) -> None:
        own_multiprocessing_folder()
        assert get_temp_dir() != first and Path(first).is_dir()

    assert in_fork(work) == 0
