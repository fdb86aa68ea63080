"""What ranks and commands of tests import, for the server that forks them (see `processes`)."""

import os

import torch.distributed.fsdp  # noqa: F401

import tests.support.equality  # noqa: F401
from dlopt.parallel.processes import launch
from tests.support import processes
from tests.support.remembered import remember_configs

os.fsync = lambda descriptor: None  # type: ignore[assignment]  # see conftest.py
launch.start_rank = processes.start_rank
remember_configs()
