"""Optimizers that torch does not have; each is a standard `torch.optim.Optimizer`, driven by `step(closure)`.

A class says by `evaluations` whether it calls the closure "once" or "many" times per step, and by `elementwise = False`
that its update of an element depends on others, so that it needs whole, not sharded, tensors.
The schedule-free ones stand in `dlopt.optim.schedule_free`: they need an optional package.
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
