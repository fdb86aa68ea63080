"""`dlopt train -m`: checks all jobs before the first one starts, and runs each in a separate process."""

import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dlopt.command_line.reads import COMPOSITION, refuse_unread_hydra, refuse_untested
from dlopt.config.compose import Composer, typed_folder
from dlopt.config.flags import hydra_main
from dlopt.config.overrides import (
    grid,
    is_hydra,
    key_of,
    listed,
    parse_overrides,
    quoted_value,
    value_of,
)
from dlopt.config.plan import Plan, as_job, checked, with_params
from dlopt.config.resolve import choices_of, to_plain
from dlopt.config.resuming import differences, may_change, refuse_other_config
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.files import write_atomically
from dlopt.folders import SPACE, RunFolder, make, make_new, newest
from dlopt.interruption import Interrupted
from dlopt.parallel.rendezvous import current
from dlopt.results.leaderboard import Record, job_record, leaderboard
from dlopt.sweeps import jobs as sweep_jobs
from dlopt.sweeps import pool as pools
from dlopt.sweeps.estimate import print_estimate
from dlopt.sweeps.grid import run_jobs
from dlopt.sweeps.jobs import Job, labels, record_dead
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment

OWN = "hydra_plugins.dlopt_sweeps."
SEARCH = f"{OWN}OptunaSweeper"  # a name only: `dlopt.sweeps.search` runs it
# Sweepers and launchers of other packages run their jobs through Hydra, which reads all of it but the run's folder.
_READS_OF_HYDRA = (
    *COMPOSITION, "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra.job", "hydra.job_logging",
    "hydra.hydra_logging", "hydra.verbose", "hydra.callbacks", "hydra.env", "hydra.output_subdir",
)  # fmt: skip


@dataclass(frozen=True)
class SweepRequest:
    """A composed sweep.

    Attributes:
        overrides: of the command line; `hydra`: those of Hydra's config, which every job is composed with; `swept`:
            those of the jobs.
        path: hydra.sweep.dir; `is_typed`: given on the command line.
        pool: the worker pool of the launcher; None for a launcher of another package.
        sized: models whose size was checked.
    """

    composer: Composer
    config: DictConfig
    overrides: list[str]
    hydra: list[str]
    swept: list[Override]
    path: Path
    is_typed: bool
    pool: pools.Pool | None
    sized: set[str] = field(default_factory=set)

    def find_folder(self, is_unfinished: Callable[[RunFolder], bool], check: Callable[[Path, str], None]) -> Path:
        """Returns the folder of the sweep, created if missing. `check(path, key)` refuses an unsuitable one."""
        if not self.is_typed:
            unfinished = newest(self.path.parent, is_unfinished) if self.config.resume == "auto" else None
            if unfinished is None:
                return make_new(self.path, "hydra.sweep.dir")
            check(unfinished.path, "resume=auto")
            return unfinished.path
        check(self.path, f"hydra.sweep.dir={self.path}")
        return make(self.path, "hydra.sweep.dir", exist_ok=True)

    def plan_job(self, overrides: Sequence[str], number: int) -> Plan:
        """Composes and checks a job. Raises `UserError`."""
        config = self.composer.compose([*self.hydra, *overrides])
        self._refuse_recipe(config)
        job = as_job(checked(config, overrides, self.overrides, self.composer.flags), number, overrides)
        refuse_untested(job.saved, overrides)
        self._check_size(job.experiment)
        if job.saved["resume"] not in (None, "auto"):
            raise UserError(f"resume={job.saved['resume']}: not supported in a sweep; use resume=auto")
        return job

    def _refuse_recipe(self, config: DictConfig) -> None:
        """Raises `UserError` for a job that is a series of runs itself."""
        name = config.hydra.runtime.choices.get("experiment")
        if config.get("comparison") is not None:
            raise UserError(
                f"experiment={name}: a comparison is a series of runs already; leave out -m, or sweep its base config "
                "with comparison=null"
            )
        sweepers = [OmegaConf.to_container(each.hydra.sweeper, resolve=False) for each in (config, self.config)]
        if config.hydra.mode == RunMode.MULTIRUN and sweepers[0] != sweepers[1]:
            raise UserError(f"experiment={name}: a study is a sweep already; run one at a time: experiment={name}")

    def _check_size(self, experiment: "Experiment") -> None:
        """Raises `UserError` for a model that does not fit into memory, and for tasks that would train the same one."""
        from dlopt.data.images import size_pair
        from dlopt.training.model_check import check_minimum_memory

        size = size_pair(experiment.data_settings.image_size)
        is_local = self.pool is not None and self.pool.is_local  # other machines may have more memory
        if is_local and (key := f"{experiment.model} {size}") not in self.sized:
            self.sized.add(key)
            check_minimum_memory(experiment.model, size)
        launcher = self.config.hydra.launcher
        tasks = launcher.get("nodes", 1) * launcher.get("tasks_per_node", 1)
        if tasks > 1 and "processes" not in experiment.parallel.arguments:
            raise UserError(
                f"hydra.launcher: nodes x tasks_per_node starts {tasks} processes per job, which would train the same "
                "model; use parallel=ddp, or one process"
            )

    def run_grid(self, folder: Path, jobs: Sequence[Job]) -> None:
        """Runs the jobs as they were checked. A launcher or sweeper of another package composes them again."""
        if self.pool is None or not jobs:
            run_with_hydra(self, folder, [listed(override) for override in self.swept])
            return
        if self.pool.is_local:
            pools.warm_up()
        size = self.config.hydra.sweeper.get("max_batch_size") or len(jobs)
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            run_jobs(batch, len(batch), self.pool)

    def estimate(self, jobs: Sequence[Plan], total: int) -> int:
        slots = 1 if self.pool is None else self.pool.slots
        print_estimate([job.saved for job in jobs], choices_of(self.config), total, slots)
        return DONE


def refuse_ranks(command: str, what: str) -> None:
    """Raises `UserError` in one of several ranks of torchrun or srun, all of which would start `what`."""
    if current() is not None:
        raise UserError(
            f"{command}: cannot run inside torchrun or srun, because every rank would start {what}; start it from a "
            "shell"
        )


def sweep(composer: Composer, parsed: Namespace) -> int:
    """Runs the sweep and returns its exit code. Raises `UserError` before it creates any file."""
    refuse_ranks("-m", "the sweep")
    config = composer.compose(parsed.overrides, multirun=True)
    refuse_unread_hydra(parsed.overrides, "a sweep", _READS_OF_HYDRA, {"hydra.run": "use hydra.sweep.dir"})
    if config.hydra.job.chdir:
        raise UserError("hydra.job.chdir=true: not supported in a sweep, whose jobs run in the current folder")
    path, is_typed = typed_folder(config, "hydra.sweep.dir", parsed.overrides)
    is_search = str(config.hydra.sweeper._target_) == SEARCH
    refusal = "starts jobs in batches, but a search starts one per free slot" if is_search else None
    pool = build_pool(config, refusal)
    lines = parsed.overrides if is_search else with_params(config, parsed.overrides)
    swept = composer.parse([line for line in lines if not is_hydra(line)])
    hydra = [line for line in lines if is_hydra(line)]
    request = SweepRequest(composer, config, parsed.overrides, hydra, swept, path, is_typed, pool)
    try:
        return _load_search()(request) if is_search else _grid(request)
    except Interrupted:  # before the first job
        raise
    except KeyboardInterrupt:
        return INTERRUPTED


def _load_search() -> Callable[[SweepRequest], int]:
    try:
        from dlopt.sweeps.search import search
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(f"hydra/sweeper=dlopt_optuna: requires optuna; {install('dlopt[sweep]')}") from None
    return search


def build_pool(config: DictConfig, refusal: str | None) -> pools.Pool | None:
    """Checks the settings of the launcher and returns its worker pool.

    A launcher of another package has none: raises `UserError` with the reason `refusal`, if any.
    """
    launcher = instantiate(config.hydra.launcher) if str(config.hydra.launcher._target_).startswith(OWN) else None
    if launcher is not None:
        return cast(pools.Pool, launcher.build_pool())
    if refusal is not None:
        name = config.hydra.runtime.choices["hydra/launcher"]
        raise UserError(f"hydra/launcher={name}: {refusal}; allowed: serial, joblib, gpus, slurm")
    return None


def read_space(sweep: Path) -> Any:
    """Reads sweep.yaml; None if it is missing or unreadable."""
    try:
        return yaml.safe_load((sweep / SPACE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def print_next(title: str, sweep: Path, *, has_failed: bool = False) -> int:
    """Prints `title` and the next commands; returns `DONE`."""
    path = shlex.quote(short_path(sweep))
    failed = [f"  dlopt runs {path} status=failed"] if has_failed else []
    print(title, "next:", f"  dlopt report {path}", *failed, sep="\n")
    return DONE


def show_board(records: Sequence[Record], **ranking: Any) -> None:
    """Prints the leaderboard of a sweep."""
    from dlopt.results.terminal import show_leaderboard

    board = leaderboard(records, **ranking)
    show_leaderboard(board, board.metric.replace("best_val_", "test_"))


# -- grids


def _jobs(sweep: Path, plans: Sequence[Plan]) -> list[Job]:
    """Returns the jobs of a grid in the folder `sweep`."""
    named = enumerate(zip(plans, labels([plan.lines for plan in plans]), strict=True))
    return [Job(number, RunFolder(sweep / plan.subfolder), plan, label) for number, (plan, label) in named]


def _grid(request: SweepRequest) -> int:
    plans = _plans(request)
    if request.config.dry_run:
        for number, label in enumerate(labels([plan.lines for plan in plans])):
            print(f"job {number}: {label}")
        return request.estimate(plans, len(plans))
    folder = request.find_folder(
        lambda candidate: bool(plans) and _is_unfinished(candidate, _jobs(candidate.path, plans)),
        lambda path, key: _check_folder(RunFolder(path), key, _jobs(path, plans), request.config.resume),
    )
    jobs = _jobs(folder, plans)
    if jobs and all(job.is_done for job in jobs):
        return print_next(f"this sweep is already finished: {folder}", folder)
    with RunFolder(folder).lock():
        write_atomically(folder / SPACE, yaml.safe_dump([plan.lines for plan in plans], allow_unicode=True).encode())
        for job in jobs:
            record_dead(job.folder)
        request.run_grid(folder, jobs)
    rows = [(job.plan, job.folder.summary() or {}) for job in jobs]
    show_board([job_record(Path(plan.subfolder), plan.saved, summary, plan.lines) for plan, summary in rows])
    # A sweeper that chooses its jobs at run time is judged by the runs that it has left.
    runs = [job.folder for job in jobs] or [RunFolder(path.parent) for path in folder.glob("*/config.yaml")]
    statuses = {(run.summary() or {}).get("status", "running" if run.is_live() else "failed") for run in runs}
    print_next(f"\nsweep folder: {short_path(folder)}", folder, has_failed="failed" in statuses)
    if statuses & {"failed", "interrupted"}:
        print("resume=auto added to this command runs the failed and interrupted jobs again")
    if not statuses or statuses & {"failed", "running"}:
        return FAILED
    return INTERRUPTED if "interrupted" in statuses else DONE


def _plans(request: SweepRequest) -> list[Plan]:
    """Expands a grid to its checked jobs, like Hydra's basic sweeper; [] for sweepers that choose jobs at run time."""
    sweeper = request.config.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return []
    if sweeper.max_batch_size is not None and sweeper.max_batch_size < 1:
        raise UserError(f"hydra.sweeper.max_batch_size={sweeper.max_batch_size}: must be > 0, or null")
    combinations = grid(request.swept)
    if not combinations:
        raise UserError("-m: nothing to run, because a list of values is empty")
    jobs = [request.plan_job(overrides, number) for number, overrides in enumerate(combinations)]
    if len({job.subfolder for job in jobs}) < len(jobs):
        raise UserError(f"hydra.sweep.subdir={jobs[0].subfolder}: must be different for each job")
    return jobs


def _check_folder(sweep: RunFolder, key: str, jobs: Sequence[Job], resume: str | None) -> None:
    if sweep.is_live():
        raise UserError(f"{key}: another sweep is active in this folder")
    for job in jobs:
        job.folder.refuse_newer(key)
    for job in jobs:
        folder, saved = job.folder, job.plan.saved
        if folder.has_run():
            if resume != "auto":
                raise UserError(f"{key}: this folder contains a sweep; resume it with resume=auto")
            former = folder.config() or saved
            refuse_other_config(former, saved, str(folder.path), folder.history())
            if any(former.get(name) != saved[name] for name in ("epochs", "steps")):
                _check_length(job)


def _check_length(job: Job) -> None:
    """Raises `UserError` if the job would train its added epochs at learning rate 0."""
    from dlopt.training.checkpoint import Checkpoints
    from dlopt.training.progress import check_lengthened

    state = Checkpoints(job.folder.checkpoints).load_newest()
    if state is not None:
        check_lengthened(job.plan.experiment, state)


def _is_unfinished(sweep: RunFolder, jobs: Sequence[Job]) -> bool:
    """Returns whether the folder contains the same jobs, some of them unfinished."""
    space = read_space(sweep.path)
    if sweep.is_live() or not isinstance(space, list) or len(space) != len(jobs):
        return False
    if all(job.is_done for job in jobs):
        return False
    for lines, job in zip(space, jobs, strict=True):
        old = job.folder.config()
        if differences(old, job.plan.saved) if old is not None else _values(lines) != _values(job.plan.lines):
            return False
    return True


def _values(lines: Any) -> dict[str, str]:
    """Returns the overrides by key, without those that may change on resume."""
    lines = [str(line) for line in lines] if isinstance(lines, list) else []
    return {key_of(line): value_of(line) for line in lines if not may_change(key_of(line))}


# -- launchers and sweepers of other packages


def run_with_hydra(request: SweepRequest, folder: Path, overrides: Sequence[str]) -> None:
    """Runs a sweep through Hydra's main, with the sweeper and the launcher of its config.

    `overrides`: of the jobs; their lists of values are spelled out, which Hydra expands in the same order.
    """
    composer = request.composer
    flags = ["-m", "--config-name", composer.config_name]
    flags += [] if composer.config_dir is None else ["--config-dir", composer.config_dir]
    hydra = [line for line in request.hydra if key_of(line) not in ("hydra.sweep.dir", "hydra.sweeper.params")]
    own = [f"hydra.sweep.dir={quoted_value(str(folder))}"]
    if str(request.config.hydra.sweeper._target_).endswith("BasicSweeper"):
        own.append("hydra.sweeper.params=null")
    with env_override({"HYDRA_FULL_ERROR": "1"}):  # errors are raised, not printed
        hydra_main([*flags, *hydra, *own, *overrides], start_job)


def start_job(config: DictConfig) -> str:
    """Runs one job that Hydra has composed; returns its status."""
    hydra = HydraConfig.get()
    folder, overrides = RunFolder(Path(hydra.runtime.output_dir)), [str(line) for line in hydra.overrides.task]
    chosen = {str(key): str(value) for key, value in hydra.runtime.choices.items() if value is not None}
    try:
        from dlopt.config.parsing import parse

        plain, saved = to_plain(config, overrides)
        experiment = parse(plain, saved)
    except UserError as error:
        return sweep_jobs.record_failure(folder, str(error)).status
    choices = {key: value for key, value in chosen.items() if not key.startswith("hydra")}
    plan = Plan(tuple(parse_overrides(overrides)), choices, experiment)
    job = Job(int(hydra.job.num), folder, plan, " ".join(overrides))
    return run_jobs([job], 1, pools.local(n_jobs=1))[job.number]
