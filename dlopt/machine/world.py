"""The processes of a run as their launcher describes them: dlopt's own, torchrun, srun."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dlopt.basics.errors import UserError

RANK, PROCESSES = "DLOPT_RANK", "DLOPT_PROCESSES"  # set by dlopt.parallel.processes.launch


@dataclass(frozen=True)
class World:
    """The processes of one run as their launcher numbers them."""

    launcher: Literal["dlopt", "torchrun", "srun"]
    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine
    restarts: int = 0  # earlier attempts of the launcher

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_started_by_hand(self) -> bool:
        """Returns whether nothing but its variables makes this process a rank: nobody collects their outputs."""
        return self.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in os.environ


def current(environment: Mapping[str, str] = os.environ) -> World | None:
    """Returns the world that the launcher describes; None in a single process, even if a launcher started it."""

    def number(name: str, *defaults: str | int) -> int:
        text = str(next((value for value in (environment.get(name), *defaults) if value not in (None, "")), ""))
        if not text.isascii() or not text.isdigit():
            raise UserError(f"{name}={text}: must be a whole number >= 0 (set by the launcher)")
        return int(text)

    if RANK in environment:
        rank, size = number(RANK), number(PROCESSES)
        return World("dlopt", rank, size, rank, size)
    names = "RANK", "WORLD_SIZE"
    missing = [name for name in names if name not in environment]
    if len(missing) == 1:
        raise UserError(f"{missing[0]}: not set; set both of RANK and WORLD_SIZE, or none to train in one process")
    if not missing:
        rank, size = map(number, names)
        # Without these, processes that meet at another host's address (PyTorchJob) have a machine each.
        host = environment.get("MASTER_ADDR") or "localhost"
        alone = "LOCAL_RANK" not in environment and host not in ("localhost", "::1") and not host.startswith("127.")
        local_rank = number("LOCAL_RANK", 0 if alone else rank)
        local_size = number("LOCAL_WORLD_SIZE", 1 if alone else size)
        world = World("torchrun", rank, size, local_rank, local_size, number("TORCHELASTIC_RESTART_COUNT", 0))
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        names = "SLURM_PROCID", "SLURM_NTASKS"
        size = number("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""), 1)
        local_ranks = environment.get("SLURM_GTIDS")  # the global ranks of this node's tasks: "2,3"
        nodes = number("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", ""), 1)
        local_size = len(local_ranks.split(",")) if local_ranks else -(-size // nodes)
        rank, local_rank = number("SLURM_PROCID"), number("SLURM_LOCALID", 0)
        world = World("srun", rank, size, local_rank, local_size, number("SLURM_RESTART_COUNT", 0))
    else:
        return None
    if world.rank >= world.size:
        raise UserError(f"{names[0]}={world.rank}: must be < {names[1]}={world.size}; ranks count from 0")
    return world if world.size > 1 else None
