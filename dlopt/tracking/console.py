"""Console output of a run: header, table of epochs, result; with a live progress display at a terminal."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderHook, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.emphasis import emphasized
from dlopt.basics.length import Length, UpdateCount
from dlopt.basics.terminal_controls import drop_bad_size, without_controls
from dlopt.metrics.measures import seconds_left
from dlopt.metrics.names import split_of, tag_of
from dlopt.metrics.shown import format_metric, live_name, shown_in
from dlopt.tracking import terminal_text

if TYPE_CHECKING:
    from dlopt.tasks.report import TestReport

_SHOWN = [each.name for each in shown_in("live")]
_VAL = [name for name in _SHOWN if split_of(name) == "val"]
_TRAIN = [name for name in _SHOWN if name not in _VAL]  # also rates and throughput
_REDRAW_SECONDS = 0.1
_REDRAW_FRACTION = 0.01  # of the training time that redrawing may take


class _Output:
    """A text stream that discards output, instead of raising, once its reader is gone (`| head`, closed terminal)."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    @property
    def is_closed(self) -> bool:
        return self._stream is None

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):
                self._silence()
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._silence()

    def _silence(self) -> None:
        stream, self._stream = self._stream, None
        # The interpreter flushes stdout when it exits; with a broken pipe a successful run would exit with code 120.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, cast(TextIO, stream).fileno())
            os.close(devnull)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("closed")
        return self._stream.fileno()


@dataclass
class _Display:
    """The live display, one line each: epochs, batches of this epoch, training metrics, validation metrics.

    `position`: see `Length.position`.
    """

    length: Length
    position: int
    samples_per_batch: float
    unit: str
    evaluation: tuple[str, int, int] | None = None  # split, batch, batches
    train: Mapping[str, float | None] = field(default_factory=dict)
    val: Mapping[str, float | None] = field(default_factory=dict)
    # (time, position). The estimate of the time left starts after the first update, which compiles and warms up.
    _clock_start: tuple[float, int] | None = None
    _recent: tuple[float, int] | None = None  # start of the interval over which throughput is measured
    _throughput: float | None = None  # samples per second, exponential moving average

    def advance(self, position: int, now: float) -> None:
        self.evaluation = None
        self.position = position
        if self._clock_start is None or self._recent is None:
            self._clock_start = self._recent = (now, position)
            return
        seconds = now - self._recent[0]
        if seconds >= 0.5 and position > self._recent[1]:
            latest = (position - self._recent[1]) * self.samples_per_batch / seconds
            self._throughput = latest if self._throughput is None else 0.7 * self._throughput + 0.3 * latest
            self._recent = (now, position)

    def evaluate(self, split: str, batch: int, batches: int) -> None:
        self.evaluation = (split, batch, batches)
        # Evaluation time must not count as training time in the throughput.
        self._recent = None if self._clock_start is None else (perf_counter(), self.position)

    @property
    def end(self) -> int:
        return self.length.position(self.length.updates)

    def _time_left(self) -> str:
        if self._clock_start is None:
            return ""
        start, first = self._clock_start
        seconds = seconds_left(perf_counter() - start, self.position - first, self.end - self.position)
        return "" if seconds is None else f"{formats.format_clock(seconds)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        epochs, per_epoch, end = self.length.epochs, self.length.per_epoch, self.end
        epoch = min((max(self.position, 1) - 1) // per_epoch + 1, epochs)
        epoch_start = (epoch - 1) * per_epoch
        of_epoch = min(per_epoch, end - epoch_start)
        throughput = f"{self._throughput:,.0f} {self.unit}/s" if self._throughput is not None else ""
        # Columns: name (5), count "12/200", bar (4 to 60 cells), and the rest for the time left or the throughput.
        count_width = 2 * len(str(max(epochs, per_epoch))) + 1
        bar_width = max(min(options.max_width - 7 - count_width - 2 - 20, 60), 4)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for width in (5, count_width, bar_width, max(options.max_width - 7 - count_width - 2 - bar_width - 3, 1)):
            grid.add_column(width=width, no_wrap=True, overflow="crop")
        grid.columns[0].style, grid.columns[1].justify = "bold", "right"
        # (name, count, of, completed, total, text): the bar of the epochs advances with every update.
        rows = [("epoch", epoch, epochs, self.position, end, self._time_left())]
        if self.evaluation is None:
            done, name = self.position - epoch_start, "batch" if self.length.grows else "step"
            rows.append((name, done, of_epoch, done, of_epoch, throughput))
        else:
            split, batch, batches = self.evaluation
            rows.append((split, batch, batches, batch, batches, ""))
        for name, number, of, completed, total, text in rows:
            bar = ProgressBar(total=max(total, 1), completed=completed, width=bar_width, complete_style="cyan")
            grid.add_row(name, f"{number}/{of}", bar, text)
        yield grid
        for name, metrics in (("train", self.train), ("val", self.val)):
            text = "   ".join(f"{live_name(key)} {format_metric(key, value)}" for key, value in metrics.items())
            yield Text.assemble((f"{name:7}", "bold"), text or "-", no_wrap=True, overflow="crop")


class _WithoutControls(RenderHook):
    """Replaces control characters in everything that a console prints, except rich's own."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(each) for each in renderables]


@dataclass
class _Cleaned:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


def open_console(stream: IO[str] | None = None) -> tuple[_Output, Console, bool]:
    """Opens a console on `stream` (default: stdout) that never raises on output; also returns whether it can redraw."""
    drop_bad_size()  # of a notebook, too
    chosen: Any = sys.stdout if stream is None else stream
    output = _Output(getattr(chosen, "unfiltered", chosen))
    terminal = output.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
    console = Console(
        file=cast(IO[str], output),
        force_terminal=terminal,
        force_interactive=terminal,
        force_jupyter=False,
        color_system="auto" if terminal else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.push_render_hook(_WithoutControls())
    return output, console, terminal


class Screen:
    """Prints text and a live display on `stream` (default: stdout). Never raises because of the stream."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._output, self._console, self.terminal = open_console(stream)
        self._live: Live | None = None

    def _start_live(self, get_renderable: Callable[[], RenderableType], *, redirect: bool) -> None:
        # No refresh thread: it would compete with the training for the interpreter lock.
        # The empty last line has room for the ^C of the terminal, which would wrap a full line and leave parts of it.
        self._live = Live(
            get_renderable=lambda: Group(get_renderable(), ""),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=redirect,
            redirect_stderr=redirect and sys.stderr is not None and sys.stderr.isatty(),
        )
        self._live.start(refresh=True)

    def _print(self, text: str | Text) -> None:
        self._console.print(text, soft_wrap=True)
        self._output.flush()

    def _print_block(self, *renderables: RenderableType) -> None:
        """Prints tables and trees without trailing spaces."""
        with self._console.capture() as capture:
            self._console.print(*renderables, sep="\n")
        self._output.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
        self._output.flush()

    def message(self, text: str, style: str = "") -> None:
        """Prints a line; a terminal wraps it between words."""
        if self.terminal:
            self._console.print(Text(text, style))
        else:
            self._print(Text(text, style))

    def close(self) -> None:
        """Removes the live display and shows the cursor again. Safe to call twice and at any time."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._output.flush()


class ConsoleView(Screen):
    """Shows a run: its config, the progress display, a row per evaluated epoch, the results."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__(stream)
        self._width = shutil.get_terminal_size().columns if self._output.isatty() else None  # None if not a terminal
        self._display: _Display | None = None
        self._rows: terminal_text.EpochRows | None = None
        self._rows_width: int | None = -1  # for which the table's header was printed; -1: for none
        self._has_marks = False
        self._due = float("inf")

    def begin(
        self,
        config: Mapping[str, Any],
        choices: Mapping[str, str],
        facts: Mapping[str, Any],
        first_step: UpdateCount,
        seconds: float,
    ) -> None:
        """Shows the header and starts the display; `facts`: see `terminal_text.header_rows`."""
        length: Length = facts["length"]
        drawn, unit = facts.get("drawn", facts.get("train")) or 0, facts.get("unit", "samples")
        self._rows = terminal_text.EpochRows(
            length,
            unit=unit,
            seconds=seconds,
            step=first_step,
            metrics=facts.get("metrics", ()),
            sets=tuple(facts.get("sets", ())),
        )
        self._print_block(terminal_text.header(config, choices, facts), Text(""))
        if not self.terminal:
            return
        self._display = _Display(length, length.position(first_step), drawn / length.per_epoch, unit)
        self._start_live(lambda: cast(_Display, self._display), redirect=True)
        self._due = perf_counter() + _REDRAW_SECONDS

    def advance(self, step: UpdateCount) -> None:
        """Call after every update. Only reads the clock unless a redraw is due."""
        now = perf_counter()
        if now >= self._due and self._display is not None:
            self._display.advance(self._display.length.position(step), now)
            self._redraw()

    def evaluating(self, batch: int, batches: int, split: str) -> None:
        if perf_counter() >= self._due and self._display is not None:
            self._display.evaluate(split, batch, batches)
            self._redraw()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Stores metrics by TensorBoard tag for the next redraw."""
        if self._display is not None:
            tags = {name: tag_of(name) for name in _TRAIN}
            self._display.train = {name: values[tag] for name, tag in tags.items() if tag in values}

    def _redraw(self) -> None:
        if self._live is None:
            return
        start = perf_counter()
        self._live.refresh()
        end = perf_counter()
        # Over a slow connection a redraw takes long: wait until it was at most 1 % of the time.
        pause = max(_REDRAW_SECONDS, (end - start) / _REDRAW_FRACTION)
        self._due = float("inf") if self._output.is_closed else end + pause

    def epoch(self, metrics: Mapping[str, Any], best: bool) -> None:
        assert self._rows is not None  # since `begin`
        width = self._console.width if self.terminal else self._width
        if width != self._rows_width:  # the first row, or a resized terminal
            self._rows_width = width
            self._print(self._rows.header(metrics, width))
        self._print(self._rows.row(metrics, best))
        self._has_marks |= best
        if (display := self._display) is not None:
            display.position = display.length.position(metrics["step"])
            train, val = ({name: metrics[name] for name in names if name in metrics} for names in (_TRAIN, _VAL))
            display.train, display.val = train, val
            self._redraw()

    def finish(
        self,
        summary: Mapping[str, Any],
        lines: Iterable[str],
        tested: "TestReport | None" = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Prints the results (see `terminal_text.format_result`), then `lines` (run folder, suggested commands) without
        wrapping them."""
        self.close()
        if self._has_marks:
            self._print(Text("* best epoch so far", "dim"))
        self._print_block(Text(""), terminal_text.format_result(summary, tested, classes), Text(""))
        for line in lines:
            self._print(emphasized(line))

    def close(self) -> None:
        self._due = float("inf")
        super().close()
