"""Learning-rate schedules: pure functions from the step (update t, from 0) to a factor of the peak learning rate.

A choice is a factory that takes the `Horizon` of the run and returns the function. Three rules hold for all of them:
- a linear warmup can stand before any schedule (`Warmup`); it multiplies what the schedule says;
- `step` and `multistep` count from the start of training, as papers state their milestones; curves (cosine,
  exponential, ...) begin where the warmup has ended. Past the end of the run the factor stays where it arrived;
- a length is given in epochs or in steps, the unit in the key's name. Where neither is given it is a share of the run,
  so that the defaults are valid for every length of run.

`plateau` alone depends on what happened: it is an object with `update`, `state_dict` and `load_state_dict`.
"""

from dlopt.schedules.curves import constant, cosine, exponential, linear, multistep, polynomial, step, time_decay, wsd
from dlopt.schedules.cycles import OneCycle, cosine_restarts, cosine_warmup_restarts
from dlopt.schedules.horizon import Factor, Horizon, WarmedUp, Warmup, build
from dlopt.schedules.scheduler import Plateau, Scheduler

__all__ = [
    "Factor",
    "Horizon",
    "OneCycle",
    "Plateau",
    "Scheduler",
    "WarmedUp",
    "Warmup",
    "build",
    "constant",
    "cosine",
    "cosine_restarts",
    "cosine_warmup_restarts",
    "exponential",
    "linear",
    "multistep",
    "polynomial",
    "step",
    "time_decay",
    "wsd",
]
