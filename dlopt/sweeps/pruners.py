"""Which jobs a search stops early, from their validation figures so far. conf/hydra/sweeper/pruner/ names them."""

from typing import Annotated

import optuna
from annotated_types import Ge
from optuna.pruners import BasePruner

from dlopt.ranges import Count, Natural

Factor = Annotated[int, Ge(2)]


def none() -> BasePruner:
    """Every job runs to its end."""
    return optuna.pruners.NopPruner()


def median(*, startup_trials: Natural, warmup_epochs: Natural) -> BasePruner:
    """Stops a job that is worse than the median of those before it at the same epoch (Golovin et al. 2017)."""
    return optuna.pruners.MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=warmup_epochs)


def asha(*, min_epochs: Count, reduction_factor: Factor, grace_rungs: Natural) -> BasePruner:
    """Asynchronous successive halving (Li et al. 2020): of the jobs at each rung the best 1/reduction_factor go on."""
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=min_epochs, reduction_factor=reduction_factor, min_early_stopping_rate=grace_rungs
    )


def hyperband(*, min_epochs: Count, max_epochs: Count, reduction_factor: Factor) -> BasePruner:
    """Successive halving with several first rungs (Li et al. 2018): jobs are dealt to brackets by their number."""
    return optuna.pruners.HyperbandPruner(
        min_resource=min_epochs, max_resource=max_epochs, reduction_factor=reduction_factor
    )
