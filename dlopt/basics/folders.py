"""Run folders, one per run: creation, locking, status (finished, unfinished, live), and search."""

import contextlib
import itertools
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dlopt.basics.errors import FileError, RunError, StateError, UserError
from dlopt.basics.files import read_json
from dlopt.basics.formats import printable
from dlopt.basics.interruption import flush_streams, note_files, print_line
from dlopt.basics.locks import hold, is_held, is_held_by_parent, lost
from dlopt.basics.plain_values import load_yaml, read_regular, regular_lines

FORMAT = 1  # of the files in a run folder and of their keys, checkpoints included
LOCK = ".lock"
LAUNCHER_LOCK = ".launcher.lock"  # of the process that starts the ranks of a run; rank 0 takes `LOCK`
SPACE = "sweep.yaml"  # in a sweep's folder; grid: the overrides of each job; search: its space and config
SUBMITTED = "DLOPT_SUBMITTED"  # in the environment: the folder `workers` of a submitted sweep, while its jobs are run
IN_PLACE = "DLOPT_IN_PLACE"  # in the environment, with SUBMITTED: folders of code that is not copied beside the sweep
SHELL_FOLDER = "DLOPT_SHELL_FOLDER"  # in the environment: for which paths are printed, also if hydra.job.chdir is set
_AFTER = ".after"  # in a dated folder that is newer than its name: the name of an older one, and a number
_DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
ENDED = ("finished", "stopped_early")
"""The statuses of runs with a result."""


@dataclass
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def config(self) -> dict[str, Any] | None:
        """Reads the saved config; None if it is missing or unreadable."""
        config = self._load("config.yaml")
        return config if isinstance(config, dict) else None

    def run_id(self) -> str | None:
        """Returns the id that ties the config, the checkpoints and the summary of a run; None without a config.

        A run that is resumed in its folder keeps its id; a run resumed from a checkpoint in another folder gets a new
        one.
        """
        found = (self.config() or {}).get("run_id")
        return found if isinstance(found, str) else None

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.path / "summary.json")

    def choices(self) -> dict[str, Any]:
        """Reads the choice of each group. Raises `UserError`."""
        choices = (read_json(self.path / "environment.json") or {}).get("choices")
        if not isinstance(choices, dict):
            raise FileError(f"{self.path}: environment.json is missing or damaged")
        return choices

    def other_format(self) -> str | None:
        """Returns an error message if the folder is in another format; None otherwise.

        Also None without environment.json, which a killed start may not have written.
        """
        environment = read_json(self.path / "environment.json")
        return None if environment is None else other_format(environment.get("folder_format"), "run folder format")

    def refuse_other_format(self, key: str) -> None:
        """Raises `UserError` for a folder in another format; `key`: the override that selected it."""
        if (reason := self.other_format()) is not None:
            raise UserError(f"{key}: {self.path}: {reason}")

    def has_run(self) -> bool:
        return any((self.path / name).exists() for name in ("config.yaml", "summary.json", "checkpoints"))

    def has_begun(self, *, resumed: bool = False) -> bool:
        """Returns whether the run has left a result: a summary, a checkpoint, or metrics of several epochs.

        A start that was cut off has none, and its folder may be used again: the metrics of the first epoch and the best
        model are written before the first checkpoint that can be resumed. `resumed`: the run is resumed from another
        folder, from which metrics and the best model are copied first.
        """
        if (self.path / "summary.json").exists():
            return True
        if any(path.name != "best.pt" for path in self.checkpoints.glob("*.pt")):
            return True
        with contextlib.suppress(OSError, ValueError):
            lines = regular_lines(self.path / "metrics.jsonl", sys.maxsize)
            return not resumed and sum(line.endswith(b"\n") for line in itertools.islice(lines, 2)) > 1
        return False

    def has_ended(self, *, or_failed: bool = False) -> bool:
        """Returns whether the run has a result.

        `or_failed`: a failure is one, too, unless its process died (was killed, for example).
        """
        summary = self.summary() or {}
        status = summary.get("status")
        return status in ENDED or (or_failed and status == "failed" and not summary.get("died"))

    def has_diverged(self) -> bool:
        """Returns whether the run has failed because it diverged: in some series this is a result."""
        return (self.summary() or {}).get("diverged") is True

    def is_done(self, config: Mapping[str, Any]) -> bool:
        """Returns whether the run has ended and `config` does not extend it."""
        summary = self.summary() or {}
        status, key = summary.get("status"), "epochs" if config["steps"] is None else "steps"
        length = summary.get(key)  # config.yaml may be of a longer attempt, which was killed
        # epochs=5min: a run of the same config has counted its updates, and made them.
        is_longer = isinstance(length, int) and isinstance(config[key], int) and config[key] > length
        return status == "stopped_early" or (status == "finished" and not is_longer)

    def is_live(self) -> bool:
        """Returns whether a process holds a lock; the lock file of a killed process does not count."""
        return is_held(self.path / LOCK) or is_held(self.path / LAUNCHER_LOCK)

    def lock(self, name: str = LOCK) -> IO[str]:
        """Locks the folder until the returned file is closed or the process ends. Raises `UserError` if locked."""
        note_files("; resume with resume=auto")
        refuse_links(self.path, f"hydra.run.dir={self.path}")
        try:
            # Two runs in one folder would replace each other's checkpoints and metrics. The file is emptied under the
            # lock only: until then it may name the process of another run.
            file = hold(self.path / name)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        except BlockingIOError:
            raise StateError(f"hydra.run.dir={self.path}: another run is active in this folder") from None
        except OSError as error:
            raise FileError(f"hydra.run.dir={self.path}: cannot write to this folder: {error.strerror}") from None
        return file

    def refuse_moved(self) -> None:
        """Raises `RunError` if the folder of a run of this process was removed or renamed, or lost its lock file.

        Otherwise the run's output would be lost, or mixed with the files of the next run in a folder of the same name.
        A process that the run's own code has forked, and that has returned into the training, ends here: two processes
        would write the same files.
        """
        if is_held_by_parent(self.path / LOCK):
            print_line("a forked process of this run ends, because its parent writes the same folder")
            flush_streams()
            os._exit(0)
        if (place := lost(self.path / LOCK)) is not None:
            folder = Path(place).parent
            now = "removed" if place == "" else f"renamed to {folder}; resume with hydra.run.dir={folder} resume=auto"
            raise RunError(f"{self.path}: during the run, this folder or its file {LOCK} was {now}")

    @staticmethod
    def to_resume(path: str) -> Path:
        """Returns the checkpoint that `resume=PATH` names: a file, or the last one of a run folder."""
        for file in (Path(path, "checkpoints", "last.pt"), Path(path, "last.pt")):
            if file.is_file():
                return file
        return Path(path)

    def typed(self) -> list[str]:
        """Reads the overrides of the run as they were typed, after the flags that name its config files."""
        overrides = self._load("overrides.yaml")
        return [str(override) for override in overrides] if isinstance(overrides, list) else []

    def _load(self, name: str) -> Any:
        try:
            return load_yaml(self.path / name)
        except (OSError, ValueError):  # ValueError includes UnicodeDecodeError
            return None


def other_format(found: object, what: str) -> str | None:
    """Returns an error message about files of the format `found`; None if it is `FORMAT`. `what`: its name."""
    if type(found) is int and found == FORMAT:
        return None
    shown = "none" if found is None else printable(str(found))[:40]
    return f"written by another version of dlopt ({what} {shown}; this version reads {FORMAT}); use that version"


def new_run_id() -> str:
    return secrets.token_hex(6)


def refuse_links(folder: Path, key: str) -> None:
    """Raises `UserError` for a link in the folder of a run or a sweep: writing to it would change files elsewhere.

    Also for a pipe or a socket, at which writing waits. The folder itself may be a link. Links to devices are harmless,
    and checkpoint files are replaced.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    for name in (*sorted(names), "checkpoints/shards"):
        if (folder / name).is_char_device():
            continue
        path = inside(folder, name, key)
        if path.is_fifo() or path.is_socket():
            raise UserError(f"{key}: {printable(name)} is a pipe or a socket, not a file; remove it")


def inside(folder: Path, name: str, key: str) -> Path:
    """Returns the path of an entry in or below `folder`. Raises `UserError` if the path contains a link."""
    path = folder
    for part in Path(name).parts:
        path /= part
        if path.is_symlink():
            link = printable(str(path.relative_to(folder)))
            raise UserError(f"{key}: {link} is a link, which may lead to files of others; remove it")
    return path


def refuse_url(path: str, key: str) -> None:
    """Raises `UserError` for s3://bucket/x, which as a path would be a local folder named `s3:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(
            f"{key}={path}: must be a path, not a URL; mount the storage (s3fs, gcsfuse) and use the mounted path, "
            "or use a local folder and copy it at the end"
        )


def make(path: Path, key: str, *, exist_ok: bool = False) -> Path:
    """Creates the folder given by `key`. Raises `UserError`."""
    note_files()
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        reason = f"cannot create this folder: {error.strerror}; choose one where you may create files"
        if isinstance(error, FileExistsError) and not exist_ok:
            reason = "is a file, or another run is creating this folder"
        raise UserError(f"{key}={path}: {reason}") from None
    return path


def make_new(path: Path, key: str = "hydra.run.dir") -> Path:
    """Creates a dated folder; appends -1, -2, ... to the name if several runs start in the same second."""
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        candidate = path.with_name(path.name + suffix)
        if not candidate.exists():
            try:
                return _in_order(make(candidate, key))
            except UserError:
                if not candidate.exists():  # a real error; otherwise another process was faster: try the next name
                    raise
    raise UserError(f"{key}={path}: 1000 folders of this name exist")


class FolderSnapshot:
    """The entries of a folder before a run writes to it, to clean up after a run that fails to start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = set(os.listdir(path)) if path.is_dir() else None
        self.missing = [folder for folder in path.parents if not folder.exists()]

    def erase(self, path: Path) -> None:
        """Removes new entries of `path` (the same folder, or a sibling of it) and the folders created for it."""
        kept = self.entries if path == self.path else None
        with contextlib.suppress(OSError):
            for entry in (each for each in path.iterdir() if each.name not in (kept or ())):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            for folder in (path, *self.missing) if kept is None else ():
                folder.rmdir()


def newest(parent: Path, distance: Callable[[RunFolder], int | None]) -> RunFolder | None:
    """Returns the folder in `parent` with the smallest distance (of several, the newest); None without a match."""
    try:
        folders = sorted((p for p in parent.iterdir() if p.is_dir()), key=_age, reverse=True)
    except OSError:
        return None
    found: dict[int, RunFolder] = {}
    for folder in map(RunFolder, folders):
        if (value := distance(folder)) is not None:
            found.setdefault(value, folder)
            if value == 0:
                break
    return found[min(found)] if found else None


def _age(folder: Path) -> tuple[str, int, str, int, str]:
    """Sort key of dated folders: by name, within one second -10 after -9, or where `_in_order` has put them."""
    name, rank = folder.name, 0
    with contextlib.suppress(OSError, ValueError):
        name, _, number = read_regular(folder / _AFTER, 300).decode().partition("\n")
        rank = int(number)
    return name[:19], len(name), name, rank, folder.name


def _in_order(folder: Path) -> Path:
    """Notes in a new folder which folder it follows, if the clock was set back and the names have the wrong order."""
    with contextlib.suppress(OSError):  # the order matters less than the run
        others = [each for each in folder.parent.iterdir() if each != folder and _DATED.match(each.name)]
        latest = max(map(_age, others), default=None)
        if latest is not None and _DATED.match(folder.name) and latest[0] > folder.name[:19]:
            (folder / _AFTER).write_text(f"{latest[2]}\n{latest[3] + 1}")
    return folder


def short_path(path: Path) -> str:
    """Returns the path relative to the folder of the user's shell if it is below it, else the absolute path."""
    absolute, shell = Path(os.path.abspath(path)), os.environ.get(SHELL_FOLDER) or os.getcwd()
    return str(absolute.relative_to(shell) if absolute.is_relative_to(shell) else absolute)
