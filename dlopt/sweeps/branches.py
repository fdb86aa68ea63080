"""`from=RUN at=5,10,20`: runs of other lengths that continue an earlier run before their cooldowns begin.

A schedule with a stable phase, such as wsd, is the same for all lengths until the cooldown begins. A run of another
length therefore equals, bit for bit, one that resumes from a checkpoint before that update with the schedule of its own
length. So does one with another cooldown. The word `at` becomes an axis of the sweep with these lengths, and the
checkpoint of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.length import BatchCount, Length, UpdateCount
from dlopt.config.compose import Composer
from dlopt.config.inherit import inherit
from dlopt.config.overrides import (
    AT,
    BRANCH,
    SWEEP_WORDS,
    WAIT,
    is_set,
    key_of,
    listed_values,
    parse_axes,
    quoted_plain,
    without,
)
from dlopt.config.parameters import as_typed
from dlopt.config.plan import checked
from dlopt.config.resuming import differences, refuse_other_config
from dlopt.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from dlopt.config.plan import Plan
    from dlopt.config.run_config import RunConfig
    from dlopt.sweeps.jobs import Job
    from dlopt.training.checkpoint.content import Checkpoint

Factors = Callable[[int], tuple[float, ...]]
"""Returns the factors of learning rate and weight decay, and the momentum if the schedule sets it, in an update, from
0."""

_MOST = 4_000_000  # updates of a branch: its schedule is compared with that of its stem update by update


@dataclass(frozen=True)
class _Stem:
    """The run from which others branch.

    Attributes:
        source: `from=RUN`, for messages.
        own: the config of the run.
        run_config: that of the branches, which may have another schedule.
        is_changed: whether the two differ.
        checkpoints: the kept ones, by completed updates.
        of_run: its length; `updates`: those that it has completed.
    """

    source: str
    own: "RunConfig"
    run_config: "RunConfig"
    is_changed: bool
    checkpoints: dict[int, Path]
    of_run: Length
    updates: UpdateCount

    @property
    def unit(self) -> str:
        return "epochs" if self.run_config.settings.steps is None else "steps"

    @property
    def length(self) -> int:
        """In its unit."""
        return self.updates if self.unit == "steps" else self.of_run.batches(self.updates) // self.of_run.per_epoch

    def updates_of(self, length: int) -> UpdateCount:
        if self.unit == "steps":
            return UpdateCount(length)
        return self.of_run.updates_before(BatchCount(length * self.of_run.per_epoch))


def _factors(run_config: "RunConfig", horizon: int, steps_per_epoch: float) -> Factors:
    """Returns the factors of a run whose schedule has this length. Raises `UserError`."""
    from dlopt import schedules

    rate = schedules.build(run_config.build_schedule, run_config.warmup, steps=horizon, steps_per_epoch=steps_per_epoch)
    decay = run_config.decay.build(horizon=schedules.Horizon(0, horizon, steps_per_epoch))
    parts = [1.0, *(rule.horizon for rule in run_config.grouping.groups if rule.horizon is not None)]

    def of(update: int) -> tuple[float, ...]:
        factors = [rate(update / part) for part in parts]
        if decay is not None:
            factors += [decay.factor(update / part, f, 1.0) for part, f in zip(parts, factors, strict=True)]
        if rate.momentum is not None:
            factors += [rate.momentum(update / part) for part in parts]
        return tuple(factors)

    return of


def branched(composer: Composer, words: Sequence[str]) -> list[str]:
    """Replaces `from=RUN at=LENGTHS` by the overrides of that run and the axis of its branches.

    Returns other command lines unchanged, for `inherit`. Raises `UserError`.
    """
    given = [word for word in words if key_of(word) == AT]
    if not given:
        return inherit(composer, words)
    if len(given) > 1 or not is_set("from", words):
        raise UserError(f"{' '.join(given)}: needs one run from which to branch, and one list: from=RUN at=5,10,20")
    rest = without(words, AT)
    if is_set("dry_run", rest):
        raise UserError(f"{given[0]}: dry_run describes whole runs, not branches; leave out one of them")
    taken = [word for word in rest if key_of(word) in ("epochs", "steps", "schedule_epochs")]
    if taken:
        raise UserError(f"{taken[0]}: {given[0]} sets the lengths; leave out one of them")
    source = next(word for word in rest if key_of(word) == "from")
    for axis in parse_axes(without(rest, *SWEEP_WORDS), composer):
        if axis.is_swept:
            raise UserError(f"{axis}: branches of one run differ in their lengths only; leave it out")
    for word in rest:
        if key_of(word) in SWEEP_WORDS and key_of(word) != WAIT:
            raise UserError(f"{word}: branches of one run differ in their lengths only; leave it out")
        if key_of(word) == "hydra.sweeper":
            raise UserError(f"{word}: branches are a grid; leave it out")
        if key_of(word) == "resume" and word != "resume=auto":
            raise UserError(f"{word}: {given[0]} chooses the checkpoints; leave it out, or set resume=auto")
    lengths = _lengths(composer, given[0])
    overrides = inherit(composer, without(rest, "hydra.sweep.dir", "resume"))
    stem = _stem(composer, source, [word for word in overrides if not key_of(word).startswith("hydra")])
    starts = [_start(stem, length) for length in lengths]
    updates = [stem.updates_of(length) for length in lengths]
    print(f"branches: {sum(updates) - sum(starts):,} updates instead of {sum(updates):,}, after {stem.source}")
    # With steps, `begin` sets the length of the schedule: as a number of epochs, it would be rounded.
    in_epochs = lengths if stem.unit == "epochs" else ["null"] * len(lengths)
    columns: dict[str, Sequence[object]] = {stem.unit: lengths, "schedule_epochs": in_epochs}
    items = [f"{key}=[{','.join(map(str, values))}]" for key, values in columns.items()]
    items.append(f"resume=[{','.join(quoted_plain(str(stem.checkpoints[start])) for start in starts)}]")
    kept = without(inherit(composer, rest), *columns)
    return [*kept, f"{BRANCH}=zip({','.join(items)})"]


def _lengths(composer: Composer, word: str) -> list[int]:
    [override] = composer.parse([word])
    values = listed_values(override) if override.is_sweep_override() else [str(override.value())]
    if not all(value.isdecimal() and 0 < int(value) < 10**9 for value in values):
        raise UserError(f"{word}: must list lengths, in epochs (of a run with steps=N in updates): at=5,10,20")
    return sorted(map(int, values))


def _stem(composer: Composer, source: str, overrides: Sequence[str]) -> _Stem:
    """Reads the run `from=RUN`, composed from `overrides`. Raises `UserError`."""
    from dlopt.training.checkpoint.checkpoints import load  # imports torch

    [override] = composer.parse([source])
    folder = RunFolder(Path(str(override.value())).absolute())
    folder = RunFolder(folder.path.parent) if folder.path.name == "config.yaml" else folder
    single = [each for each in composer.parse(overrides) if not each.is_sweep_override()]
    run_config = checked(composer.compose(single), single).run_config
    if (growth := run_config.settings.batch_growth) is not None:
        grows = f"its batch grows: accumulate={as_typed(growth)}"
        raise UserError(f"{source}: {grows}; branches need a constant one: train each length from its start")
    checkpoints = {}
    for path in folder.checkpoints.glob("step-*.pt"):
        if (number := path.stem.removeprefix("step-")).isdecimal():
            checkpoints[int(number)] = path
    last = folder.checkpoints / "last.pt"
    if not last.is_file():
        raise UserError(f"{source}: has no checkpoints/last.pt")
    checkpoint = load(last)
    checkpoints[checkpoint.step] = last
    if not checkpoint.length.per_epoch:
        raise UserError(f"{source}: an earlier version ended it within its first epoch; train it again")
    _check_history(source, folder, checkpoint)
    new, typed = run_config.config, folder.typed()
    refuse_other_config(checkpoint.config, new, str(last), typed, has_identity=True, free=("schedule",))
    is_changed = bool(differences(checkpoint.config, new))  # in the schedule
    own = _own_config(folder, checkpoint.config) if is_changed else run_config
    return _Stem(source, own, run_config, is_changed, checkpoints, checkpoint.length, checkpoint.step)


def _check_history(source: str, folder: RunFolder, checkpoint: "Checkpoint") -> None:
    """Raises `UserError` if metrics.jsonl is damaged, or a straight run would have other batches."""
    epoch: Any = 0
    for line in read_metrics(folder.path):
        epoch, step = line.get("epoch"), line.get("step")
        if type(step) is not int or type(epoch) not in (int, float) or not step > 0 < epoch:
            raise FileError(f"{source}: metrics.jsonl is damaged: epoch {epoch}, step {step}")
        if type(epoch) is int and step != epoch * checkpoint.length.per_epoch and step < checkpoint.step:
            raise UserError(
                f"{source}: ended within epoch {epoch}, after update {step}, and was lengthened: its next update is "
                "the first of another epoch, unlike that of a straight run; train the whole length at once"
            )
    if epoch < checkpoint.evaluated_epoch:
        raise FileError(f"{source}: metrics.jsonl is damaged: it ends after epoch {epoch}, the run later")


def _own_config(folder: RunFolder, config: Mapping[str, Any]) -> "RunConfig":
    """Parses the saved config of a run. Raises `UserError`."""
    from dlopt.config.parsing import parse
    from dlopt.config.resolve import resolve_saved

    return parse(resolve_saved(config), config, folder.choices())


def _start(stem: _Stem, length: int) -> int:
    """Returns the completed updates of the checkpoint with which the branch of this length begins.

    The latest one before the first update in which the two schedules differ. Raises `UserError`.
    """
    word, updates = f"{AT}={length}", stem.updates_of(length)
    if updates > stem.updates:
        end = f"{stem.length} {stem.unit}"
        raise UserError(f"{word}: {stem.source} ends after {end}; allowed: 1 to {stem.length}")
    if updates > _MOST:
        raise UserError(f"{word}: {updates:,} updates; a branch has at most {_MOST:,}")
    of_run = stem.of_run
    most, differ = shared_updates(stem.own, stem.run_config, of_run.horizon, updates, of_run.per_epoch)
    if most is None and stem.is_changed:
        saved, new = stem.own.config["schedule"], stem.run_config.config["schedule"]
        warmup = []
        for key, value in saved.items():
            if key.startswith("warmup_") and value and value != new[key]:
                warmup.append(f"schedule.{key}={value}")
        raise UserError(
            f"{word}: the learning rate differs from that of {stem.source} from update {differ} on; only the cooldown "
            f"of a branch may differ: keep {' '.join(warmup) or 'the warmup and the stable phase'}"
        )
    if most is None:
        cause = f"{stem.run_config.schedule.choice} depends on the length of the run from update {differ} on"
        raise UserError(
            f"{word}: {cause}, so that no other length can branch off; train {stem.source} with a schedule that is "
            "constant before its cooldown, and a warmup of fixed length: schedule=wsd schedule.warmup_steps=100"
        )
    usable = [step for step in stem.checkpoints if 0 < step <= most]
    if not usable:
        kept = ", ".join(map(str, sorted(stem.checkpoints)))
        raise UserError(
            f"{word}: its cooldown begins after update {most}, and {stem.source} has no checkpoint until then (kept "
            f"are those of updates {kept}); train it with checkpoint.every_epochs=1 checkpoint.keep=1000"
        )
    return max(usable)


def shared_updates(
    stem: "RunConfig", branch: "RunConfig", horizon: int, updates: int, steps_per_epoch: float
) -> tuple[int | None, int]:
    """Returns the number of updates until which a branch equals its stem, and the first update with another rate.

    The number is None if no branch is possible, because the rates differ from the warmup on.

    Args:
        horizon: updates of the schedule of the stem; `updates`: of the branch.
    """
    is_same = stem is branch and updates == horizon  # the run itself
    count = min(updates, horizon)
    differ = count
    if not is_same:
        own, other = _factors(branch, updates, steps_per_epoch), _factors(stem, horizon, steps_per_epoch)
        differ = next((update for update in range(count) if own(update) != other(update)), count)
    lengths = [branch.warmup.length(updates, steps_per_epoch), stem.warmup.length(horizon, steps_per_epoch)]
    if differ <= max(lengths) + 1:  # also a decay that begins with the second update
        return None, differ
    # A branch makes at least one update, and saves the horizon of its own; the run itself is repeated as it is.
    most = differ if is_same else min(differ, updates - 1)
    if branch.settings.ema == "tail":  # the mean over the last quarter
        most = min(most, *(steps - max(steps // 4, 1) for steps in (updates, horizon)))
    return most, differ


def from_checkpoint(plan: "Plan") -> "Plan":
    """Returns the plan of a job that begins with a checkpoint of another run, `resume=PATH`.

    The checkpoint is copied into the folder of the job, which then resumes like any other.
    """
    if (resume := plan.saved["resume"]) in (None, "auto"):
        return plan
    settings = replace(plan.run_config.settings, resume=None)
    run_config = replace(plan.run_config, settings=settings, config={**plan.saved, "resume": None})
    return replace(plan, run_config=run_config, branches_from=str(resume))


def begin(jobs: "Sequence[Job]") -> None:
    """Puts the checkpoint of each branch that has not begun into its folder, with the history until then.

    Raises `UserError`.
    """
    from dlopt.run.folder import copy_history
    from dlopt.run.record import describe
    from dlopt.training.checkpoint.checkpoints import Checkpoints, load

    for job in jobs:
        plan, folder = job.plan, job.folder
        if not plan.branches_from or folder.has_begun(resumed=True):
            continue
        path = Path(plan.branches_from)
        source, checkpoint = RunFolder(path.absolute().parent.parent), load(path)
        describe(folder.path, plan.saved, plan.typed, plan.choices)
        run_id = folder.run_id()
        assert run_id is not None
        copy_history(source, folder, checkpoint.best_epoch, run_id)
        target = Checkpoints(folder.checkpoints)
        if not target.best.exists() and (best := _best(source, checkpoint)) is not None:
            target.adopt(best, run_id, "best")
        # As the straight run would have saved it. With epochs, `schedule_epochs` sets the length of the schedule.
        horizon = plan.run_config.settings.steps
        target.adopt(path, run_id, "last", config=plan.saved, horizon=horizon)


def _best(source: RunFolder, checkpoint: "Checkpoint") -> Path | None:
    """Returns the kept checkpoint of the best evaluation until `checkpoint`; the run may have found a better one since.

    None if it has none: the best model of the branch is then one of later epochs.
    """
    from dlopt.training.checkpoint.checkpoints import load

    steps = [line["step"] for line in read_metrics(source.path) if line["epoch"] == checkpoint.best_epoch]
    path = source.checkpoints / f"step-{steps[0] if steps else 0}.pt"
    return path if path.is_file() and load(path).evaluated_epoch == checkpoint.best_epoch else None
