"""The length of a change that costs as much as the base: `dlopt judge BASE CHANGE equal=updates|flops|time`."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.folders import make
from dlopt.extend import Role, UserError, read_json, role_of, show, write_json
from dlopt.lab.judge.proposal import CODE, SIDES, Equal, Side, differing

if TYPE_CHECKING:
    from dlopt.extend import RunConfig, Workload


def check_equal(base: Side, change: Side, equal: Equal) -> None:
    """Raises `UserError` if the length of the change cannot be set, or its cost not be measured."""
    for key in differing(base, change):
        if role_of(key) is Role.LENGTH:
            value = show(change.identity.get(key))
            raise UserError(f"{key}={value}: equal={equal} sets the length of the change; leave one of the two out")
    if (epochs := base.plan.saved["schedule_epochs"]) is not None:
        reason = f"fixes the schedule, which equal={equal} fits to the length of the change"
        raise UserError(f"schedule_epochs={epochs}: {reason}; leave it out of the base")
    if change.code is not None and equal != "updates":
        raise UserError(f"{CODE}={change.code}: equal={equal} cannot measure other code; use equal=updates")


def equal_length(base: Side, change: Side, equal: Equal) -> dict[str, Any]:
    """Returns the fields of an `Entry` for a change that is trained to the cost of the base, to a whole update.

    Reads the data and builds both models; for equal=time, trains both for some seconds. Raises `UserError`.
    """
    from dlopt.extend import build_workload, training_batches
    from dlopt.training.length import length_of_run

    configs = [_with_a_rate(side.plan.run_config) for side in (base, change)]
    workloads = [build_workload(config) for config in configs]
    batches = (training_batches(each) for each in workloads)
    of_base, of_change = (length_of_run(each.settings, of, None) for each, of in zip(configs, batches, strict=True))
    steps = updates = int(of_base.updates)
    cost = 1.0
    if equal == "time":
        cost = _seconds_ratio(*configs)
        updates = max(round(steps / cost), 1)
    elif equal == "flops":
        flops, flops_of_change = (_flops(side, workload) for side, workload in zip(SIDES, workloads, strict=True))
        updates = of_change.nearest(of_base.samples(of_base.updates) * flops / flops_of_change)
        cost = steps / updates
    for each in workloads:
        each.close()
    return {"equal": equal, "update_cost": cost, "updates": updates}


def updates_of(base: Side, ledger: Path) -> int:
    """Returns the updates of a base with epochs=5min, for both sides of all proposals: counted once, for the ledger.

    Trains the base for some seconds. Raises `UserError`.
    """
    from dlopt.parallel.processes.launch import count_processes
    from dlopt.trained.distillation import with_teacher
    from dlopt.training.budget import count
    from dlopt.training.builders.workload import build_mode

    path, config = ledger / "updates.json", base.plan.run_config
    if (known := read_json(path)) is None:
        if count_processes(config.parallel.arguments, config.settings.device) > 1:
            time = f"epochs={config.settings.epochs}"
            raise UserError(
                f"{time}: for runs of several processes, train the base first, and judge against its folder"
            )
        with tempfile.TemporaryDirectory() as scratch:
            known = count(config, Path(scratch) / "timed", build_mode(config), with_teacher)
        make(ledger, "output", exist_ok=True)
        write_json(path, known)
        print(known["line"])
    return int(known["updates"])


def _with_a_rate(config: "RunConfig") -> "RunConfig":
    """Returns the config with any learning rate in place of optimizer.lr=auto: the cost does not depend on it."""
    if not config.auto_lr:
        return config
    return replace(config, optimizer=config.optimizer.partial(lr=1e-3), auto_lr=False)


def _flops(side: str, workload: "Workload") -> float:
    """Returns the FLOPs of a sample in an update. Raises `UserError` if they are unknown, or vary by update."""
    from dlopt.optim.traits import optimizer_traits
    from dlopt.training.builders.optimizer import build_optimizer

    flops = workload.computed_flops
    if not flops or optimizer_traits(build_optimizer(workload)).evaluations != "once":
        raise UserError(f"equal=flops: those of the {side} are not known; use equal=time or equal=updates")
    return flops


def _seconds_ratio(*configs: "RunConfig") -> float:
    """Returns the time of an update of the second config relative to the first: a median. Raises `UserError`."""
    from dlopt.lab.benchmark.costs import measure
    from dlopt.parallel.processes.launch import count_processes

    for config in configs:
        if count_processes(config.parallel.arguments, config.settings.device) > 1:
            raise UserError("equal=time: runs of several processes cannot be measured here; use equal=flops")
    with tempfile.TemporaryDirectory() as scratch:
        return measure(configs[0], configs[1], Path(scratch)).time
