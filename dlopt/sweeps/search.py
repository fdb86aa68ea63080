"""`hydra/sweeper=dlopt_optuna`: jobs drawn one by one, from a study that several processes may share."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import optuna
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from dlopt.analysis.leaderboard import Direction, direction_of, is_seed
from dlopt.config.resuming import FREE
from dlopt.config.schema import check_arguments, component, show
from dlopt.errors import DONE, FAILED, INTERRUPTED, UserError
from dlopt.files import write_atomically
from dlopt.plain import flatten
from dlopt.ranges import Count, Seed
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import SPACE, Job, Result, compose, compose_or_refuse, record_dead
from dlopt.sweeps.pool import Pool, Source
from dlopt.sweeps.space import Space, space_of
from dlopt.sweeps.study import Claim, Plan, Study, storage_errors
from dlopt.tracking.overview import Overview

_PATIENCE = 3.0  # seconds between two looks for the jobs of processes that may be dead
_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


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


def plan_of(loader: Any, config: DictConfig, overrides: Sequence[str]) -> Plan:
    """The search of the composed config and the task's overrides (as typed). Raises `UserError`."""
    sweeper = cast("dict[str, Any]", OmegaConf.to_container(config.hydra.sweeper, resolve=True))
    plain = {key: value for key, value in sweeper.items() if not key.startswith("_")}
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
    return Plan(space, objectives, directions, watched, sampling, pruning, total, settings.storage, settings.study_name)


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
            f"hydra.sweeper.watch=auto: metrics.jsonl has no {objectives[0]}; type one of its metrics "
            "for the pruner to compare: hydra.sweeper.watch=val_loss"
        )
    return objectives[0].removeprefix("best_")


def probes(space: Space) -> list[list[str]]:
    """Overrides of jobs that between them take every choice and both ends of every range: what they say is checked
    before the first job starts."""
    ends = {key: _ends(each) for key, each in space.searched.items()}
    first = {key: values[0] for key, values in ends.items()}
    points = [first] + [{**first, key: value} for key, values in ends.items() for value in values[1:]]
    return [space.overrides(point) for point in points]


def _ends(distribution: Any) -> Sequence[Any]:
    is_choice = isinstance(distribution, optuna.distributions.CategoricalDistribution)
    return distribution.choices if is_choice else (distribution.low, distribution.high)


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
        return FAILED if self.failed else INTERRUPTED if self.interrupted else DONE


def run_search(loader: Any, config: DictConfig, pool: Pool, arguments: Sequence[str]) -> Outcome:
    """Works on the study until nothing is left to take. Raises `UserError` before anything runs."""
    plan = plan_of(loader, config, arguments)
    folder = Path(str(config.hydra.sweep.dir))
    first = compose(loader, config, probes(plan.space)[0], 0)
    facts = {**facts_of(plan, first.config), "space": plan.space.describe()}
    with storage_errors(plan.storage):
        study = Study(folder, plan, facts)
        _note(folder, facts, study)
        search = Search(plan, study, partial(compose_or_refuse, loader, config))
        try:
            search.run(pool)
        finally:
            _note(folder, facts, study)
            study.close()
        return search.outcome()


def _note(folder: Path, facts: Mapping[str, Any], study: Study) -> None:
    """sweep.yaml, by which resume=auto finds the search."""
    counts = study.counts()
    noted = {"facts": dict(facts), "finished": sum(counts[state] for state in _STATES.values())}
    write_atomically(folder / SPACE, yaml.safe_dump(noted, sort_keys=False, allow_unicode=True).encode())


class Search(Source):
    """Hands out the study's jobs, and records how they end. `make` (overrides, number, label) composes a job."""

    def __init__(self, plan: Plan, study: Study, make: Callable[[Sequence[str], int, str], Job]) -> None:
        self._plan, self._study, self._make = plan, study, make
        self._claims: dict[int, Claim] = {}
        self._interrupted = 0
        self._looked, self._over = float("-inf"), False
        self._overview: Overview | None = None

    def run(self, pool: Pool) -> None:
        """Until nothing is left to take. Raises KeyboardInterrupt once a signal has come and the jobs have stopped."""
        self._overview = Overview(self._plan.total, self._plan.objectives[0], self._plan.directions[0])
        pools.run(self, pool, self._overview)

    def next(self) -> Job | None:
        now = time.monotonic()
        if now < self._looked + _PATIENCE:  # nothing was left: other processes' jobs are looked at now and then
            return None
        counts = self._study.counts()
        if self._overview is not None:
            done = [(number, label, {self._plan.objectives[0]: values[0]}) for number, label, values in self._rows()]
            self._overview.share({status: counts[state] for status, state in _STATES.items()}, done)
        claim = self._study.claim()
        if claim is None:
            self._looked = now
            self._over = self._study.counts()[TrialState.WAITING] == 0 and not self._study.awaits_orphans()
            return None
        self._claims[claim.number] = claim
        job = self._make(self._plan.space.overrides(claim.values), claim.number, self._plan.space.label(claim.values))
        if claim.again and not job.error:
            record_dead(job.folder)
        return job

    def _rows(self) -> list[tuple[int, str, Sequence[float]]]:
        return [(number, self._plan.space.label(values), scores) for number, values, scores in self._study.finished()]

    def is_over(self) -> bool:
        return self._over

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        value = line.get(self._plan.watched or "")
        if self._plan.watched is None or not _is_number(value):
            return False
        return self._study.report(self._claims[job.number], int(line["epoch"]), float(value))

    def ended(self, job: Job, result: Result) -> None:
        claim = self._claims[job.number]
        if result.status == "interrupted":
            self._interrupted += 1
            return  # stays taken; with this process gone another takes it over
        if result.status == "pruned":
            self._study.prune(claim)
            return
        reason = result.reason
        if result.status != "failed":
            scores = [value for key in self._plan.objectives if _is_number(value := result.metrics.get(key))]
            if len(scores) == len(self._plan.objectives):
                self._study.finish(claim, [float(score) for score in scores])
                return
            missing = next(key for key in self._plan.objectives if not _is_number(result.metrics.get(key)))
            there = ", ".join(key for key, value in result.metrics.items() if _is_number(value))
            reason = f"hydra.sweeper.objective={missing}: summary.json has no such metric; it has {there}"
        self._study.fail(claim, reason)

    def outcome(self) -> Outcome:
        counts = self._study.counts()
        elsewhere = counts[TrialState.RUNNING] - self._interrupted
        return Outcome(counts[TrialState.FAIL], self._interrupted, elsewhere, self._rows())


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float)
