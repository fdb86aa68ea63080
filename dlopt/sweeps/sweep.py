"""`dlopt train -m`: checks all jobs before the first one starts, and runs each in a separate process."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, StateError, UserError, require_package
from dlopt.basics.folders import FolderSnapshot, RunFolder, short_path
from dlopt.basics.formats import format_count
from dlopt.basics.interruption import Interrupted, print_message
from dlopt.basics.secrets import is_secret_name
from dlopt.basics.status_line import waiting
from dlopt.config.compose import Composer, typed_folder
from dlopt.config.flags import hydra_main
from dlopt.config.overrides import (
    BRANCH,
    WAIT,
    grid,
    is_hydra,
    key_of,
    listed,
    quoted_plain,
    storable,
    text_of,
    without,
)
from dlopt.config.plan import Plan, checked
from dlopt.config.reads import COMPOSITION, refuse_unread_hydra
from dlopt.config.refusals import refused_together
from dlopt.config.resolve import job_variables, task_overrides
from dlopt.config.resuming import in_folder, refuse_other_config, shortened, with_counted_updates
from dlopt.parallel.processes.rendezvous import refuse_ranks
from dlopt.results.ranking import of_folder
from dlopt.results.reading import find
from dlopt.sweeps import jobs as sweep_jobs
from dlopt.sweeps import pool as pools
from dlopt.sweeps.array import is_submitted
from dlopt.sweeps.axes import is_grid, read_axes
from dlopt.sweeps.branches import begin
from dlopt.sweeps.jobs import Job, labels, list_jobs, record_dead
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.matching import distance_of_unfinished, lists_jobs, numbers, refuse_other_labels, swept_keys
from dlopt.sweeps.request import SweepEnd, SweepRequest, print_next
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.submission import is_working
from dlopt.sweeps.submitting import refuse_different_environments, refuse_hidden_words, submit_grid
from dlopt.sweeps.sweep_file import find_space, read_space
from dlopt.tracking.notify import notify

OWN = "hydra_plugins.dlopt_sweeps."
SEARCH = f"{OWN}OptunaSweeper"  # a name only: `dlopt.sweeps.search` runs it
# Sweepers and launchers of other packages run their jobs through Hydra, which reads all of these but the run's folder.
_READS_OF_HYDRA = (
    *COMPOSITION, "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra.job", "hydra.job_logging",
    "hydra.hydra_logging", "hydra.verbose", "hydra.callbacks", "hydra.env", "hydra.output_subdir",
)  # fmt: skip


def request(composer: Composer, words: Sequence[str]) -> SweepRequest:
    """Composes and checks a sweep, except its jobs. Raises `UserError`."""
    refuse_ranks("-m", "the sweep")
    # Branches that have begun continue, and the others begin with the checkpoint of their axis.
    resumed = ["resume"] if "resume=auto" in words and BRANCH in map(key_of, words) else []
    with refused_together(composer, without(words, *resumed), multirun=True):
        config, typed, axes = read_axes(composer, without(words, WAIT, *resumed))
    config.resume = "auto" if resumed else config.resume
    overrides = [override for axis in typed for override in axis.overrides]
    refuse_unread_hydra(overrides, "a sweep", _READS_OF_HYDRA, {"hydra.run": "use hydra.sweep.dir"})
    if config.hydra.job.chdir:
        raise UserError("hydra.job.chdir=true: not supported in a sweep, whose jobs run in the current folder")
    path, is_typed = typed_folder(config, "hydra.sweep.dir", overrides)
    is_search = str(config.hydra.sweeper._target_) == SEARCH
    refusal = "starts jobs in batches, but a search starts one per free slot" if is_search else None
    launcher = build_launcher(config, refusal)
    hydra = [override for axis in axes for override in axis.overrides if is_hydra(override)]
    own = [axis for axis in axes if not is_hydra(axis.overrides[0])]
    is_waiting = _is_waiting(words, launcher)
    return SweepRequest(composer, config, overrides, hydra, own, path, is_typed, launcher, [*words], is_waiting)


def _is_waiting(words: Sequence[str], launcher: pools.Pool | Slurm | None) -> bool:
    """Returns whether the command waits for the end of the sweep; by default not if submitted. Raises `UserError`."""
    typed = [word for word in words if key_of(word) == WAIT]
    if not typed:
        return not isinstance(launcher, Slurm)
    if typed[-1] not in (f"{WAIT}=true", f"{WAIT}=false"):
        raise UserError(f"{typed[-1]}: must be true or false")
    if not isinstance(launcher, Slurm):
        raise UserError(f"{typed[-1]}: only for hydra/launcher=slurm; with other launchers, the command runs the jobs")
    return typed[-1] == f"{WAIT}=true"


def request_series(
    composer: Composer, config: DictConfig, overrides: Sequence[str], series: str, later: tuple[str, ...] = ()
) -> SweepRequest:
    """Returns the request of a recipe's series of runs, which has no axes; see `SweepRequest`. Raises `UserError`."""
    refuse_ranks(series, f"the {series}")
    key, parsed = "hydra.run.dir", composer.parse(overrides)
    path, is_typed = typed_folder(config, key, parsed)
    launcher = build_launcher(config, f"not available for a {series}")
    if isinstance(launcher, Slurm) and not config.dry_run:
        launcher.require()
    return SweepRequest(
        composer, config, parsed, [], [], path, is_typed, launcher, [], key=key, series=series, later=later
    )


def run(request: SweepRequest) -> SweepEnd:
    """Runs a sweep, or submits it. Raises `UserError` before it creates any file."""
    if isinstance(request.launcher, Slurm) and not request.config.dry_run:
        request.launcher.require()
    try:
        if str(request.config.hydra.sweeper._target_) == SEARCH:
            require_package("hydra/sweeper=dlopt_optuna", "optuna", "sweep")
            from dlopt.sweeps.search import search

            end = search(request)
        else:
            end = _grid(request)
        if end.is_submitted and request.is_waiting:
            from dlopt.sweeps.status import wait  # imports NumPy, which the help of the laboratory does not need

            status, board = wait(request.found[0])
            end = SweepEnd(status.code, board)
        url = request.config.notify
        if url is not None and end.is_submitted:
            print_message("warning: notify: nothing is sent at the end of a submitted sweep, unless you add wait=true")
        elif url is not None and request.found:
            notify(url, {"text": f"{request.config.name}: sweep ended", **end.document(request.found[0])})
        return end
    except Interrupted:  # before the first job
        raise
    except KeyboardInterrupt:
        return SweepEnd(INTERRUPTED)


def build_launcher(config: DictConfig, refusal: str | None) -> pools.Pool | Slurm | None:
    """Checks the launcher and builds it; None, or `UserError` if there is a `refusal`, for another package's."""
    if (pool := pools.of_worker.get()) is not None:
        return pool
    if str(config.hydra.launcher._target_).startswith(OWN):
        settings = cast(dict[str, Any], OmegaConf.to_container(config.hydra.launcher, resolve=True))
        # Not `instantiate`, for which Hydra 1.4 requires a list of names.
        launcher: Any = get_class(settings.pop("_target_"))
        return cast(pools.Pool | Slurm, launcher(**settings).build())
    if refusal is None:
        return None
    name = config.hydra.runtime.choices["hydra/launcher"]
    raise UserError(f"hydra/launcher={name}: {refusal}; allowed: serial, joblib, gpus, slurm")


# -- grids


def _jobs(request: SweepRequest, sweep: Path, plans: Sequence[Plan], space: Any, key: str) -> list[Job]:
    """Returns the jobs of a grid in the folder `sweep`, numbered as in its file, which has `space`.

    Raises `UserError`.
    """
    found = numbers(space, sweep, plans, request.plan_job, key)
    if not isinstance(request.launcher, pools.Pool | Slurm) and found != [*range(len(plans))]:
        name = request.config.hydra.runtime.choices["hydra/launcher"]
        raise UserError(f"hydra/launcher={name}: numbers the jobs itself, so it cannot extend a sweep; use serial")
    plans = [
        plan if number == index else request.plan_job(plan.texts, number)
        for index, (number, plan) in enumerate(zip(found, plans, strict=True))
    ]
    named = zip(found, plans, labels([plan.texts for plan in plans]), strict=True)
    jobs = [Job(number, RunFolder(sweep / plan.subfolder), plan, label) for number, plan, label in named]
    return sorted(jobs, key=lambda job: job.number)


def _run_jobs(request: SweepRequest, folder: Path, jobs: Sequence[Job]) -> dict[int, str]:
    """Runs the jobs as they were checked; returns their statuses.

    A launcher or sweeper of another package composes them again; then it returns {}.
    """
    ended: dict[int, str] = {}
    if not isinstance(request.launcher, pools.Pool) or not jobs:
        run_with_hydra(request, folder, [listed(override) for axis in request.axes for override in axis.overrides])
        return ended
    pools.warm_up()
    size = request.config.hydra.sweeper.get("max_batch_size") or len(jobs)
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        ended |= pools.run_jobs(batch, len(batch), request.launcher, folder)
    return ended


def _grid(request: SweepRequest) -> SweepEnd:
    from dlopt.results.printing import show_end

    plans = _plans(request)
    request.warn_of_fixed_rates(plans)
    if request.config.dry_run:
        for number, label in enumerate(labels([plan.texts for plan in plans])):
            print(f"job {number}: {label}")
        return request.rehearse(plans[0], len(plans)) if plans else SweepEnd(DONE)
    if isinstance(request.launcher, Slurm):
        refuse_different_environments(plans)
    request.check_tracking(plans)
    before = FolderSnapshot(request.path)
    jobs: list[Job] = []

    def distance(candidate: RunFolder) -> int | None:
        space = find_space(candidate.path)
        is_listed = lists_jobs(space, plans)
        return distance_of_unfinished(candidate, _jobs(request, candidate.path, plans, is_listed and space, ""))

    def check(path: Path, key: str) -> None:
        extends = request.config.resume == "auto" or is_submitted(path)
        jobs[:] = _jobs(request, path, plans, extends and read_space(path), key)
        check_folder(RunFolder(path), key, jobs, request.config.resume, joins=isinstance(request.launcher, Slurm))

    folder = request.find_folder(distance, check)
    jobs = jobs or _jobs(request, folder, plans, None, "")
    listed = len(space) if isinstance(space := find_space(folder), list) else 0
    if listed and (added := sum(job.number >= listed for job in jobs)):
        print(f"adds {format_count('jobs', added)} to the {listed} of this sweep")
    if jobs and all(job.is_done for job in jobs):
        print_next(f"this sweep is already finished: {folder}", folder)
        return SweepEnd(DONE, of_folder(folder))
    # A second sweep in this folder would start the same jobs.
    with RunFolder(folder).lock():
        begin(jobs)
        if isinstance(request.launcher, Slurm):
            submit_grid(request, folder, jobs, before)
            return SweepEnd(DONE, is_submitted=True)
        list_jobs(folder, jobs, read_space(folder))
        request.begin(folder, "grid")
        for job in jobs:
            record_dead(job.folder)
        ended = _run_jobs(request, folder, jobs)
    # The status of another package's job follows from its files. A job of ours that a signal ended before its first
    # update has left no files.
    runs = [job.folder for job in jobs] or [RunFolder(path.parent) for path in folder.glob("*/config.yaml")]
    statuses = set(ended.values()) or {
        (run.summary() or {}).get("status", "running" if run.is_live() else "failed") for run in runs
    }
    ranking = of_folder(folder)
    show_end(ranking, folder, is_final="interrupted" not in statuses)
    print_next(f"\nsweep folder: {short_path(folder)}", folder, has_failed="failed" in statuses)
    if statuses & {"failed", "interrupted"}:
        words = ["resume=auto"] if request.is_typed else in_folder(folder)
        print(f"{shlex.join(words)} added to this command runs the failed and interrupted jobs again")
    if not statuses or statuses & {"failed", "running"}:
        return SweepEnd(FAILED, ranking)
    return SweepEnd(INTERRUPTED if "interrupted" in statuses else DONE, ranking)


def _plans(request: SweepRequest) -> list[Plan]:
    """Expands a grid to its checked jobs, like Hydra's basic sweeper; [] for sweepers that choose jobs at run time."""
    sweeper = request.config.hydra.sweeper
    joint = [axis for axis in request.axes if axis.is_zip or axis.when]
    if joint and (request.launcher is None or not is_grid(request.config)):
        group = "hydra/launcher" if request.launcher is None else "hydra/sweeper"
        name = request.config.hydra.runtime.choices[group]
        raise UserError(
            f"{joint[0]}: {group}={name} is not dlopt's, and takes axes of one key without a condition only"
        )
    if not is_grid(request.config):
        return []
    if sweeper.max_batch_size is not None and isinstance(request.launcher, Slurm):
        raise UserError(f"hydra.sweeper.max_batch_size={sweeper.max_batch_size}: not with hydra/launcher=slurm")
    if sweeper.max_batch_size is not None and sweeper.max_batch_size < 1:
        raise UserError(f"hydra.sweeper.max_batch_size={sweeper.max_batch_size}: must be > 0, or null")
    combinations = grid(request.axes)
    if not combinations:
        raise UserError("-m: nothing to run, because a list of values is empty")
    title = f"checking {format_count('jobs', len(combinations))} ..."
    with waiting(title), refused_together(request.composer, request.words, multirun=True):
        jobs = [request.plan_job(overrides, number) for number, overrides in enumerate(combinations)]
    if len({job.subfolder for job in jobs}) < len(jobs):
        raise UserError(f"hydra.sweep.subdir={jobs[0].subfolder}: must be different for each job")
    return jobs


def check_folder(
    sweep: RunFolder, key: str, jobs: Sequence[Job], resume: str | None, what: str = "sweep", *, joins: bool = False
) -> None:
    """Raises `UserError` for a folder that another sweep uses, or whose runs cannot be resumed as these jobs.

    `joins`: accept a folder with live elements of this sweep.
    """
    from dlopt.training.checkpoint.checkpoints import Checkpoints  # imports torch
    from dlopt.training.length import check_lengthened

    working = is_working(sweep.path)
    if sweep.is_live() or live_workers(sweep.path) or (working and not joins):
        raise StateError(f"{key}: another {what} is active in this folder")
    space = read_space(sweep.path)
    axes = swept_keys(space, [job.plan for job in jobs])
    if is_submitted(sweep.path) and isinstance(space, list):
        own = {job.number for job in jobs}
        if working and len(own | {*range(len(space))}) > len(space):
            raise StateError(f"{key}: elements of this sweep are queued or running; add jobs when they have ended")
        if missing := {*range(len(space))} - own:
            first = " ".join(line for line in space[min(missing)] if key_of(line) in axes)
            raise StateError(
                f"{key}: the sweep that was submitted in this folder has a job {min(missing)} ({first}), which is not "
                "one of these; type its values, too, or use another folder"
            )
    if working:  # the submission compares all of its jobs with these
        return
    for job in jobs:
        job.folder.refuse_other_format(key)
    if resume != "auto" and any(RunFolder(path).has_begun() for path in find(sweep.path)):
        found = "a sweep; resume it" if what == "sweep" else "runs; resume them"
        raise StateError(f"{key}: this folder contains {found} with resume=auto")
    for job in [job for job in jobs if job.folder.has_begun()]:
        folder, former = job.folder, job.folder.config() or job.plan.saved
        saved = with_counted_updates(job.plan.saved, former)
        refuse_other_config(former, saved, str(folder.path), folder.typed(), axes)
        refuse_other_labels(job, axes)
        if job.is_done:
            continue
        has_other_length = any(former.get(name) != saved[name] for name in ("epochs", "steps"))
        if has_other_length and (newest := Checkpoints(folder.checkpoints).load_newest()) is not None:
            check_lengthened(job.plan.run_config, newest)
    if all(job.is_done for job in jobs):
        return
    for job in jobs:
        if (length := shortened(job.folder, job.plan.saved)) is not None:
            raise StateError(
                f"{key}: job {job.number} has finished after {length}, which is more than the other jobs would train; "
                "train all jobs as long, or in another folder"
            )


# -- launchers and sweepers of other packages


def run_with_hydra(request: SweepRequest, folder: Path, overrides: Sequence[str]) -> None:
    """Runs a sweep through Hydra's main. `overrides`: with lists spelled out, which Hydra expands in the same order."""
    replaced = ("hydra.sweep.dir", "hydra.sweeper.params")
    if line := request.launcher_line:
        print(line)
    hydra = [line for line in storable(map(text_of, request.hydra)) if key_of(line) not in replaced]
    refuse_hidden_words(hydra)
    own = [f"hydra.sweep.dir={quoted_plain(str(folder))}"]
    if is_grid(request.config):
        own.append("hydra.sweeper.params=null")
    # Hydra stores its overrides in multirun.yaml, therefore secrets that are typed become variables.
    secrets = {name: value for name, value in job_variables(request.config).items() if is_secret_name(name)}
    job = HydraJob(tuple(storable(request.composer.command_line.words)))
    with env_override({**secrets, "HYDRA_FULL_ERROR": "1"}):  # errors are raised, not printed
        hydra_main(["-m", *request.composer.flags, *hydra, *own, *overrides], job)


@dataclass(frozen=True)
class HydraJob:
    """Hydra's task function of a sweep. `typed`: the words of the command line, without secrets."""

    typed: tuple[str, ...]

    def __call__(self, config: DictConfig) -> str:
        """Runs a job that Hydra has composed; returns its status."""
        hydra = HydraConfig.get()
        with open_dict(config):
            config.hydra = hydra  # Hydra takes it out of the config of a task
        folder, overrides = RunFolder(Path(hydra.runtime.output_dir)), task_overrides(config)
        try:
            plan = self.checked(config, overrides)
        except UserError as error:
            return sweep_jobs.failed(folder, str(error)).status
        job = Job(int(hydra.job.num), folder, plan, " ".join(overrides))
        return pools.run_jobs([job], 1, pools.local(n_jobs=1, stop_on_failure=False))[job.number]

    def checked(self, config: DictConfig, overrides: Sequence[str]) -> Plan:
        """Checks a config that Hydra has composed. Raises `UserError`."""
        Composer(words=self.typed).check_origin(config)
        return checked(config, overrides)
