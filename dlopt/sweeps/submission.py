"""A sweep that runs independently of its shell: the files for its workers, and how they start.

FOLDER/workers/ holds `submission.json` (this module), `launcher.json` (the settings of hydra/launcher), `log` (the jobs
of a grid, see `queue`), `.code/` (see `code_copy`), `repository.json` and `code.diff` (the state of the user's
repository, which the runs record), `stop` (why the workers must stop), and the workers' locks and outputs.

An untrusted folder runs nothing: a worker accepts only a submission of its own user, or one whose SHA-256 the user has
typed. The hash covers the code, the packages that jobs may import, and their environment.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dlopt._version import __version__
from dlopt.basics.errors import UserError
from dlopt.basics.files import read_json, write_atomically
from dlopt.basics.folders import SUBMITTED, inside, short_path
from dlopt.basics.plain_values import read_regular
from dlopt.parallel.processes.launch import python_module
from dlopt.sweeps.code_copy import is_unchanged
from dlopt.sweeps.queue import WORKERS, Log
from dlopt.sweeps.slurm import Slurm, cancel_waiting

FILE, LAUNCHER, STOP = "submission.json", "launcher.json", "stop"  # in the folder of the workers


@dataclass(frozen=True)
class Submission:
    """Everything a worker needs.

    Attributes:
        dlopt, torch: versions.
        cwd: the folder in which the sweep was submitted, where the jobs run.
        code: the folder of the copied code, relative to the sweep's folder; `paths`: entries of sys.path in it.
        sha256: of the copied code.
        packages: packages that the configs of jobs may name in `allow_packages`.
        environment: additional variables of the jobs; `secrets`: variables that no file may hold.
        tasks: processes of a job, which srun starts.
        command: the dlopt command of every worker; None for workers that take the jobs in the log.
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

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))

    def import_paths(self, sweep: Path) -> list[str]:
        """Returns the entries of sys.path of a worker."""
        return [os.path.abspath(sweep / self.code / path) for path in self.paths]

    def check(self, sweep: Path) -> None:
        """Raises `UserError` if this environment differs from the submission's."""
        here = {"dlopt": self.dlopt if self.paths else __version__, "torch": version("torch")}
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
    from dlopt.config.schema import check_arguments  # with pydantic, which the status of a sweep does not need

    found = read_json(sweep / WORKERS / FILE)
    names = {each.name for each in fields(Submission)}
    if found is None:
        raise UserError(f"{short_path(sweep)}: no sweep was submitted in this folder (hydra/launcher=slurm)")
    if found.keys() != names:
        raise UserError(f"{short_path(sweep)}: submitted with another version of dlopt, or damaged ({FILE})")
    try:
        return Submission(**check_arguments(FILE, Submission, found))
    except UserError as error:
        raise UserError(f"{short_path(sweep)}: damaged: {error}") from None


def _launcher(sweep: Path) -> Slurm:
    """Reads the settings of the launcher. Raises `UserError`."""
    from dlopt.config.schema import check_arguments

    try:
        return Slurm(**check_arguments(LAUNCHER, Slurm, read_json(sweep / WORKERS / LAUNCHER) or {}))
    except UserError as error:
        raise UserError(f"{short_path(sweep)}: damaged: {error}") from None


def _read_own(sweep: Path, verb: str) -> tuple[Submission, Slurm]:
    """Reads a submission of this user. Raises `UserError`, also for a sweep of another user."""
    submission, launcher = read(sweep), _launcher(sweep)
    if not {submission.digest, digest_of(asdict(launcher))} <= _trusted():
        raise UserError(f"{short_path(sweep)}: only the user who has submitted this sweep can {verb} it")
    return submission, launcher


def check_own(sweep: Path) -> None:
    """Raises `UserError` for a sweep of another user, which this user cannot stop."""
    _read_own(sweep, "stop")


def is_submitted(sweep: Path) -> bool:
    return (sweep / WORKERS / FILE).is_file()


# -- workers


def start_workers(
    sweep: Path, submission: Submission, launcher: Slurm, workers: int, secrets: Mapping[str, str]
) -> str | None:
    """Submits up to `workers` workers; returns their Slurm job id, None for hydra.launcher.n_jobs=0."""
    count = min(launcher.n_jobs, workers)
    if count == 0:
        return None
    line = worker_command(sweep, submission, launcher)
    job_id = launcher.submit(count, line, (sweep / WORKERS).absolute(), Path(submission.cwd), secrets)
    # After the submission, which returns the id. A crash may leave workers out of the log. They still run, but
    # `dlopt sweep stop` cannot cancel them while they wait: they read the file STOP when they start.
    log = Log(sweep)
    with log.locked():
        log.append(slurm=job_id)
    return job_id


def worker_command(sweep: Path, submission: Submission, launcher: Slurm, slots: int = 1) -> list[str]:
    """Returns the command line of a worker that runs `slots` jobs at once, with its import paths."""
    options = {"slots": slots, "requeue": launcher.requeue, "stop_on_failure": launcher.stop_on_failure}
    arguments = str(sweep.absolute()), submission.digest, json.dumps(options)
    command = python_module("dlopt.commands.sweep_worker", *arguments)
    shell = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*submission.import_paths(sweep), *filter(os.path.isabs, shell)]  # not ".": the working folder may change
    program = [command[0], "-P", *(word for word in command[1:] if word != "-P")]
    # No bytecode: `check` compares the copy of the code, which must not change.
    variables = ["PYTHONDONTWRITEBYTECODE=1", *([f"PYTHONPATH={os.pathsep.join(paths)}"] if paths else [])]
    return ["/usr/bin/env", *variables, *program]


@contextlib.contextmanager
def recorded_code(sweep: Path) -> Iterator[None]:
    """Makes runs that are described in the block record the code of the submission."""
    from hydra.core.utils import env_override

    with env_override({SUBMITTED: str((sweep / WORKERS).absolute())}):
        yield


def stop_reason(sweep: Path) -> str | None:
    """Returns why the workers of a sweep must stop; None to continue."""
    try:
        return read_regular(sweep / WORKERS / STOP).decode(errors="replace")[:200]
    except OSError:
        return None
    except ValueError as error:
        return f"{WORKERS}/{STOP} {error}"


def stop(sweep: Path, reason: str) -> None:
    """Makes the workers of a sweep stop with checkpoints, and cancels workers that have not started."""
    # The file first: a worker that starts while the others are cancelled reads it, and takes no job.
    write_atomically(sweep / WORKERS / STOP, reason)
    cancel_waiting(Log(sweep).read().slurm, sweep / WORKERS)


def resume(sweep: Path) -> str | None:
    """Queues the failed and interrupted jobs again and submits workers; returns their Slurm job id.

    Raises `UserError`, also for a sweep or settings of sbatch that another user has submitted.
    """
    submission, launcher = _read_own(sweep, "resume")
    submission.check(sweep)
    launcher.require()
    log, count = Log(sweep), launcher.slots
    with log.locked():
        (sweep / WORKERS / STOP).unlink(missing_ok=True)
        free = {*log.free()}
        for number, job in sorted(log.jobs.items()):
            if job.status in ("failed", "interrupted") or number in free:  # its starts count from zero
                log.append(job=number, folder=job.folder, label=job.label)
        if submission.command is None:
            count = len([*log.free()])
    if count == 0:
        raise UserError(f"{short_path(sweep)}: no job is left to run")
    return start_workers(sweep, submission, launcher, count, {name: os.environ[name] for name in submission.secrets})


def become_worker(sweep: Path, typed: str | None, slots: int) -> None:
    """Replaces this process by a worker of the sweep.

    Raises `UserError`, also for a sweep that another user has submitted, unless its SHA-256 was `typed`.
    """
    submission = read(sweep)
    digest = submission.digest
    if digest not in _trusted() and not (typed is not None and len(typed) >= 12 and digest.startswith(typed)):
        raise UserError(
            f"{short_path(sweep)}: you have not submitted this sweep, whose code would run; if you trust it, add "
            f"trust={digest[:16]}"
        )
    submission.check(sweep)
    if submission.tasks > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"{short_path(sweep)}: its jobs have {submission.tasks} processes, which srun starts")
    command = worker_command(sweep, submission, _launcher(sweep), slots)
    sys.stdout.flush()
    os.execv(command[0], command)


def _state() -> Path:
    """Returns the file with the digests of this user's submissions."""
    home = os.path.expanduser("~/.local/state")
    return Path(os.environ.get("XDG_STATE_HOME") or (home if os.path.isabs(home) else os.devnull), "dlopt", "submitted")


def _trusted() -> set[str]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return set(_state().read_text().split())
    return set()


def trust(*digests: str) -> None:
    with contextlib.suppress(OSError):  # without a home: `trust=` is needed
        _state().parent.mkdir(parents=True, exist_ok=True)
        if new := set(digests) - _trusted():
            with _state().open("a") as file:
                file.write("".join(f"{each}\n" for each in sorted(new)))


def digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
