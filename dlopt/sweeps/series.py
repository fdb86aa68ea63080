"""What every series of runs has: its kind, the command that continues it, and a way to stop it or one of its runs.

Grids, searches, comparisons, benchmarks, ladders and judgements write FOLDER/series.yaml when they begin. The pool that
runs the jobs of a series looks for the files STOP (of the series) and STOP_RUN (of a run): both work on any machine
that sees the folder.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_atomically, write_yaml
from dlopt.basics.folders import RunFolder, short_path
from dlopt.basics.stored import Stored
from dlopt.config.overrides import storable
from dlopt.results.reading import find
from dlopt.sweeps.array import STOP, STOP_RUN, WORKERS, is_submitted
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.submission import digest_of, trust, trusted

SERIES = "series.yaml"


@dataclass(frozen=True)
class Series:
    """A series of runs.

    Attributes:
        kind: grid, search, comparison, or the command of the laboratory.
        command: continues it in the folder `cwd`.
        total: number of its runs; None if the files of its kind state it.
    """

    kind: str
    command: tuple[str, ...]
    cwd: str
    total: int | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @property
    def is_own(self) -> bool:
        """Whether this user has started it: its command may run in this user's name."""
        return digest_of(asdict(self)) in trusted()


def begin(folder: Path, kind: str, command: Sequence[str], total: int | None = None) -> None:
    """Writes the file of a series that begins or continues, and withdraws a request to stop it."""
    (folder / WORKERS / STOP).unlink(missing_ok=True)
    series = Series(kind, tuple(storable(command)), os.getcwd(), total)
    write_yaml(folder / SERIES, asdict(series) | {"command": list(series.command)})
    trust(digest_of(asdict(series)))


def read(folder: Path) -> Series | None:
    """Reads the file of a series; None if there is none. Raises `UserError` for a damaged one."""
    return Stored(folder / SERIES, Series).read()


def of_run(run: Path) -> Path | None:
    """Returns the folder of the series to which a run belongs; None if it is a single run."""
    return next((each for each in run.absolute().parents if (each / SERIES).exists() or is_submitted(each)), None)


def stop(folder: Path, reason: str) -> None:
    """Requests the end of a series that runs without Slurm. Raises `UserError` if no process runs it."""
    is_live = (
        RunFolder(folder).is_live() or live_workers(folder) or any(RunFolder(run).is_live() for run in find(folder))
    )
    if not is_live:
        raise UserError(f"{short_path(folder)}: no process runs this series")
    (folder / WORKERS).mkdir(exist_ok=True)
    write_atomically(folder / WORKERS / STOP, reason)


def stop_run(run: Path) -> None:
    """Requests the end of one run of a series, with a checkpoint. Raises `UserError` if it does not run."""
    if of_run(run) is None or not RunFolder(run).is_live():
        raise UserError(f"{short_path(run)}: not a running job of a series")
    write_atomically(run / STOP_RUN, "")
