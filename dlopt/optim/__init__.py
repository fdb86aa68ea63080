"""Optimizers that torch does not have. Each is a standard `torch.optim.Optimizer`, driven by `step(closure)`.

Training reads the properties of a class from its attribute `traits` (`OptimizerTraits`).

They are not taken from pytorch-optimizer, whose classes deviate from the papers in tests/optim/test_papers.py (ADOPT,
MARS, Shampoo, SOAP, Prodigy, Kron), or count updates per group instead of per parameter (Adan, AdaBelief, AdEMAMix).
The schedule-free optimizers are in `dlopt.optim.schedule_free`, because they need an optional package.
"""

from dlopt.optim.adam import ADOPT, LAMB, MARS, AdaBelief, Adafactor, Adan, AdEMAMix, CautiousAdamW, NAdam, adamw
from dlopt.optim.bfgs import BFGS, LBFGS
from dlopt.optim.common import LossClosure
from dlopt.optim.kronecker import SOAP, DistributedShampoo, Kron, Shampoo
from dlopt.optim.muon import Muon, Scion
from dlopt.optim.newton import Newton, NewtonCG
from dlopt.optim.prodigy import Prodigy
from dlopt.optim.sam import SAM
from dlopt.optim.sgd import LARS, SGDW, Lion, Rprop, Signum
from dlopt.optim.sophia import Sophia
from dlopt.optim.traits import OptimizerTraits, StepSize
