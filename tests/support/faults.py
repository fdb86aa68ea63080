"""Fault injection: kills, slow and full disks, damaged files. Used by tests and by the chaos campaign."""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dlopt.basics import files as durable
from tests.support.runs import in_fork

_CLONE_NEWNS = 0x00020000


# -- disks (Linux, root): mounted in a forked process, unmounted with it


def private_mounts() -> None:
    """Gives this process and its children a private mount namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("--make-rprivate", "/")


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr)


def can_mount() -> bool:
    def attempt() -> None:
        private_mounts()
        _mount("-t", "tmpfs", "tmpfs", "/mnt")

    return os.geteuid() == 0 and os.path.isdir("/mnt") and in_fork(attempt) == 0


def small_disk(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)


def resize(folder: Path, size: int) -> None:
    _mount("-o", f"remount,size={size}", folder)


def read_only(path: Path) -> None:
    """Mounts a file or a folder read-only."""
    _mount("--bind", path, path)
    _mount("-o", "remount,bind,ro", path)


def writable_again(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True, capture_output=True)


# -- processes


def fork(function: Callable[[], object]) -> int:
    """Forks a child in its own process group that runs `function` and exits with 0 or 1; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            function()
            code = 0
        finally:
            os._exit(code)
    with contextlib.suppress(OSError):  # the child may be faster
        os.setpgid(child, child)
    return child


def ended(child: int, seconds: float) -> int | None:
    """Waits for the child; returns its wait status, or None if it still runs after the timeout."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill_group(child: int) -> bool:
    """Kills the process group with SIGKILL; returns whether the child was alive."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def slow_saves(seconds: float, tell: int | None = None) -> Iterator[None]:
    """Writes every checkpoint in 20 chunks with pauses; sends a byte to the descriptor `tell` when one begins."""
    original = torch.save

    def save(value: Any, file: Any) -> None:
        import io

        buffer = io.BytesIO()
        original(value, buffer)
        data = buffer.getvalue()
        if tell is not None:
            os.write(tell, b"x")
        size = -(-len(data) // 20)
        for start in range(0, len(data), size):
            file.write(data[start : start + size])
            file.flush()
            time.sleep(seconds / 20)

    with patch.object(torch, "save", save):
        yield


# -- damage


def _replace(path: Path, data: bytes) -> None:
    path.unlink()  # a hard link may share the data; a disk damages one place
    path.write_bytes(data)


def flip_bit(path: Path, draws: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = draws.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    _replace(path, bytes(data))


def truncate(path: Path, draws: random.Random) -> None:
    data = path.read_bytes()
    _replace(path, data[: draws.randrange(1, len(data))])


def empty(path: Path, draws: random.Random) -> None:
    _replace(path, b"")


def zero_page(path: Path, draws: random.Random) -> None:
    """Overwrites a non-zero page with zeros."""
    data = path.read_bytes()
    pages = [at for at in range(0, len(data) - 4096, 4096) if any(data[at : at + 4096])]
    at = draws.choice(pages or [0])
    _replace(path, data[:at] + bytes(4096) + data[at + 4096 :])


def dangle(path: Path, draws: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere.pt")


def lose_checksum(path: Path, draws: random.Random) -> None:
    durable.digest_file(path).unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": flip_bit,
    "truncated": truncate,
    "zero length": empty,
    "a page of zeros": zero_page,
    "a dangling link": dangle,
    "checksum missing": lose_checksum,
}


@contextlib.contextmanager
def no_generator_restored() -> Iterator[None]:
    """Negative control: does not restore the global generators."""
    from dlopt.training import rng

    with patch.object(rng, "restore", lambda state: None):
        yield


@contextlib.contextmanager
def no_position_restored() -> Iterator[None]:
    """Negative control: restarts a resumed epoch at its first batch."""
    from dlopt.data.batches import Batches

    original = Batches.epoch
    with patch.object(Batches, "epoch", lambda self, epoch, start=0, step=0: original(self, epoch, 0, step)):
        yield
