"""`dlopt train -m`: checks all jobs before the first one starts, and runs each in a separate process."""

import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
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
    text_of,
    value_of,
)
from dlopt.config.plan import Plan, as_job, checked, with_params
from dlopt.config.resolve import choices_of, to_plain
from dlopt.config.resuming import differences, may_change, refuse_other_config
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError, install
from dlopt.files import write_atomically
from dlopt.folders import SPACE, FolderSnapshot, RunFolder, make, make_new, newest
from dlopt.interruption import Interrupted
from dlopt.parallel.rendezvous import current
from dlopt.results.leaderboard import Record, front, job_record, leaderboard
from dlopt.sweeps import jobs as sweep_jobs
from dlopt.sweeps import pool as pools
from dlopt.sweeps.estimate import print_estimate
from dlopt.sweeps.grid import run_jobs
from dlopt.sweeps.jobs import Job, labels, record_dead
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment
    from dlopt.sweeps.search import Row
    from dlopt.sweeps.study import StudySpec

OWN = "hydra_plugins.dlopt_sweeps."
SEARCH = f"{OWN}OptunaSweeper"  # a name only: `_search` runs it
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

    def run_grid(self, folder: Path, jobs: Sequence[Plan]) -> None:
        """Runs the jobs as they were checked. A launcher or sweeper of another package composes them again."""
        if self.pool is None or not jobs:
            run_with_hydra(self, folder, [listed(override) for override in self.swept])
            return
        if self.pool.is_local:
            pools.warm_up()
        names = labels([job.lines for job in jobs])
        ready = [
            Job(number, RunFolder(folder / job.subfolder), job, name)
            for number, (job, name) in enumerate(zip(jobs, names, strict=True))
        ]
        size = self.config.hydra.sweeper.get("max_batch_size") or len(jobs)
        for first in range(0, len(jobs), size):
            batch = ready[first : first + size]
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
        return _search(request) if is_search else _grid(request)
    except Interrupted:  # before the first job
        raise
    except KeyboardInterrupt:
        return INTERRUPTED


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


def _space(sweep: Path) -> Any:
    """Reads sweep.yaml; None if it is missing or unreadable."""
    try:
        return yaml.safe_load((sweep / SPACE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


# -- grids


def _grid(request: SweepRequest) -> int:
    jobs = _jobs(request)
    if request.config.dry_run:
        for number, label in enumerate(labels([job.lines for job in jobs])):
            print(f"job {number}: {label}")
        return request.estimate(jobs, len(jobs))
    folder = request.find_folder(
        lambda candidate: bool(jobs) and _is_unfinished(candidate, jobs),
        lambda path, key: _check_folder(path, key, jobs, request.config.resume),
    )
    folders = [RunFolder(folder / job.subfolder) for job in jobs]
    if jobs and all(each.is_done(job.saved) for each, job in zip(folders, jobs, strict=True)):
        return _print_next(f"this sweep is already finished: {folder}", folder)
    with RunFolder(folder).lock():
        write_atomically(folder / SPACE, yaml.safe_dump([job.lines for job in jobs], allow_unicode=True).encode())
        for each in folders:
            record_dead(each)
        request.run_grid(folder, jobs)
    pairs = list(zip(folders, jobs, strict=True))
    _show([job_record(Path(job.subfolder), job.saved, each.summary() or {}, job.lines) for each, job in pairs])
    statuses = _statuses(folder, jobs)
    _print_next(f"\nsweep folder: {short_path(folder)}", folder, statuses)
    if any(status in ("failed", "interrupted") for status in statuses):
        print("resume=auto added to this command runs the failed and interrupted jobs again")
    if not statuses or {"failed", "running"} & set(statuses):
        return FAILED
    return INTERRUPTED if "interrupted" in statuses else DONE


def _jobs(request: SweepRequest) -> list[Plan]:
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


def _check_folder(sweep: Path, key: str, jobs: Sequence[Plan], resume: str | None) -> None:
    if RunFolder(sweep).is_live():
        raise UserError(f"{key}: another sweep is active in this folder")
    for job in jobs:
        RunFolder(sweep / job.subfolder).refuse_newer(key)
    for job in jobs:
        folder = RunFolder(sweep / job.subfolder)
        if folder.has_run():
            if resume != "auto":
                raise UserError(f"{key}: this folder contains a sweep; resume it with resume=auto")
            former = folder.config() or job.saved
            refuse_other_config(former, job.saved, str(folder.path), folder.history())
            if any(former.get(name) != job.saved[name] for name in ("epochs", "steps")):
                _check_length(folder, job)


def _check_length(folder: RunFolder, job: Plan) -> None:
    """Raises `UserError` if the job would train its added epochs at learning rate 0."""
    from dlopt.training.checkpoint import Checkpoints
    from dlopt.training.progress import check_lengthened

    state = Checkpoints(folder.checkpoints).load_newest()
    if state is not None:
        check_lengthened(job.experiment, state)


def _is_unfinished(sweep: RunFolder, jobs: Sequence[Plan]) -> bool:
    """Returns whether the folder contains the same jobs, some of them unfinished."""
    space = _space(sweep.path)
    if sweep.is_live() or not isinstance(space, list) or len(space) != len(jobs):
        return False
    folders = [RunFolder(sweep.path / job.subfolder) for job in jobs]
    if all(folder.is_done(job.saved) for folder, job in zip(folders, jobs, strict=True)):
        return False
    for lines, folder, job in zip(space, folders, jobs, strict=True):
        old = folder.config()
        if differences(old, job.saved) if old is not None else _values(lines) != _values(job.lines):
            return False
    return True


def _values(lines: Any) -> dict[str, str]:
    """Returns the overrides by key, without those that may change on resume."""
    lines = [str(line) for line in lines] if isinstance(lines, list) else []
    return {key_of(line): value_of(line) for line in lines if not may_change(key_of(line))}


def _statuses(sweep: Path, jobs: Sequence[Plan] = ()) -> list[str]:
    """Returns the status of each job; without `jobs`, of each run in the sweep's folder."""
    folders = [RunFolder(sweep / job.subfolder) for job in jobs]
    if not jobs:
        folders = [RunFolder(path) for path in sweep.iterdir() if (path / "config.yaml").exists()]
    return [(folder.summary() or {}).get("status", "running" if folder.is_live() else "failed") for folder in folders]


def _print_next(title: str, sweep: Path, statuses: Sequence[str] = ()) -> int:
    """Prints `title` and the next commands; returns `DONE`."""
    path = shlex.quote(short_path(sweep))
    failed = [f"  dlopt runs {path} status=failed"] if "failed" in statuses else []
    print(title, "next:", f"  dlopt report {path}", *failed, sep="\n")
    return DONE


def _show(entries: Sequence[Record], **ranking: Any) -> None:
    from dlopt.results.terminal import show_leaderboard

    board = leaderboard(entries, **ranking)
    show_leaderboard(board, board.metric.replace("best_val_", "test_"))


# -- searches


def _search(request: SweepRequest) -> int:
    try:
        from dlopt.sweeps.search import build_study_spec, probes, run_search, study_facts
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(f"hydra/sweeper=dlopt_optuna: requires optuna; {install('dlopt[sweep]')}") from None

    spec = build_study_spec(request.composer, request.config, [text_of(override) for override in request.swept])
    jobs = [request.plan_job(probe, 0) for probe in probes(spec.space)]
    space = spec.space.describe()
    facts = {**study_facts(spec, jobs[0].saved), "space": space}
    if request.config.dry_run:
        for key, values in space.items():
            print(f"{key}: {values}")
        print("values are drawn when a job starts")
        return request.estimate(jobs, spec.total)
    before = FolderSnapshot(request.path)
    folder = request.find_folder(
        lambda candidate: _is_unfinished_search(_space(candidate.path), facts, spec.total),
        lambda path, key: _check_search(path, key, facts, request.config.resume),
    )
    saved = _space(folder)
    if _is_same_search(saved, facts) and not _is_unfinished_search(saved, facts, spec.total):
        return _print_next(f"this sweep is already finished: {folder}", folder)
    try:
        assert request.pool is not None  # has refused other launchers
        if request.pool.is_local:
            pools.warm_up()
        outcome = run_search(spec, facts, folder, request.pool, request.plan_job)
    except UserError:
        if saved is None:
            before.erase(folder)
        raise
    if outcome.elsewhere:
        are = "job is" if outcome.elsewhere == 1 else "jobs are"
        print(f"{outcome.elsewhere} {are} still running in other processes")
    _show_search(folder, spec, outcome.rows)
    return int(outcome.code)


def _is_unfinished_search(saved: Any, facts: Mapping[str, Any], total: int) -> bool:
    """Returns whether the contents of a sweep.yaml are of this search, with jobs left to run."""
    return _is_same_search(saved, facts) and saved.get("finished", 0) < total


def _is_same_search(saved: Any, facts: Mapping[str, Any]) -> bool:
    from dlopt.sweeps.study import describe_differences

    former = saved.get("facts") if isinstance(saved, dict) else None
    return isinstance(former, dict) and not describe_differences(former, facts)


def _check_search(sweep: Path, key: str, facts: Mapping[str, Any], resume: str | None) -> None:
    """Raises `UserError` for a folder with another search. Joins one with live workers, without resume=auto."""
    from dlopt.sweeps.study import describe_differences, has_live_worker

    saved = _space(sweep)
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise UserError(f"{key}: this folder contains a grid sweep, not a search")
    different = describe_differences(saved.get("facts", {}), facts)
    if different:
        raise UserError(f"{key}: this folder contains a different search ({different}); use another folder")
    if resume != "auto" and not has_live_worker(sweep):
        raise UserError(f"{key}: this folder contains a sweep; resume it with resume=auto")


def _show_search(sweep: Path, spec: "StudySpec", rows: "Sequence[Row]") -> None:
    from dlopt.results.terminal import show_front

    if len(spec.objectives) > 1:
        pareto_indices = front([values for _, _, values, _ in rows], spec.directions)
        pareto_rows = [(f"job {rows[i][0]}: {rows[i][1]}", rows[i][2]) for i in pareto_indices]
        show_front(sorted(pareto_rows, key=lambda row: list(row[1])), spec.objectives)
    else:
        metric = spec.objectives[0]
        entries = []
        for number, label, values, run in rows:
            summary = {**(RunFolder(run).summary() or {"status": "finished"}), metric: values[0]}
            entries.append(job_record(Path(f"job {number}"), {"job": number}, summary, [f"job {number}:", label]))
        _show(entries, metric=metric, direction=spec.directions[0])
    _print_next(f"\nsweep folder: {short_path(sweep)}", sweep, _statuses(sweep))


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
