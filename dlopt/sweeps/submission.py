"""A sweep that runs independently of its shell: the files for its elements or workers, and how they start.

A grid is an array whose elements run the jobs of their index (`array`). The workers of a search, a benchmark or a
ladder run the same command, which shares its jobs among processes.

FOLDER/workers/ holds `submission.json` (this module), `launcher.json` (the settings of hydra/launcher), `jobs.json`
(the jobs of a grid), `slurm` (the ids of the arrays), `.code/` (see `code_copy`), `repository.json` and `code.diff`
(the state of the user's repository, which the runs record), `stop` (why the workers of a search must stop), and the
outputs.

An untrusted folder runs nothing: an element accepts only a submission of its own user, or one whose SHA-256 the user
has typed. The hash covers the code, the jobs, the packages that they may import, and their environment.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dlopt._version import __version__
from dlopt.basics.errors import StateError, UserError
from dlopt.basics.files import write_atomically
from dlopt.basics.folders import IN_PLACE, SUBMITTED, RunFolder, inside, short_path
from dlopt.basics.locks import locked, shared, taken
from dlopt.basics.plain_values import read_regular
from dlopt.basics.stored import Stored
from dlopt.parallel.processes.launch import python_module
from dlopt.sweeps.array import (
    JOBS,
    STOP,
    STOP_RUN,
    SUBMISSION,
    SUBMIT_AGAIN,
    WORKERS,
    JobArray,
    format_indices,
    own_numbers,
    read_array,
)
from dlopt.sweeps.code_copy import is_unchanged
from dlopt.sweeps.element import RESTARTS
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.slurm_queue import Elements, cancel, note_array, queued_elements

T = TypeVar("T")
LAUNCHER, SUBMIT_LOCK, _IN_USE = "launcher.json", "submit.lock", "in_use.lock"  # in the folder of the workers


@dataclass(frozen=True)
class Submission:
    """Everything an element or a worker needs.

    Attributes:
        dlopt, torch: versions.
        cwd: the folder in which the sweep was submitted, where the jobs run.
        code: the folder of the copied code, relative to the sweep's folder; `paths`: see `CopiedCode`.
        sha256: of the copied code.
        packages: packages that the configs of jobs may name in `allow_packages`.
        environment: additional variables of the jobs; `secrets`: variables that no file may hold.
        tasks: processes of a job, which srun starts.
        command: the dlopt command of every worker; None for a grid.
        jobs: SHA-256 of the jobs of a grid: their folders, labels, lengths and configs; None for a command.
        elements: of the array of a grid; 0 for a command.
    """

    dlopt: str
    torch: str
    cwd: str
    code: str
    paths: tuple[str, ...]
    sha256: str
    packages: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: tuple[str, ...]
    tasks: int
    command: tuple[str, ...] | None
    jobs: str | None
    elements: int

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # such as those of another version

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))

    def import_paths(self, sweep: Path) -> list[str]:
        """Returns the entries of sys.path of a worker."""
        return [os.path.abspath(sweep / self.code / path) for path in self.paths]

    @property
    def in_place(self) -> list[str]:
        """Returns the entries of sys.path whose code is not copied."""
        return [path for path in self.paths if os.path.isabs(path)]

    def check(self, sweep: Path) -> None:
        """Raises `UserError` if this environment differs from the submission's."""
        here = {"dlopt": self.dlopt if "dlopt" in self.paths else __version__, "torch": version("torch")}
        for name, submitted in {"dlopt": self.dlopt, "torch": self.torch}.items():
            if here[name] != submitted:
                raise UserError(
                    f"{short_path(sweep)}: submitted with {name} {submitted}, but this is {name} {here[name]}; start "
                    "the worker in the environment of the sweep"
                )
        if missing := [name for name in self.secrets if name not in os.environ]:
            raise UserError(f"{short_path(sweep)}: its jobs need these environment variables: {', '.join(missing)}")
        if not is_unchanged(inside(sweep, self.code, str(sweep)), self.sha256):
            raise UserError(
                f"{short_path(sweep)}: the copy of its code has changed since it was submitted ({self.code})"
            )
        if not Path(self.cwd).is_dir():
            raise UserError(f"{short_path(sweep)}: submitted in {self.cwd}, a folder that this machine does not have")


def read(sweep: Path) -> Submission:
    """Reads the submission in the folder of a sweep. Raises `UserError`."""
    return _read(sweep, SUBMISSION, Submission)


def _read(sweep: Path, name: str, kind: type[T]) -> T:
    found = Stored(sweep / WORKERS / name, kind, cure=SUBMIT_AGAIN).read()
    if found is None:
        raise UserError(f"{short_path(sweep)}: no sweep was submitted in this folder (hydra/launcher=slurm)")
    return found


def read_own(sweep: Path, verb: str) -> tuple[Submission, Slurm]:
    """Reads a submission of this user. Raises `UserError`, also for a sweep of another user."""
    submission, launcher = read(sweep), _read(sweep, LAUNCHER, Slurm)
    if not {submission.digest, digest_of(asdict(launcher))} <= trusted():
        raise UserError(f"{short_path(sweep)}: only the user who has submitted this sweep can {verb} it")
    return submission, launcher


def is_working(sweep: Path) -> bool:
    """Returns whether elements of a submitted grid are queued or running. Raises `UserError`."""
    array = read_array(sweep)
    if array is None:
        return False
    queued = queued_elements(sweep)
    refuse_silence(queued)
    return bool(queued) or any(job.run(sweep).is_live() for job in array.jobs)


def own_array(sweep: Path, submission: Submission) -> JobArray:
    """Reads the jobs of a submitted grid. Raises `UserError` if they are not those of the submission."""
    array = read_array(sweep)
    if array is None or array.elements != submission.elements:
        raise UserError(f"{short_path(sweep)}: {WORKERS}/{JOBS} is missing, or not of this submission")
    return array


# -- elements and workers


def start_elements(
    sweep: Path, submission: Submission, launcher: Slurm, elements: Collection[int], secrets: Mapping[str, str]
) -> str | None:
    """Submits elements of a grid, or workers; returns their Slurm job id, None if there are none, or for n_jobs=0."""
    if not launcher.n_jobs or not elements:
        return None
    array = format_indices(elements) + (f"%{launcher.n_jobs}" if launcher.n_jobs < len(elements) else "")
    line = worker_command(sweep, submission, launcher)
    job_id = launcher.submit(array, line, (sweep / WORKERS).absolute(), Path(submission.cwd), secrets)
    note_array(sweep, job_id)  # a crash before this line leaves elements that only scancel stops
    return job_id


def worker_command(
    sweep: Path, submission: Submission, launcher: Slurm, slots: int = 1, part: tuple[int, int] | None = None
) -> list[str]:
    """Returns the command line of an element or a worker, with its import paths.

    `slots`: jobs at once; `part`: of the jobs of a grid, see `array.own_numbers`.
    """
    options = {
        "slots": slots, "requeue": launcher.requeue, "stop_on_failure": launcher.stop_on_failure, "part": part
    }  # fmt: skip
    arguments = str(sweep.absolute()), submission.digest, json.dumps(options)
    command = python_module("dlopt.commands.sweep_worker", *arguments)
    shell = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*submission.import_paths(sweep), *filter(os.path.isabs, shell)]  # not ".": the working folder may change
    program = [command[0], "-P", *(word for word in command[1:] if word != "-P")]
    # No bytecode: `check` compares the copy of the code, which must not change.
    variables = ["PYTHONDONTWRITEBYTECODE=1", *([f"PYTHONPATH={os.pathsep.join(paths)}"] if paths else [])]
    return ["/usr/bin/env", *variables, *program]


@contextlib.contextmanager
def in_use(sweep: Path) -> Iterator[None]:
    """Context of a process that runs jobs of the submission, which nobody replaces until it ends.

    A process between two jobs holds no lock of a run. With another submission, it would run the next job of that one
    with its own code.
    """
    folder = sweep / WORKERS
    with shared(folder / _IN_USE) if folder.is_dir() else contextlib.nullcontext():  # else `read` refuses it
        yield


@contextlib.contextmanager
def unused(sweep: Path) -> Iterator[bool]:
    """Tries to keep processes from starting to run jobs in the block; yields whether none runs any."""
    path = sweep / WORKERS / _IN_USE
    path.touch()
    with taken(path) as is_free:
        yield is_free is not False


@contextlib.contextmanager
def recorded_code(sweep: Path, submission: Submission) -> Iterator[None]:
    """Makes runs that are described in the block record the code of the submission, and import nothing else."""
    from hydra.core.utils import env_override

    in_place = os.pathsep.join(submission.in_place)
    with env_override({SUBMITTED: str((sweep / WORKERS).absolute()), IN_PLACE: in_place}):
        yield


def stop(sweep: Path, submission: Submission, reason: str) -> int:
    """Stops a sweep: cancels the elements of a grid, which write checkpoints; returns how many.

    The workers of a search may run elsewhere, too, and read the file STOP; those that wait for Slurm are cancelled.
    """
    queued = queued_elements(sweep)
    if submission.command is None:
        refuse_silence(queued)
    # The file first: a worker that starts while the others are cancelled reads it, and takes no job.
    write_atomically(sweep / WORKERS / STOP, reason)
    return cancel(queued, pending_only=submission.command is not None)


def resume(sweep: Path) -> tuple[int, str | None]:
    """Submits an array of the elements with unfinished jobs, or workers; returns how many, and the Slurm job id.

    Failed jobs run again. Raises `UserError`, also for a sweep or settings of sbatch that another user has submitted.
    """
    submission, launcher = read_own(sweep, "resume")
    submission.check(sweep)
    launcher.require()
    with locked(sweep / WORKERS / SUBMIT_LOCK):  # the second of two commands finds the array of the first
        return _resume(sweep, submission, launcher)


def _resume(sweep: Path, submission: Submission, launcher: Slurm) -> tuple[int, str | None]:
    secrets = {name: os.environ[name] for name in submission.secrets}
    queued = queued_elements(sweep)
    refuse_silence(queued)
    if submission.command is not None:
        count = launcher.slots - len(queued.running) - queued.pending
        if count <= 0:
            raise StateError(f"{short_path(sweep)}: its workers are queued or running")
        (sweep / WORKERS / STOP).unlink(missing_ok=True)
        return count, start_elements(sweep, submission, launcher, range(count), secrets)
    array = own_array(sweep, submission)
    unfinished = elements_left(sweep, array)
    elements = [element for element in unfinished if element not in queued.by_index]
    if not elements:
        left = "no job is left to run"
        if unfinished:
            left = f"all jobs that are left are queued or running (Slurm job {', '.join(queued.states)})"
        raise UserError(f"{short_path(sweep)}: {left}")
    runs = [array.jobs[number].run(sweep) for element in elements for number in array.jobs_of(element)]
    (sweep / WORKERS / STOP).unlink(missing_ok=True)
    with _failures_removed([run for run in runs if not array.has_diverged(run)]):
        return len(elements), start_elements(sweep, submission, launcher, elements, secrets)


def refuse_silence(elements: Elements) -> None:
    """Raises `UserError` if Slurm does not answer: its elements may be running."""
    if not elements.answers:
        raise UserError("hydra/launcher=slurm: squeue does not answer, so elements of this sweep may be running")


def elements_left(sweep: Path, array: JobArray) -> list[int]:
    """Returns the elements with jobs that have no result."""
    left = (number for number, job in enumerate(array.jobs) if not array.has_ended(job.run(sweep)))
    return [*dict.fromkeys(map(array.element_of, left))]


@contextlib.contextmanager
def _failures_removed(runs: Iterable[RunFolder]) -> Iterator[None]:
    """Lets elements start failed jobs again, and counts restarts from 0; a `UserError` in the block undoes it."""
    removed: dict[Path, bytes] = {}
    for run in runs:
        for name in (RESTARTS, STOP_RUN):
            (run.path / name).unlink(missing_ok=True)
        if (run.summary() or {}).get("status") == "failed" and not run.is_live():
            path = run.path / "summary.json"
            removed[path] = read_regular(path)
            path.unlink()
    try:
        yield
    except UserError:
        for path, data in removed.items():
            write_atomically(path, data)
        raise


def become_worker(sweep: Path, typed: str | None, slots: int, part: tuple[int, int] | None) -> None:
    """Replaces this process by one that runs jobs of the sweep.

    Raises `UserError`, also for a sweep that another user has submitted, unless its SHA-256 was `typed`.
    """
    submission = read(sweep)
    digest, is_own = submission.digest, submission.digest in trusted()
    if not is_own and submission.in_place:
        raise UserError(
            f"{short_path(sweep)}: only the user who has submitted this sweep can start its workers, because its code "
            f"is in no Git repository and was not copied: {', '.join(submission.in_place)}"
        )
    if not is_own and not (typed is not None and len(typed) >= 12 and digest.startswith(typed)):
        raise UserError(
            f"{short_path(sweep)}: you have not submitted this sweep, whose code would run; if you trust it, add "
            f"trust={digest[:16]}"
        )
    submission.check(sweep)
    if submission.command is not None and part is not None:
        raise UserError(f"{short_path(sweep)}: part= is for grids; the workers of a search share its jobs")
    if submission.command is None:
        own_numbers(own_array(sweep, submission), part, os.environ)  # refuses an index out of range
    if submission.tasks > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"{short_path(sweep)}: its jobs have {submission.tasks} processes, which srun starts")
    command = worker_command(sweep, submission, _read(sweep, LAUNCHER, Slurm), slots, part)
    sys.stdout.flush()
    os.execv(command[0], command)


def _state() -> Path:
    """Returns the file with the digests of this user's submissions."""
    home = os.path.expanduser("~/.local/state")
    return Path(os.environ.get("XDG_STATE_HOME") or (home if os.path.isabs(home) else os.devnull), "dlopt", "submitted")


def trusted() -> set[str]:
    """Returns the digests of the submissions and the series of this user."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return set(_state().read_text().split())
    return set()


def trust(*digests: str) -> None:
    with contextlib.suppress(OSError):  # without a home: `trust=` is needed
        _state().parent.mkdir(parents=True, exist_ok=True)
        if new := set(digests) - trusted():
            with _state().open("a") as file:
                file.write("".join(f"{each}\n" for each in sorted(new)))


def digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
