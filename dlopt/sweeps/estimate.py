"""Estimates how long jobs will take, from short runs of a few of them.

An estimate is a range: from the fastest epoch of a short run to its mean and a margin, because other processes slow
updates down, processors are faster in the first seconds, and a run ends with a test and a plot. The first update, which
loads and compiles code for all updates, takes up to some seconds and counts once.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean
from typing import Any

from dlopt.basics.errors import USER_ERROR, RunError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.formats import format_count, format_duration, format_range, round_duration
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.basics.scratch import scratch
from dlopt.config.keys import LABELS, role_of
from dlopt.run.record import describe
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import result_of
from dlopt.tracking.metrics import read_metrics

_JOBS_PER_PROBE = 4  # so that the probes take less time than the jobs
_PROBES = 3  # maximum
_PROBE_MINUTES = 0.05  # maximum training time of a probe
_PROBE_SHARE = 0.1  # fraction of the estimated training time after which a probe with two epochs ends
_MARGIN = 1.5  # factor by which a probe may underestimate the mean update of the job: measured 0.7 to 1.35
_PROBE_TIMEOUT = 120.0  # seconds, start-up included
_SHORTEST = 0.5  # seconds before the first job that an estimate mentions
_BUSY = 0.75  # processes per core (waiting or running) above which an estimate mentions the load


@dataclass(frozen=True)
class Estimate:
    """Seconds of a job: training takes `low` to `high`, starting the process and loading the data `start_up`.

    `once`: additional seconds before the first job, in which the server that forks the jobs imports PyTorch.
    """

    low: float
    high: float
    start_up: float = 0.0
    once: float = 0.0

    @property
    def total(self) -> tuple[float, float]:
        return self.start_up + self.low, self.start_up + self.high


def per_update(
    metrics: Sequence[Mapping[str, Any]], seconds: float, steps: int, start: tuple[int, float] = (0, 0.0)
) -> tuple[float, float]:
    """Returns the seconds per update including validation: in the fastest whole epoch, and on average.

    Args:
        metrics: lines of metrics.jsonl, with `step` and `seconds` since the start.
        seconds: of all `steps` updates, including an incomplete last epoch.
        start: updates that do not count, and their seconds.
    """
    ends = [start, *((line["step"], line["seconds"]) for line in metrics)]
    epochs = [
        (seconds - former) / (step - first)
        for (first, former), (step, seconds) in pairwise(ends)
        if step > first and seconds > former
    ]
    average = (seconds - start[1]) / (steps - start[0])
    return min([*epochs, average]), average


def first_updates(times: Sequence[tuple[int, float]], seconds: float, steps: int) -> tuple[int, float]:
    """Returns the number of warm-up updates of a run, and their seconds; (0, 0) if no update follows.

    The seconds include the time after the last logged update (a final validation), which also counts once.

    Args:
        times: of the logged updates, by any clock.
        seconds: of the whole run of `steps` updates.
    """
    if not times or times[0][0] >= steps:
        return 0, 0.0
    (first, start), (_, end) = times[0], times[-1]
    return first, min(max(seconds - (end - start), 0.0), seconds)


def is_enough(metrics: Sequence[Mapping[str, Any]], epochs: int, steps: int | None) -> bool:
    """Returns whether a probe has trained long enough, compared to the estimated time of the job."""
    if len(metrics) < 2:
        return False
    last = metrics[-1]
    total = steps or epochs * last["step"] / last["epoch"]
    fastest, _ = per_update(metrics, last["seconds"], last["step"])
    return bool(last["seconds"] >= _PROBE_SHARE * fastest * total)


def estimate_job(configs: Sequence[Mapping[str, Any]], choices: Mapping[str, str]) -> Estimate | None:
    """Estimates the mean seconds of a job with these (saved) configs; None if no probe trained.

    Runs one to three of the different configs for a few seconds each in a temporary folder, and warns of failures.
    Raises `UserError` if none of them can work.
    """
    different: dict[str, Mapping[str, Any]] = {}
    for config in configs:
        timed = {key: value for key, value in flatten(config).items() if _may_change_time(key)}
        different.setdefault(repr(timed), config)
    candidates = list(different.values())
    count = min(_PROBES, len(candidates), -(-len(configs) // _JOBS_PER_PROBE))
    estimates: list[Estimate | None] = []
    errors: list[UserError | RunError] = []
    for i in range(count):  # evenly spaced, from the first to the last
        try:
            estimates.append(_probe(candidates[round(i * (len(candidates) - 1) / max(count - 1, 1))], choices))
        except (UserError, RunError) as error:
            errors.append(error)
    if not estimates and isinstance(errors[0], UserError):
        raise errors[0]
    for message in dict.fromkeys(map(str, errors)):
        print(f"warning: a job would fail: {message}", flush=True)
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return None
    start_up, once = mean(e.start_up for e in known), max(e.once for e in known)
    return Estimate(mean(e.low for e in known), mean(e.high for e in known), start_up, once)


def _may_change_time(key: str) -> bool:
    # `name` has the role PLACE like keys that change the time, but does not change it.
    return role_of(key) not in (Role.SEED, Role.COMMAND) and key not in ("name", *LABELS)


def _probe(config: Mapping[str, Any], choices: Mapping[str, str]) -> Estimate | None:
    """Trains for a few seconds and extrapolates to all updates; None if the probe times out or is killed.

    Raises `UserError` if the config cannot work, `RunError` if the run fails.
    """
    from dlopt.tracking.tensorboard import read_times
    from dlopt.training.checkpoint.checkpoints import Checkpoints  # imports torch

    # TensorBoard's files have the time of each logged update; other trackers would send them.
    probe_config = {**config, "max_time": _PROBE_MINUTES, "tracking": ["tensorboard"], "log_every_steps": 1}
    probe_config |= {"resume": None, "dry_run": False}
    probe_config["schedule_epochs"] = None  # the horizon below is then the length of the run
    with scratch() as path:
        folder = RunFolder(path)
        describe(folder.path, probe_config, [], choices)
        begin = time.monotonic()
        process = pools.spawn(folder.path, {}, None)  # the first one waits for the server
        start = time.monotonic()
        while (code := process.poll()) is None:
            if time.monotonic() > start + _PROBE_TIMEOUT:
                process.kill()
                return None
            if is_enough(read_metrics(folder.path), config["epochs"], config["steps"]):
                process.stop()
            time.sleep(0.1)
        elapsed = time.monotonic() - start
        if code == "returned":
            return None
        result = result_of(folder, code)
        if result.status == "failed":
            raise (UserError if code == USER_ERROR else RunError)(result.reason)
        seconds, steps = result.metrics.get("seconds"), result.metrics.get("steps")
        if not seconds or not steps:  # nothing was trained
            return None
        start_up = max(elapsed - seconds, 0.0)
        if result.status in ("finished", "stopped_early"):
            return Estimate(seconds, seconds, start_up, start - begin)
        checkpoint = Checkpoints(folder.checkpoints).load_newest()
        assert checkpoint is not None  # an interrupted run that has trained leaves one
        # The horizon counts batches. A batch that grows makes updates longer: as many batches take as long.
        batches = checkpoint.epoch * (checkpoint.steps_per_epoch or 0) + checkpoint.position
        updates = checkpoint.horizon * steps / (batches or steps)
        first = first_updates(read_times(folder.path / "tensorboard"), seconds, steps)
        fastest, average = per_update(read_metrics(folder.path), seconds, steps, first)
        rest = updates - first[0]
        low, high = fastest * rest, _MARGIN * average * rest
        return Estimate(first[1] + low, first[1] + high, start_up, start - begin)


def print_estimate(
    configs: Sequence[Mapping[str, Any]],
    choices: Mapping[str, str],
    jobs: int,
    at_once: int = 1,
    *,
    in_process: bool = False,
) -> None:
    """Prints how long the jobs will take. `in_process`: all jobs run in the process of the command."""
    busy = _load()
    estimate = estimate_job(configs, choices)
    if estimate is not None and in_process:
        estimate = replace(estimate, start_up=0.0, once=estimate.once + estimate.start_up)
    print(f"{estimate_line(estimate, jobs, at_once)}{busy}")


def _load() -> str:
    """Notes that an estimate includes the load of other programs on this machine; "" if its cores are free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    others = os.getloadavg()[0]  # of the last minute
    if others < _BUSY * cores:
        return ""
    return f" (on this busy machine: a load of {others:.1f} for {format_count('cores', cores)}; faster once it is free)"


def estimate_line(estimate: Estimate | None, jobs: int, at_once: int) -> str:
    """Formats the estimate. The total is computed from the rounded time of a job, so that the line adds up."""
    at_once = min(at_once, jobs)
    parallel = f", {at_once} at once" if at_once > 1 else ""
    if estimate is None:
        return f"{format_count('jobs', jobs)}{parallel}; the duration could not be estimated"
    if jobs == 1:
        return f"1 job of about {format_range(*(round_duration(estimate.once + each) for each in estimate.total))}"
    job = [round_duration(seconds) for seconds in estimate.total]
    once = round_duration(estimate.once) if estimate.once >= _SHORTEST else 0.0
    total = [once + seconds * math.ceil(jobs / at_once) for seconds in job]
    start = f" and {format_duration(once)} to start" if once else ""
    each = f"{format_count('jobs', jobs)} of about {format_range(*job)} each{parallel}{start}"
    return f"{each}: about {format_range(*total)} in total"
