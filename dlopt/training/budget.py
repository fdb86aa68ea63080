"""`epochs=5min`: how many updates take this time, with their evaluations and checkpoints.

They are counted once, before the run, by timing updates of the same workload, which are then discarded. The run itself
is one of `steps=N`, and does not look at the clock.
"""

import contextlib
import gc
import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dlopt.basics.files import read_json, write_json, write_yaml
from dlopt.basics.folders import SPACE, RunFolder
from dlopt.basics.formats import format_amount
from dlopt.basics.interruption import Interruption
from dlopt.basics.length import BatchCount, UpdateCount
from dlopt.basics.locks import locked
from dlopt.basics.roles import Role
from dlopt.config.keys import role_of
from dlopt.config.overrides import key_of
from dlopt.config.run_config import RunConfig
from dlopt.machine.device import synchronized_time
from dlopt.parallel.mode import Mode
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.loop import Trainer
from dlopt.training.progress import TrainingRun, endless_batches

MANY = 1_000_000
"""Updates of the run whose first ones are timed: its schedule does not end before them."""
# Updates that load and compile code, and record a CUDA graph; seconds of the timed ones, or a fiftieth of a short run.
_UNTIMED, _LONGEST = 3, 10.0

Change = Callable[[Workload], Workload]


def count_updates(run: TrainingRun, mode: Mode, add_teacher: Change) -> tuple[TrainingRun, str | None]:
    """Returns a run with epochs=5min as one of so many updates, and a line that explains them. All ranks call this.

    A resumed run keeps its number. Runs of a sweep that differ in seeds or folds only, and are averaged, have one: the
    first of them counts, and the others wait for it.
    """
    home = next((each for each in run.folder.parents if (each / SPACE).is_file()), run.folder)
    typed, others = RunFolder(run.folder).typed(), (Role.SEED, Role.PLACE, Role.WATCH)
    shared = repr([line for line in typed if role_of(line) not in others and key_of(line) != "resume"])
    path = home / f".updates-{hashlib.sha256(shared.encode()).hexdigest()[:16]}.json"
    with locked(path.with_suffix(".lock")) if mode.ranks.is_main else contextlib.nullcontext():
        known = read_json(path) if run.checkpoint is None else {"updates": run.checkpoint.config["steps"]}
        counted = mode.ranks.broadcast(known) or count(run.run_config, run.folder / ".timed", mode, add_teacher)
        if mode.ranks.is_main:
            write_json(path, counted)
    gc.collect()  # on a GPU, reference cycles of the timed updates may hold gigabytes
    if mode.ranks.is_main and (described := RunFolder(run.folder).config()) is not None:
        write_yaml(run.folder / "config.yaml", {**described, "steps": counted["updates"]})
    return replace(run, run_config=run.run_config.with_steps(counted["updates"])), counted.get("line")


def count(config: RunConfig, folder: Path, mode: Mode, add_teacher: Change) -> dict[str, Any]:
    """Times updates of a config with epochs=5min: its number of `updates`, and a `line` that explains them.

    `folder`: for checkpoints of the timed updates; deleted at the end.
    """
    budget = config.settings.budget
    assert budget is not None
    workload = add_teacher(build_workload(config.with_steps(MANY), parallel=mode))
    with contextlib.closing(workload):
        trainer = probe_trainer(workload.with_lr(1e-3) if config.auto_lr else workload, folder)
        update = update_seconds(trainer, min(budget / 50, _LONGEST))
        evaluate = (lambda: None) if trainer.validate is None else partial(trainer.validate, Interruption())
        actions = evaluate, evaluate, partial(trainer.save, best=True)  # the first evaluation may compile
        _, evaluation, checkpoint = (_seconds(trainer, each) for each in actions)
        trainer.checkpoints.wait()
    mode.ranks.gather([None])  # all have written their shards
    shutil.rmtree(folder, ignore_errors=True)
    updates, length = updates_within(budget, trainer, update, evaluation, checkpoint), trainer.length
    shown = [format_amount(each) for each in (1000 * update, evaluation, checkpoint)]
    times = "{} ms per update, {} s per evaluation, {} s per checkpoint".format(*shown)
    total = f"{updates:,} updates ({length.epochs_of(length.batches(updates)):.4g} epochs)"
    return {"updates": updates, "line": f"epochs={config.settings.epochs}: {times}: {total}"}


def update_seconds(trainer: Trainer, shortest: float) -> float:
    """Returns the mean of the updates of about `shortest` seconds, on rank 0, after some that load and compile code."""
    numbered = enumerate(endless_batches(trainer.batches, trainer.progress))
    update = partial(next, (trainer.run_update(batch, number) for number, batch in numbered))
    trainer.module.train()
    _seconds(trainer, update, _UNTIMED)
    count = math.ceil(shortest / _seconds(trainer, update))
    return _seconds(trainer, update, count) / count


def _seconds(trainer: Trainer, action: Callable[[], object], times: int = 1) -> float:
    start = synchronized_time(trainer.mode.device)
    for _ in range(times):
        action()
    return trainer.mode.ranks.broadcast(synchronized_time(trainer.mode.device) - start)


def updates_within(budget: float, trainer: Trainer, update: float, evaluation: float, checkpoint: float) -> UpdateCount:
    """Returns the updates, at least 1, that take `budget` seconds or less, with their evaluations and checkpoints.

    `update`, `evaluation`, `checkpoint`: seconds of one of them.
    """
    per_epoch, every = trainer.length.per_epoch, trainer.intervals
    evaluations = 1 / (every.evaluate_every * per_epoch) + 1 / (every.evaluate_every_steps or math.inf)
    saves = 1 / (per_epoch * (every.save_every_epochs or math.inf)) + 1 / (every.save_every_steps or math.inf)
    each = update + evaluations * evaluation + saves * checkpoint
    # The run may end within an epoch, with an evaluation and a checkpoint more.
    return trainer.length.updates_before(BatchCount(max(int((budget - evaluation - checkpoint) / each), 1)))
