"""Submits a sweep: writes the files of its elements or workers into its folder, and makes Slurm start them."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dlopt._version import __version__
from dlopt.basics.emphasis import print_emphasized
from dlopt.basics.errors import StateError, UserError
from dlopt.basics.files import write_atomically, write_json
from dlopt.basics.folders import SPACE as SPACE_FILE
from dlopt.basics.folders import FolderSnapshot, short_path
from dlopt.basics.formats import format_count, printable
from dlopt.basics.locks import locked
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.basics.secrets import has_hidden, is_secret_name, redact, redacted
from dlopt.config.compose import Composer
from dlopt.config.keys import role_of
from dlopt.config.overrides import SPACE, WAIT, key_of, quoted_plain, storable, value_of, without
from dlopt.config.plan import Plan
from dlopt.run import environment as environments
from dlopt.sweeps.array import STOP, SUBMISSION, WORKERS, JobArray, JobEntry, count_elements, is_submitted, read_array
from dlopt.sweeps.code_copy import CopiedCode, copy_code
from dlopt.sweeps.element import RESTARTS
from dlopt.sweeps.jobs import Job, list_jobs, prepare
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.request import SweepRequest
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.slurm_queue import cancel, describe_counts, max_array_size, queued_elements
from dlopt.sweeps.submission import (
    LAUNCHER,
    SUBMIT_LOCK,
    Submission,
    digest_of,
    elements_left,
    read,
    recorded_code,
    refuse_silence,
    start_elements,
    trust,
    unused,
)

_CODE = ".code"  # in the folder of the workers; hidden, because it holds no runs


def submit_grid(request: SweepRequest, folder: Path, jobs: Sequence[Job], before: FolderSnapshot) -> None:
    """Submits the jobs of a grid that are not done, or joins a submission of the same jobs.

    Raises `UserError`, and then leaves no new folder. `before`: its previous content.
    """
    is_new = not (folder / SPACE_FILE).exists()
    try:
        _submit_grid(request, folder, jobs)
    except (UserError, OSError):
        if is_new:
            before.erase(folder)
        raise


def _submit_grid(request: SweepRequest, folder: Path, jobs: Sequence[Job]) -> None:
    launcher = request.launcher
    assert isinstance(launcher, Slurm)
    plans = [job.plan for job in jobs]
    packages = sorted({name for plan in plans for name in plan.saved.get("allow_packages") or ()})
    public, secrets = _split(plans[0].environment)
    entries = [JobEntry(str(job.folder.path.relative_to(folder)), redact(job.label), _length(job.plan)) for job in jobs]
    (folder / WORKERS).mkdir(exist_ok=True)
    with _submitting(folder) as is_unused:
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
        is_live = bool(queued) or not is_unused or any(job.folder.is_live() for job in jobs)
        if is_live and is_submitted(folder):
            _refuse_difference(folder, submission, entries)
        if queued:
            counts = describe_counts(len(queued.running), queued.pending)
            print(f"already submitted: Slurm job {', '.join(queued.states)}, elements: {counts}")
            _print_next(folder, ["status", "wait", "stop"])
            return
        list_jobs(folder, jobs)
        array = JobArray(tuple(entries), count, counts_diverged=bool(request.series))
        array.write(folder)
        _write(folder, submission, launcher)
        with recorded_code(folder, submission):
            for job in jobs:
                if array.has_diverged(job.folder):
                    continue
                if not job.folder.is_live():  # of a killed sweep: it is writing its last checkpoint
                    (job.folder.path / RESTARTS).unlink(missing_ok=True)
                    prepare(job)
        _print_header(request.launcher_line)
        elements = elements_left(folder, array)
        job_id = start_elements(folder, submission, launcher, elements, secrets)
    _print_submitted(folder, job_id, f"{format_count('elements', len(elements))} of a job array", len(jobs))


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
    return digest_of({"jobs": [*entries], "configs": configs})


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
    raise StateError(
        f"{path}: elements of this sweep are queued or running with {what}; stop them with `dlopt sweep stop "
        f"{shlex.quote(path)}`, wait for them, or use another folder"
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
    files: dict[str, Path] = {}
    words = without(request.words, WAIT, "resume", "hydra.sweep.dir")
    for index, word in enumerate(words):
        key, path = key_of(word), os.path.expanduser(value_of(word).strip("'\""))
        if key in (SPACE, "hydra.sweeper.enqueue") and os.path.isfile(path):
            files[key], words[index] = Path(path), f"{key}={{{key}}}"
    submit_command(
        launcher,
        ["train", "-m", *words],
        request.composer,
        folder,
        plan.saved,
        plan.environment,
        total,
        header=request.launcher_line,
        workers=left,
        own=["resume=auto", f"hydra.sweep.dir={quoted_plain(str(folder.absolute()))}"],
        files=files,
    )


def submit_command(
    launcher: Slurm,
    words: Sequence[str],
    composer: Composer,
    folder: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    jobs: int,
    *,
    header: str,
    workers: int | None = None,
    own: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
) -> None:
    """Submits workers that run a command of dlopt that shares its jobs among processes.

    Args:
        words: of the command, the first of which names it; `own`: words that are stored as they are.
        config: of one of its jobs; `environment`: additional variables of the jobs.
        header: who has set what of the launcher.
        workers: the number of workers with something to do; by default one per job.
        files: files that the words name, by name: `{name}` becomes the path of the copy.

    Raises:
        UserError: workers of this sweep are running other code, the code is too large, or sbatch refuses.
    """
    launcher.require()
    files, flags = dict(files or {}), [f"--config-name={composer.config_name}"]
    if composer.config_dir is not None:
        files["config"], flags = Path(composer.config_dir).absolute(), ["--config-dir={config}", *flags]
    command = [words[0], *flags, *storable(words[1:]), *own]
    packages = tuple(str(name) for name in config.get("allow_packages") or ())
    public, secrets = _split(environment)
    (folder / WORKERS).mkdir(exist_ok=True)
    with _submitting(folder) as is_unused:
        code = _copy(folder, packages, files)
        refuse_hidden_words(command)
        submission = Submission(
            **_facts(folder, code, packages, public, sorted(secrets), launcher.tasks),
            command=tuple(_with_files(word, code, files) for word in command),
            jobs=None,
            elements=0,
        )
        former = read(folder) if is_submitted(folder) else None
        is_same = former is not None and former.digest == submission.digest
        if not is_same and (live_workers(folder) or not is_unused):
            what = "code" if former is not None and former.sha256 != submission.sha256 else "settings"
            raise UserError(
                f"{short_path(folder)}: workers of this sweep are running with other {what}; wait for them, stop them "
                f"with `dlopt sweep stop {shlex.quote(short_path(folder))}`, or use another folder"
            )
        if not is_same:
            cancel(queued_elements(folder), pending_only=True)  # they would find another sweep
        _write(folder, submission, launcher)
    _print_header(header)
    count = min(launcher.n_jobs, jobs if workers is None else workers)
    job_id = start_elements(folder, submission, launcher, range(count), secrets)
    _print_submitted(folder, job_id, format_count("workers", count), jobs)


@contextlib.contextmanager
def _submitting(folder: Path) -> Iterator[bool]:
    """Context of a submission; yields whether no process runs jobs of the previous one.

    Of two submissions at the same time, the second finds the first.
    """
    with locked(folder / WORKERS / SUBMIT_LOCK), unused(folder) as is_unused:
        yield is_unused


def _print_header(line: str) -> None:
    if line:
        print(line)


def _print_submitted(folder: Path, job_id: str | None, how: str, jobs: int) -> None:
    """Prints the commands for a submitted sweep."""
    started = "no job array (hydra.launcher.n_jobs=0)" if job_id is None else f"{how}, Slurm job {job_id}"
    print(f"submitted {format_count('jobs', jobs)}: {started}")
    _print_next(folder, ["work"] if job_id is None else ["status", "wait", "stop"])


def _print_next(folder: Path, parts: Sequence[str]) -> None:
    commands = [f"  dlopt sweep {part} {shlex.quote(short_path(folder))}" for part in parts]
    print_emphasized("\n".join(["next:", *commands]))


def _copy(sweep: Path, packages: Sequence[str], files: Mapping[str, Path]) -> CopiedCode:
    """Copies the code of a sweep into its folder, and prints what was not copied. Raises `UserError`."""
    code = copy_code(packages, files, sweep / WORKERS / _CODE, [sweep, Path("outputs")])
    for repository, names in code.left_out.items():
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            git = "git" if repository == Path.cwd() else f"git -C {shlex.quote(short_path(repository))}"
            count = format_count("untracked files or folders", len(names))
            print(printable(redact(f"not copied with the code: {count} ({first}); to copy one: {git} add NAME")))
    entries = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    known = Path.cwd(), *code.left_out
    outside = {entry: "PYTHONPATH" for entry in entries if not any(map(entry.is_relative_to, known))}
    in_place = [Path(path) for path in code.paths if os.path.isabs(path)]
    in_place += [path for name, path in files.items() if not (code.folder / name / path.name).exists()]
    for folder, what in {**outside, **dict.fromkeys(in_place, "in no repository that git can read")}.items():
        if not {"site-packages", "dist-packages"} & {*folder.parts}:
            print(printable(f"not copied: {folder} ({what}); what you edit there changes the jobs"))
    return code


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
        copy = code.folder / name / path.name
        word = word.replace(f"{{{name}}}", str((copy if copy.exists() else path).absolute()))
    return word


def _write(sweep: Path, submission: Submission, launcher: Slurm) -> None:
    folder = sweep / WORKERS
    (folder / STOP).unlink(missing_ok=True)
    settings = asdict(launcher)
    code, diff = environments.repository()
    write_atomically(folder / SUBMISSION, json.dumps(asdict(submission), indent=1).encode())  # paths are not redacted
    write_atomically(folder / LAUNCHER, json.dumps(settings, indent=1).encode())
    facts = {"git_commit": environments.versions()["git_commit"], "code": code, "submitted_code": submission.sha256}
    write_json(folder / environments.REPOSITORY, facts)
    write_atomically(folder / environments.DIFF, diff.decode("utf-8", "surrogateescape"))
    trust(submission.digest, digest_of(settings))
