"""A sweep as the user sees it: one live overview at a terminal, plain lines elsewhere, the leaderboard at its end."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dlopt.tracking import layout
from dlopt.tracking.console import open_console

_ROWS = 12  # of running jobs


@dataclass
class Tally:
    """How many jobs stand where."""

    total: int
    finished: int = 0
    pruned: int = 0
    interrupted: int = 0
    failed: int = 0
    running: int = 0

    @property
    def ended(self) -> int:
        return self.finished + self.pruned + self.failed + self.interrupted

    def words(self) -> str:
        parts = [f"{self.finished} done"]
        counts = {
            "pruned": self.pruned, "interrupted": self.interrupted, "running": self.running, "failed": self.failed,
        }  # fmt: skip
        parts += [f"{count} {name}" for name, count in counts.items() if count or name == "failed"]
        return f"{self.ended}/{self.total}: {', '.join(parts)}"


@dataclass
class _Running:
    label: str
    since: float
    line: Mapping[str, Any] = field(default_factory=dict)


class Overview:
    """Follows a sweep; nothing here raises because of the terminal.

    `figure`, `direction`: what is best; without them the best validation accuracy, or loss where there is none.
    """

    def __init__(
        self,
        total: int,
        figure: str | None = None,
        direction: Literal["maximize", "minimize"] | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        self.tally = Tally(total)
        self._figure, self._direction = figure, direction
        self._output, self._console, self._terminal = open_console(stream)
        self._running: dict[int, _Running] = {}
        self._best: tuple[float, int, str] | None = None
        self._begun, self._before = time.monotonic(), 0
        self._seconds: list[float] = []  # of the jobs that have ended here
        self._live: Live | None = None
        if self._terminal:
            self._live = Live(
                get_renderable=self._renderable,
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def message(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)
        self._output.flush()

    def started(self, number: int, label: str) -> None:
        self._running[number] = _Running(label, time.monotonic())
        self.tally.running = len(self._running)
        if self._live is None:
            self.message(f"job {number}: {label}")

    def progress(self, number: int, line: Mapping[str, Any]) -> None:
        """The newest line of a running job's metrics.jsonl."""
        self._running[number].line = line

    def ended(
        self, number: int, label: str, status: str, figures: Mapping[str, Any], reason: str = "", known: bool = False
    ) -> None:
        """`known`: its end was told before, by an earlier call."""
        running = self._running.pop(number, None)
        self.tally.running = len(self._running)
        kind = "finished" if status == "stopped_early" else status
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self._consider(number, label, status, figures)
        if known:
            self._before += 1
            return
        if running is not None:
            self._seconds.append(time.monotonic() - running.since)
        words = [f"job {number} {status.replace('_', ' ')}"]
        if reason:
            words[0] += f": {reason}"
        value = figures.get(self._figure or "")
        if self._figure is not None and isinstance(value, int | float):
            words.append(f"{self._figure} {layout.figure(self._figure, value)}")
        if running is not None and not reason:
            words.append(f"in {layout.clock(self._seconds[-1])}")
        if self._live is not None:
            words.append(label)
        self.message(" | ".join([*words, *self._state()]), "red" if status == "failed" else "")

    def share(
        self, finished: int, pruned: int, failed: int, best: Iterable[tuple[int, str, Mapping[str, float]]]
    ) -> None:
        """Takes over how far a sweep is that other processes work on, too; `best`: (number, label, figures) of jobs."""
        self.tally.finished, self.tally.pruned, self.tally.failed = finished, pruned, failed
        for number, label, figures in best:
            self._consider(number, label, "finished", figures)

    def _consider(self, number: int, label: str, status: str, figures: Mapping[str, Any]) -> None:
        if self._figure is None and figures.get("best_val_accuracy") is not None:
            self._figure, self._direction = "best_val_accuracy", "maximize"
        elif self._figure is None and figures.get("best_val_loss") is not None:
            self._figure, self._direction = "best_val_loss", "minimize"
        value = figures.get(self._figure or "")
        if status not in ("finished", "stopped_early") or not isinstance(value, int | float):
            return
        sign = 1 if self._direction == "maximize" else -1
        if self._best is None or sign * value > sign * self._best[0]:
            self._best = (value, number, label)

    def _state(self) -> list[str]:
        words = [self.tally.words()]
        if self._best is not None and self._live is None:
            words.append(f"best: job {self._best[1]}")
        left = self._left()
        return [*words, f"{layout.clock(left)} left"] if left else words

    def _left(self) -> float | None:
        """Seconds, by the pace since this process began.

        Of jobs that run counts what share of an ended job's mean time they have had: several at once end together.
        """
        now = time.monotonic()
        ended: float = self.tally.ended - self._before
        remaining: float = self.tally.total - self.tally.ended
        if ended <= 0 or remaining <= 0:
            return None
        if self._seconds:
            mean = max(sum(self._seconds) / len(self._seconds), 1e-3)
            under_way = sum(min((now - job.since) / mean, 0.95) for job in self._running.values())
            ended, remaining = ended + under_way, remaining - under_way
        return (now - self._begun) / ended * remaining

    def refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _renderable(self) -> RenderableType:
        tally, left = self.tally, self._left()
        bar = ProgressBar(total=max(tally.total, 1), completed=tally.ended, width=30, complete_style="cyan")
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("sweep", "bold"), bar, tally.words(), f"{layout.clock(left)} left" if left else "")
        parts: list[RenderableType] = [head]
        if self._best is not None and self._figure is not None:
            value, number, label = self._best
            best = f"best   {self._figure} {layout.figure(self._figure, value)}  job {number}: {label}"
            parts.append(Text(best, no_wrap=True, overflow="ellipsis"))
        for number, running in list(self._running.items())[:_ROWS]:
            words = [f"job {number}", *_figures(running.line), running.label]  # which a narrow terminal cuts
            parts.append(Text("  ".join(words), "dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def close(self) -> None:
        """Takes the live display away; safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._output.flush()


def _figures(line: Mapping[str, Any]) -> list[str]:
    shown = ("epoch", "train_loss", "val_loss", "val_accuracy")
    return [
        f"{key} {layout.figure(key, line[key]) if key != 'epoch' else line[key]}"
        for key in shown
        if isinstance(line.get(key), int | float)
    ]
