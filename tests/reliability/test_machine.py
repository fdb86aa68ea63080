"""Machines that lack what others have: a run needs no /proc, home or temporary folder, and no clock that is right."""

import builtins
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.line import dlopt
from tests.support.processes import run_dlopt
from tests.support.runs import assert_same_run, at_update, resume, start, terminate
from tests.support.sizes import RICH, TINY

ALL = [*RICH, "tracking=[tensorboard]"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    start(folder, *RICH)
    return folder


@contextlib.contextmanager
def without(*folders: str) -> Iterator[list[str]]:
    """Hides folders of the system; yields the requested paths."""
    requested: list[str] = []

    def hiding(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **keys: Any) -> Any:
            if not isinstance(path, int) and os.fsdecode(path).startswith(folders):
                requested.append(os.fsdecode(path))
                raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
            return original(path, *arguments, **keys)

        return call

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (io, ["open"]),
            (builtins, ["open"]),
            (os, ["open", "stat", "listdir", "scandir", "readlink"]),
        ):
            for name in names:
                stack.enter_context(patch.object(owner, name, hiding(getattr(owner, name))))
        yield requested


def test_without_proc_and_sys(whole: Path, tmp_path: Path) -> None:
    with without("/proc", "/sys") as requested, at_update(7, terminate):
        start(tmp_path, *RICH)
    with without("/proc", "/sys"):
        resume(tmp_path, *RICH)
    assert any(path.startswith("/proc") for path in requested)
    assert_same_run(tmp_path, whole)
    with without("/proc", "/sys"):
        result = dlopt(tmp_path, "train", *TINY, "hydra.run.dir=command", "threads=auto")
    assert result.code == 0 and "Traceback" not in result.out + result.err


def test_without_home_and_temporary_folder(tmp_path: Path) -> None:
    """What a service or a container has: the path of programs, and nothing else."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    done = run_dlopt(tmp_path, "train", *TINY, "hydra.run.dir=run", environment=kept)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_mask(mask: int, mode: int, tmp_path: Path) -> None:
    """Also those that are written under another name first."""
    former = os.umask(mask)
    try:
        with at_update(7, terminate):
            start(tmp_path, *ALL)
        resume(tmp_path, *ALL)
    finally:
        os.umask(former)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_a_clock_that_is_set_back(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour in the first part of the run, and by a day before the second."""
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    with at_update(3, lambda: shift.append(shift.pop() - 3600)), at_update(7, terminate):
        start(tmp_path, *RICH)
    shift[0] -= 86400
    assert resume(tmp_path, *RICH)["seconds"] > 0
    assert_same_run(tmp_path, whole)
