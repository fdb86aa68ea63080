"""From the words of the command line to two plans that may be compared: the base and the change."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.basics.plain_values import flatten
from dlopt.basics.status_line import waiting
from dlopt.commands.shared.command_line import of_run
from dlopt.config.keys import ROLES
from dlopt.extend import (
    Role,
    RunFolder,
    UserError,
    group_of,
    key_of,
    role_of,
    show,
    value_of,
    without,
)
from dlopt.lab.claimed_trials import UNRECORDED
from dlopt.results.leaderboard import canonical, distinguishes
from dlopt.run.environment import code_sha256, packages

if TYPE_CHECKING:
    from dlopt.extend import Composer, Plan

SIDES = ("base", "change")
Equal = Literal["updates", "flops", "time"]
"""What a change may cost as much of as the base."""
CODE = "code"
TRUST = "allow_packages"
SEEDS = tuple(key for key, role in ROLES.items() if role is Role.SEED and "." not in key)
_OF_BATCHES = ("data.batch_size", "data.drop_last")  # the only keys of the data that a change may set
_WHERE = ("data.memory", "data.workers", "data.offline")


@dataclass(frozen=True)
class Side:
    """The base or the change.

    Attributes:
        lines: overrides of its runs, without the seed.
        code: folder that comes first on the path of its runs.
    """

    lines: Sequence[str]
    composer: "Composer"
    code: Path | None = None

    @cached_property
    def plan(self) -> "Plan":
        from dlopt.extend import plan  # imports torch

        return plan(self.composer, self.lines)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its runs compute, by dotted key, without their seeds, and the hashes of the code that is not dlopt's."""
        saved = flatten(self.plan.saved)
        own = {key: canonical(value) for key, value in saved.items() if _is_compared(key) and value is not None}
        own |= {f"package {name}": sha256 for name, sha256 in self.packages.items()}
        return own if self.code is None else {**own, CODE: code_sha256(self.code)}

    @cached_property
    def packages(self) -> dict[str, str | None]:
        """The hashes of the trusted packages that its config names, as the base imports them; None: installed, or not
        found."""
        named = str({key: value for key, value in self.plan.saved.items() if key != TRUST})
        trusted = [name for name in self.plan.run_config.settings.allow_packages if f"{name}." in named]
        return {name: (found or {}).get("sha256") for name, found in packages(trusted).items()}

    @property
    def hash(self) -> str:
        return hash_of(self.identity)


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _is_compared(key: str) -> bool:
    is_own_seed = role_of(key) is Role.SEED and key not in SEEDS
    is_data = group_of(key) == "data" and key not in _WHERE
    return key != "run_id" and (distinguishes(key) or is_own_seed or is_data)


def read_base(composer: "Composer", word: str) -> Side:
    """Reads BASE: a run, a recipe, or overrides in one word. Raises `UserError`."""
    if _is_path(word):
        folder = RunFolder(Path(word).parent if Path(word).name == "config.yaml" else Path(word))
        if folder.config() is not None and not folder.has_ended():
            status = (folder.summary() or {}).get("status", "running" if folder.is_live() else "unfinished")
            raise UserError(f"{word}: the base has not finished ({status}): a change is judged against a whole run")
        return _side(composer, _lines_of(composer, word))
    words = words_of(word)
    if "=" not in word:
        if word not in composer.choices("experiment"):
            raise UserError(f"{word}: no such folder or recipe; BASE may also be overrides in quotes")
        words = [f"experiment={word}"]
    _refuse_seeds(words)
    return _side(composer, words)


def read_change(composer: "Composer", base: Side, words: Sequence[str]) -> Side:
    """Reads CHANGE: overrides of the base, another run, code=FOLDER. Raises `UserError` if they cannot be compared."""
    typed = [each for word in words for each in words_of(word) or [word]]
    code = [Path(value_of(each)) for each in typed if key_of(each) == CODE]
    for folder in code:
        if not folder.is_dir() or not any(folder.rglob("*.py")):
            raise UserError(f"{CODE}={folder}: must be a folder with Python files")
    overrides = without(typed, CODE)
    runs = [each for each in overrides if "=" not in each and Path(each).exists()]
    if runs:
        if len(typed) > 1:
            raise UserError(f"{' '.join(typed)}: a change is one run, or overrides of the base")
        lines = _lines_of(composer, runs[0])
    else:
        _refuse_seeds(overrides)
        lines = _combined(composer, base.lines, overrides)
    change = _side(composer, lines, code[-1].absolute() if code else None)
    with waiting("loading PyTorch ..."):
        _check(base, change)
    return change


def trusting(composer: "Composer") -> list[str]:
    """Returns the override that trusts the packages typed anywhere on the command line; none if there are none.

    Raises `UserError` for a value that is no list.
    """
    names: list[str] = []
    for override in composer.parse(each for each in composer.command_line.words if key_of(each) == TRUST):
        if not isinstance(value := override.value(), list):
            raise UserError(f"{override.input_line}: must be a list: {TRUST}=[mine]")
        names += value
    return [f"{TRUST}={show([*dict.fromkeys(names)])}"] if names else []


def with_length(composer: "Composer", side: Side, updates: int) -> Side:
    """Returns the side with runs of a number of updates."""
    lines = [f"steps={updates}"]
    if side.plan.run_config.settings.budget is not None:
        lines.append("epochs=1")  # steps= excludes a time, not a number, which it replaces
    return _side(composer.with_words(*lines), _combined(composer, side.lines, lines), side.code)


def _lines_of(composer: "Composer", run: str) -> list[str]:
    """Returns the overrides of a run, without the seeds. Raises `UserError`."""
    if RunFolder(Path(run).parent if Path(run).is_file() else Path(run)).config() is None:
        raise UserError(f"{run}: not the folder of a run, which has a readable config.yaml")
    return without(of_run(composer, run, trusting(composer)), *SEEDS)


def words_of(side: str) -> list[str]:
    """Splits "optimizer=sgd epochs=5", typed as one word, before each key; a list may have spaces. [] for a path.

    A part may be quoted for the shell, as the head of a run shows its overrides.
    """
    parts = [] if _is_path(side) else re.split(r"\s+(?=['\"]?[+~]*[\w./@-]+=)", side.strip())
    return [_unquoted(part) if part[:1] in ("'", '"') else part for part in parts]


def _unquoted(part: str) -> str:
    with suppress(ValueError):  # an open quotation
        return " ".join(shlex.split(part))
    return part


def _is_path(side: str) -> bool:
    return os.path.exists(side)  # pathlib raises for more letters than a name may have


def _refuse_seeds(words: Sequence[str]) -> None:
    for word in words:
        if key_of(word) in SEEDS:
            raise UserError(f"{word}: `dlopt judge` sets the seeds: every pair of runs has its own")


def _combined(composer: "Composer", lines: Sequence[str], change: Sequence[str]) -> list[str]:
    """Returns the overrides of the base with the change; a choice in the change replaces its whole group."""
    keys, groups = {key_of(each) for each in change}, set(composer.groups())
    chosen = tuple(f"{key}." for key in keys & groups)
    return [*(each for each in lines if key_of(each) not in keys and not key_of(each).startswith(chosen)), *change]


def _side(composer: "Composer", lines: Sequence[str], code: Path | None = None) -> Side:
    from dlopt.config.early_checks import check_early  # with pydantic, which the help does not need
    from dlopt.config.resolve import to_plain

    lines = _combined(composer, lines, [*UNRECORDED, *trusting(composer)])
    config = composer.compose(lines)
    if config.get("comparison") is not None:
        recipe = next((each for each in lines if key_of(each) == "experiment"), "comparison")
        raise UserError(f"{recipe}: a comparison of several runs, which has its own claims; name a single run")
    check_early(to_plain(config)[0], lines)  # of both sides, before torch is imported
    return Side(lines, composer, code)


def _check(base: Side, change: Side) -> None:
    """Raises `UserError` for a change that changes nothing, or after which the metrics are not comparable."""
    different = list(differing(base, change))
    if not different:
        raise UserError("the base and the change are equal: they differ in nothing that a run computes")
    for key in sorted(different, key=lambda key: key != "data._target_"):  # before keys that other data have
        shown = f"{key}={show(change.identity.get(key))}"
        if role_of(key) is Role.PROTOCOL:
            raise UserError(f"{shown}: alters the metric or how it is measured; give it to the base, for both")
        if group_of(key) == "data" and key not in _OF_BATCHES:
            raise UserError(f"{shown}: other data than the base's ({show(base.identity.get(key))}) are not comparable")
    refuse_loss(base, change, str(base.plan.saved["monitor"]))


def refuse_loss(base: Side, change: Side, metric: str) -> None:
    """Raises `UserError` if the change alters the loss by which it would be judged."""
    keys = [key for key in differing(base, change) if group_of(key) == "loss"]
    if keys and metric == "val_loss":
        shown = f"{keys[0]}={show(change.identity.get(keys[0]))}"
        raise UserError(f"{shown}: alters the metric val_loss; give the base another one: monitor=val_accuracy")


def differing(base: Side, change: Side) -> Iterator[str]:
    """Yields the dotted keys in which the sides differ."""
    for key in dict.fromkeys([*base.identity, *change.identity]):
        if base.identity.get(key) != change.identity.get(key):
            yield key
