"""Which process of a run this is: told by dlopt itself, by torchrun, or by Slurm's srun; and how the others are met."""

import contextlib
import gc
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NoReturn

from dlopt.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

RANK, PROCESSES, MEETING = "DLOPT_RANK", "DLOPT_PROCESSES", "DLOPT_MEETING"  # set by dlopt.parallel.launch


@dataclass(frozen=True)
class World:
    """The processes of one run as their launcher numbers them."""

    launcher: Literal["dlopt", "torchrun", "srun"]
    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine
    restarts: int = 0  # earlier attempts of the launcher's

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def current(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher made; None in a process that stands alone, also when a launcher started but one."""

    def get(name: str, otherwise: object = "") -> str:
        return environment.get(name) or str(otherwise)

    def number(name: str, otherwise: object = "") -> int:
        text = get(name, otherwise)
        if not text.isascii() or not text.isdigit():
            raise UserError(f"{name}={text}: the launcher's environment holds a whole number here, from 0")
        return int(text)

    if RANK in environment:
        rank, size = number(RANK), number(PROCESSES)
        return World("dlopt", rank, size, rank, size)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = number("RANK"), number("WORLD_SIZE")
        local_rank, local_size = number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", size)
        found = World("torchrun", rank, size, local_rank, local_size, number("TORCHELASTIC_RESTART_COUNT", 0))
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        size = number("SLURM_STEP_NUM_TASKS", get("SLURM_NTASKS", 1))
        nodes = number("SLURM_STEP_NUM_NODES", get("SLURM_NNODES", 1))
        per_node = get("SLURM_STEP_TASKS_PER_NODE", get("SLURM_TASKS_PER_NODE"))
        node, counts = number("SLURM_NODEID", 0), _tasks_per_node(per_node)
        local_size = counts[node] if node < len(counts) else -(-size // nodes)
        found = World(
            "srun",
            number("SLURM_PROCID"),
            size,
            number("SLURM_LOCALID", 0),
            local_size,
            number("SLURM_RESTART_COUNT", 0),
        )
    else:
        return None
    if found.rank >= found.size:
        names = ("RANK", "WORLD_SIZE") if found.launcher == "torchrun" else ("SLURM_PROCID", "SLURM_NTASKS")
        raise UserError(
            f"{names[0]}={found.rank}: there are only {found.size} processes ({names[1]}); ranks count from 0"
        )
    return found if found.size > 1 else None


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `n[1-2,5],m1` -> `n1`."""
    match = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "") + (match[3] or "")


def master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the ranks of a Slurm step meet; see `parallel.master_addr`.

    The first node's name does not resolve everywhere: then the address of the node that ran srun, then loopback.
    """
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
    port = 20000 + (job * 31 + step) % 12000
    if nodes == 1:
        return "127.0.0.1", port
    name = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    try:
        socket.getaddrinfo(name, port)
    except OSError:
        name = environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return name, port


_GATHERING = 3.0  # seconds within which ranks find that they have waited in vain

_met: "Store | None" = None


def meet(world: World, *, minutes: float, address: str | None = None, port: int | None = None) -> "Store":
    """The key-value store of this run's processes, made or joined at the first call. Raises `UserError`."""
    global _met
    if _met is not None:
        return _met
    if world.local_size == world.size and sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    limit = timedelta(minutes=minutes)
    place = "the meeting file"
    from torch import distributed

    try:
        if world.launcher == "dlopt":
            _met = distributed.FileStore(os.environ[MEETING], world.size)
            _met.set_timeout(limit)
        elif world.launcher == "torchrun":
            os.environ.update({k: str(v) for k, v in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if v})
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            agents, _, _ = next(iter(distributed.rendezvous("env://", timeout=limit)))
            _met = distributed.PrefixStore(f"attempt{world.restarts}", agents)  # it outlives a failed attempt
        else:
            found = master(os.environ)
            host, number = address or found[0], port or found[1]
            place = f"{host}:{number}"
            _met = distributed.TCPStore(
                host, number, world.size, is_master=world.is_main, timeout=limit, wait_for_workers=False
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            key = "MASTER_PORT" if world.launcher == "torchrun" else "parallel.master_port"
            raise UserError(f"{key}: {place}: another program listens at this port; choose another one") from None
        raise UserError(
            f"parallel.master_addr: rank {world.rank} of {world.size} could not reach {place} within "
            f"parallel.timeout_minutes={minutes:g} ({reason}); set parallel.master_addr and parallel.master_port"
        ) from None
    return _met


def first_to_fail() -> bool:
    """Whether no other rank has told of a failure yet: what follows on the other ranks is not worth a message.

    It has to be asked before this rank leaves, so that it comes before what its leaving does to the others. What goes
    wrong on all of them is rank 0's to tell.
    """
    world = current()
    if world is None:
        return True
    if not world.is_main:
        time.sleep(0.5)
    try:
        return bool(meet(world, minutes=1.0).add("failures", 1) == 1)
    except Exception:  # the rank that kept the store is gone; it has told of its failure, or its launcher will
        return False


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    from torch import distributed

    told = str(error)
    is_gloo = isinstance(error, RuntimeError) and "gloo" in told and ("onnect" in told or "Read error" in told)
    return is_gloo or isinstance(error, distributed.DistNetworkError)


def comes_from_others(error: Exception) -> bool:
    """Whether a collective failed because of the processes at its other ends."""
    return is_lost_connection(error) or _is_timeout(error)


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "imed out" in str(error)


def silent_ranks(error: Exception) -> list[int]:
    """The ranks that did not answer in time, where that is what made a collective fail; every waiting rank asks."""
    world = current()
    if world is None or not _is_timeout(error):
        return []
    try:
        store = meet(world, minutes=1.0)
        store.set(f"waited{world.rank}", "")
        time.sleep(_GATHERING)
        return [rank for rank in range(world.size) if not store.check([f"waited{rank}"])]
    except Exception:  # the rank that keeps the store does not answer either
        return [0]


def leave() -> None:
    """Ends the process group of a run that went well."""
    from torch import distributed

    gc.collect()  # gloo aborts at exit when DDP's hooks outlive the group
    if distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # rank 0 keeps the store until all have come here
            distributed.barrier()
        distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends a rank without waiting for the others' threads and sockets, which a failed collective may block."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code not in (0, 75) and _met is not None and current() is not None:
        time.sleep(0.2)  # others may still ask the store who failed first
    os._exit(code)
