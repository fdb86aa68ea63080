"""Submits a sweep: writes the files of its elements or workers into its folder, and makes Slurm start them."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dlopt._version import __version__
from dlopt.basics.errors import UserError
from dlopt.basics.files import write_atomically, write_json
from dlopt.basics.folders import short_path
from dlopt.basics.formats import format_count, printable
from dlopt.basics.locks import locked
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.basics.secrets import has_hidden, is_secret_name, redact, redacted
from dlopt.config.compose import Composer
from dlopt.config.keys import role_of
from dlopt.config.overrides import SPACE, WAIT, key_of, quoted_plain, storable, value_of, without
from dlopt.config.plan import Plan
from dlopt.config.resolve import job_variables
from dlopt.run import environment as environments
from dlopt.sweeps.array import SUBMISSION, WORKERS, JobArray, JobEntry, count_elements, is_submitted, read_array
from dlopt.sweeps.code_copy import CopiedCode, copy_code
from dlopt.sweeps.element import RESTARTS
from dlopt.sweeps.jobs import Job, list_jobs, prepare
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.request import SweepRequest
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.slurm_queue import Elements, cancel, max_array_size, queued_elements
from dlopt.sweeps.submission import (
    LAUNCHER,
    STOP,
    Submission,
    digest_of,
    elements_left,
    read,
    recorded_code,
    refuse_silence,
    start_elements,
    start_workers,
    trust,
)

_CODE, _LOCK = ".code", "submit.lock"  # in the folder of the workers; hidden, because it holds no runs
_NOT_COPIED = "not_copied"  # there, too: the files beside the code that were not copied


def submit_grid(launcher: Slurm, folder: Path, jobs: Sequence[Job]) -> None:
    """Submits the jobs of a grid that are not done, or joins a submission of the same jobs. Raises `UserError`."""
    plans = [job.plan for job in jobs]
    packages = sorted({name for plan in plans for name in plan.saved.get("allow_packages") or ()})
    public, secrets = _split(plans[0].environment)
    entries = [JobEntry(str(job.folder.path.relative_to(folder)), redact(job.label), _length(job.plan)) for job in jobs]
    (folder / WORKERS).mkdir(exist_ok=True)
    with locked(folder / WORKERS / _LOCK):  # of two submissions at the same time, the second finds the first
        queued = queued_elements(folder)
        refuse_silence(queued)
        code = _copy(folder, packages, {})
        limit = max_array_size() if launcher.n_jobs else None
        count = count_elements(len(jobs), launcher.chunk, launcher.n_jobs, limit)
        submission = Submission(
            **_facts(folder, code, packages, public, sorted(secrets), launcher.tasks),
            command=None,
            jobs=_digest_of_jobs(entries, plans),
            elements=count,
        )
        is_live = bool(queued) or any(job.folder.is_live() for job in jobs)
        if is_live and is_submitted(folder):
            _refuse_difference(folder, submission, entries)
        if queued:
            print_joined(folder, queued)
            return
        list_jobs(folder, jobs)
        array = JobArray(entries, count)
        array.write(folder)
        _write(folder, submission, launcher)
        with recorded_code(folder):
            for job in jobs:
                if not job.folder.is_live():  # of a killed sweep: it is writing its last checkpoint
                    (job.folder.path / RESTARTS).unlink(missing_ok=True)
                    prepare(job)
        elements = elements_left(folder, array)
        job_id = start_elements(folder, submission, launcher, elements, secrets)
    print_submitted(folder, job_id, f"{format_count('elements', len(elements))} of a job array", len(jobs))


def _length(plan: Plan) -> str:
    """Returns the override that gives the length of a job."""
    key = "epochs" if plan.saved["steps"] is None else "steps"
    return f"{key}={plan.saved[key]}"


def _digest_of_jobs(entries: Sequence[JobEntry], plans: Sequence[Plan]) -> str:
    """Returns the SHA-256 of what the jobs of a grid are, whoever starts them, and how often."""
    configs = [
        {key: value for key, value in flatten(redacted(plan.saved)).items() if role_of(key) is not Role.COMMAND}
        for plan in plans
    ]
    return digest_of({"jobs": [astuple(entry) for entry in entries], "configs": configs})


def _refuse_difference(folder: Path, submission: Submission, entries: Sequence[JobEntry]) -> None:
    """Raises `UserError` if the elements that are queued or running are of another submission."""
    former, array = read(folder), read_array(folder)
    if replace(former, elements=submission.elements) == submission:
        return
    what = "other settings"
    if former.sha256 != submission.sha256:
        what = "other code"
    elif array is not None and (lengths := _lengths(array.jobs)) != _lengths(entries):
        what = f"another length ({lengths})"
    path = short_path(folder)
    raise UserError(
        f"{path}: elements of this sweep are queued or running with {what}; stop them with `dlopt sweep stop "
        f"{path}`, wait for them, or use another folder"
    )


def _lengths(entries: Sequence[JobEntry]) -> str:
    return ", ".join(dict.fromkeys(entry.length for entry in entries))


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
        command=command,
        files=files,
        packages=packages,
        environment=plan.environment,
        workers=left,
    )
    print_submitted(folder, job_id, format_count("workers", min(launcher.n_jobs, left)), total)


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
        command=command,
        files=files,
        packages=packages,
        environment=job_variables(config),
        workers=jobs,
    )
    print_submitted(folder, job_id, format_count("workers", min(launcher.n_jobs, jobs)), jobs)


def _config_files(composer: Composer) -> tuple[dict[str, Path], list[str]]:
    """Returns the folder of --config-dir, to be copied, and the flags that name the copy."""
    flags = [f"--config-name={composer.config_name}"]
    if composer.config_dir is None:
        return {}, flags
    return {"config": Path(composer.config_dir).absolute()}, ["--config-dir={config}", *flags]


def print_submitted(folder: Path, job_id: str | None, how: str, jobs: int) -> None:
    """Prints the commands for a submitted sweep."""
    started = "no job array (hydra.launcher.n_jobs=0)" if job_id is None else f"{how}, Slurm job {job_id}"
    print(f"submitted {format_count('jobs', jobs)}: {started}", "next:", sep="\n")
    for part in ("work",) if job_id is None else ("status", "wait", "stop"):
        print(f"  dlopt sweep {part} {shlex.quote(short_path(folder))}")


def print_joined(folder: Path, queued: Elements) -> None:
    """Prints that the jobs of a sweep are submitted already."""
    states = [f"{len(queued.running)} running"] if queued.running else []
    states += [f"{queued.pending} pending"] if queued.pending else []
    print(f"already submitted: Slurm job {', '.join(queued.states)}, elements: {', '.join(states)}", "next:", sep="\n")
    for part in ("status", "wait", "stop"):
        print(f"  dlopt sweep {part} {shlex.quote(short_path(folder))}")


def submit(
    sweep: Path,
    launcher: Slurm,
    *,
    command: Sequence[str],
    files: Mapping[str, Path],
    packages: Sequence[str],
    environment: Mapping[str, str],
    workers: int,
) -> str | None:
    """Writes the files of the workers of a command, and submits workers; returns their Slurm job id.

    Args:
        command: of dlopt, which every worker runs.
        files: files that `command` reads, by name: `{name}` in a word becomes the path of the copy.
        packages: of `allow_packages`.
        environment: additional variables of the jobs.
        workers: the number of workers with something to do.

    Raises:
        UserError: workers of this sweep are running other code, the code is too large, or sbatch refuses.
    """
    public, secrets = _split(environment)
    folder = sweep / WORKERS
    folder.mkdir(exist_ok=True)
    with locked(folder / _LOCK):  # of two submissions at the same time, the second finds the first
        code = _copy(sweep, packages, files)
        refuse_hidden_words(command)
        submission = Submission(
            **_facts(sweep, code, packages, public, sorted(secrets), launcher.tasks),
            command=tuple(_with_files(word, code, files) for word in command),
            jobs=None,
            elements=0,
        )
        former = read(sweep) if is_submitted(sweep) else None
        is_same = former is not None and former.digest == submission.digest
        if not is_same and live_workers(sweep):
            what = "code" if former is not None and former.sha256 != submission.sha256 else "settings"
            raise UserError(
                f"{short_path(sweep)}: workers of this sweep are running with other {what}; wait for them, stop them "
                f"with `dlopt sweep stop {short_path(sweep)}`, or use another folder"
            )
        if not is_same:
            cancel(queued_elements(sweep), pending_only=True)  # they would find another sweep
        _write(sweep, submission, launcher)
        (folder / STOP).unlink(missing_ok=True)
    return start_workers(sweep, submission, launcher, workers, secrets)


def _copy(sweep: Path, packages: Sequence[str], files: Mapping[str, Path]) -> CopiedCode:
    """Copies the code of a sweep into its folder, and reports what was left out. Raises `UserError`."""
    folder = sweep / WORKERS
    code = copy_code(packages, files, folder / _CODE, [sweep.absolute(), Path("outputs").absolute()])
    _report_left_out(code, folder / _NOT_COPIED)
    return code


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


def _facts(
    sweep: Path,
    code: CopiedCode,
    packages: Sequence[str],
    environment: Mapping[str, str],
    secrets: Sequence[str],
    tasks: int,
) -> dict[str, Any]:
    """Returns the arguments of `Submission` that grids and commands share."""
    return {
        "dlopt": __version__,
        "torch": version("torch"),
        "cwd": os.getcwd(),
        "code": str(code.folder.relative_to(sweep)),
        "paths": code.paths,
        "sha256": code.sha256,
        "packages": tuple(packages),
        "environment": environment,
        "secrets": tuple(secrets),
        "tasks": tasks,
    }


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
    write_atomically(folder / SUBMISSION, json.dumps(asdict(submission), indent=1).encode())  # paths are not redacted
    write_atomically(folder / LAUNCHER, json.dumps(settings, indent=1).encode())
    facts = {"git_commit": environments.versions()["git_commit"], "code": code, "submitted_code": submission.sha256}
    write_json(folder / environments.REPOSITORY, facts)
    write_atomically(folder / environments.DIFF, diff.decode("utf-8", "surrogateescape"))
    trust(submission.digest, digest_of(settings))
