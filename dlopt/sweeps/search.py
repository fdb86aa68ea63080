"""`hydra/sweeper=dlopt_optuna`: jobs drawn one by one, from a study that several processes may share."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dlopt.analysis.leaderboard import Direction, direction_of, is_seed
from dlopt.config.resuming import FREE
from dlopt.config.schema import check_arguments, component, show
from dlopt.errors import UserError
from dlopt.files import write_atomically
from dlopt.folders import RunFolder
from dlopt.plain import flatten
from dlopt.ranges import Count, Seed
from dlopt.sweeps.crew import Refused, work
from dlopt.sweeps.jobs import SPACE, Job, Result, compose, record_dead, record_failure
from dlopt.sweeps.places import Places
from dlopt.sweeps.samplers import Sampler
from dlopt.sweeps.space import Space, grid_values, space_of
from dlopt.sweeps.study import Claim, Study, open_storage, storage_errors
from dlopt.tracking.overview import Overview

_PATIENCE = 3.0  # seconds between two looks for the jobs of processes that may be dead


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/hydra/sweeper/dlopt_optuna.yaml but for the sampler and the pruner."""

    n_trials: Count | None
    objective: str | list[str]
    direction: Literal["auto", "maximize", "minimize"] | list[Literal["auto", "maximize", "minimize"]]
    watch: str
    storage: str | None
    study_name: str
    seed: Seed


@dataclass(frozen=True)
class Plan:
    """A checked search."""

    space: Space
    settings: Settings
    objectives: Sequence[str]
    directions: Sequence[Direction]
    watched: str | None  # figure that the pruner compares; None: nothing is pruned
    sampler: Sampler
    pruner: optuna.pruners.BasePruner
    total: int


def plan_of(loader: Any, config: DictConfig, overrides: Sequence[str]) -> Plan:
    """What the composed config and the task's overrides (as typed) ask for. Raises `UserError`."""
    plain = {str(key): _resolved(config, key) for key in config.hydra.sweeper if not str(key).startswith("_")}
    params, sampler, pruner = plain.pop("params") or {}, plain.pop("sampler"), plain.pop("pruner")
    lines = [f"{key}={show(value)}" for key, value in params.items()]
    space = space_of(OverridesParser.create(loader).parse_overrides([*lines, *overrides]))
    settings = Settings(**check_arguments("hydra.sweeper", Settings, plain))
    objectives = [settings.objective] if isinstance(settings.objective, str) else settings.objective
    directions = _directions(settings, objectives)
    packages = ("dlopt.sweeps",)
    draw = component("hydra.sweeper.sampler", sampler, ("space", "seed"), packages)
    stop = component("hydra.sweeper.pruner", pruner, (), packages)
    name = draw.target.__name__
    if name == "cmaes" and len(objectives) > 1:
        raise UserError("hydra/sweeper/sampler=cmaes: searches one objective; allowed for several: random, tpe, sobol")
    seeds = [key for key in space.searched if is_seed(key)]
    if seeds and name != "grid":
        raise UserError(
            f"{seeds[0]}: a search draws configurations, not seeds; type one seed, and compare the chosen "
            f"configurations over {seeds[0]}=range(0,5) afterwards (or with hydra/sweeper/sampler=grid)"
        )
    total = settings.n_trials if settings.n_trials is not None else space.size()
    if total is None:
        raise UserError("hydra.sweeper.n_trials=null: only a grid has an end; how many jobs are to run?")
    if name == "grid" and space.size() is not None:
        total = min(total, space.size() or 0)
    pruning = stop.build()
    watched = None if isinstance(pruning, optuna.pruners.NopPruner) else _watched(settings, objectives)
    sampling = draw.build(space=space, seed=settings.seed)
    return Plan(space, settings, objectives, directions, watched, sampling, pruning, total)


def _resolved(config: DictConfig, key: Any) -> Any:
    value = OmegaConf.select(config, f"hydra.sweeper.{key}")
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _directions(settings: Settings, objectives: Sequence[str]) -> list[Direction]:
    given = settings.direction if isinstance(settings.direction, list) else [settings.direction] * len(objectives)
    if not objectives or len(given) != len(objectives):
        raise UserError(
            f"hydra.sweeper.direction={show(settings.direction)}: one for each objective is needed "
            f"({', '.join(objectives) or 'hydra.sweeper.objective is empty'})"
        )
    return [direction_of(key) if each == "auto" else each for key, each in zip(objectives, given, strict=True)]


def _watched(settings: Settings, objectives: Sequence[str]) -> str:
    if len(objectives) > 1:
        raise UserError("hydra/sweeper/pruner: jobs are stopped by one objective; with several, type none")
    if settings.watch != "auto":
        return settings.watch
    if not objectives[0].startswith("best_val_"):
        raise UserError(
            f"hydra.sweeper.watch=auto: no epoch tells of {objectives[0]}; type the figure of metrics.jsonl "
            "that the pruner shall compare: hydra.sweeper.watch=val_loss"
        )
    return objectives[0].removeprefix("best_")


def probes(space: Space) -> list[list[str]]:
    """Overrides of jobs that between them take every choice and both ends of every range: what they say is checked
    before the first job starts."""
    ends = {key: _ends(each) for key, each in space.searched.items()}
    first = {key: values[0] for key, values in ends.items()}
    points = [first] + [{**first, key: value} for key, values in ends.items() for value in values[1:]]
    return [space.overrides(point) for point in points]


def _ends(distribution: Any) -> list[Any]:
    values = grid_values(distribution)
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return values or []
    return [distribution.low, distribution.high]


def facts_of(plan: Plan, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What processes that share the study have to agree on, besides its space. `saved`: config of any one job."""
    ours = ("epochs", "steps")  # a search compares runs of one length
    free = [*(key for key in FREE if key not in ours), "data.root", *plan.space.searched]
    kept = {
        key: value
        for key, value in flatten(saved).items()
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    }
    return {"objective": list(plan.objectives), "config": kept}


@dataclass(frozen=True)
class Outcome:
    """`rows`: (job, overrides that vary, objectives) of all jobs of the study that count, whoever ran them."""

    failed: int
    interrupted: int
    elsewhere: int  # jobs at which other processes are at work
    rows: Sequence[tuple[int, str, Sequence[float]]]

    @property
    def code(self) -> int:
        return 1 if self.failed else 75 if self.interrupted else 0


def run_search(loader: Any, config: DictConfig, places: Places, arguments: Sequence[str]) -> Outcome:
    """Works on the study until nothing is left to take. Raises `UserError` before anything runs."""
    plan = plan_of(loader, config, arguments)
    folder = Path(str(config.hydra.sweep.dir))
    first = compose(loader, config, probes(plan.space)[0], 0)
    facts = {**facts_of(plan, first.config), "space": plan.space.describe()}
    study = open_study(plan, folder, facts)
    with storage_errors(plan.settings.storage):
        _note(folder, facts, study)
        source = Search(plan, study, partial(compose, loader, config))
        try:
            source.run(places)
        finally:
            _note(folder, facts, study)
            study.close()
        return source.outcome()


def _note(folder: Path, facts: Mapping[str, Any], study: Study) -> None:
    """sweep.yaml, by which resume=auto finds the search."""
    counts = study.counts()
    noted = {"facts": dict(facts), "finished": counts.finished + counts.pruned + counts.failed}
    write_atomically(folder / SPACE, yaml.safe_dump(noted, sort_keys=False, allow_unicode=True).encode())


def open_study(plan: Plan, folder: Path, facts: Mapping[str, Any]) -> Study:
    """Makes or joins the study. Raises `UserError` with the difference where it searches something else."""
    with storage_errors(plan.settings.storage):
        return Study(
            open_storage(plan.settings.storage, folder),
            name=plan.settings.study_name,
            folder=folder,
            space=plan.space,
            directions=plan.directions,
            total=plan.total,
            facts=facts,
            sampler=plan.sampler,
            pruner=plan.pruner,
        )


Compose = Callable[[Sequence[str], int, str], Job]
"""(overrides, number, label): the job, or `UserError`."""


class Search:
    """Hands out the study's jobs, and tells it how they end."""

    def __init__(self, plan: Plan, study: Study, make: Compose) -> None:
        self._plan, self._study, self._make = plan, study, make
        self._claims: dict[int, Claim] = {}
        self._interrupted = 0
        self._asked, self._over = 0.0, False

    def run(self, places: Places) -> None:
        """Until nothing is left to take. Raises KeyboardInterrupt once a signal has come and the jobs have stopped."""
        self._overview = Overview(self._plan.total, self._plan.objectives[0], self._plan.directions[0])
        self._show_known(self._overview)
        work(self, places, self._overview)

    def _share(self) -> None:
        counts, objective = self._study.counts(), self._plan.objectives[0]
        done = [(n, self._plan.space.label(values), {objective: f[0]}) for n, values, f in self._study.finished()]
        self._overview.share(counts.finished, counts.pruned, counts.failed, done)

    def _show_known(self, overview: Overview) -> None:
        """What is over already."""
        counts = self._study.counts()
        for number, values, figures in self._study.finished():
            label = self._plan.space.label(values)
            known = dict(zip(self._plan.objectives, figures, strict=True))
            overview.ended(number, label, "finished", known, known=True)
        for status, count in (("pruned", counts.pruned), ("failed", counts.failed)):
            for _ in range(count):
                overview.ended(-1, "", status, {}, known=True)

    def next(self) -> Job | Refused | None:
        now = time.monotonic()
        if now < self._asked:  # nothing was left: other processes' jobs are looked at now and then
            return None
        self._share()
        claim = self._study.claim()
        if claim is None:
            self._asked = now + _PATIENCE
            self._over = self._study.counts().waiting == 0 and not self._study.awaits_orphans()
            return None
        self._claims[claim.number] = claim
        overrides = self._plan.space.overrides(claim.values)
        label = self._plan.space.label(claim.values)
        try:
            job = self._make(overrides, claim.number, label)
        except UserError as error:
            folder = RunFolder(self._study.folder / str(claim.number))
            return Refused(claim.number, label, record_failure(folder, str(error)))
        if claim.again:
            record_dead(job.folder)
        return job

    def is_over(self) -> bool:
        return self._over

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        value = line.get(self._plan.watched or "")
        if self._plan.watched is None or not isinstance(value, int | float):
            return False
        return self._study.report(self._claims[job.number], int(line["epoch"]), float(value))

    def ended(self, job: Job | Refused, result: Result) -> None:
        claim = self._claims[job.number]
        if result.status == "interrupted":
            self._interrupted += 1
            return  # stays taken; with this process gone another takes it over
        if result.status == "pruned":
            self._study.prune(claim)
            return
        if result.status == "failed":
            self._study.fail(claim, result.reason)
            return
        figures = [result.figures.get(key) for key in self._plan.objectives]
        if all(isinstance(value, int | float) for value in figures):
            self._study.finish(claim, [float(value) for value in figures if value is not None])
            return
        missing = [key for key, value in zip(self._plan.objectives, figures, strict=True) if value is None]
        there = ", ".join(key for key, value in result.figures.items() if isinstance(value, int | float))
        reason = f"hydra.sweeper.objective={missing[0]}: summary.json has no such figure; it has {there}"
        self._study.fail(claim, reason)

    def outcome(self) -> Outcome:
        counts = self._study.counts()
        rows = [(number, self._plan.space.label(values), figures) for number, values, figures in self._study.finished()]
        return Outcome(counts.failed, self._interrupted, counts.running - self._interrupted, rows)
