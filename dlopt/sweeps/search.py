"""`hydra/sweeper=dlopt_optuna`: draws jobs one at a time from an Optuna study that several processes may share."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, RunError, UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.folders import SPACE, FolderSnapshot, RunFolder, short_path
from dlopt.basics.locks import locked
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.ranges import Count, Seed
from dlopt.basics.status_line import waiting
from dlopt.config.keys import is_seed
from dlopt.config.overrides import Axis, key_of
from dlopt.config.parameters import show
from dlopt.config.plan import Plan
from dlopt.config.schema import check_arguments, component
from dlopt.metrics.names import (
    VAL_ACCURACY,
    Directions,
    Goal,
    Metric,
    base_name,
    best_key,
    column_of,
    direction_of,
    monitored_directions,
)
from dlopt.results.leaderboard import ParetoFront, front, goal_of, is_number, job_record, leaderboard
from dlopt.results.printing import show_front, show_leaderboard
from dlopt.results.reading import find, number_in
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, JobResult, build_job, record_dead
from dlopt.sweeps.pool import JobSource
from dlopt.sweeps.queue import WORKERS, live_workers
from dlopt.sweeps.request import SweepEnd, SweepRequest, print_next
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.space import Space, parse_space
from dlopt.sweeps.study import (
    STUDY_LOCK,
    ClaimedJob,
    Study,
    StudySpec,
    describe_differences,
    is_fact,
    storage_errors,
)
from dlopt.sweeps.submitting import submit_search
from dlopt.sweeps.sweep_file import find_space, read_space
from dlopt.tracking.overview import Overview

_AUTO = "auto"
_RETRY_SECONDS = 3.0  # between attempts to take over jobs of dead processes when no other job is left
_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The keys of conf/hydra/sweeper/dlopt_optuna.yaml except for the sampler and the pruner."""

    n_trials: Count | None
    objective: str | list[str]
    direction: Literal["auto", Goal] | list[Literal["auto", Goal]]
    watch: str
    storage: str | None
    study_name: str
    seed: Seed


def search(request: SweepRequest) -> SweepEnd:
    """Runs the jobs of a search. Raises `UserError` before it creates any file."""
    objective = request.config.hydra.sweeper.objective
    is_auto = _AUTO in ([objective] if isinstance(objective, str) else objective)
    monitored = _monitored(request) if is_auto else ""
    spec = build_study_spec(request.config, request.axes, monitored)
    with waiting("checking the search space ..."):
        jobs = [request.plan_job(probe, 0) for probe in probes(spec.space)]
    facts = study_facts(spec, jobs[0].saved)
    if request.config.dry_run:
        for key, values in facts["space"].items():
            print(f"{key}: {values}")
        print("values are drawn when a job starts")
        return request.estimate(jobs, spec.total)
    request.check_tracking(jobs)
    before = FolderSnapshot(request.path)
    folder = request.find_folder(
        lambda candidate: 0 if _jobs_left(find_space(candidate.path), facts, spec.total) else None,
        lambda path, key: _check_folder(path, key, facts, request.config.resume),
    )
    saved = read_space(folder)
    if _jobs_left(saved, facts, spec.total) == 0:
        print_next(f"this sweep is already finished: {folder}", folder)
        return SweepEnd(DONE)
    try:
        if isinstance(request.launcher, Slurm):
            left = _jobs_left(saved, facts, spec.total)
            _submit(request, request.launcher, spec, facts, folder, jobs[0], spec.total if left is None else left)
            return SweepEnd(DONE, is_submitted=True)
        return _run(request, spec, facts, folder)
    except UserError:
        if saved is None:
            before.erase(folder)
        raise


def _submit(
    request: SweepRequest,
    launcher: Slurm,
    spec: StudySpec,
    facts: Mapping[str, Any],
    folder: Path,
    plan: Plan,
    left: int,
) -> None:
    """Creates the study, and submits workers that draw its jobs. Raises `UserError`."""
    with storage_errors(spec.storage):
        study = Study(folder, spec, facts)
        try:
            _write_sweep_file(folder, facts, study)
        finally:
            study.close()
    submit_search(request, launcher, folder, plan, spec.total, left)


def _run(request: SweepRequest, spec: StudySpec, facts: Mapping[str, Any], folder: Path) -> SweepEnd:
    """Runs jobs of the study until none is left to claim. Raises `UserError` before the first job starts."""
    assert isinstance(request.launcher, pools.Pool)  # has refused and submitted others
    pools.warm_up()
    with storage_errors(spec.storage):
        study = Study(folder, spec, facts)
        _write_sweep_file(folder, facts, study)
        source = Search(spec, study, partial(build_job, request.plan_job, folder))
        try:
            pools.run(source, request.launcher, source.overview)
        finally:
            _write_sweep_file(folder, facts, study)
            study.close()
        counts, finished = study.counts(), study.finished()
    if elsewhere := counts[TrialState.RUNNING] - source.interrupted:
        are = "job is" if elsewhere == 1 else "jobs are"
        print(f"{elsewhere} {are} still running in other processes")
    has_failed = counts[TrialState.FAIL] > 0
    end = _ranked(spec, finished, FAILED if has_failed else INTERRUPTED if source.interrupted else DONE)
    if end.board is not None:
        show_leaderboard(end.board)
    if end.front is not None:
        show_front([(label, values) for label, _, values in end.front.rows], end.front.metrics)
    print_next(f"\nsweep folder: {short_path(folder)}", folder, has_failed=has_failed)
    return end


def _jobs_left(saved: Any, facts: Mapping[str, Any], total: int) -> int | None:
    """Returns how many jobs of the search are not done. `saved`: content of sweep.yaml; None for another search."""
    former = saved.get("facts") if isinstance(saved, dict) else None
    is_same = isinstance(former, dict) and not describe_differences(former, facts)
    return max(total - saved.get("finished", 0), 0) if is_same else None


def _check_folder(sweep: Path, key: str, facts: Mapping[str, Any], resume: str | None) -> None:
    """Raises `UserError` for a folder with another search. Joins one with live workers, without resume=auto."""
    saved = read_space(sweep)
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise UserError(f"{key}: this folder contains a grid sweep, not a search")
    if different := describe_differences(saved.get("facts", {}), facts):
        raise UserError(f"{key}: this folder contains a different search ({different}); use another folder")
    has_begun = any(RunFolder(path).has_begun() for path in find(sweep))
    if resume != "auto" and has_begun and not live_workers(sweep):
        raise UserError(f"{key}: this folder contains a sweep; resume it with resume=auto")


def _ranked(spec: StudySpec, jobs: Sequence[FrozenTrial], code: int) -> SweepEnd:
    """Returns the end of a search with the leaderboard of the finished jobs, or their Pareto front."""
    label = spec.space.label
    if len(spec.objectives) > 1:
        best = [jobs[i] for i in front([job.values for job in jobs], spec.directions)]
        rows = [(f"job {job.number}: {label(job.params)}", Path(job.user_attrs["run"]), job.values) for job in best]
        rows.sort(key=lambda row: list(row[2]))
        return SweepEnd(code, front=ParetoFront(spec.objectives, spec.directions, rows))
    metric, records = spec.objectives[0], []
    for job in jobs:
        run = RunFolder(Path(job.user_attrs["run"]))
        summary = {**(run.summary() or {"status": "finished"}), metric: job.values[0]}
        words = [f"job {job.number}:", label(job.params)]
        # The job's number is a text: of numbers, the smallest and the largest value are named.
        config = {key: _number(value) for key, value in job.params.items()} | {"job": str(job.number)}
        records.append(job_record(run.path, config, summary, words))
    return SweepEnd(code, leaderboard(records, metric=metric, direction=spec.directions[0]))


def _number(value: Any) -> Any:
    """Returns the number of a choice, which is a text as on the command line; other values are unchanged."""
    number = number_in(str(value))
    return value if number is None else number


# -- the search's config


def _monitored(request: SweepRequest) -> str:
    """Returns the key in summary.json of the metric that the runs monitor.

    The data decide what monitor=auto is; where they cannot be read, as on the login node of a cluster, accuracy.
    """
    if (monitor := str(request.config.monitor)) != _AUTO:
        return best_key(monitor)
    from dlopt.training.builders.dataset import read_source, with_task

    run_config = request.plan_job(probes(parse_space(request.axes))[0], 0).run_config
    try:
        dataset = read_source(run_config)
        return best_key(with_task(run_config, dataset, dataset.train.shape).task.monitor)
    except UserError:
        return VAL_ACCURACY.best


def build_study_spec(config: DictConfig, axes: Sequence[Axis], monitored: str = VAL_ACCURACY.best) -> StudySpec:
    """Checks the search in a composed config and the axes of its jobs; `monitored`: the objective `auto`.

    Raises `UserError`.
    """
    sweeper = cast("dict[str, Any]", OmegaConf.to_container(config.hydra.sweeper, resolve=True))
    plain = {key: value for key, value in sweeper.items() if not key.startswith("_")}
    sampler_node, pruner_node = plain.pop("sampler"), plain.pop("pruner")
    plain.pop("params")  # among the axes
    space = parse_space(axes)
    settings = SearchSettings(**check_arguments("hydra.sweeper", SearchSettings, plain))
    typed = [settings.objective] if isinstance(settings.objective, str) else settings.objective
    objectives = [monitored if name == _AUTO else name for name in typed]
    for name in objectives:
        metric = Metric.of(column_of(name))
        if metric is not None and metric.split == "test":
            raise UserError(
                f"hydra.sweeper.objective={name}: a search by a test metric would select on the test set; "
                f"set hydra.sweeper.objective={Metric('val', metric.name).best}"
            )
    directions = monitored_directions(flatten(OmegaConf.to_container(config, resolve=False)))
    goals = _goals(settings, objectives, directions)
    sampler = component("hydra.sweeper.sampler", sampler_node, ("space", "seed"), ["dlopt.sweeps"])
    pruner = component("hydra.sweeper.pruner", pruner_node, (), ["dlopt.sweeps"]).build()
    name = sampler.target.__name__
    if name == "cmaes" and len(objectives) > 1:
        raise UserError("hydra/sweeper/sampler=cmaes: supports one objective; for several use random, tpe or sobol")
    seeds = [key for axis in space.axes.values() for key in axis.keys if axis.is_swept and is_seed(key)]
    if seeds and name != "grid":
        raise UserError(
            f"{seeds[0]}: a search draws configurations, not seeds; set one seed, and compare the best "
            f"configurations over {seeds[0]}=range(0,5) afterwards (or use hydra/sweeper/sampler=grid)"
        )
    size = space.size()
    total = settings.n_trials or size
    if total is None:
        raise UserError("hydra.sweeper.n_trials=null: allowed for grids only; set the number of jobs")
    if name == "grid" and size is not None:
        total = min(total, size)
    watch = None if isinstance(pruner, optuna.pruners.NopPruner) else _pruning_metric(settings, objectives)
    is_opposite = False
    if watch is not None and watch != column_of(objectives[0]):  # for example a loss and an accuracy
        direction = direction_of(watch, directions)
        if direction is None:
            raise UserError(
                f"hydra.sweeper.watch={watch}: not a metric of dlopt; for a metric of your own, say which values are "
                f"better: monitor={watch} monitor_mode=min (or max)"
            )
        is_opposite = (direction == "min") != (goals[0] == "minimize")
    return StudySpec(
        space,
        objectives,
        goals,
        watch,
        sampler.build(space=space, seed=settings.seed),
        pruner,
        total,
        settings.storage,
        settings.study_name,
        negate_pruning_metric=is_opposite,
    )


def _goals(settings: SearchSettings, objectives: Sequence[str], directions: Directions) -> list[Goal]:
    goals = settings.direction if isinstance(settings.direction, list) else [settings.direction] * len(objectives)
    if not objectives or len(goals) != len(objectives):
        raise UserError(
            f"hydra.sweeper.direction={show(settings.direction)}: one for each objective is needed "
            f"({', '.join(objectives) or 'hydra.sweeper.objective is empty'})"
        )
    for key, goal in zip(objectives, goals, strict=True):
        direction = direction_of(key, directions)
        if direction is None and goal == "auto":
            raise UserError(
                f"hydra.sweeper.objective={key}: not a metric of dlopt; for a metric of your own, say which values are "
                "better: hydra.sweeper.direction=minimize (or maximize)"
            )
        is_metric = base_name(key) != key  # a metric of an evaluation: a search may maximize the steps of a run
        if is_metric and direction is not None and goal not in ("auto", f"{direction}imize"):
            better = "smaller" if direction == "min" else "larger"
            raise UserError(
                f"hydra.sweeper.direction={goal}: {key} is better when {better}; set hydra.sweeper.direction=auto"
            )
    return [goal_of(key, directions) if goal == "auto" else goal for key, goal in zip(objectives, goals, strict=True)]


def _pruning_metric(settings: SearchSettings, objectives: Sequence[str]) -> str:
    if len(objectives) > 1:
        raise UserError("hydra/sweeper/pruner: pruning needs a single objective; with several set none")
    if settings.watch != "auto":
        return settings.watch
    metric = Metric.of(objectives[0])
    if metric is None or metric.split != "val" or metric.best != objectives[0]:
        raise UserError(
            f"hydra.sweeper.watch=auto: metrics.jsonl has no {objectives[0]}; set the metric "
            "that the pruner compares, for example hydra.sweeper.watch=val_loss"
        )
    return metric.column


def probes(space: Space) -> list[list[str]]:
    """Returns overrides of jobs, to be checked early, that cover every choice and both ends of every range."""
    searched: Mapping[str, Any] = space.searched
    extremes = {
        name: each.choices if isinstance(each, CategoricalDistribution) else (each.low, each.high)
        for name, each in searched.items()
    }
    first = {name: values[0] for name, values in extremes.items()}
    points = [first]
    for name, values in extremes.items():
        # An axis with a condition is in the jobs of a value of another axis.
        job = next((point for point in points if space.has(name, point)), first)
        points += [{**job, name: value} for value in values[1:]]
    return [space.overrides(point) for point in points]


def study_facts(spec: StudySpec, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that must be equal in all processes that share the study.

    `saved`: the config of any one job; keys that are searched or that may differ between machines are left out.
    """
    searched = spec.space.keys
    # The keys of a searched choice differ between jobs, unless the command line fixes them.
    typed = [key for line in spec.space.fixed if is_below(key := key_of(line), searched)]
    fixed = {
        key: value
        for key, value in flatten(saved).items()
        if is_fact(key) and (not is_below(key, searched) or is_below(key, typed))
    }
    return {"objective": list(spec.objectives), "config": fixed, "space": spec.space.describe()}


# -- its jobs


def _write_sweep_file(folder: Path, facts: Mapping[str, Any], study: Study) -> None:
    """Writes sweep.yaml, by which resume=auto finds the search."""
    with locked(folder / WORKERS / STUDY_LOCK):  # processes that share the study start and end at about the same time
        counts = study.counts()
        ended = sum(counts[state] for state in _STATES.values())
        content = {"facts": dict(facts), "finished": ended, "total": sum(counts.values())}
        write_yaml(folder / SPACE, content)


class Search(JobSource):
    """Claims jobs of the study and records their results. `build` (overrides, number, label) composes a job."""

    def __init__(self, spec: StudySpec, study: Study, build: Callable[[Sequence[str], int, str], Job]) -> None:
        self._spec, self._study, self._build = spec, study, build
        self._claims: dict[int, ClaimedJob] = {}
        self.interrupted = 0  # jobs
        self._last_empty_claim = float("-inf")
        self.overview = Overview(spec.total, spec.objectives[0], spec.directions[0])
        self._logged: set[str] = set()  # metrics in the lines of metrics.jsonl, if there is a pruner

    def next(self) -> Job | None:
        now = time.monotonic()
        if now < self._last_empty_claim + _RETRY_SECONDS:  # do not query the storage at every poll of the pool
            return None
        counts = self._study.counts()
        space, objective = self._spec.space, self._spec.objectives[0]
        finished = self._study.finished()
        done = [(job.number, space.label(job.params), {objective: job.values[0]}) for job in finished]
        self.overview.update_shared({status: counts[state] for status, state in _STATES.items()}, done)
        claim = self._study.claim()
        if claim is None:
            self._last_empty_claim = now
            return None
        self._claims[claim.number] = claim
        job = self._build(space.overrides(claim.values), claim.number, space.label(claim.values))
        if claim.is_takeover and isinstance(job, Job):
            record_dead(job.folder)
        return job

    def is_exhausted(self) -> bool:
        return self._study.counts()[TrialState.WAITING] == 0 and not self._study.awaits_orphans()

    def should_stop(self, job: Job, metrics: Mapping[str, Any]) -> bool:
        if self._spec.pruning_metric is None:
            return False
        self._logged |= metrics.keys()
        value = metrics.get(self._spec.pruning_metric)
        if not is_number(value) or isinstance(metrics["epoch"], float):  # pruners compare jobs at ends of epochs
            return False
        # The pruner compares in the direction of the objective.
        value = -float(value) if self._spec.negate_pruning_metric else float(value)
        return self._study.report(self._claims[job.number], int(metrics["epoch"]), value)

    def ended(self, job: Job, result: JobResult) -> None:
        claim = self._claims[job.number]
        if result.status == "interrupted":
            self.interrupted += 1  # the trial stays RUNNING: another process takes it over once this one has ended
        elif result.status == "pruned":
            self._study.finish(claim, TrialState.PRUNED)
        elif result.status == "failed":
            self._study.finish(claim, TrialState.FAIL, reason=result.reason)
        else:
            self._record(claim, job.folder, result.metrics)

    def _record(self, claim: ClaimedJob, run: RunFolder, metrics: Mapping[str, Any]) -> None:
        """Records the objectives. Raises `RunError` if no job of this search can have the metrics of its objectives."""
        missing = [key for key in self._spec.objectives if not is_number(metrics.get(key))]
        if not missing:
            scores = [float(metrics[key]) for key in self._spec.objectives]
            self._study.finish(claim, TrialState.COMPLETE, scores, run=str(run.path))
        else:
            available = ", ".join(name for name, value in metrics.items() if is_number(value))
            is_unknown = missing[0] not in metrics
            reason = f"no such metric in summary.json, which has {available}" if is_unknown else "not a finite number"
            reason = f"hydra.sweeper.objective={missing[0]}: {reason}"
            self._study.finish(claim, TrialState.FAIL, reason=reason)
            if is_unknown and not self._study.finished():
                raise RunError(reason)
            self.overview.message(f"job {claim.number}: {reason}")
        watch = self._spec.pruning_metric
        if self._logged and watch is not None and watch not in self._logged:
            logged = ", ".join(sorted(self._logged))
            raise RunError(f"hydra.sweeper.watch={watch}: no such metric in metrics.jsonl, which has {logged}")
