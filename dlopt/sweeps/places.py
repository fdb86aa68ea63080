"""Where a sweep's jobs run: so many places, each of which takes one job's process at a time."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge
from omegaconf import OmegaConf

from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.folders import RunFolder
from dlopt.ranges import Count
from dlopt.sweeps.jobs import DONE
from dlopt.sweeps.warm import spawn


class Process(Protocol):
    """A job that has been started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Asks it to end with a checkpoint."""

    def kill(self) -> None:
        """Ends it at once."""


Start = Callable[[int, Path, Mapping[str, str]], Process]
"""(place, folder, environment): runs what the folder describes."""


@dataclass(frozen=True)
class Places:
    """`find`: the job that a former sweep has left running in a folder, if any."""

    count: int
    start: Start
    find: Callable[[Path], Process | None]
    seconds: float = 0.2  # between two looks at the jobs
    is_here: bool = True  # whether jobs are processes of this machine


def checked(launcher: Callable[..., Places], settings: Mapping[str, Any]) -> Places:
    """The places of a launcher with these settings of hydra.launcher. Raises `UserError`."""
    plain = {
        key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in settings.items()
    }
    return launcher(**check_arguments("hydra.launcher", launcher, plain))


def local(*, n_jobs: Annotated[int, Ge(-1)]) -> Places:
    """So many processes on this machine, with equal shares of the cores that this process may use; -1: one per core."""
    if n_jobs == 0:
        raise UserError("hydra.launcher.n_jobs=0: how many jobs run at once; allowed: a whole number >= 1, or -1")
    cores = sorted(os.sched_getaffinity(0))
    count = len(cores) if n_jobs == -1 else n_jobs
    shares = [None] * count if count == 1 else [_share(cores, place, count) for place in range(count)]
    return Places(count, lambda place, folder, more: spawn(folder, more, shares[place]), find_local)


def _share(cores: Sequence[int], place: int, count: int) -> set[int]:
    """Cores of one place; with more places than cores, one that others share."""
    return set(cores[place::count]) or {cores[place % len(cores)]}


def gpus(*, gpus: Literal["auto"] | list[Annotated[int, Ge(0)] | str], jobs_per_gpu: Count) -> Places:
    """One process per GPU (or `jobs_per_gpu`), which sees no other."""
    names = visible_gpus() if gpus == "auto" else [str(each) for each in gpus]
    if not names:
        raise UserError("hydra.launcher.gpus=auto: no GPU is visible here; name them: hydra.launcher.gpus=[0,1]")
    if len(set(names)) < len(names):
        raise UserError(f"hydra.launcher.gpus={names}: a GPU stands twice; hydra.launcher.jobs_per_gpu shares them")
    pool = [name for _ in range(jobs_per_gpu) for name in names]

    def start(place: int, folder: Path, more: Mapping[str, str]) -> Process:
        return spawn(folder, {**more, "CUDA_VISIBLE_DEVICES": pool[place]}, None)

    return Places(len(pool), start, find_local)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs, for CUDA_VISIBLE_DEVICES. Asked of the driver, so that no memory is taken on them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return [line.strip() for line in listed.splitlines() if line.strip().isdigit()]
    return []


class _Left:
    """A job of a sweep that was killed, still writing its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)

    def poll(self) -> int | None:
        return None if self._folder.is_live() else DONE

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass


def find_local(folder: Path) -> Process | None:
    return _Left(folder) if RunFolder(folder).is_live() else None
