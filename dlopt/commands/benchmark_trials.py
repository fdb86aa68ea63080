"""The trials of `dlopt benchmark` and `dlopt benchmark --check`: which overrides they may have, and how they start."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dlopt.analysis.benchmark.protocol import FOLDER, has_space
from dlopt.commands.command import Line
from dlopt.commands.sweep import build_pool, is_hydra
from dlopt.errors import UserError
from dlopt.sweeps import pool as pools

if TYPE_CHECKING:
    from dlopt.sweeps.benchmark import Candidate, Request

MACHINE = (
    "allow_packages", "device", "precision", "threads", "compile", "cuda_graphs", "channels_last", "deterministic",
    "hydra",
)  # fmt: skip
"""Keys and groups that do not change what is compared."""
_FIXED = (
    "experiment", "schedule", "schedule_epochs", "seed", "init_seed", "order_seed", "augmentation_seed", "epochs",
    "steps", "max_time", "stopping", "evaluate", "monitor", "resume", "checkpoint", "tracking", "log_every_steps",
    "comparison", "dry_run",
)  # fmt: skip


def group_of(override: str) -> str:
    """Returns the group or the first part of the key: schedule of `schedule=cosine` and of `++schedule.warmup=1`."""
    return re.split(r"[./@]", _key_of(override))[0]


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def refuse_protocol(overrides: Iterable[str]) -> None:
    """Raises `UserError` for an override that would change the protocol."""
    for override in overrides:
        if group_of(override) in _FIXED:
            raise UserError(
                f"{override}: part of the protocol, and cannot be changed; a tier or a search space of your own may "
                "set it, see `dlopt benchmark --help`"
            )


def refuse_drawn(overrides: Iterable[str], candidates: "Mapping[str, Candidate]") -> None:
    """Raises `UserError` for an override of a key that a search space sets."""
    for override in overrides:
        key = _key_of(override)
        if key == "optimizer._target_":
            raise UserError(f"{override}: name the class by optimizer={override.partition('=')[2]}")
        for name, chosen in candidates.items():
            if key in chosen.describe():
                place = "in a folder given by --config-dir"
                if has_space(name, None):  # a file of the same name would be refused
                    advice = f"search another one under another name: optimizer/NAME.yaml and {FOLDER}/space/NAME.yaml"
                else:
                    advice = f"to replace it, write {FOLDER}/space/{name}.yaml"
                raise UserError(f"{override}: set by the search space of {name}; {advice} {place}")


def launch(line: Line, request: "Request", overrides: Sequence[str]) -> int:
    """Runs the waiting trials with the launcher of the command line, by default one process per core.

    Returns how many of them other processes are running. On a signal, raises KeyboardInterrupt.
    """
    from dlopt.sweeps.benchmark import run_trials

    hydra = [each for each in overrides if is_hydra(each)]
    if not any(each.startswith("hydra/launcher=") for each in hydra):
        hydra = ["hydra/launcher=joblib", *hydra]
    folder = str(request.folder).replace("\\", "\\\\").replace("'", "\\'")
    composed = line.composer.compose([*hydra, *request.overrides, f"hydra.sweep.dir='{folder}'"], multirun=True)
    pool = build_pool(line.composer, composed, "not supported here")
    assert pool is not None  # has refused other launchers
    if pool.is_local:
        pools.warm_up()
    return run_trials(request, line.composer.loader, composed, pool)
