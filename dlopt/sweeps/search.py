"""`hydra/sweeper=dlopt_optuna`: draws jobs one at a time from an Optuna study that several processes may share."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, RunError, StateError, UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.folders import SPACE, FolderSnapshot, RunFolder, short_path
from dlopt.basics.formats import format_count, printable
from dlopt.basics.locks import locked
from dlopt.basics.plain_values import flatten, is_below, load_yaml
from dlopt.basics.ranges import Count, Seed
from dlopt.basics.status_line import waiting
from dlopt.config.keys import is_seed
from dlopt.config.overrides import Axis, key_of, value_of
from dlopt.config.parameters import show
from dlopt.config.plan import Plan
from dlopt.config.refusals import refused_together
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
from dlopt.results.leaderboard import FOLD, ParetoFront, front, goal_of, is_number
from dlopt.results.printing import show_end, show_front
from dlopt.results.ranking import of_folder
from dlopt.results.reading import find
from dlopt.sweeps import pool as pools
from dlopt.sweeps.array import WORKERS
from dlopt.sweeps.jobs import Job, JobResult, build_job, record_dead
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.pool import JobSource
from dlopt.sweeps.request import SweepEnd, SweepRequest, print_next
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.space import Space, Value, parse_space
from dlopt.sweeps.study import (
    STUDY_LOCK,
    ClaimedTrial,
    Study,
    StudySpec,
    describe_differences,
    hide_password,
    is_fact,
    storage_errors,
)
from dlopt.sweeps.submitting import submit_search
from dlopt.sweeps.sweep_file import find_space, read_space
from dlopt.tracking.metrics import read_metrics
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
    enqueue: str | list[dict[str, Any]] | None


def search(request: SweepRequest) -> SweepEnd:
    """Runs the jobs of a search. Raises `UserError` before it creates any file."""
    objective = request.config.hydra.sweeper.objective
    is_auto = _AUTO in ([objective] if isinstance(objective, str) else objective)
    with refused_together(request.composer, request.words, multirun=True):
        monitored = _monitored(request) if is_auto else ""
        spec = build_study_spec(request.config, request.axes, monitored)
        with waiting("checking the search space ..."):
            jobs = plan_probes(request, spec)
            _check_objectives(spec.objectives, jobs[0])
    facts = study_facts(spec, jobs[0].saved)
    request.warn_of_fixed_rates(jobs)
    if request.config.dry_run:
        for key, values in facts["space"].items():
            print(f"{key}: {values}")
        for number, values in enumerate(spec.enqueued):
            print(f"trial {number}: {spec.space.label(values)}")
        if spec.seeds:
            print(f"each trial: {', '.join(spec.seeds)}")
        print("values are drawn when a job starts")
        return request.rehearse(jobs[0], spec.total * spec.jobs_per_trial)
    request.check_tracking(jobs)
    before = FolderSnapshot(request.path)
    folder = request.find_folder(
        lambda candidate: 0 if _jobs_left(find_space(candidate.path), facts, spec.total) else None,
        lambda path, key: _check_folder(path, key, facts, request.config.resume),
    )
    saved = read_space(folder)
    if _jobs_left(saved, facts, spec.total) == 0 and not spec.enqueued:
        print_next(f"this sweep is already finished: {folder}", folder)
        return SweepEnd(DONE, None if len(spec.objectives) > 1 else of_folder(folder))
    try:
        if isinstance(request.launcher, Slurm):
            with storage_errors(spec.storage), closing(_joined(folder, spec, facts, is_new=saved is None)) as study:
                _write_sweep_file(folder, facts, study, spec)
            left = _jobs_left(saved, facts, spec.total)
            workers, total = spec.total if left is None else left, spec.total * spec.jobs_per_trial
            submit_search(request, request.launcher, folder, jobs[0], total, workers)
            return SweepEnd(DONE, is_submitted=True)
        return _run(request, spec, facts, folder, is_new=saved is None)
    except UserError:
        if saved is None:
            before.erase(folder)
        raise


def _joined(folder: Path, spec: StudySpec, facts: Mapping[str, Any], *, is_new: bool) -> Study:
    """Creates or joins the study, and says what other folders have of it. Raises `UserError`.

    `is_new`: the folder has no jobs of the study, so that it would stay empty where the others leave none.
    """
    study = Study(folder, spec, facts)
    if not (others := study.elsewhere()):
        return study
    folders = printable(", ".join(map(str, _folders(others))))
    name = f"the study {spec.name} of {hide_password(spec.storage)}"
    if is_new and len(others) == spec.total and all(trial.state.is_finished() for trial in others):
        study.close()
        raise UserError(
            f"hydra.sweeper.study_name={spec.name}: {name} has ended with {spec.total} trials in {folders}; to extend "
            "it, raise hydra.sweeper.n_trials; for a new search, set another study_name"
        )
    print(f"joins {name}: {len(others)} of {spec.total} trials are in {folders}")
    return study


def _folders(trials: Sequence[FrozenTrial]) -> list[Path]:
    return sorted({Path(str(trial.user_attrs["folder"])) for trial in trials})


def _run(request: SweepRequest, spec: StudySpec, facts: Mapping[str, Any], folder: Path, *, is_new: bool) -> SweepEnd:
    """Runs jobs of the study until none is left to claim. Raises `UserError` before the first job starts."""
    assert isinstance(request.launcher, pools.Pool)  # has refused and submitted others
    pools.warm_up()
    with storage_errors(spec.storage):
        study = _joined(folder, spec, facts, is_new=is_new)
        _write_sweep_file(folder, facts, study, spec)
        request.begin(folder, "search")
        source = Search(spec, study, partial(build_job, request.plan_job, folder))
        try:
            pools.run(source, request.launcher, source.overview)
        finally:
            _write_sweep_file(folder, facts, study, spec)
            study.close()
        counts, finished = study.counts(), study.finished()
        others = [each for each in _folders(study.elsewhere()) if each.is_dir()]
    if elsewhere := counts[TrialState.RUNNING] - source.interrupted:
        are = "is" if elsewhere == 1 else "are"
        print(f"{format_count('trials' if spec.seeds else 'jobs', elsewhere)} {are} still running in other processes")
    has_failed = counts[TrialState.FAIL] > 0
    code = FAILED if has_failed else INTERRUPTED if source.interrupted else DONE
    if len(spec.objectives) > 1:
        end = SweepEnd(code, front=(best := _front(spec, finished)))
        show_front([(label, values) for label, _, values in best.rows], best.metrics)
    else:
        end = SweepEnd(code, ranking := of_folder(folder, *_runs_elsewhere(folder, finished)))
        show_end(ranking, folder, is_final=not source.interrupted and not elsewhere)
    print_next(f"\nsweep folder: {short_path(folder)}", folder, *others, has_failed=has_failed)
    return end


def _jobs_left(saved: Any, facts: Mapping[str, Any], total: int) -> int | None:
    """Returns how many trials of the search are not done. `saved`: content of sweep.yaml; None for another search."""
    former = saved.get("facts") if isinstance(saved, dict) else None
    is_same = isinstance(former, dict) and not describe_differences(former, facts)
    return max(total - saved.get("finished", 0), 0) if is_same else None


def _check_folder(sweep: Path, key: str, facts: Mapping[str, Any], resume: str | None) -> None:
    """Raises `UserError` for a folder with another search. Joins one with live workers, without resume=auto."""
    saved = read_space(sweep)
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise StateError(f"{key}: this folder contains a grid sweep, not a search")
    if different := describe_differences(saved.get("facts", {}), facts):
        raise StateError(f"{key}: this folder contains a different search ({different}); use another folder")
    has_begun = any(RunFolder(path).has_begun() for path in find(sweep))
    if resume != "auto" and has_begun and not live_workers(sweep):
        raise StateError(f"{key}: this folder contains a sweep; resume it with resume=auto")


def _front(spec: StudySpec, jobs: Sequence[FrozenTrial]) -> ParetoFront:
    """Returns the Pareto front of the finished jobs."""
    label, unit = spec.space.label, "trial" if spec.seeds else "job"
    best = [jobs[i] for i in front([job.values for job in jobs], spec.directions)]
    rows = [(f"{unit} {job.number}: {label(job.params)}", Path(job.user_attrs["run"]), job.values) for job in best]
    rows.sort(key=lambda row: list(row[2]))
    return ParetoFront(spec.objectives, spec.directions, rows)


def _runs_elsewhere(folder: Path, jobs: Sequence[FrozenTrial]) -> list[Path]:
    """Returns the run folders of trials that other processes, which share the study, have outside of `folder`."""
    runs = [Path(run) for job in jobs for run, *_ in job.user_attrs.get("runs") or [(job.user_attrs["run"],)]]
    return [run for run in runs if not run.is_relative_to(folder.absolute()) and run.is_dir()]


# -- the search's config


def _check_objectives(objectives: Sequence[str], job: Plan) -> None:
    """Raises `UserError` for a key that summary.json will not have."""
    from dlopt.training.requested_metrics import check_objective

    if (dataset := _dataset(job)) is not None:
        for key in objectives:
            check_objective(f"hydra.sweeper.objective={key}", key, job.run_config, dataset)


def _dataset(job: Plan) -> Any:
    """Returns the data as they are stored, with their task; None if they cannot be read, which the runs report."""
    from dlopt.training.builders.dataset import read_source, with_task

    try:
        source = read_source(job.run_config)
        return with_task(job.run_config, source, source.train.shape)
    except UserError:
        return None


def _monitored(request: SweepRequest) -> str:
    """Returns the key in summary.json of the metric that the runs monitor.

    The data decide what monitor=auto is; where they cannot be read, as on the login node of a cluster, accuracy.
    """
    if (monitor := str(request.config.monitor)) != _AUTO:
        return best_key(monitor)
    dataset = _dataset(request.plan_job(probes(parse_space(request.axes))[0], 0))
    return VAL_ACCURACY.best if dataset is None else best_key(dataset.task.monitor)


def build_study_spec(config: DictConfig, axes: Sequence[Axis], monitored: str = VAL_ACCURACY.best) -> StudySpec:
    """Checks the search in a composed config and the axes of its jobs; `monitored`: the objective `auto`.

    Raises `UserError`.
    """
    sweeper = cast("dict[str, Any]", OmegaConf.to_container(config.hydra.sweeper, resolve=True))
    plain = {key: value for key, value in sweeper.items() if not key.startswith("_")}
    sampler_node, pruner_node = plain.pop("sampler"), plain.pop("pruner")
    plain.pop("params")  # among the axes
    axes, seeds = _without_seeds(axes)
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
    searched_seeds = [key for axis in space.axes.values() for key in axis.keys if axis.is_swept and is_seed(key)]
    if searched_seeds and name != "grid":
        raise UserError(
            f"{searched_seeds[0]}: a search draws configurations, not seeds; seeds=5 runs each trial with five seeds"
        )
    size = space.size() if settings.n_trials is None or name == "grid" else None  # of 10 axes it may be 10**10
    total = settings.n_trials or size
    if total is None:
        raise UserError("hydra.sweeper.n_trials=null: allowed for grids only; set the number of jobs")
    if name == "grid" and size is not None:
        total = min(total, size)
    enqueued = _enqueued(settings.enqueue, space)
    if enqueued and name == "grid":
        raise UserError("hydra.sweeper.enqueue: hydra/sweeper/sampler=grid tries every point; use another sampler")
    if len(enqueued) > total:
        raise UserError(f"hydra.sweeper.enqueue: {len(enqueued)} points, but hydra.sweeper.n_trials={total}")
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
        seeds=seeds,
        enqueued=enqueued,
    )


def _without_seeds(axes: Sequence[Axis]) -> tuple[list[Axis], list[str]]:
    """Separates the axis of the seeds that each trial runs with; returns its overrides, [] if there is none."""
    if any(FOLD in axis.keys and (axis.is_swept or axis.is_continuous) for axis in axes):
        raise UserError(
            f"{FOLD}: a search draws configurations, not folds: set one of them, or data.val_split; compare the best "
            "configurations in all folds by dlopt train -m"
        )
    own = [axis for axis in axes if axis.keys == ("seed",) and axis.is_swept and not axis.is_continuous]
    return [axis for axis in axes if axis not in own], [line for axis in own for [line] in axis.rows()]


def _enqueued(enqueue: str | list[dict[str, Any]] | None, space: Space) -> list[dict[str, Value]]:
    """Returns the values of the points to try first. `enqueue`: the points, or their file. Raises `UserError`."""
    key, points = "hydra.sweeper.enqueue", [] if enqueue is None else enqueue
    if isinstance(enqueue, str):
        key = f"{key}={enqueue}"
        try:
            points = load_yaml(Path(enqueue).expanduser())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"{key}: {reason}; needs points, or a YAML file with a list of them") from None
    if not isinstance(points, list) or not all(isinstance(point, dict) and point for point in points):
        raise UserError(f"{key}: must be a list of points: [{{optimizer.lr:0.1,optimizer:sgd}},{{optimizer.lr:0.3}}]")
    values = []
    for number, point in enumerate(points, 1):
        try:
            values.append(space.point(point))
        except UserError as error:
            raise UserError(f"{key}: point {number}: {error}") from None
    return values


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


def plan_probes(request: SweepRequest, spec: StudySpec) -> list[Plan]:
    """Composes and checks jobs that cover the space, the enqueued points and the seeds. Raises `UserError`."""
    seeds = [[seed] for seed in spec.seeds] or [[]]
    points = probes(spec.space)
    enqueued = [spec.space.overrides(values) for values in spec.enqueued]
    plans = [request.plan_job([*point, *seeds[0]], 0) for point in [*points, *enqueued]]
    same = [request.plan_job([*points[0], *seed], number) for number, seed in enumerate(seeds)]
    if len({plan.subfolder for plan in same}) < len(same):
        raise UserError(f"hydra.sweep.subdir={same[0].subfolder}: must be different for each seed")
    return plans


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
    facts: dict[str, Any] = {"objective": list(spec.objectives), "config": fixed, "space": spec.space.describe()}
    if spec.seeds:
        facts["seeds"] = ",".join(map(value_of, spec.seeds))
    return facts


# -- its jobs


def _write_sweep_file(folder: Path, facts: Mapping[str, Any], study: Study, spec: StudySpec) -> None:
    """Writes sweep.yaml, by which resume=auto finds the search."""
    with locked(folder / WORKERS / STUDY_LOCK):  # processes that share the study start and end at about the same time
        counts = study.counts()
        ended = sum(counts[state] for state in _STATES.values())
        total = sum(counts.values())
        content = {"facts": dict(facts), "directions": list(spec.directions), "finished": ended, "total": total}
        write_yaml(folder / SPACE, content | {"jobs": study.jobs_here(spec.jobs_per_trial)})


@dataclass
class _Trial:
    """A trial that this process runs, one job per seed.

    Attributes:
        waiting: indices of the jobs that are not started.
        curves: of each job, the values of the pruner's metric by epoch.
        jobs: the started jobs by index.
        results: of the jobs that have ended, by index.
        is_stopped: it has failed or was pruned, so its other jobs do not run on.
    """

    claim: ClaimedTrial
    waiting: list[int]
    curves: list[dict[int, float]]
    jobs: dict[int, Job] = field(default_factory=dict)
    results: dict[int, JobResult] = field(default_factory=dict)
    is_stopped: bool = False


class Search(JobSource):
    """Claims trials of the study, runs their jobs and records the results.

    `build` (overrides, number, label) composes a job.
    """

    def __init__(self, spec: StudySpec, study: Study, build: Callable[[Sequence[str], int, str], Job]) -> None:
        self._spec, self._study, self._build = spec, study, build
        self.series = study.folder
        self._trials: dict[int, _Trial] = {}  # claimed and without a result in the study
        self._last_empty_claim = float("-inf")
        size = spec.jobs_per_trial
        self.overview = Overview(spec.total * size, spec.objectives[0], spec.directions[0], jobs_per_trial=size)
        self._logged: set[str] = set()  # metrics in the lines of metrics.jsonl, if there is a pruner

    @property
    def interrupted(self) -> int:
        """The number of trials that stay RUNNING: another process takes them over once this one has ended."""
        return len(self._trials)

    def next(self) -> Job | None:
        if (trial := next((each for each in self._trials.values() if each.waiting), None)) is not None:
            return self._next_job(trial)
        now = time.monotonic()
        if now < self._last_empty_claim + _RETRY_SECONDS:  # do not query the storage at every poll of the pool
            return None
        self._update_overview()
        claim = self._study.claim()
        if claim is None:
            self._last_empty_claim = now
            return None
        size = self._spec.jobs_per_trial
        trial = self._trials[claim.number] = _Trial(claim, [*range(size)], [{} for _ in range(size)])
        return self._next_job(trial)

    def _next_job(self, trial: _Trial) -> Job:
        """Composes the next job of a trial."""
        index, claim, spec = trial.waiting.pop(0), trial.claim, self._spec
        seed = [spec.seeds[index]] if spec.seeds else []
        overrides = [*spec.space.overrides(claim.values), *seed]
        label = " ".join([spec.space.label(claim.values), *seed])
        job = trial.jobs[index] = self._build(overrides, claim.number * spec.jobs_per_trial + index, label)
        if claim.is_takeover and isinstance(job, Job):
            record_dead(job.folder)
        return job

    def _trial_of(self, job: Job) -> tuple[_Trial, int]:
        """Returns the trial of a job, and the index of the job in the trial."""
        number, index = divmod(job.number, self._spec.jobs_per_trial)
        return self._trials[number], index

    def _update_overview(self) -> None:
        counts, size = self._study.counts(), self._spec.jobs_per_trial
        ended = Counter({status: size * counts[state] for status, state in _STATES.items()})
        for trial in self._trials.values():
            ended.update(result.status for result in trial.results.values() if result.status in _STATES)
        self.overview.update_shared(ended, self._finished())

    def _finished(self) -> list[tuple[int, str, dict[str, float]]]:
        """Returns number, label and objective of each finished trial, of this and other processes."""
        label, objective = self._spec.space.label, self._spec.objectives[0]
        return [(trial.number, label(trial.params), {objective: trial.values[0]}) for trial in self._study.finished()]

    def is_exhausted(self) -> bool:
        return self._study.counts()[TrialState.WAITING] == 0 and not self._study.awaits_orphans()

    def should_stop(self, job: Job, metrics: Mapping[str, Any]) -> bool:
        trial, index = self._trial_of(job)
        watch = self._spec.pruning_metric
        if watch is None or trial.is_stopped:
            return trial.is_stopped
        self._logged |= metrics.keys()
        value = metrics.get(watch)
        if not is_number(value) or isinstance(metrics["epoch"], float):  # pruners compare jobs at ends of epochs
            return False
        # The pruner compares in the direction of the objective.
        value = -float(value) if self._spec.negate_pruning_metric else float(value)
        epoch = int(metrics["epoch"])
        trial.curves[index][epoch] = value
        values = [curve[epoch] for curve in trial.curves if epoch in curve]
        if len(values) == len(trial.curves) and self._study.report(trial.claim, epoch, _mean(values)):
            self._stop(trial, f"pruned at epoch {epoch}")
        return trial.is_stopped

    def _stop(self, trial: _Trial, how: str) -> None:
        """Stops the jobs of a trial; those that run end at their next line of metrics."""
        if self._spec.seeds and not trial.is_stopped:
            left = ", ".join(self._spec.seeds[index] for index in trial.waiting)
            self.overview.message(f"trial {trial.claim.number} {how}" + (f"; not run: {left}" if left else ""))
        trial.is_stopped = True
        trial.waiting.clear()

    def ended(self, job: Job, result: JobResult) -> None:
        trial, index = self._trial_of(job)
        has_finished = result.status not in ("interrupted", "pruned", "failed")
        if has_finished:
            self._read_curve(trial, index)
            result = self._with_objectives(trial, job, result)
        trial.results[index] = result
        if result.status == "failed":
            self._stop(trial, f"failed with {self._spec.seeds[index]}" if self._spec.seeds else "")
        elif result.status == "pruned":  # by an earlier process, if the trial is not stopped yet
            self._stop(trial, "pruned")
        if not trial.waiting and len(trial.results) == len(trial.jobs):
            self._record(trial)
        watch = self._spec.pruning_metric
        if has_finished and self._logged and watch is not None and watch not in self._logged:
            logged = ", ".join(sorted(self._logged))
            raise RunError(f"hydra.sweeper.watch={watch}: no such metric in metrics.jsonl, which has {logged}")

    def _read_curve(self, trial: _Trial, index: int) -> None:
        """Reads what an earlier process has seen of a job: the trial's other jobs need it for their mean."""
        if len(trial.curves) == 1 or self._spec.pruning_metric is None:
            return
        job = trial.jobs[index]
        for metrics in read_metrics(job.folder.path):
            if metrics.get("epoch") not in trial.curves[index]:
                self.should_stop(job, metrics)

    def _with_objectives(self, trial: _Trial, job: Job, result: JobResult) -> JobResult:
        """Returns the result, as failed if an objective is missing.

        Raises `RunError` if no job of this search can have the metrics of its objectives.
        """
        metrics = result.metrics
        missing = [key for key in self._spec.objectives if not is_number(metrics.get(key))]
        if not missing:
            return result
        available = ", ".join(name for name, value in metrics.items() if is_number(value))
        is_unknown = missing[0] not in metrics
        reason = f"no such metric in summary.json, which has {available}" if is_unknown else "not a finite number"
        reason = f"hydra.sweeper.objective={missing[0]}: {reason}"
        if is_unknown and not self._study.finished():
            self._study.finish(trial.claim, TrialState.FAIL, reason=reason)
            raise RunError(reason)
        self.overview.message(f"job {job.number}: {reason}")
        return JobResult("failed", metrics, reason)

    def _record(self, trial: _Trial) -> None:
        """Records the end of a trial, unless it was interrupted: the means of its objectives over its jobs."""
        spec, claim, results = self._spec, trial.claim, trial.results
        statuses = [result.status for result in results.values()]
        not_started = spec.jobs_per_trial - len(trial.jobs)
        attributes: dict[str, Any] = {"left_out": not_started} if not_started else {}
        if "failed" in statuses:
            index = next(index for index, result in results.items() if result.status == "failed")
            seed = f"{spec.seeds[index]}: " if spec.seeds else ""
            attributes["reason"] = f"{seed}{results[index].reason}"
            self._study.finish(claim, TrialState.FAIL, **attributes)
        elif "interrupted" in statuses:
            return
        elif "pruned" in statuses or not_started:
            self._study.finish(claim, TrialState.PRUNED, **attributes)
        else:
            scores = [[float(results[index].metrics[key]) for key in spec.objectives] for index in sorted(results)]
            folders = [str(trial.jobs[index].folder.path) for index in sorted(results)]
            attributes["run"] = folders[0]
            if spec.seeds:
                attributes["runs"] = [list(run) for run in zip(folders, scores, strict=True)]
            means = [_mean(values) for values in zip(*scores, strict=True)]
            self._study.finish(claim, TrialState.COMPLETE, means, **attributes)
        del self._trials[claim.number]
        if spec.seeds:
            self.overview.update_shared({}, self._finished())


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
