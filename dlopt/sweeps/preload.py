"""What jobs import, for the server that forks them (see `pool`)."""

import atexit
import gc

import torch._dynamo  # noqa: F401

import dlopt.config.parsing
import dlopt.run.job
import dlopt.sweeps.pool
import dlopt.tracking.tensorboard
import dlopt.trained.distillation
import dlopt.training.run  # noqa: F401

# Collections in the jobs skip these objects, some 400,000: each takes 0.2 s less and leaves the pages of memory shared.
gc.freeze()
atexit.register(gc.unfreeze)  # else nanobind reports Triton's objects as leaks when the server ends
