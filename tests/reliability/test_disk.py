"""Full, read-only and broken disks: one error message, no data lost, resumable."""

import contextlib
import errno
import itertools
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import pytest

from dlopt.basics import files
from dlopt.basics.folders import SPACE
from dlopt.run import runner
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.progress import TrainingRun
from tests.support.faults import can_mount, private_mounts, read_only, resize, small_disk, writable_again
from tests.support.line import dlopt
from tests.support.runs import assert_same_run, execute, in_fork, resume, run_config, same, start
from tests.support.runs import result as result_of
from tests.support.sizes import RICH, TINY

needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs root and mount (Debian package mount)")

# Its checkpoints are much larger than all other files.
LARGE = [*RICH, "model.widths=[300]"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    start(folder, *LARGE)
    return folder


def in_private_mounts(function: Callable[[], None], error_file: Path) -> None:
    """Runs `function` in a process with private mounts, which writes errors to `error_file`."""

    def work() -> None:
        try:
            private_mounts()
            function()
        except BaseException:
            error_file.write_text(traceback.format_exc())
            raise

    assert in_fork(work) == 0, error_file.read_text()


@pytest.fixture(autouse=True)
def outside_of_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the small disks hold the uncommitted changes of this checkout, too, as code.diff."""
    monkeypatch.chdir(tmp_path)


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dlopt: ") and "Traceback" not in text, text
    return lines[0]


def stray(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@needs_mounts
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_disk_with_space_for_one_and_a_half_checkpoints(
    reference: Path, tmp_path: Path, asynchronous: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    size = (reference / "checkpoints/last.pt").stat().st_size
    lines = [*LARGE, "checkpoint.keep=1", "data.val_split=0.25", f"checkpoint.asynchronous={str(asynchronous).lower()}"]

    def run() -> None:
        folder = tmp_path / "run"
        small_disk(folder, int(1.5 * size))
        assert execute(folder, *lines) == 1
        message = one_line(capfd.readouterr().err)
        assert "could not be written" in message and "No space left" in message
        assert load(folder / "checkpoints/last.pt").step == 4, "the previous checkpoint is intact"
        assert not stray(folder)
        assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
        resize(folder, 20 * size)
        assert execute(folder, *lines) == 0
        assert_same_run(folder, reference)

    in_private_mounts(run, tmp_path / "failure")


@needs_mounts
def test_read_only_checkpoint_folder(reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        folder = tmp_path / "run"
        start(folder, *LARGE, "max_time=0.00001")
        before = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
        read_only(folder / "checkpoints")
        capfd.readouterr()
        assert execute(folder, *LARGE) == 1
        message = one_line(capfd.readouterr().err)
        assert "could not be written" in message and "Read-only" in message
        writable_again(folder / "checkpoints")
        assert {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
        assert execute(folder, *LARGE) == 0
        assert_same_run(folder, reference)

    in_private_mounts(run, tmp_path / "failure")


@needs_mounts
def test_unwritable_logs_warn_once(reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        for name in ("metrics.jsonl", "train.log"):
            (folder / name).touch()
            read_only(folder / name)
        (folder / "tensorboard").mkdir()
        read_only(folder / "tensorboard")
        lines = [*LARGE, "tracking=[tensorboard]"]
        state = runner.exit_code(TrainingRun(run_config(*lines), folder, overrides=[*lines]), console=True)
        assert state == 0
        out = capfd.readouterr().out
        for name in ("metrics.jsonl", "train.log", "tfevents"):
            warned = [line for line in out.replace("\n", " ").split("cannot be written") if name in line[-200:]]
            assert len(warned) == 1, (name, out)
        assert same(result_of(folder)["model"], result_of(reference)["model"])
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"

    in_private_mounts(run, tmp_path / "failure")


def test_log_on_a_full_device(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "train.log").symlink_to("/dev/full")
    start(tmp_path, *LARGE)
    assert_same_run(tmp_path, reference)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    # Python before 3.12.8 keeps a .pyc file that was cut short by the limit, and every later import of it fails.
    sys.dont_write_bytecode = True


def test_file_size_limit(reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Writing fails in the middle of a file, as with a disk quota."""
    size = (reference / "checkpoints/last.pt").stat().st_size

    def limited() -> None:
        limit_file_size(size // 2)
        code = execute(tmp_path, *LARGE)
        os.write(1, f"{code}".encode())

    with_room = [*LARGE, "max_time=0.00001"]
    start(tmp_path, *with_room)
    capfd.readouterr()
    assert in_fork(limited) == 0
    out, err = capfd.readouterr()
    assert out == "1"
    assert "could not be written" in one_line(err)
    assert not stray(tmp_path)
    assert load(tmp_path / "checkpoints/last.pt").step == 1
    assert resume(tmp_path, *LARGE)["status"] == "finished"
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize(
    "words", [["show-batch", "output=out.png"], ["export", "run", "format=torch_export", "output=out.pt2"]], ids=str
)
def test_a_file_that_does_not_fit_leaves_the_one_before(words: list[str], small: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(small)
    path = tmp_path / words[-1].removeprefix("output=")
    path.write_text("before")

    def limited() -> None:
        limit_file_size(1000)
        result = dlopt(tmp_path, *words)
        assert result.code == 2 and result.err == f"dlopt: {words[-1]}: cannot write: File too large\n", result

    assert in_fork(limited) == 0
    assert path.read_text() == "before" and not stray(tmp_path)


def test_unwritable_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without summary.json the run counts as unfinished; resuming it finishes immediately."""
    from dlopt.tracking import metrics

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Exception, match=r"summary\.json: cannot be written"):
        patch.setattr(metrics, "write_atomically", full)
        start(tmp_path, *RICH)
    summary: dict[str, Any] = resume(tmp_path, *RICH)
    assert summary["status"] == "finished"


# -- every call that writes fails from some moment on


@contextlib.contextmanager
def failing(call: str, first: int, count: float, code: int) -> Iterator[None]:
    """Lets `count` calls of a function fail from call `first` on.

    `call`: a function of `os`, or "a file": writing one that is renamed.
    """
    calls = itertools.count(1)

    def check() -> None:
        if first <= next(calls) < first + count:
            raise OSError(code, os.strerror(code))

    class Failing:
        def __init__(self, file: BinaryIO) -> None:
            self.write = lambda data: check() or file.write(data)
            self.flush, self.fileno = file.flush, file.fileno

    @contextlib.contextmanager
    def failing_file(path: Path) -> Iterator[Failing]:
        with synced(path) as file:
            yield Failing(file)

    def failing_call(*arguments: Any, **keys: Any) -> Any:
        check()
        return original(*arguments, **keys)

    synced, original = files.synced, getattr(os, call, None)
    with patch.object(*(files, "synced", failing_file) if call == "a file" else (os, call, failing_call)):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    start(folder, *RICH)
    return folder


@pytest.mark.parametrize(
    ("call", "first", "code"),
    [
        ("a file", 1, errno.EIO), ("replace", 1, errno.ENOSPC), ("a file", 4, errno.ENOSPC), ("fsync", 4, errno.EIO),
        ("replace", 9, errno.EIO), ("fsync", 9, errno.ENOSPC), ("a file", 14, errno.EDQUOT), ("replace", 14, errno.EIO),
    ],
)  # fmt: skip
def test_no_data_is_lost_where_the_disk_fails(
    call: str, first: int, code: int, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with failing(call, first, math.inf, code):
        assert execute(tmp_path / "run", *RICH) == (2 if first == 1 else 1)  # before and after the start
    assert os.strerror(code) in one_line(capfd.readouterr().err)
    assert not stray(tmp_path)
    assert execute(tmp_path / "run", *RICH) == 0
    assert_same_run(tmp_path / "run", small)


def test_a_sweep_names_the_file_that_a_full_disk_does_not_take(tmp_path: Path) -> None:
    with failing("a file", 1, math.inf, errno.ENOSPC):
        result = dlopt(tmp_path, "train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.code == 1 and result.err == f"dlopt: {tmp_path}/sweep/{SPACE}: No space left on device\n"


def test_a_full_disk_takes_nothing_from_the_ledger_of_a_judgement(tmp_path: Path) -> None:
    words = ("judge", " ".join(TINY), "output=out", "minutes=1e-9")
    path = tmp_path / "out/ledger.jsonl"
    with failing("a file", 1, math.inf, errno.ENOSPC):
        result = dlopt(tmp_path, *words, "optimizer.lr=0.2")
    assert result.code == 1 and result.err == f"dlopt: {path}: No space left on device\n" and not path.exists()
    assert dlopt(tmp_path, *words, "optimizer.lr=0.2").code == 4  # undecided
    before = path.read_bytes()
    with failing("a file", 1, math.inf, errno.ENOSPC):
        result = dlopt(tmp_path, *words, "optimizer.lr=0.3")
    assert result.code == 1 and result.err == f"dlopt: {path}: No space left on device\n"
    assert path.read_bytes() == before and not stray(tmp_path)


@pytest.mark.parametrize(("call", "first"), [("write", 1), ("write", 7), ("link", 1)])
def test_a_disk_that_recovers_does_not_change_a_run(call: str, first: int, small: Path, tmp_path: Path) -> None:
    with failing(call, first, 2, errno.EIO):
        assert execute(tmp_path / "run", *RICH) == 0
    assert_same_run(tmp_path / "run", small)
