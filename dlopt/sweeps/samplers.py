"""Samplers, which draw the values of a search's jobs, and pruners, which stop unpromising jobs early.

conf/hydra/sweeper/sampler/ and conf/hydra/sweeper/pruner/ name these callables with their arguments.

Every job has its own sampler, seeded by the search's seed and the job's number. So the values of job 7 depend neither
on the process that draws them nor on earlier interruptions of the sweep. They do depend on the results so far if the
sampler learns from them.
"""

import hashlib
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from annotated_types import Ge
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from dlopt.errors import UserError, install
from dlopt.ranges import Count, Natural, Positive
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
    try:
        import cmaes as _  # noqa: F401
    except ImportError:
        raise UserError(f"hydra/sweeper/sampler=cmaes: needs the package cmaes: {install('dlopt[sweep]')}") from None
    if all(isinstance(distribution, CategoricalDistribution) for distribution in space.searched.values()):
        raise UserError("hydra/sweeper/sampler=cmaes: needs numbers to search; for choices alone use random or tpe")
    return lambda number: optuna.samplers.CmaEsSampler(
        n_startup_trials=startup_trials,
        sigma0=sigma,
        popsize=population,
        seed=_seed(seed, number),
        independent_sampler=optuna.samplers.RandomSampler(seed=_seed(seed, number)),
        warn_independent_sampling=False,
    )


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
