"""The table of the parallel modes and what they do not take, from the functions and the table that refuse it."""

import functools
from dataclasses import replace
from unittest import mock

import torch
from markup import code, table
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dlopt.basics.errors import UserError
from dlopt.config.choices import Catalogue
from dlopt.config.compose import Composer
from dlopt.config.conflicts import CONFLICTS, Run
from dlopt.config.plan import plan
from dlopt.config.run_config import RunConfig
from dlopt.machine.world import World
from dlopt.parallel.mode import Mode
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.training.builders.optimizer import build_optimizer, check_label_sampling, check_optimizer
from dlopt.training.builders.workload import Workload, build_mode, build_workload

SMALL = ("device=cpu", "threads=1", "model=mlp", "model.widths=[4]", "data.subset=100")
MODES = ("ddp", "fsdp", "filter", "hybrid", "spatial", "columns", "pipeline")


def run_config(*overrides: str) -> RunConfig:
    return plan(Composer(), [*SMALL, *overrides]).run_config


def modes() -> dict[str, Mode]:
    """Returns each mode as rank 0 of 4 processes builds it, without the other processes."""
    group = object.__new__(ProcessGroup)
    vars(group).update(world=World("dlopt", 0, 4, 0, 4), minutes=1.0, rank=0, size=4)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)

    def join(_: str, device: torch.device, **__: object) -> tuple[ProcessGroup, torch.device]:
        return group, device

    try:
        with mock.patch("dlopt.parallel.mode.join", join), mock.patch("dlopt.parallel.modes.hybrid.join", join):
            more = {"hybrid": ["parallel.model_degree=2"], "pipeline": ["accumulate=4"]}
            return {name: build_mode(run_config(f"parallel={name}", *more.get(name, ()))) for name in MODES}
    finally:
        distributed.destroy_process_group()


@functools.cache
def optimizers() -> list[tuple[str, torch.optim.Optimizer, Workload]]:
    """Returns every optimizer that can be chosen by its name alone, built for a small model."""
    found, small = [], build_workload(run_config())
    for choice in Catalogue().choices("optimizer"):
        if choice.name != "custom":
            workload = replace(small, run_config=run_config(f"optimizer={choice.name}"))
            found.append((choice.name, build_optimizer(workload), workload))
    return found


def takes(mode: Mode, optimizer: torch.optim.Optimizer, workload: Workload) -> bool:
    """Returns whether a run may use an optimizer in this mode."""
    try:
        check_optimizer(mode, optimizer)
        check_label_sampling(mode, optimizer, workload.loss)
    except UserError:
        return False
    return True


def conflicts_of(mode: str) -> list[str]:
    """Returns the names of the features that exclude a mode."""
    config = run_config(f"parallel={mode}")
    run = Run(config.settings, config.config, config)
    sides = [pair for row in CONFLICTS for pair in ((row.one, row.other), (row.other, row.one))]
    return [feature.name for feature, other in sides if other.find(run) == f"parallel={mode}"]


def table_of_modes() -> str:
    """A row for each mode: the optimizers and the features that it refuses."""
    rows = []
    for name, mode in modes().items():
        refused = [code(each) for each, *built in optimizers() if not takes(mode, *built)]
        missing = [code(each) for each in conflicts_of(name)]
        rows.append((code(name), ", ".join(refused) or "none", ", ".join(missing) or "none"))
    return table(("Mode", "Optimizers that it does not take", "Other things that it does not take"), rows)
