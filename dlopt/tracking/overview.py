"""Display of a sweep: one live overview at a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlopt.tracking import layout
from dlopt.tracking.console import Screen

_ROWS = 12  # of running jobs


@dataclass
class _Running:
    label: str
    since: float
    line: Mapping[str, Any] = field(default_factory=dict)


class Overview(Screen):
    """Follows a sweep.

    `metric`, `direction`: what is best; without them the best validation accuracy, or loss where there is none.
    """

    def __init__(
        self,
        total: int,
        metric: str | None = None,
        direction: Literal["maximize", "minimize"] | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        super().__init__(stream)
        self._total = total
        self._counts = Counter[str]()  # jobs by how they ended
        self._metric, self._direction = metric, direction
        self._running: dict[int, _Running] = {}
        self._best: tuple[float, int, str] | None = None
        self._begun, self._before = time.monotonic(), 0
        self._seconds: list[float] = []  # of the jobs that have ended here
        if self.terminal:
            self._start_live(self._renderable, redirect=False)

    def message(self, text: str, style: str = "") -> None:
        self._print(Text(text, style))

    def started(self, number: int, label: str) -> None:
        self._running[number] = _Running(label, time.monotonic())
        if self._live is None:
            self.message(f"job {number}: {label}")

    def progress(self, number: int, line: Mapping[str, Any]) -> None:
        """The newest line of a running job's metrics.jsonl."""
        self._running[number].line = line

    def ended(
        self, number: int, label: str, status: str, metrics: Mapping[str, Any], reason: str = "", known: bool = False
    ) -> None:
        """`known`: an earlier call has shown its end."""
        running = self._running.pop(number, None)
        self._counts["finished" if status == "stopped_early" else status] += 1
        self._consider(number, label, status, metrics)
        if known:
            self._before += 1
            return
        words = [f"job {number} {status.replace('_', ' ')}" + (f": {reason}" if reason else "")]
        value = metrics.get(self._metric or "")
        if self._metric is not None and isinstance(value, int | float):
            words.append(f"{self._metric} {layout.metric(self._metric, value)}")
        if running is not None:
            self._seconds.append(time.monotonic() - running.since)
            if not reason:
                words.append(f"in {layout.clock(self._seconds[-1])}")
        if self._live is not None:
            words.append(label)
        words.append(self._state())
        if self._best is not None and self._live is None:
            words.append(f"best: job {self._best[1]}")
        self.message(" | ".join(filter(None, [*words, self._left()])), "red" if status == "failed" else "")

    def share(self, counts: Mapping[str, int], best: Iterable[tuple[int, str, Mapping[str, float]]]) -> None:
        """Takes over the counts by status of a sweep on which other processes work, too.

        `best`: (number, label, metrics) of its finished jobs. The first call gives those that had ended before.
        """
        if not self._seconds and not self._running and not self._counts:
            self._before = sum(counts.values())
        self._counts.update({status: count - self._counts[status] for status, count in counts.items()})
        for number, label, metrics in best:
            self._consider(number, label, "finished", metrics)

    def _consider(self, number: int, label: str, status: str, metrics: Mapping[str, Any]) -> None:
        if self._metric is None and metrics.get("best_val_accuracy") is not None:
            self._metric, self._direction = "best_val_accuracy", "maximize"
        elif self._metric is None and metrics.get("best_val_loss") is not None:
            self._metric, self._direction = "best_val_loss", "minimize"
        value = metrics.get(self._metric or "")
        if status not in ("finished", "stopped_early") or not isinstance(value, int | float):
            return
        sign = 1 if self._direction == "maximize" else -1
        if self._best is None or sign * value > sign * self._best[0]:
            self._best = (value, number, label)

    def _state(self) -> str:
        """3/9: 2 done, 1 running, 1 failed."""
        counts = {"pruned": 0, "interrupted": 0, **self._counts, "running": len(self._running)}
        parts = [f"{counts[name]} {name}" for name in ("pruned", "interrupted", "running") if counts[name]]
        parts = [f"{self._counts['finished']} done", *parts, f"{self._counts['failed']} failed"]
        return f"{self._counts.total()}/{self._total}: {', '.join(parts)}"

    def _left(self) -> str:
        """The time left, by the pace since this process began; '' where there is none yet.

        A running job counts by its share of an ended job's mean time: several at once end together.
        """
        now = time.monotonic()
        ended: float = self._counts.total() - self._before
        remaining: float = self._total - self._counts.total()
        if ended <= 0 or remaining <= 0:
            return ""
        if self._seconds:
            mean = max(sum(self._seconds) / len(self._seconds), 1e-3)
            under_way = sum(min((now - job.since) / mean, 0.95) for job in self._running.values())
            ended, remaining = ended + under_way, remaining - under_way
        left = (now - self._begun) / ended * remaining
        return f"{layout.clock(left)} left" if left else ""

    def refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _renderable(self) -> RenderableType:
        bar = ProgressBar(max(self._total, 1), self._counts.total(), width=30, complete_style="cyan")
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("sweep", "bold"), bar, self._state(), self._left())
        rows = []
        if self._best is not None and self._metric is not None:
            value, number, label = self._best
            rows.append(Text(f"best   {self._metric} {layout.metric(self._metric, value)}  job {number}: {label}"))
        for number, running in list(self._running.items())[:_ROWS]:
            words = [f"job {number}", *_metrics(running.line), running.label]  # which a narrow terminal cuts
            rows.append(Text("  ".join(words), "dim"))
        for row in rows:
            row.no_wrap, row.overflow = True, "ellipsis"
        return Group(head, *rows)


def _metrics(line: Mapping[str, Any]) -> list[str]:
    shown = ("epoch", "train_loss", "val_loss", "val_accuracy")
    return [
        f"{key} {layout.metric(key, line[key]) if key != 'epoch' else line[key]}"
        for key in shown
        if isinstance(line.get(key), int | float)
    ]
