"""Finds the jobs of a grid among those in a sweep's folder: equal ones keep their numbers, and new ones follow.

A key that does not affect the results, such as the folder of the data, may change when a run is resumed. As an axis of
a sweep, it distinguishes the jobs: a data set may have moved between two attempts, but two jobs have two data sets.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.roles import Role
from dlopt.config.keys import LABELS, role_of
from dlopt.config.overrides import is_equal, key_of, parse_overrides, storable, value_of
from dlopt.config.plan import Plan
from dlopt.config.resuming import comparable, differences, distance, may_change
from dlopt.sweeps.jobs import Job, PlanJob
from dlopt.sweeps.sweep_file import find_space

_RECIPES = ("experiment", "debug")


def numbers(space: Any, sweep: Path, plans: Sequence[Plan], plan_job: PlanJob, key: str) -> list[int]:
    """Returns the number of each job of a grid in a sweep's folder: that of the equal job there, else the next free.

    Jobs are equal if their settings are: their words may have another order, or an axis may be new and had its default.
    Jobs of the folder that this grid lacks keep their numbers, which are never used again.

    Args:
        space: content of the sweep's file, the overrides of each job.
        plan_job: composes a job of the folder, to know its settings.

    Raises:
        UserError: a new job differs from those of the folder in more than axes.
    """
    former: list[list[str]] = space if isinstance(space, list) else []
    axes = swept_keys(space, plans)
    by_words = {_words(lines, axes): number for number, lines in enumerate(former)}
    found = [by_words.get(_words(plan.texts, axes)) for plan in plans]
    if former and None in found:
        by_settings: dict[Hashable, int] = {}
        for number in sorted({*range(len(former))} - {*found}, reverse=True):
            with suppress(UserError):  # a job that can no longer be composed is another one
                config = _config(RunFolder(sweep / str(number)), former[number])
                config = plan_job(former[number], number).saved if config is None else config
                by_settings[_settings(config, former[number], axes)] = number
        for index, plan in enumerate(plans):
            if found[index] is None:
                found[index] = by_settings.get(_settings(plan.saved, plan.texts, axes))
        fixed = [_words(lines, axes, has_axes=False) for lines in former]
        for plan, number in zip(plans, found, strict=True):
            if number is None and (own := _words(plan.texts, axes, has_axes=False)) not in fixed:
                there, here = (" ".join(sorted(each)) or "no override" for each in (fixed[0] - own, own - fixed[0]))
                raise UserError(
                    f"{key}: this folder contains another sweep ({there} there, {here} here); use another folder, or "
                    "sweep the values of both"
                )
    free = iter(range(len(former), len(former) + len(plans)))
    return [next(free) if number is None else number for number in found]


def lists_jobs(space: Any, plans: Sequence[Plan]) -> bool:
    """Returns whether the file of a sweep has these jobs, in any order, and no others."""
    axes = swept_keys(space, plans)
    former = {_words(lines, axes) for lines in space} if isinstance(space, list) else set()
    return former == {_words(plan.texts, axes) for plan in plans}


def _config(folder: RunFolder, lines: Sequence[str]) -> Mapping[str, Any] | None:
    """Returns the config of a job with the overrides `lines` that has begun in this folder."""
    return folder.config() if {*lines} <= {*folder.typed()} else None


def _words(lines: Sequence[str], axes: Collection[str], *, has_axes: bool = True) -> frozenset[str]:
    """Returns the overrides that tell jobs apart; those of axes only if `has_axes`."""
    return frozenset(line for key, line in _values(lines, axes).items() if has_axes or not is_below(key, axes))


def _settings(config: Mapping[str, Any], lines: Sequence[str], axes: Collection[str]) -> Hashable:
    """Returns the settings of a job, equal for equal jobs. `lines`: have the swept labels, which may have changed."""
    labels = parse_overrides(line for line in lines if key_of(line) in LABELS and key_of(line) in axes)
    return comparable(config, axes), tuple(sorted(f"{each.key_or_group}={each.value()}" for each in labels))


def swept_keys(space: Any, plans: Sequence[Plan]) -> set[str]:
    """Returns the keys and groups in which jobs differ, or differed in `space`, the content of the sweep's file.

    A recipe, or a user's group, changes keys with other names: if there is one, all keys that differ count.
    """
    former = [lines for lines in space if isinstance(lines, list)] if isinstance(space, list) else []
    axes: set[str] = set()
    for sweep in (former, [plan.texts for plan in plans]):
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for line in storable(str(line) for lines in sweep for line in lines):
            values[key_of(line)][value_of(line)] += 1
        axes |= {key for key, each in values.items() if len(each) > 1 or each.total() < len(sweep)}
    axes = {key for key in axes if role_of(key) is not Role.COMMAND or key in _RECIPES}
    unknown = {axis for axis in axes if not any(_has(axis, plan) for plan in plans)}
    if not unknown:
        return axes
    configs = [flatten(plan.saved) for plan in plans]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if may_change(key)]
    return axes | {
        key
        for key in keys
        if role_of(key) is not Role.COMMAND and any(each.get(key) != configs[0].get(key) for each in configs)
    }


def _has(axis: str, plan: Plan) -> bool:
    """Returns whether the config of a job has this key or group."""
    value: Any = plan.saved
    for part in axis.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def distance_of_jobs(sweep: RunFolder, jobs: Sequence[Job]) -> int | None:
    """Returns the distance of the started jobs in a sweep's folder from these jobs; see `resuming.distance`."""
    axes = swept_keys(find_space(sweep.path), [job.plan for job in jobs])
    pairs = [(config, job.plan.saved) for job in jobs if (config := job.folder.config()) is not None]
    if any(differences(old, new, axes) for old, new in pairs):
        return None
    return max((distance(old, new) or 0 for old, new in pairs), default=0)


def distance_of_unfinished(sweep: RunFolder, jobs: Sequence[Job]) -> int | None:
    """Returns the distance of the sweep in a folder from these jobs; None if it has other jobs, or all have ended."""
    space = find_space(sweep.path)
    if not jobs or not isinstance(space, list) or len(space) != len(jobs):
        return None
    if sweep.is_live() or all(job.is_done for job in jobs):
        return None
    axes = swept_keys(space, [job.plan for job in jobs])
    unstarted = [(lines, job) for lines, job in zip(space, jobs, strict=True) if job.folder.config() is None]
    return distance_of_jobs(sweep, jobs) if all(_has_values(lines, job, axes) for lines, job in unstarted) else None


def refuse_other_labels(job: Job, axes: Collection[str]) -> None:
    """Raises `UserError` for a job that was started with another swept tag or note.

    Compares the overrides, because `dlopt runs tag` changes the config.
    """
    for key in {*axes} & {*LABELS}:
        before, now = (
            [each for each in lines if key_of(each) == key] for lines in (job.folder.typed(), job.plan.texts)
        )
        if not _has_values(before, job, {key}, now):
            raise UserError(f"resume: {job.folder.path} was started with {' '.join(before)}, now {' '.join(now)}")


def _has_values(lines: Any, job: Job, axes: Collection[str], own: Sequence[str] | None = None) -> bool:
    """Returns whether stored overrides equal a job's (or its `own`). Ignores keys that may change, except axes."""
    old, new = _values(lines, axes), _values(job.plan.texts if own is None else own, axes)
    try:
        return old.keys() == new.keys() and all(old[key] == new[key] or is_equal(old[key], new[key]) for key in old)
    except (HydraException, UserError):  # the file was not written by dlopt, or is damaged
        return False


def _values(lines: Any, axes: Collection[str]) -> dict[str, str]:
    """Returns the overrides by key, as they are stored, without keys that may change on resume."""
    stored = storable(map(str, lines)) if isinstance(lines, list) else []
    pairs = [(key_of(line), line) for line in stored]
    return {key: line for key, line in pairs if is_below(key, axes) or not may_change(key)}
