"""Compares the jobs of a grid with the jobs in a sweep's folder: resume=auto continues only equal jobs.

A key that does not affect the results, such as the folder of the data, may change when a run is resumed. As an axis of
a sweep, it distinguishes the jobs: a data set may have moved between two attempts, but two jobs have two data sets.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from hydra.errors import HydraException

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.roles import Role
from dlopt.config.keys import LABELS, role_of
from dlopt.config.overrides import is_equal, key_of, storable, value_of
from dlopt.config.resuming import differences, distance, may_change
from dlopt.sweeps.jobs import Job
from dlopt.sweeps.sweep_file import find_space

_RECIPES = ("experiment", "debug")


def swept_keys(space: Any, jobs: Sequence[Job]) -> set[str]:
    """Returns the keys and groups in which jobs differ, or differed in `space`, the content of the sweep's file.

    A recipe, or a user's group, changes keys with other names: if there is one, all keys that differ count.
    """
    former = [lines for lines in space if isinstance(lines, list)] if isinstance(space, list) else []
    axes: set[str] = set()
    for sweep in (former, [job.plan.texts for job in jobs]):
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for line in storable(str(line) for lines in sweep for line in lines):
            values[key_of(line)][value_of(line)] += 1
        axes |= {key for key, each in values.items() if len(each) > 1 or each.total() < len(sweep)}
    axes = {key for key in axes if role_of(key) is not Role.COMMAND or key in _RECIPES}
    unknown = {axis for axis in axes if not any(_has(axis, job) for job in jobs)}
    if not unknown:
        return axes
    configs = [flatten(job.plan.saved) for job in jobs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if may_change(key)]
    return axes | {
        key
        for key in keys
        if role_of(key) is not Role.COMMAND and any(each.get(key) != configs[0].get(key) for each in configs)
    }


def _has(axis: str, job: Job) -> bool:
    """Returns whether the config of a job has this key or group."""
    value: Any = job.plan.saved
    for part in axis.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def distance_of_jobs(sweep: RunFolder, jobs: Sequence[Job]) -> int | None:
    """Returns the distance of the started jobs in a sweep's folder from these jobs; see `resuming.distance`."""
    axes = swept_keys(find_space(sweep.path), jobs)
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
    axes = swept_keys(space, jobs)
    unstarted = [(lines, job) for lines, job in zip(space, jobs, strict=True) if job.folder.config() is None]
    return distance_of_jobs(sweep, jobs) if all(_has_values(lines, job, axes) for lines, job in unstarted) else None


def has_jobs(space: Any, jobs: Sequence[Job], axes: Collection[str]) -> bool:
    """Returns whether the file of a sweep lists these jobs. Ignores keys that may change, except axes."""
    if not isinstance(space, list) or len(space) != len(jobs):
        return False
    return all(_has_values(lines, job, axes) for lines, job in zip(space, jobs, strict=True))


def refuse_other_order(space: Any, jobs: Sequence[Job], axes: Collection[str], key: str) -> None:
    """Raises `UserError` if a started job has the values of the axes of another job in `space`: jobs are numbered."""
    own = [[line for line in job.plan.texts if key_of(line) in axes] for job in jobs]
    for lines, job in zip(space if isinstance(space, list) else [], jobs, strict=False):
        before = [line for line in lines if key_of(line) in axes]
        if job.folder.has_begun() and before != own[job.number] and before in own:
            raise UserError(
                f"{key}: job {job.number} has {' '.join(before)}, and now {' '.join(own[job.number])}: jobs are "
                "numbered, and only the first axis can get more values, after its own; or use another folder"
            )


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
