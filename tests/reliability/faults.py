"""Ways in which a machine fails: kills from outside, slow and full disks, damaged files. Used by tests and campaign."""

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

from dlopt import files as durable
from tests.training.runs import in_fork

_CLONE_NEWNS = 0x00020000


# -- disks (Linux, root): within a process that has forked off, so that they go with it


def private_mounts() -> None:
    """What this process mounts from here on is seen by it and its children only. Raises OSError."""
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
    """A file or a folder, as it is."""
    _mount("--bind", path, path)
    _mount("-o", "remount,bind,ro", path)


def writable_again(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True, capture_output=True)


# -- processes


def fork(function: Callable[[], object]) -> int:
    """The process id of a child, leader of its own group, that runs `function` and exits with 0, or with 1."""
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
    """Waits so long for the child's end: its wait status, or None while it runs."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill_group(child: int) -> bool:
    """kill -9 for the child and all it has started; whether it was still alive."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def slow_saves(seconds: float, tell: int | None = None) -> Iterator[None]:
    """Every checkpoint is written in twenty pieces with pauses; a byte goes to the descriptor `tell` as one begins."""
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
    """A page that held something."""
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
    """A negative control: the global generators stay as they are."""
    from dlopt.training import rng

    with patch.object(rng, "restore", lambda state: None):
        yield


@contextlib.contextmanager
def no_position_restored() -> Iterator[None]:
    """Another one: a resumed epoch begins with its first batch."""
    from dlopt.data.batches import Batches

    original = Batches.epoch
    with patch.object(Batches, "epoch", lambda self, epoch, start=0, step=0: original(self, epoch, 0, step)):
        yield
