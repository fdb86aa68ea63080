"""Learning-rate schedules: pure functions of the update t, counted from 0, that return a factor of the peak learning
rate. Update t uses factor(t); so the last update of a run of n updates uses factor(n - 1).

A choice is a factory that takes the `Horizon` of the run and returns the function, or an object that sets more: see
`Schedule`. Three rules hold for all of them:
- every schedule can have a warmup (`Warmup`), which multiplies the schedule's factor;
- `step` and `multistep` count from the start of training, as papers state their milestones; curves (cosine,
  exponential, ...) start at the end of the warmup. From t = n on, the factor is constant, unless the schedule has no
  end (wsd without a decay);
- a length is given in epochs or in steps, with the unit in the key's name. By default it is a fraction of the run, so
  the defaults are valid for runs of any length.
"""

from dlopt.schedules.curves import constant, cosine, exponential, linear, multistep, polynomial, step, time_decay, wsd
from dlopt.schedules.cycles import OneCycle, cosine_restarts, cosine_warmup_restarts
from dlopt.schedules.horizon import Factor, Horizon, Schedule, Warmup, build, warmed_up
from dlopt.schedules.scheduler import Plateau, Scheduler
