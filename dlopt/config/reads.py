"""Refuses keys that a command does not read. Beside each command stands which keys of `dlopt train` and Hydra it reads.

Only what is typed is refused: a recipe (`experiment=...`) is written for `dlopt train`, and sets more than other
commands read.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import is_below
from dlopt.basics.roles import Role
from dlopt.config.keys import ROLES, role_of
from dlopt.config.overrides import group_of, key_of, text_of, value_of
from dlopt.config.packages import entries

if TYPE_CHECKING:  # Hydra is imported late: most commands only need the keys
    from hydra.core.override_parser.types import Override

RECIPE = ("experiment", "allow_packages")
"""What sets other keys, and what permits their values."""
INFERENCE = ("device", "precision", "threads")
"""What the outputs of a trained model depend on, in addition to its checkpoint."""
UPDATE = (
    "task", "data", "normalize", "sampler", "augmentation", "model", "init", "adapt", "loss", "optimizer", "clip",
    "parallel", "seed", "init_seed", "order_seed", "augmentation_seed", "init_from", "device", "precision", "compile",
    "cuda_graphs", "channels_last", "threads", "deterministic", "accumulate", "decay_norm_and_bias", "on_out_of_memory",
)  # fmt: skip
"""What one update of a training depends on, apart from its learning rate."""
LEARNING_RATE = ("schedule", "decay", "schedule_epochs", "epochs", "steps", "scale_lr", "scale_lr_reference")
"""What learning rate and weight decay of an update depend on, in addition to the keys of the optimizer."""
COMPOSITION = ("hydra.searchpath", "hydra.mode", "hydra.job.name")
"""What composing a run reads: the last one is part of the name of a folder, by interpolation."""

_TRAIN = frozenset(key.partition(".")[0] for key in ROLES)


def unavailable(flag: str) -> str:
    """Says which commands have a flag of `dlopt train`."""
    return f"{flag}: only available in `dlopt train`"


def refuse_unread(
    overrides: "Iterable[str | Override]",
    command: str,
    reads: Sequence[str],
    *,
    command_keys: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> None:
    """Raises `UserError` for a typed key of `dlopt train` that is not among or below the keys that a command reads.

    Passes unknown keys on: composing explains them.

    Args:
        command: for messages.
        reads: groups and dotted keys, also of Hydra.
        command_keys: of the command alone.
        hints: advice for keys and those below them.
    """
    for override in overrides:
        key, line = key_of(override), text_of(override)
        is_of_train = group_of(line) in _TRAIN or group_of(line) in entries("dlopt.series")
        if not is_of_train or is_below(key, (*reads, *command_keys)):
            continue
        folders = dict.fromkeys(("hydra.run", "hydra.sweep"), "set output= instead") if "output" in command_keys else {}
        advice = folders | dict(hints or {})
        hint = next((text for name, text in advice.items() if is_below(key, [name])), "")
        if not hint and role_of(key) is Role.COMMAND:
            others = " and commands whose --help lists it" if key == "dry_run" else ""
            raise UserError(f"{line}: only available in `dlopt train`{others}")
        raise UserError(f"{line}: {command} does not read this key{f'; {hint}' if hint else ''}")


def refuse_unread_hydra(
    overrides: "Iterable[str | Override]",
    command: str,
    reads: Sequence[str],
    hints: Mapping[str, str],
    command_keys: Sequence[str] = (),
) -> None:
    """As `refuse_unread`, for a command that reads all keys except some of Hydra's."""
    hydra = [line for line in overrides if group_of(line) == "hydra"]
    refuse_unread(hydra, command, reads, command_keys=command_keys, hints=hints)


def refuse_untested(config: Mapping[str, Any], overrides: "Iterable[str | Override]") -> None:
    """Raises `UserError` for typed keys of the final test in a run without a final test. `config`: of the run."""
    for line in overrides:
        if key_of(line) in ("evaluate.tta", "evaluate.average") and config["evaluate"]["test"] is False:
            name = key_of(line).partition(".")[2]
            raise UserError(
                f"{text_of(line)}: belongs to the final test, which evaluate.test=false skips; test later with "
                f"`dlopt eval checkpoint=PATH {name}={value_of(line)}`"
            )
