"""Rendezvous of the ranks, and what to report when one fails."""

import contextlib
import errno
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, StateError, UserError
from dlopt.basics.interruption import print_message
from dlopt.machine.world import World, current

if TYPE_CHECKING:
    from torch.distributed import Store

STORE = "DLOPT_STORE"  # set by dlopt.parallel.processes.launch


def refuse_ranks(command: str, what: str) -> None:
    """Raises `UserError` in one of several ranks of torchrun or srun, all of which would start `what`."""
    if current() is not None:
        reason = f"cannot run inside torchrun or srun, because every rank would start {what}"
        raise UserError(f"{command}: {reason}; start it from a shell")


def slurm_master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Returns the rendezvous address and port of a Slurm step; `parallel.master_addr` overrides it.

    The step's first node; if it is unknown or does not resolve, the node that ran srun, and then loopback. The port
    follows from the job and step numbers: steps on one node rarely collide.
    """
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
    port = 20000 + (job * 31 + step) % 12000
    if nodes == 1:
        return "127.0.0.1", port
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", node_list]
        name = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
        socket.getaddrinfo(name, port)
    except (OSError, subprocess.SubprocessError, IndexError):
        name = environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return name, port


def _master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Returns the rendezvous address and port of torchrun's variables. Raises `UserError`."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        keys = " and ".join(f"parallel.{name.lower()}" for name in missing)
        raise UserError(
            f"{', '.join(missing)}: not set, but RANK={environment['RANK']} and "
            f"WORLD_SIZE={environment['WORLD_SIZE']} are; set {'it' if len(missing) == 1 else 'them'}, or {keys}; "
            "to train in one process, unset RANK and WORLD_SIZE"
        )
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    return host, int(port)


_store: "Store | None" = None


def join_store(world: World, *, minutes: float, address: str | None = None, port: int | None = None) -> "Store":
    """Returns the key-value store of this run, which the first call creates or joins. Raises `UserError`."""
    global _store
    if _store is not None:
        return _store
    if world.local_size == world.size and sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo's default is the hostname, which may not resolve
    from torch import distributed

    limit = timedelta(minutes=minutes)
    host, number, has_agent = "127.0.0.1", 0, False
    try:
        if world.launcher == "dlopt":
            _store = distributed.FileStore(os.environ[STORE], world.size)
            _store.set_timeout(limit)
            return _store
        if world.launcher == "torchrun":
            # torchrun's agent hosts a store at its own address.
            has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not address and not port
            os.environ.update({k: str(v) for k, v in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if v})
            host, number = _master(os.environ)
        else:
            master = slurm_master(os.environ)
            host, number = address or master[0], port or master[1]
        hosts = world.is_main and not has_agent
        server = distributed.TCPStore(host, number, world.size, hosts, timeout=limit, wait_for_workers=False)
        # The agent's store outlives a failed attempt: without a prefix a restart would read its stale keys.
        _store = distributed.PrefixStore(f"attempt{world.restarts}", server)
        if not has_agent:  # which starts all ranks or none
            _call_roll(_store, world, minutes)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        endpoint = "the rendezvous file" if world.launcher == "dlopt" else f"{host}:{number}"
        if world.is_main and number and _is_port_in_use(number):
            key = "MASTER_PORT" if world.launcher == "torchrun" else "parallel.master_port"
            raise StateError(f"{key}={number}: port in use at {host}; choose another one") from None
        raise UserError(
            f"parallel.master_addr: rank {world.rank} of {world.size} could not reach {endpoint} within "
            f"parallel.timeout_minutes={minutes:g} ({str(error).splitlines()[0]}); "
            "set parallel.master_addr and parallel.master_port"
        ) from None
    return _store


def _call_roll(store: "Store", world: World, minutes: float) -> None:
    """Waits until all ranks have joined. Raises `UserError` on each if one has not, or has another WORLD_SIZE."""
    store.set(f"joined{world.rank}", str(world.size))
    if world.is_main:
        rank, refusal, end = 1, "", time.monotonic() + 60 * minutes
        while rank < world.size and not refusal:
            try:
                store.wait([f"joined{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
                if (size := int(store.get(f"joined{rank}"))) != world.size:
                    refusal = f"WORLD_SIZE={size} on rank {rank}, but WORLD_SIZE={world.size} on rank 0; set one number"
            except RuntimeError:
                refusal = f"parallel.timeout_minutes={minutes:g}: not all of the {world.size} ranks have joined within "
                refusal += f"this time (rank {rank} has not)"
            rank += 1
        store.set("roll", refusal)
        time.sleep(0.5 if refusal else 0)  # the others read it
    # Rank 0 hosts the store, so it has begun before this rank: its answer comes within these minutes.
    store.wait(["roll"], timedelta(minutes=minutes, seconds=_ROLL_CALL))
    if refusal := store.get("roll").decode():
        raise UserError(refusal)


def _is_port_in_use(port: int) -> bool:
    # torch raises the same error for a port in use as for any other failure.
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


# Which rank caused a failure?
#
# The exception does not tell: gloo raises a bare RuntimeError for a lost peer, for a timeout and for own errors (in
# torch 2.15 only NCCL and TCPStore raise DistError). But when a peer is lost or a collective times out, gloo closes the
# group's connections, and from then on a send fails immediately.
#
# Roll call: every rank whose collective failed because of a peer sets a key in the store. After `_ROLL_CALL` seconds,
# the ranks without a key have ended or do not respond.

_ROLL_CALL = 3.0  # seconds for all waiting ranks to notice the failure
_PROBE_TAG = 1 << 20  # no rank receives with this tag


def caused_by_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank ended or did not respond."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (type(error) is RuntimeError and _has_lost_connection())


def _has_lost_connection() -> bool:
    import torch
    from torch import distributed

    # A message to a live rank is never received, which is harmless: the run ends.
    groups = distributed.distributed_c10d._world.pg_map if distributed.is_initialized() else ()
    for group in list(groups):
        peers = [rank for rank in range(group.size()) if rank != group.rank()]
        for peer in peers if torch.device("cpu") in group._device_types else ():
            try:
                distributed.isend(torch.zeros(1), group=group, group_dst=peer, tag=_PROBE_TAG)
            except RuntimeError:
                return True
    return False


def missing_ranks(error: Exception) -> list[int]:
    """Returns the ranks that made a collective fail: they ended or did not respond. All surviving ranks call this."""
    world = current()
    if world is None or not caused_by_peer(error):
        return []
    try:
        store = join_store(world, minutes=1.0)
        store.set(f"waited{world.rank}", "")
        time.sleep(_ROLL_CALL)
        return [rank for rank in range(world.size) if not store.check([f"waited{rank}"])]
    except Exception:  # the store is gone, and with it rank 0, which hosts it
        return [0]


def is_main() -> bool:
    """Returns whether this is the only process or rank 0."""
    world = current()
    return world is None or world.is_main


def is_launched() -> bool:
    """Returns whether torchrun or srun has started this process as one of several."""
    world = current()
    return world is not None and world.launcher != "dlopt"


def failure_of_peers(error: Exception) -> tuple[int, str] | None:
    """Returns exit code and message of a rank for an error that other ranks have caused; None for one of its own.

    They are those of the first rank that has failed, if it has posted why.
    """
    missing = missing_ranks(error)
    if not missing and not caused_by_peer(error):
        return None
    with contextlib.suppress(Exception):  # the store is gone
        if _store is not None and _store.check(["failure"]):
            code, reason = json.loads(_store.get("failure"))
            return code, reason
    if missing:
        ranks = ", ".join(map(str, missing))
        return FAILED, f"rank {ranks} exited, or did not respond within parallel.timeout_minutes (hung or overloaded)"
    if not re.search("timed? ?out|connection", str(error), re.IGNORECASE):
        return None
    return FAILED, (
        "all ranks respond, but wait in different collectives: check that all have the same command, code and data, "
        f"or raise parallel.timeout_minutes ({str(error).splitlines()[0]})"
    )


def first_to_fail(code: int = FAILED, reason: str | None = None) -> bool:
    """Returns whether this rank is the first to report a failure, which it then posts: one message is enough.

    Call before leaving the group: leaving makes the other ranks fail too.
    """
    world = current()
    if world is None:
        return True
    if not world.is_main:
        time.sleep(0.5)  # an error that occurs on all ranks is reported by rank 0
    try:
        store = join_store(world, minutes=1.0)
        is_first = bool(store.add("failures", 1) == 1)
        if is_first and reason is not None:
            store.set("failure", json.dumps([code, reason]))
        elif reason is not None and world.is_started_by_hand:
            print_message(reason)
        return is_first
    except Exception:  # rank 0, which hosts the store, is gone; it or its launcher reports the failure
        return False


def leave() -> None:
    """Destroys the process group after a successful run, if there is one."""
    from torch import distributed

    if distributed.is_initialized():
        gc.collect()  # collects DDP's hooks: gloo aborts at exit if they outlive the group
        with contextlib.suppress(RuntimeError):  # rank 0 hosts the store, so it must not leave first
            distributed.barrier()
        distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends this rank without exit handlers, which may block after a failed collective."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    world = current()
    if code not in (DONE, INTERRUPTED) and _store is not None and world is not None:
        from torch import distributed

        # Rank 0 hosts the store: the other ranks notice its end, and read the reason there.
        is_read = code == USER_ERROR and world.is_main and is_launched() and distributed.is_initialized()
        if is_read:
            distributed.destroy_process_group()
        time.sleep(_ROLL_CALL + 1 if is_read else 0.2)  # others may still query the store in `first_to_fail`
    os._exit(code)
