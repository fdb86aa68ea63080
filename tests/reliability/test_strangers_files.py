"""Folders whose files a stranger has made: no command hangs, fills the memory or ends in a traceback.

Every file of a real run and of a real sweep is replaced by what it should not be, one at a time, and every command that
opens, replaces or looks for it is run: exit code 0, or one line that says what is wrong.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import dlopt as api
from dlopt.basics.errors import UserError
from dlopt.basics.files import write, write_yaml
from dlopt.basics.folders import SPACE, RunFolder, refuse_links
from dlopt.config.compose import Composer
from dlopt.config.inherit import inherit
from dlopt.sweeps import submission
from dlopt.sweeps.array import SUBMISSION, WORKERS, JobArray, JobEntry, read_array, stop_reason
from dlopt.sweeps.slurm_queue import array_ids, note_array
from dlopt.sweeps.status import StatusReader
from dlopt.sweeps.sweep_file import read_space
from dlopt.tracking.metrics import read_metrics
from dlopt.training.checkpoint.checkpoints import is_intact, load
from dlopt.training.checkpoint.sharded import load_without_shards
from tests.support.folders import make_run
from tests.support.line import dlopt
from tests.support.sizes import TINY
from tests.sweeps.fake_slurm import SUBMIT

SECONDS = 40  # for a command, which takes 1 s at most
MEMORY = 3 << 30  # bytes of address space in addition to that of the test process
DEEP = "[" * 20_000
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}\n" for level in range(1, 9)
)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def huge(path: Path) -> None:
    """200 MB, of which the disk holds nothing."""
    with path.open("wb") as file:
        file.truncate(200 << 20)


def containing(content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: path.write_bytes(data) and None


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": fifo, "device": device, "folder": folder, "loop": loop, "huge": huge,
    "deep": containing(DEEP), "deep mapping": containing('{"a":' * 20_000), "closed": containing(DEEP + "]" * 20_000),
    "bomb": containing(BOMB), "not UTF-8": containing(b"\xff\xfe\x00{"), "empty": containing(""),
    "list": containing("[]\n"), "text": containing('"x"\n'), "number": containing("1\n"), "null": containing("null\n"),
    "nested": containing('{"choices": [], "status": {}, "facts": 1, "data": 1, "allow_packages": 1, "code": []}\n'),
    "surrogate": containing('{"a": "\\ud800", "job": 0, "folder": "0", "label": "", "choices": {"a": "\\ud800"}}'),
    "infinite": containing('{"job": Infinity, "folder": "0", "label": "x", "epoch": 1e999, "step": NaN}\n'),
    "digits": containing(f'{{"job": {"9" * 10_000}, "epoch": {"9" * 4_000}, "step": 1}}\n'),
    "jobs": containing('{"elements": 2, "jobs": [["\\u0000", "", ""], ["../..", "", ""]]}'),
    "options": containing("--help\n"),
}  # fmt: skip


RUN = [
    ["runs", "run"], ["runs", "diff", "run", "run"], ["report", "run", "format=csv", "output=r.csv"], ["eval", "run"],
    ["export", "run", "format=safetensors", "output=out.safetensors"], ["consolidate", "run"],
    ["train", "from=run", "hydra.run.dir=new", "--cfg", "job"], ["runs", "tag", "run", "x"],
    ["train", "resume=run", "hydra.run.dir=new", *TINY], ["train", "hydra.run.dir=run", "resume=auto", *TINY],
]  # fmt: skip
SWEEP = [
    ["runs", "sweep"], ["report", "sweep", "format=csv", "output=r.csv"], ["sweep", "status", "sweep"],
    ["sweep", "status", "sweep", "--json"], ["sweep", "wait", "sweep"], ["sweep", "stop", "sweep"],
    ["sweep", "resume", "sweep"], [*SUBMIT, "resume=auto", "seed=0,1", *TINY],
]  # fmt: skip
COMMANDS = {"run": RUN, "sweep": SWEEP}


def from_python(name: str) -> None:
    api.runs(name)
    for path in (name, f"{name}/0"):
        if Path(path).is_dir():
            with contextlib.suppress(UserError):
                run = api.open_run(path)
                _ = run.summary, run.steps, run.pictures
                api.load(path)


def complaints(place: Path, commands: list[list[str]], name: str) -> list[str]:
    """Runs commands, and returns what is wrong with their ends."""
    found = []

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for words in commands:
        signal.alarm(SECONDS)
        try:
            result = dlopt(place, *words)
            lines = result.err.splitlines()
            if "Traceback" in result.err + result.out or (result.code and len(lines) > 3):
                found.append(f"{words}: {result.err[-500:]}")
            elif result.code not in (0, 1, 2, 75) or (result.code == 2 and not lines):
                found.append(f"{words}: {result}")
        except BaseException:
            found.append(f"{words}: {traceback.format_exc()[-900:]}")
        finally:
            signal.alarm(0)
    signal.alarm(SECONDS)
    try:
        with contextlib.chdir(place):
            from_python(name)
    except UserError:
        pass
    except BaseException:
        found.append(f"Python: {traceback.format_exc()[-900:]}")
    signal.alarm(0)
    return found


def touched(place: Path, words: list[str], name: str) -> list[str]:
    """Runs a command, and returns what it opens, replaces or looks for in a folder. For a fork: audit hooks stay."""
    paths: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith("os."):
            paths.update(map(str, arguments))

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, **keys: (paths.add(str(path)), function(path, **keys))[1]

    sys.addaudithook(note)
    with mock.patch("os.stat", noting(os.stat)), mock.patch("os.lstat", noting(os.lstat)):
        dlopt(place, *words)
    inside = (os.path.relpath(place / path, place / name) for path in list(paths) if "\0" not in path)
    return sorted(path for path in inside if not path.startswith(".."))


def in_fork(place: Path, work: Callable[[], list[str]]) -> list[str]:
    """Returns the result of a forked process with little memory, or its error."""
    report = place / "report.json"
    process = os.fork()
    if process == 0:
        forkserver._forkserver.__init__()  # that of the parent is none of this process
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            found = work()
        except BaseException:
            found = [traceback.format_exc()]
        report.write_text(json.dumps(found))
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return json.loads(report.read_text()) if status == 0 else [f"ended with {status}, at {os.listdir(place)}"]


def files(folder: Path) -> list[str]:
    """Lists the files of a run or a sweep, but not those of job 1, which are read as those of job 0."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and ".code" not in path.parts)
    return sorted(str(path) for path in found if path.parts[0] != "1")


def copied(source: Path, target: Path) -> None:
    """Copies a run or a sweep; links the sweep's 900 files of code, which are only read."""

    def copy(path: str, other: str) -> None:
        (os.link if ".code" in Path(path).parts else shutil.copy2)(path, other)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run, `run`, and of a submitted sweep, `sweep`."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(place / "state"))
        patch.setattr("dlopt.sweeps.status._LOST_SECONDS", 0.0)
        for words in (["train", "hydra.run.dir=run", *TINY], [*SUBMIT, "seed=0,1", *TINY]):
            result = dlopt(place, *words)
            assert result.code == 0, result
        for words in (*RUN[:5], ["sweep", "status", "sweep"]):
            dlopt(place, *words)  # imports what all cases need
        with contextlib.chdir(place):
            from_python("run")
        yield place


@pytest.fixture(scope="module")
def readers(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[str]]]]:
    """The commands that touch each file; the others cannot depend on what it is."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for name, commands in COMMANDS.items():
        found[name] = {file: [] for file in files(made / name)}
        for words in commands:
            place = tmp_path_factory.mktemp("intact")
            copied(made / name, place / name)
            paths = in_fork(place, partial(touched, place, words, name))
            assert found[name].keys() & paths, (words, paths)  # or the error
            for file in found[name].keys() & paths:
                found[name][file].append(words)
    return found


READ_ALIKE = {"deep mapping", "closed", "text", "number", "null"}  # as "deep" and "list"; `test_every_reader` has them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "sweep"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in READ_ALIKE])
def test_every_file_and_every_command(
    made: Path, readers: dict[str, dict[str, list[list[str]]]], tmp_path: Path, name: str, kind: str
) -> None:
    def complaints_of_all() -> list[str]:
        found = []
        for file in files(made / name):
            place = tmp_path / file.replace("/", "_")
            copied(made / name, place / name)
            (place / name / file).unlink()
            KINDS[kind](place / name / file)
            # Whoever lists a folder asks for the types of its entries, which fails for a loop.
            commands = COMMANDS[name] if kind == "loop" else readers[name][file]
            found += [f"{file}: {each}" for each in complaints(place, commands, name)]
            shutil.rmtree(place)
        return found

    found = in_fork(tmp_path, complaints_of_all)
    assert not found, "\n".join(found)


def sweep_folder(path: Path) -> None:
    """A submitted sweep of two jobs, written without a command."""
    for number in (0, 1):
        make_run(path / str(number), seed=number)
    write_yaml(path / SPACE, [["seed=0"], ["seed=1"]])
    (path / WORKERS).mkdir()
    JobArray(tuple(JobEntry(str(number), f"seed={number}", "epochs=1") for number in (0, 1)), 2).write(path)
    note_array(path, "7")
    (path / WORKERS / SUBMISSION).write_text("{}")
    (path / WORKERS / submission.STOP).write_text("a job failed")
    (path / "0/checkpoints").mkdir()
    write(path / "0/checkpoints/best.pt", lambda file: file.write(b"x"))


def read_all(path: Path) -> None:
    """Reads what commands read in the folder of a sweep; each reader may raise a `UserError`."""
    checkpoint, composer = path / "0/checkpoints/best.pt", Composer()
    for reader in (
        lambda: StatusReader(path).read().counts,
        lambda: submission.read(path),
        lambda: stop_reason(path),
        lambda: submission.read_own(path, "stop"),
        lambda: read_space(path),
        lambda: read_array(path),
        lambda: array_ids(path),
        lambda: RunFolder(path / "0").has_begun(),
        lambda: read_metrics(path / "0"),
        lambda: load(checkpoint),
        lambda: is_intact(checkpoint),
        lambda: load_without_shards(checkpoint),
        lambda: refuse_links(path / "0", "hydra.run.dir"),
        lambda: inherit(composer, [f"from={path / '0'}"]),
    ):
        with contextlib.suppress(UserError):
            reader()


QUICK = ("fifo", "device", "loop", "deep", "bomb", "nested", "jobs")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_every_reader(tmp_path: Path, kind: str) -> None:
    sweep_folder(tmp_path / "sweep")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SECONDS)
    try:
        for file in files(tmp_path / "sweep"):
            path = tmp_path / "sweep" / file
            path.rename(tmp_path / "kept")
            KINDS[kind](path)
            read_all(tmp_path / "sweep")
            path.rmdir() if path.is_dir() else path.unlink()
            (tmp_path / "kept").rename(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
