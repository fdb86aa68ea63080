"""Display of a sweep: a live overview on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.folders import ENDED
from dlopt.metrics.names import VAL_ACCURACY, VAL_LOSS, Goal, column_of
from dlopt.metrics.shown import COLUMNS, format_metric, listed_in
from dlopt.tracking.console import Screen

_MAX_ROWS = 12  # running jobs on display
_BAR_WIDTH = 30  # characters


@dataclass
class _Running:
    label: str
    since: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Overview(Screen):
    """Shows the progress of a sweep: counts, time left, the best job, the running jobs.

    `metric`, `direction`: decide which job is best; by default best_val_accuracy, or best_val_loss in a regression.
    `similar`: the jobs take about the same time; otherwise no time left is estimated.
    `silent`: only messages are printed; the source of the jobs shows them itself.
    `jobs_per_trial`: of several, a trial is best by their mean, which `update_shared` receives.
    """

    def __init__(
        self,
        total: int,
        metric: str | None = None,
        direction: Goal | None = None,
        stream: IO[str] | None = None,
        similar: bool = True,
        silent: bool = False,
        jobs_per_trial: int = 1,
    ) -> None:
        super().__init__(stream)
        self.note = ""  # below the running jobs of the live display
        self._total, self._similar, self._silent = total, similar, silent
        self._unit = "job" if jobs_per_trial == 1 else "trial"  # of the best one
        self._counts = Counter[str]()  # ended jobs by status
        self._metric, self._direction = metric, direction
        self._running: dict[int, _Running] = {}
        self._best: tuple[float, int, str] | None = None  # value, number, label
        self._start_time, self._done_before = time.monotonic(), 0
        self._durations: list[float] = []  # seconds of the jobs that this process ran
        if self.terminal and not silent:
            self._start_live(self._renderable, redirect=False)

    def started(self, number: int, label: str) -> None:
        label = formats.round_floats(label)
        self._running[number] = _Running(label, time.monotonic())
        if self._live is None and not self._silent:
            self.message(f"job {number}: {label}")

    def forked(self, number: int) -> None:
        """Restarts the clock of a job that is running now: the server imported PyTorch before it, once for all jobs."""
        now, running = time.monotonic(), self._running[number]
        self._start_time += now - running.since
        running.since = now

    def progress(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Stores the newest line of a running job's metrics.jsonl."""
        self._running[number].metrics = metrics

    def ended(
        self, number: int, label: str, status: str, metrics: Mapping[str, Any], reason: str = "", known: bool = False
    ) -> None:
        """Counts a job and prints its result. `known`: it had ended before this process started; nothing is printed."""
        label = formats.round_floats(label)
        running = self._running.pop(number, None)
        self._counts["finished" if status == "stopped_early" else status] += 1
        if self._unit == "job":
            self._update_best(number, label, status, metrics)
        if known:
            self._done_before += 1
        if known or self._silent:
            return
        reason = " ".join(reason.split())  # an error of other code may have several lines
        texts = [f"job {number} {status.replace('_', ' ')}" + (f": {reason}" if reason else "")]
        value = metrics.get(self._metric or "")
        if self._metric is not None and isinstance(value, int | float):
            texts.append(f"{self._metric} {format_metric(self._metric, value)}")
        if running is not None:
            self._durations.append(time.monotonic() - running.since)
            if not reason:
                texts.append(f"in {formats.format_clock(self._durations[-1])}")
        if self._live is not None:  # the live display has the rest
            texts.append(label)
        else:
            texts += [self._state(), "" if self._best is None else f"best: {self._unit} {self._best[1]}"]
            texts.append("" if status == "interrupted" else self._time_left())
        self.message(" | ".join(filter(None, texts)), "red" if status == "failed" else "")

    def update_shared(self, counts: Mapping[str, int], jobs: Iterable[tuple[int, str, Mapping[str, float]]]) -> None:
        """Sets the counts by status of a sweep that several processes share.

        `jobs`: (number, label, metrics) of its finished jobs or trials. The first call defines what was done before.
        """
        if not self._durations and not self._running and not self._counts:
            self._done_before = sum(counts.values())
        self._counts.update({status: count - self._counts[status] for status, count in counts.items()})
        for number, label, metrics in jobs:
            self._update_best(number, formats.round_floats(label), "finished", metrics)

    def _update_best(self, number: int, label: str, status: str, metrics: Mapping[str, Any]) -> None:
        if self._metric is None and metrics.get(VAL_ACCURACY.best) is not None:
            self._metric, self._direction = VAL_ACCURACY.best, "maximize"
        elif self._metric is None and metrics.get(VAL_LOSS.best) is not None:
            self._metric, self._direction = VAL_LOSS.best, "minimize"
        value = metrics.get(self._metric or "")
        if status not in ENDED or not isinstance(value, int | float):
            return
        if "data.fold=" in label:  # no run is the best one: folds are compared by the mean over all of them
            return
        sign = 1 if self._direction == "maximize" else -1
        if self._best is None or sign * value > sign * self._best[0]:
            self._best = (value, number, label)

    def _state(self) -> str:
        """Formats the counts: 3/9: 2 done, 1 running, 1 failed."""
        others = {status: self._counts[status] for status in ("pruned", "interrupted")}
        others["running"] = len(self._running)
        texts = [f"{count} {status}" for status, count in others.items() if count]
        texts = [f"{self._counts['finished']} done", *texts, f"{self._counts['failed']} failed"]
        return f"{self._counts.total()}/{self._total}: {', '.join(texts)}"

    def _time_left(self) -> str:
        """Estimates the time left from the rate since this process started; '' before the first result.

        Running jobs count as fractions, by their time relative to the mean duration. Otherwise the estimate would jump
        whenever jobs that started together end together.
        """
        now = time.monotonic()
        done: float = self._counts.total() - self._done_before
        remaining: float = self._total - self._counts.total()
        if done <= 0 or remaining <= 0 or not self._similar:
            return ""
        if self._durations:
            mean = max(sum(self._durations) / len(self._durations), 1e-3)
            in_progress = sum(min((now - job.since) / mean, 0.95) for job in self._running.values())
            done, remaining = done + in_progress, remaining - in_progress
        left = (now - self._start_time) / done * remaining
        return f"{formats.format_clock(left)} left" if left else ""

    def refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _renderable(self) -> RenderableType:
        texts = list(filter(None, [self._state(), self._time_left()]))
        bar_width = min(max(self._console.width - sum(len(text) + 2 for text in ("sweep", *texts, "")), 4), _BAR_WIDTH)
        bar = ProgressBar(max(self._total, 1), self._counts.total(), width=bar_width, complete_style="cyan")
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("sweep", "bold"), bar, *texts)
        rows = []
        if self._best is not None and self._metric is not None:
            value, number, label = self._best
            metric = format_metric(self._metric, value)
            name = column_of(self._metric)
            rows.append(Text(f"best   {name} {metric}  {self._unit} {number}: {label}"))
        for number, running in list(self._running.items())[:_MAX_ROWS]:
            texts = [f"job {number}", running.label, *_format_metrics(running.metrics)]  # narrow terminals cut the end
            rows.append(Text("  ".join(texts), "dim"))
        if self.note:
            rows.append(Text(self.note))
        for row in rows:
            row.no_wrap, row.overflow = True, "ellipsis"
        return Group(head, *rows)


def _format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {COLUMNS[key].show_brief(metrics[key])}"
        for key in listed_in("sweep")
        if isinstance(metrics.get(key), int | float)
    ]
