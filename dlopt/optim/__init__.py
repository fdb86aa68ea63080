"""Optimizers that torch does not have. Each is a standard `torch.optim.Optimizer`, driven by `step(closure)`.

Class attributes: `evaluations` tells whether a step calls the closure "once" or "many" times. `elementwise = False`
means that the update of an element depends on other elements, so the optimizer needs full, not sharded, tensors.
The schedule-free optimizers are in `dlopt.optim.schedule_free`, because they need an optional package.
"""

from dlopt.optim.adam import LAMB, NAdam
from dlopt.optim.bfgs import BFGS, LBFGS
from dlopt.optim.common import LossClosure
from dlopt.optim.lion import Lion
from dlopt.optim.muon import Muon
from dlopt.optim.newton import Newton, NewtonCG
from dlopt.optim.rprop import Rprop
from dlopt.optim.sam import SAM
from dlopt.optim.sgd import LARS, SGDW

__all__ = [
    "BFGS",
    "LAMB",
    "LARS",
    "LBFGS",
    "SAM",
    "SGDW",
    "Lion",
    "LossClosure",
    "Muon",
    "NAdam",
    "Newton",
    "NewtonCG",
    "Rprop",
]
