"""Runs the pairs of a judgement, each of the same seed, until they decide."""

import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.plain_values import flatten
from dlopt.basics.status_line import status_line
from dlopt.config.resuming import differences
from dlopt.extend import (
    Record,
    Role,
    RunError,
    RunFolder,
    UserError,
    lower_is_better,
    read_run,
    role_of,
    short_path,
    show,
    without,
)
from dlopt.lab.claimed_trials import ClaimedTrials
from dlopt.lab.judge.proposal import SEEDS, SIDES, Side, refuse_loss
from dlopt.lab.judge.wording import COSTS, pair_line
from dlopt.metrics.names import monitored_directions, resolve_monitor, split_of
from dlopt.metrics.shown import words
from dlopt.run.environment import code_sha256
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import OUTPUT, Job, JobResult, PlanJob
from dlopt.sweeps.pool import Pool

if TYPE_CHECKING:
    from dlopt.lab.judge.ledger import Entry, Verdict
    from dlopt.lab.judge.sequential import Look  # imports NumPy, which the help does not need

_APART = 1000  # seeds between two proposals: each has its own seeds, independent of earlier verdicts


@dataclass(frozen=True)
class PairedRun:
    side: str
    seed: int

    @property
    def subfolder(self) -> str:
        return f"{self.side}/{self.seed}"


@dataclass
class Judgement:
    """The runs of a proposal in its folder, and their results so far. A request of `ClaimedTrials`.

    Attributes:
        seeds: pairs after which the change stays undecided.
        end: time (time.monotonic) after which no pair starts.
        ahead: pairs that run at once.
        data: identity of the data.
        same: number of pairs with bitwise equal metrics.
        costs: what the runs of each side cost, by the names of `COSTS`; not of those that diverged.
    """

    folder: Path
    sides: Mapping[str, Side]
    entry: "Entry"
    seeds: int
    end: float = math.inf
    ahead: int = 1
    metric: str = ""
    gains: list[float] = field(default_factory=list)
    looks: "list[Look]" = field(default_factory=list)
    same: int = 0
    costs: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    data: Mapping[str, Any] = field(default_factory=dict)

    def pair(self, number: int) -> list[PairedRun]:
        return [PairedRun(side, _APART * self.entry.number + number) for side in SIDES]

    def line(self, trial: PairedRun) -> list[str]:
        side = self.sides[trial.side]
        tags = show([*side.plan.saved["tags"], self.entry.name])
        return [*without(side.lines, "tags"), f"tags={tags}", f"seed={trial.seed}"]

    def label(self, trial: PairedRun) -> str:
        return f"{trial.side}, seed {trial.seed}"

    def run_folder(self, trial: PairedRun) -> RunFolder:
        return RunFolder(self.folder / trial.subfolder)

    @property
    def verdict(self) -> "Verdict":
        return self.looks[-1].verdict if self.looks else "undecided"

    def concluded(self) -> "Entry":
        """Returns the entry with the results of the runs.

        Bitwise equal pairs are no final verdict: the change may act in a later one.
        """
        is_same = self.verdict == "undecided" and 0 < len(self.gains) == self.same
        verdict: Verdict = "same" if is_same else self.verdict
        costs = {
            side: {name: _median(run.get(name) for run in runs) for name in COSTS} for side, runs in self.costs.items()
        }
        entry = replace(self.entry, verdict=verdict, metric=self.metric, gains=tuple(self.gains), costs=costs)
        if not self.looks:
            return entry
        look = self.looks[-1]
        return replace(entry, estimate=look.estimate, low=look.low, high=look.high)

    def waiting(self) -> list[PairedRun]:
        """Returns the trials of the next pairs; none when the verdict or the budget has ended the judgement."""
        self.collect()
        first = len(self.gains)
        if self.verdict != "undecided" or first >= self.seeds:
            return []
        pairs = [self.pair(number) for number in range(first, min(first + self.ahead, self.seeds))]
        if time.monotonic() > self.end:  # a pair that has begun is completed
            pairs = [pair for pair in pairs if any(self.run_folder(each).has_run() for each in pair)]
        return [each for pair in pairs for each in pair if not self.run_folder(each).has_ended(or_failed=True)]

    def collect(self) -> None:
        """Reads the pairs that have ended, in their order, until one decides.

        Raises:
            RunError: a run failed otherwise than by diverging.
            UserError: the change alters the loss by which it is judged, or a run is not of this proposal.
        """
        from dlopt.lab.judge.sequential import looks

        while self.verdict == "undecided" and len(self.gains) < self.seeds:
            pair = self.pair(len(self.gains))
            if not all(self.run_folder(each).has_ended(or_failed=True) for each in pair):
                return
            base, change = map(self._read, pair)
            self.gains.append(self._gain(base, change))
            for side, record in zip(SIDES, (base, change), strict=True):
                self.costs[side] += [dict(record.metrics)] if record.status != "failed" else []
            self.same += _curves(base) == _curves(change)
            self.looks += looks(self.gains, self.entry.rate, self.entry.margin, first=len(self.gains))

    def refuse_foreign(self) -> None:
        """Raises `UserError` if a run in the folder is not of this proposal: it would count as one, or be resumed."""
        for number in range(self.seeds):
            for trial in self.pair(number):
                if self.run_folder(trial).has_run():
                    self._refuse_foreign(trial)

    def _refuse_foreign(self, trial: PairedRun) -> None:
        folder, expected = self.run_folder(trial), self.sides[trial.side].plan.saved
        config = folder.config()
        if config is None and not folder.checkpoints.exists():  # it failed before it was described
            return
        config = config or {}
        flat, planned = flatten(config), flatten(expected)
        derived = {key for key, value in flat.items() if role_of(key) is Role.SEED and value == trial.seed}
        different = [key for key in SEEDS if flat.get(key) != trial.seed]
        different += [key for key in differences(config, expected) if key not in derived]
        different += [key for key in planned if role_of(key) is Role.LENGTH and flat.get(key) != planned[key]]
        tags = config.get("tags")
        different += [] if isinstance(tags, list) and self.entry.name in tags else ["tags"]
        if different:
            found = f"{different[0]}={show(flat.get(different[0]))}"
            advice = "remove it, or judge in another folder with output=DIR"
            raise UserError(f"{short_path(folder.path)}: is not a run of this proposal ({found}); {advice}")

    def _refuse_changed(self, trial: PairedRun, record: Record) -> None:
        """Raises `RunError` if data or code of a run have changed since the judgement began."""
        side, again = self.sides[trial.side], "the same command judges it with what is there now"
        data, code = record.origin.get("data"), record.origin.get("code") or {}
        if data is not None and self.data and trained_on(data) != trained_on(self.data):
            raise RunError(f"{short_path(record.path)}: the data were changed during the judgement; {again}")
        for name, sha256 in {} if side.code is not None else side.packages.items():
            if (found := code.get(name, {}).get("sha256", sha256)) != sha256:
                raise RunError(f"{short_path(record.path)}: {name} was changed during the judgement ({found}); {again}")

    def _read(self, trial: PairedRun) -> Record:
        self._refuse_foreign(trial)
        folder = self.run_folder(trial)
        summary = folder.summary() or {}
        if summary.get("status") == "failed" and not summary.get("diverged"):
            raise RunError(f"{short_path(folder.path)}: {summary.get('reason')}; the same command runs it again")
        record = read_run(folder.path)
        if not isinstance(record, Record):
            raise RunError(f"{short_path(folder.path)}: {record.reason}; remove this folder")
        self._refuse_changed(trial, record)
        return record

    def _gain(self, base: Record, change: Record) -> float:
        """Returns the difference of the best values of the monitored metric; infinite if one of the runs diverged."""
        for record in (base, change):
            if not self.metric and record.history:
                saved = self.sides["base"].plan.saved
                self.metric = resolve_monitor(str(saved["monitor"]), record.history[-1])
                refuse_loss(self.sides["base"], self.sides["change"], self.metric)
        values = [_best(record, self.metric) for record in (base, change)]
        return 0.0 if values[0] == values[1] else values[1] - values[0]


def trained_on(data: Mapping[str, Any]) -> Any:
    """Returns the part of an identity on which a verdict depends: not the test set, nor named validation sets."""
    return {name: split for name, split in data.items() if name in ("train", "val")}


def _best(record: Record, metric: str) -> float:
    """Returns the best value of a metric, negated where a lower one is better; -inf for a run that diverged."""
    sign = -1 if lower_is_better(metric or "val_loss", monitored_directions(record.config)) else 1
    values = [sign * line[metric] for line in record.history if line.get(metric) is not None]
    return max(values, default=-math.inf) if record.status != "failed" else -math.inf


def _median(values: Iterable[float | None]) -> float | None:
    """Returns the median of the known values; None if there are none."""
    known = [each for each in values if each is not None]
    return float(statistics.median(known)) if known else None


def _curves(record: Record) -> list[list[tuple[str, float]]]:
    """Returns the computed values: the metrics of all epochs, without times."""
    return [[(k, v) for k, v in line.items() if split_of(k) in ("train", "val")] for line in record.history]


class _Pairs(ClaimedTrials[PairedRun]):
    """Supplies the trials of the next pairs, and prints each look."""

    request: Judgement

    def __init__(self, request: Judgement, plan_job: PlanJob, show: Callable[[str], None]) -> None:
        """`show` replaces the current line of a terminal."""
        from dlopt.tracking.overview import Overview

        overview = Overview(2 * request.seeds, metric="", silent=True)
        super().__init__(request, plan_job, lambda _: False, overview)
        self._shown, self._show = len(request.looks), show

    def next(self) -> Job | None:
        self.waiting = dict.fromkeys(self.request.waiting())  # those that run are locked
        self._show(f"training: {len(self.request.gains)} of at most {self.request.seeds} pairs are done ...")
        return super().next()

    def ended(self, job: Job, result: JobResult) -> None:
        super().ended(job, result)
        if result.status == "failed" and not job.folder.has_ended(or_failed=True):
            raise RunError(f"{short_path(job.folder.path)}: {result.reason}; the same command runs it again")
        self.request.collect()
        self._show("")
        for number in range(self._shown, len(self.request.looks)):
            look, gain, metric = self.request.looks[number], self.request.gains[number], self.request.metric
            if number == 0:
                self.overview.message(f"gain in {words(metric)} (above 0, the change is better):")
            self.overview.message(pair_line(metric, number + 1, gain, look.low, look.high))
        self._shown = len(self.request.looks)


def run(judgement: Judgement, pool: Pool, plan_job: PlanJob) -> None:
    """Runs the pairs that are missing. On a signal, raises KeyboardInterrupt. Raises `RunError` for a failed run."""
    for side in SIDES:
        for path in judgement.folder.glob(f"{side}/*/summary.json"):
            summary = RunFolder(path.parent).summary() or {}
            if summary.get("status") == "failed" and not summary.get("diverged"):
                shutil.rmtree(path.parent)
    pools.warm_up()
    judgement.ahead = max(pool.slots // len(SIDES), 1)
    code = judgement.sides["change"].code
    with status_line() as show:
        source = _Pairs(judgement, plan_job, show)
        pools.run(source, pool if code is None else _with_code(pool, code), source.overview)


# -- code=FOLDER


def _with_code(pool: Pool, code: Path) -> Pool:
    """Returns a pool that runs the change in interpreters of their own, which import from `code` first.

    The server that forks the other jobs has imported the packages of the base.
    """
    sha256, cores = code_sha256(code), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> pools.Process:
        if folder.parent.name != "change":
            return pool.start(slot, folder, environment)
        if code_sha256(code) != sha256:
            raise RunError(f"code={code}: was changed while it is being judged; the runs do not count, remove {folder}")
        path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / OUTPUT).open("ab") as output:
            process = _Interpreter(
                [sys.executable, "-P", "-m", "dlopt.run.job", str(folder)], stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, env={**os.environ, **environment, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        if cores and pool.slots > 1:  # as the jobs of the pool
            os.sched_setaffinity(process.pid, set(cores[slot :: pool.slots]) or {cores[slot % len(cores)]})
        return process

    return replace(pool, start=start)


class _Interpreter(subprocess.Popen[bytes]):
    def stop(self) -> None:
        self.terminate()
