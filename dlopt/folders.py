"""Run folders: one folder, one run. Finding, locking, and telling apart what is finished, unfinished and live."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from dlopt.errors import UserError
from dlopt.files import read_json
from dlopt.locks import hold, is_held
from dlopt.plain import check_yaml

FORMAT = 1  # of run folders: which files there are and what their keys mean; environment.json says it
LOCK = ".lock"
_ENDED = ("finished", "stopped_early")


@dataclass
class RunFolder:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def config(self) -> dict[str, Any] | None:
        """The saved config; None where there is no readable one."""
        path = self.path / "config.yaml"
        try:
            check_yaml(path)
            found = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError, ValueError):  # UnicodeDecodeError is one
            return None
        return found if isinstance(found, dict) else None

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.path / "summary.json")

    def newer_format(self) -> str | None:
        """Returns the reason why this dlopt cannot read the folder, where a newer one wrote it in its own format.

        Folders without a format are of the first one.
        """
        version = (read_json(self.path / "environment.json") or {}).get("folder_format")
        if type(version) is not int or version <= FORMAT:
            return None
        return f"written by a newer dlopt (run folder format {version}; this reads {FORMAT})"

    def refuse_newer(self, key: str) -> None:
        """Raises `UserError` where a newer dlopt wrote the folder; `key`: what was typed to come here."""
        if (reason := self.newer_format()) is not None:
            raise UserError(f"{key}: {self.path}: {reason}")

    def holds_a_run(self) -> bool:
        return any((self.path / name).exists() for name in ("config.yaml", "summary.json", "checkpoints"))

    def is_finished(self) -> bool:
        return (self.summary() or {}).get("status") in _ENDED

    def is_done(self, config: Mapping[str, Any]) -> bool:
        """Whether nothing is left to do: the run is finished, and `config` does not ask for a longer one."""
        status, saved = (self.summary() or {}).get("status"), self.config() or {}
        key = "epochs" if config["steps"] is None else "steps"
        length = saved.get(key)
        is_longer = isinstance(length, int) and config[key] > length
        return status == "stopped_early" or (status == "finished" and not is_longer)

    def is_live(self) -> bool:
        """Whether a process is at work here; a lock left by a killed one does not count."""
        return is_held(self.path / LOCK)

    def lock(self) -> IO[str]:
        """Locks the folder until the returned file is closed or the process ends. `UserError` where it is locked."""
        try:
            file = hold(self.path / LOCK)
        except BlockingIOError:
            raise UserError(f"hydra.run.dir={self.path}: another run is active in this folder") from None
        except OSError as error:
            raise UserError(f"hydra.run.dir={self.path}: the folder cannot be written: {error.strerror}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    def history(self) -> list[str]:
        """What was typed for the run."""
        try:
            found = yaml.safe_load((self.path / "overrides.yaml").read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return []
        return [str(each) for each in found] if isinstance(found, list) else []


def make(path: Path, key: str) -> Path:
    """Makes the folder that was asked for. Raises `UserError` when that cannot be."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{key}={path}: there is a file of this name, or another run makes this folder") from None
    except OSError as error:
        raise UserError(f"{key}={path}: the folder cannot be made: {error.strerror}") from None
    return path


def make_new(path: Path, key: str = "hydra.run.dir") -> Path:
    """Makes a dated folder; runs of the same second get -1, -2 ... behind it."""
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        candidate = path.with_name(path.name + suffix)
        if not candidate.exists():
            try:
                return make(candidate, key)
            except UserError:
                if not candidate.exists():  # another process was no faster
                    raise
    raise UserError(f"{key}={path}: a thousand folders of this name exist")


class Trace:
    """What stands at a path before a run touches it, so that one which cannot begin leaves no trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = set(os.listdir(path)) if path.is_dir() else None
        self.missing = [folder for folder in path.parents if not folder.exists()]

    def erase(self, path: Path) -> None:
        """Takes back what has come since in `path` (the same, or one beside it), and folders made for it."""
        kept = self.entries if path == self.path else None
        with contextlib.suppress(OSError):
            for entry in (each for each in path.iterdir() if each.name not in (kept or ())):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            for folder in (path, *self.missing) if kept is None else ():
                folder.rmdir()


def newest(parent: Path, fits: Callable[[RunFolder], bool]) -> RunFolder | None:
    """The newest folder below `parent` that fits."""
    try:
        folders = sorted((p for p in parent.iterdir() if p.is_dir()), key=_age, reverse=True)
    except OSError:
        return None
    return next((folder for folder in map(RunFolder, folders) if fits(folder)), None)


def _age(folder: Path) -> tuple[str, int, str]:
    """Order of dated names: of one second, -10 is newer than -9."""
    return folder.name[:19], len(folder.name), folder.name
