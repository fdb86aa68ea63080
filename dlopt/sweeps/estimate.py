"""How long jobs will take: a few of them are run for some seconds, in a folder that is thrown away."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlopt.folders import RunFolder
from dlopt.sweeps import warm

_PROBES = 3
_MINUTES = 0.05  # that a probe trains
_PATIENCE = 120.0  # seconds after which a probe tells nothing


def seconds_of(configs: Sequence[Mapping[str, Any]], choices: Mapping[str, str]) -> float | None:
    """Mean seconds of a job of these configs (as they are saved), by the first, the middle and the last of them; None
    where none of them came to train."""
    picked = sorted({0, len(configs) // 2, len(configs) - 1})[:_PROBES]
    found = [_probe(configs[i], choices) for i in picked]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) / len(known) if known else None


def _probe(config: Mapping[str, Any], choices: Mapping[str, str]) -> float | None:
    from dlopt.errors import RunError, UserError
    from dlopt.job import describe
    from dlopt.train.checkpoint import Checkpoints

    probing = {**config, "max_time": _MINUTES, "tracking": [], "resume": None, "dry_run": False}
    with tempfile.TemporaryDirectory(prefix="dlopt-") as place:
        folder = RunFolder(Path(place))
        describe(folder.path, probing, [], choices)
        process, deadline = warm.spawn(folder.path, {}, None), time.monotonic() + _PATIENCE
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                return None
            time.sleep(0.1)
        summary = folder.summary() or {}
        seconds, steps = summary.get("seconds"), summary.get("steps")
        if summary.get("status") in ("finished", "stopped_early") or not seconds or not steps:
            return seconds
        try:
            state = Checkpoints(folder.checkpoints).load_newest()
        except (RunError, UserError):
            return None
        return None if state is None else float(seconds * state["progress"]["horizon"] / steps)


def told(seconds: float | None, jobs: int, at_once: int) -> str:
    """One line for `jobs` jobs of `seconds` each, `at_once` of them at a time."""
    from dlopt.tracking.layout import clock

    if seconds is None:
        return f"{jobs} jobs, {at_once} at once; how long they take could not be found out"
    whole = seconds * -(-jobs // at_once)
    return f"{jobs} jobs of about {clock(seconds)} each, {at_once} at once: about {clock(whole)} in all"
