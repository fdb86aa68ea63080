"""Samplers, which draw the values of a search's jobs, and pruners, which stop unpromising jobs early.

conf/hydra/sweeper/sampler/ and conf/hydra/sweeper/pruner/ name these callables with their arguments.

Every job has its own sampler, seeded by the search's seed and the job's number. So the values of job 7 depend neither
on the process that draws them nor on earlier interruptions of the sweep. They do depend on the results so far if the
sampler learns from them.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from annotated_types import Ge
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dlopt.basics.errors import UserError, require_package
from dlopt.basics.ranges import Count, Natural, Positive
from dlopt.sweeps.space import Space, grid_values

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

Sampler = Callable[[int], BaseSampler]
"""Job number -> Optuna sampler of that job."""
Factor = Annotated[int, Ge(2)]


def random(*, space: Space, seed: int) -> Sampler:
    """Random search: independent draws (Bergstra & Bengio 2012)."""
    return lambda number: optuna.samplers.RandomSampler(seed=_seed(seed, number))


def tpe(*, space: Space, seed: int, startup_trials: Natural, multivariate: bool, constant_liar: bool) -> Sampler:
    """The tree-structured Parzen estimator (Bergstra et al. 2011, Watanabe 2023)."""
    return lambda number: optuna.samplers.TPESampler(
        n_startup_trials=startup_trials,
        multivariate=multivariate,
        group=False,
        constant_liar=constant_liar,
        seed=_seed(seed, number),
    )


def cmaes(
    *, space: Space, seed: int, startup_trials: Count, sigma: Positive | None, population: Annotated[int, Ge(3)] | None
) -> Sampler:
    """Covariance matrix adaptation (Hansen 2016) over numeric keys; choices and the first jobs are drawn at random."""
    require_package("hydra/sweeper/sampler=cmaes", "cmaes", "sweep")
    if all(isinstance(each, CategoricalDistribution) or space.axes[key].when for key, each in space.searched.items()):
        raise UserError(
            "hydra/sweeper/sampler=cmaes: needs numbers to search, in every job; for choices and conditions alone use "
            "random or tpe"
        )
    return lambda number: _CmaEs(space, startup_trials, sigma, population, _seed(seed, number))


class _CmaEs(BaseSampler):
    """The sampler of one job, which recomputes the state of CMA-ES from the completed jobs.

    Draws what Optuna's `CmaEsSampler` draws, up to rounding, if the jobs run one after another. Optuna keeps the state
    in the study as a pickle, which can execute code: anyone with write access to a shared study could run programs on
    the machines of others. Generations follow the order in which the jobs end, so all processes compute one state.
    """

    _GENERATION = "cma:generation"  # attribute of a trial, as Optuna names it: the generation that drew its values

    def __init__(self, space: Space, startup_trials: int, sigma: float | None, population: int | None, seed: int):
        self._space = {
            key: each
            for key, each in sorted(space.searched.items())
            if isinstance(each, FloatDistribution | IntDistribution) and not each.single() and not space.axes[key].when
        }
        self._startup_trials, self._sigma, self._population = startup_trials, sigma, population
        self._seed, self._random = seed, optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        import cmaes

        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not search_space or len(completed) < self._startup_trials:
            return {}
        by_generation: dict[int, list[FrozenTrial]] = defaultdict(list)
        for each in sorted(completed, key=lambda each: (str(each.datetime_complete), each.number)):
            generation = each.system_attrs.get(self._GENERATION)
            if isinstance(generation, int) and all(
                each.distributions.get(key) == distribution and distribution._contains(each.params[key])
                for key, distribution in search_space.items()
            ):
                by_generation[generation].append(each)
        unit, size = _SearchSpaceTransform(search_space, transform_0_1=True), len(search_space)
        draws = np.random.RandomState(self._seed)
        if max(by_generation, default=0) <= 0:
            draws.randint(1, 2**31 - 2)  # as in Optuna, which draws a seed for an optimizer that it does not restore
        optimizer = cmaes.CMA(
            mean=np.full(size, 0.5),
            sigma=max(self._sigma or 1 / 6, 1e-10),
            bounds=unit.bounds,
            n_max_resampling=10 * size,
            seed=draws.randint(1, 2**16) + trial.number,
            population_size=self._population,
        )
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        while len(trials := by_generation[optimizer.generation]) >= (count := optimizer.population_size):
            optimizer.tell([(unit.transform(each.params), sign * each.values[0]) for each in trials[:count]])
        study._storage.set_trial_system_attr(trial._trial_id, self._GENERATION, optimizer.generation)
        return unit.untransform(optimizer.ask())

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def sobol(*, space: Space, seed: int, scramble: bool) -> Sampler:
    """Sobol sequence with Owen scrambling: most even when the number of jobs is a power of two."""
    return lambda number: _fixed(point("Sobol", space, seed, scramble, number))


def halton(*, space: Space, seed: int, scramble: bool) -> Sampler:
    """Halton sequence with Owen scrambling: even for any number of jobs, in few dimensions."""
    return lambda number: _fixed(point("Halton", space, seed, scramble, number))


def point(name: Literal["Sobol", "Halton"], space: Space, seed: int, scramble: bool, number: int) -> dict[str, Any]:
    """Returns the values of point `number` (from 0) of a sequence."""
    from scipy.stats import qmc

    points = getattr(qmc, name)(len(space.searched), scramble=scramble, seed=np.random.default_rng(seed))
    if number > 0:
        points.fast_forward(number)
    pairs = zip(space.searched.items(), points.random(1)[0], strict=True)
    return {key: _quantile(distribution, float(x)) for (key, distribution), x in pairs}


def draw(space: Space, seed: int, number: int) -> dict[str, Any]:
    """Returns the values of point `number` of a Halton sequence, rounded to four digits."""
    drawn = point("Halton", space, seed, True, number)
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in drawn.items()}


def grid(*, space: Space, seed: int) -> Sampler:
    """Every combination, in order; all keys need lists or ranges. `seed` is ignored."""
    continuous = [key for key, distribution in space.searched.items() if grid_values(distribution) is None]
    if continuous:
        raise UserError(f"{continuous[0]}: hydra/sweeper/sampler=grid needs choice(a,b,...) or range(a,b,step)")
    points = space.points()
    return lambda number: _fixed(points[number % len(points)])


def _fixed(values: dict[str, Any]) -> BaseSampler:
    """Returns the sampler of one job whose values do not depend on other jobs' results."""
    return optuna.samplers.PartialFixedSampler(values, optuna.samplers.RandomSampler())


def _quantile(distribution: BaseDistribution, x: float) -> Any:
    """Returns the quantile at probability `x` (0 <= x < 1) of the distribution."""
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        low, high = distribution.low, distribution.high
        value = low * (high / low) ** x if distribution.log else low + x * (high - low)
        return min(max(value, low), high)
    if isinstance(distribution, IntDistribution) and distribution.log:
        low, high = distribution.low - 0.5, distribution.high + 0.5  # rounding gives the ends their full weight
        return min(max(round(low * (high / low) ** x), distribution.low), distribution.high)
    values = grid_values(distribution)
    assert values is not None
    return values[int(x * len(values))]


def _seed(seed: int, number: int) -> int:
    """Hashes seed and job number, so that the streams of neighbouring jobs are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


# -- pruners


def none() -> BasePruner:
    """No pruning."""
    return optuna.pruners.NopPruner()


def median(*, startup_trials: Natural, warmup_epochs: Natural) -> BasePruner:
    """Stops a job whose metric is worse than the median of the earlier jobs at the same epoch (Golovin et al. 2017)."""
    return optuna.pruners.MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=warmup_epochs)


def asha(*, min_epochs: Count, reduction_factor: Factor, grace_rungs: Natural) -> BasePruner:
    """Asynchronous successive halving (Li et al. 2020): the best 1/reduction_factor of the jobs pass each rung."""
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=min_epochs, reduction_factor=reduction_factor, min_early_stopping_rate=grace_rungs
    )


def hyperband(*, min_epochs: Count, max_epochs: Count, reduction_factor: Factor) -> BasePruner:
    """Successive halving in several brackets with different first rungs (Li et al. 2018)."""
    if max_epochs < min_epochs:
        raise UserError(f"hydra.sweeper.pruner.max_epochs={max_epochs}: must be at least min_epochs={min_epochs}")
    return optuna.pruners.HyperbandPruner(
        min_resource=min_epochs, max_resource=max_epochs, reduction_factor=reduction_factor
    )
