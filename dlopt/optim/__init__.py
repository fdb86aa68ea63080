"""Optimizers that torch does not have. Each is a standard `torch.optim.Optimizer`, driven by `step(closure)`.

Class attributes: `evaluations` tells whether a step calls the closure "once" or "many" times. `elementwise = False`
means that the update of an element depends on other elements, so the optimizer needs full, not sharded, tensors.
`couples_layers = True` means that it depends on other layers; every optimizer with many evaluations is one of these.
`moves_at_zero_lr = True`: updates also change weights at a learning rate of zero. `ignores_clipping = True`: a step
computes its gradient from `closure.loss()`, not from the clipped gradients of the closure. `uses_all_gradients = True`:
with many evaluations, all their gradients enter the update, so none may be non-finite (a line search may reject one).
They are not taken from pytorch-optimizer, whose classes deviate from the papers in tests/optim/test_papers.py (ADOPT,
MARS, Shampoo, SOAP, Prodigy, Kron), or count updates per group instead of per parameter (Adan, AdaBelief, AdEMAMix).
The schedule-free optimizers are in `dlopt.optim.schedule_free`, because they need an optional package.
"""

from dlopt.optim.adam import ADOPT, LAMB, MARS, AdaBelief, Adafactor, Adan, AdEMAMix, CautiousAdamW, NAdam, adamw
from dlopt.optim.bfgs import BFGS, LBFGS
from dlopt.optim.common import LossClosure
from dlopt.optim.kronecker import SOAP, Kron, Shampoo
from dlopt.optim.muon import Muon, Scion
from dlopt.optim.newton import Newton, NewtonCG
from dlopt.optim.prodigy import Prodigy
from dlopt.optim.sam import SAM
from dlopt.optim.sgd import LARS, SGDW, Lion, Rprop, Signum
from dlopt.optim.sophia import Sophia
