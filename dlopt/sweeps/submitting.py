"""Submits a sweep: writes the files of its workers into its folder, and makes Slurm start the workers."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig

from dlopt._version import __version__
from dlopt.basics.errors import UserError
from dlopt.basics.files import write_atomically, write_json
from dlopt.basics.folders import short_path
from dlopt.basics.formats import format_count, printable
from dlopt.basics.locks import locked
from dlopt.basics.secrets import has_hidden, is_secret_name, redact
from dlopt.config.compose import Composer
from dlopt.config.overrides import SPACE, WAIT, key_of, quoted_plain, storable, value_of, without
from dlopt.config.plan import Plan
from dlopt.config.resolve import job_variables
from dlopt.run import environment as environments
from dlopt.sweeps.code_copy import CopiedCode, copy_code
from dlopt.sweeps.jobs import Job, prepare
from dlopt.sweeps.queue import RUNNING, WORKERS, Log, live_workers
from dlopt.sweeps.request import SweepRequest
from dlopt.sweeps.slurm import Slurm, cancel_waiting
from dlopt.sweeps.submission import (
    FILE,
    LAUNCHER,
    STOP,
    Submission,
    digest_of,
    is_submitted,
    read,
    recorded_code,
    start_workers,
    trust,
)

_CODE, _LOCK = ".code", "submit.lock"  # in the folder of the workers; hidden, because it holds no runs
_NOT_COPIED = "not_copied"  # there, too: the files beside the code that were not copied


def submit_grid(request: SweepRequest, launcher: Slurm, folder: Path, jobs: Sequence[Job]) -> None:
    """Submits the jobs of a grid that are not done. Raises `UserError`."""
    plans = [job.plan for job in jobs]
    left = sum(not job.is_done for job in jobs)
    packages = sorted({name for plan in plans for name in plan.saved.get("allow_packages") or ()})
    again = request.config.resume == "auto"
    job_id = submit(
        folder, launcher, jobs, packages=packages, environment=plans[0].environment, workers=left, again=again
    )
    print_submitted(folder, job_id, min(launcher.n_jobs, left), len(jobs))


def refuse_different_environments(plans: Sequence[Plan]) -> None:
    """Raises `UserError` for environment variables that differ between the jobs of a sweep to submit."""
    if any(plan.environment != plans[0].environment for plan in plans):
        raise UserError("hydra.job.env_set: must be the same for all jobs of a submitted sweep")


def refuse_hidden_words(words: Sequence[str]) -> None:
    """Raises `UserError` for a word that cannot be stored as typed: a URL with a password or token."""
    for word in words:
        if has_hidden(word):
            raise UserError(
                f"{word}: no file may hold the password or token; set a variable, and type ${{oc.env:NAME}}"
            )


def submit_search(request: SweepRequest, launcher: Slurm, folder: Path, plan: Plan, total: int, left: int) -> None:
    """Submits a search, whose workers draw the jobs (`left` of `total`). `plan`: of one job. Raises `UserError`."""
    files, flags = _config_files(request.composer)
    words = without(request.words, WAIT, "resume", "hydra.sweep.dir")
    for index, word in enumerate(words):
        key, path = key_of(word), os.path.expanduser(value_of(word).strip("'\""))
        if key in (SPACE, "hydra.sweeper.enqueue") and os.path.isfile(path):
            files[key], words[index] = Path(path), f"{key}={{{key}}}"
    own = ["resume=auto", f"hydra.sweep.dir={quoted_plain(str(folder.absolute()))}"]
    command = ["train", "-m", *flags, *storable(words), *own]
    packages = plan.saved.get("allow_packages") or ()
    job_id = submit(
        folder,
        launcher,
        None,
        command=command,
        files=files,
        packages=packages,
        environment=plan.environment,
        workers=left,
    )
    print_submitted(folder, job_id, min(launcher.n_jobs, left), total)


def submit_command(
    launcher: Slurm, words: Sequence[str], composer: Composer, folder: Path, config: DictConfig, jobs: int
) -> None:
    """Submits workers that run a command of dlopt that shares its jobs among processes. Raises `UserError`.

    `config`: of one of its jobs.
    """
    launcher.require()
    files, flags = _config_files(composer)
    command = [words[0], *flags, *storable(words[1:])]
    packages = [str(name) for name in config.get("allow_packages") or ()]
    job_id = submit(
        folder,
        launcher,
        None,
        command=command,
        files=files,
        packages=packages,
        environment=job_variables(config),
        workers=jobs,
    )
    print_submitted(folder, job_id, min(launcher.n_jobs, jobs), jobs)


def _config_files(composer: Composer) -> tuple[dict[str, Path], list[str]]:
    """Returns the folder of --config-dir, to be copied, and the flags that name the copy."""
    flags = [f"--config-name={composer.config_name}"]
    if composer.config_dir is None:
        return {}, flags
    return {"config": Path(composer.config_dir).absolute()}, ["--config-dir={config}", *flags]


def print_submitted(folder: Path, job_id: str | None, workers: int, jobs: int) -> None:
    """Prints the commands for a submitted sweep."""
    how = "no workers" if job_id is None else f"{format_count('workers', workers)}, Slurm job {job_id}"
    print(f"submitted {format_count('jobs', jobs)}: {how}", "next:", sep="\n")
    for part in ("work",) if job_id is None else ("status", "wait", "stop"):
        print(f"  dlopt sweep {part} {shlex.quote(short_path(folder))}")


def submit(
    sweep: Path,
    launcher: Slurm,
    jobs: Sequence[Job] | None,
    *,
    command: Sequence[str] | None = None,
    files: Mapping[str, Path] | None = None,
    packages: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    workers: int,
    again: bool = False,
) -> str | None:
    """Writes the files of the workers into the folder of a sweep, and submits workers; returns their Slurm job id.

    Args:
        jobs: the jobs of a grid, described in their folders; None if every worker runs `command` of dlopt.
        files: files that `command` reads, by name: `{name}` in a word becomes the path of the copy.
        packages: of `allow_packages`.
        environment: additional variables of the jobs.
        workers: the number of workers with something to do.
        again: queue all jobs that are neither done nor running, as they are now.

    Raises:
        UserError: workers of this sweep are running other code, the code is too large, or sbatch refuses.
    """
    public, secrets = _split(environment or {})
    folder = sweep / WORKERS
    folder.mkdir(exist_ok=True)
    with locked(folder / _LOCK):  # of two submissions at the same time, the second finds the first
        code = copy_code(packages, files or {}, folder / _CODE, [sweep.absolute(), Path("outputs").absolute()])
        _report_left_out(code, folder / _NOT_COPIED)
        refuse_hidden_words(command or [])
        words = None if command is None else [_with_files(word, code, files or {}) for word in command]
        submission = _submission(sweep, code, packages, public, sorted(secrets), launcher.tasks, words)
        former = read(sweep) if is_submitted(sweep) else None
        is_same = former is not None and former.digest == submission.digest
        if not is_same and live_workers(sweep):
            what = "code" if former is not None and former.sha256 != submission.sha256 else "settings"
            raise UserError(
                f"{short_path(sweep)}: workers of this sweep are running with other {what}; wait for them, stop them "
                f"with `dlopt sweep stop {short_path(sweep)}`, or use another folder"
            )
        log = Log(sweep).read()
        if not is_same:
            cancel_waiting(log.slurm, sweep / WORKERS)  # they would find another sweep
            write_atomically(folder / "log", b"")
            log = Log(sweep)
        _write(sweep, submission, launcher)
        if jobs is not None:
            with recorded_code(sweep), log.locked():
                _queue(log, jobs, again=again)
        (folder / STOP).unlink(missing_ok=True)
    return start_workers(sweep, submission, launcher, workers, secrets)


def _report_left_out(code: CopiedCode, path: Path) -> None:
    """Prints files of the code that were not copied, and lists them in a file."""
    write_atomically(path, redact("".join(f"{name}\n" for name in code.left_out)))
    if code.left_out:
        first = ", ".join(short_path(Path(name)) for name in code.left_out[:3])
        more = ", ..." if len(code.left_out) > 3 else ""
        count = format_count("files or folders", len(code.left_out))
        print(printable(redact(f"not copied with the code: {count} ({first}{more}), listed in {short_path(path)}")))
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        is_installed = {"site-packages", "dist-packages"} & set(Path(entry).parts)
        if os.path.isabs(entry) and not is_installed and not Path(entry).is_relative_to(Path.cwd()):
            print(printable(f"not copied with the code: {entry} of PYTHONPATH; what you edit there changes the jobs"))


def _submission(
    sweep: Path,
    code: CopiedCode,
    packages: Sequence[str],
    environment: Mapping[str, str],
    secrets: Sequence[str],
    tasks: int,
    command: Sequence[str] | None,
) -> Submission:
    return Submission(
        dlopt=__version__,
        torch=version("torch"),
        cwd=os.getcwd(),
        code=str(code.folder.relative_to(sweep)),
        paths=code.paths,
        sha256=code.sha256,
        packages=tuple(packages),
        environment=environment,
        secrets=tuple(secrets),
        tasks=tasks,
        command=None if command is None else tuple(command),
    )


def _split(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Splits variables into secrets and variables that files may hold."""
    secrets = {name: value for name, value in environment.items() if is_secret_name(name) or redact(value) != value}
    return {name: value for name, value in environment.items() if name not in secrets}, secrets


def _with_files(word: str, code: CopiedCode, files: Mapping[str, Path]) -> str:
    for name, path in files.items():
        word = word.replace(f"{{{name}}}", str((code.folder / name / path.name).absolute()))
    return word


def _write(sweep: Path, submission: Submission, launcher: Slurm) -> None:
    folder = sweep / WORKERS
    settings = asdict(launcher)
    code, diff = environments.repository()
    write_atomically(folder / FILE, json.dumps(asdict(submission), indent=1).encode())  # paths are not redacted
    write_atomically(folder / LAUNCHER, json.dumps(settings, indent=1).encode())
    facts = {"git_commit": environments.versions()["git_commit"], "code": code, "submitted_code": submission.sha256}
    write_json(folder / environments.REPOSITORY, facts)
    write_atomically(folder / environments.DIFF, diff.decode("utf-8", "surrogateescape"))
    trust(submission.digest, digest_of(settings))


def _queue(log: Log, jobs: Sequence[Job], *, again: bool) -> None:
    """Describes the remaining jobs in their folders, and queues them."""
    free = {*log.free()}
    for job in jobs:
        known = log.jobs.get(job.number)
        if known is not None and (not again or (known.status == RUNNING and job.number not in free)):
            continue
        done = None if job.folder.is_live() else prepare(job)  # of a killed sweep: it is writing its last checkpoint
        log.add([job])
        if done is not None:
            log.append(ended=job.number, status=done.status)
