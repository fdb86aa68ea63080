"""Formats metrics, configs, results and tables for terminals of any width."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dlopt.plain import flatten

_FOLDED = 16  # columns that a folding column keeps
_PIPED = 200  # columns of an output that is no terminal
_FOR_THE_REPORT = "published"  # a key that sets nothing


def number(value: float | None) -> str:
    """Four significant places for losses; scientific where that is shorter."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def rate(value: float | None) -> str:
    """A learning rate: four significant digits, no trailing zeros."""
    return "-" if value is None else f"{value:.4g}"


def size(number: float) -> str:
    """Bytes: 1.5 MiB."""
    power = min(int(math.log2(max(number, 1))) // 10, 4)
    return f"{number / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def metric(name: str, value: float | None) -> str:
    """A metric by its kind: accuracies in percent, learning rates and the rest as numbers."""
    if name == "lr":
        return rate(value)
    return percent(value) if "accuracy" in name or name.endswith(("top1", "top5")) else number(value)


def counted(key: str, count: int) -> str:
    """`1 epoch`, `1,200 steps`; `key` in the plural."""
    return f"{count:,} {key.removesuffix('s') if count == 1 else key}"


def short_path(path: Path) -> str:
    """Relative to the current folder where it lies below it, absolute elsewhere."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


# -- configs


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values by dotted key, without `_target_` and empty groups."""
    flat = flatten(config).items()
    return {key: value for key, value in flat if key.rpartition(".")[2] != "_target_" and value != {}}


def _choices(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, str]:
    """The choice of each group that has one; without `choices` the last part of its `_target_`."""
    groups = {key: value if isinstance(value, Mapping) else {} for key, value in config.items()}
    targets = {key: str(group.get("_target_") or "").rpartition(".")[2] for key, group in groups.items()}
    return {key: str(choice) for key, target in targets.items() if (choice := choices.get(key) or target)}


def hparams(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, str | bool | float]:
    """The config as flat hyperparameters; a group's own name holds its choice; nulls are left out.

    So are the seeds that follow `seed`: TensorBoard shows five columns before it is asked for more.
    """
    flat: dict[str, str | bool | float] = {**_choices(config, choices)}
    for key, value in settings(config).items():
        follows = key.endswith("_seed") and value == config.get("seed")
        if value is not None and key != _FOR_THE_REPORT and not follows:
            flat[key] = value if isinstance(value, str | bool | int | float) else _value(value)
    return flat


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)


def header_rows(
    config: Mapping[str, Any], choices: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Summarizes a run: data, model, optimizer and schedule, length and device, folder.

    `facts`: what only the built run knows: `parameters`, `trainable`, `train`, `val`, `test` (samples), `epochs`,
    `steps_per_epoch`, `device`, `precision`, `threads`, `folder`. Rows without content are left out.
    """
    chosen, values = _choices(config, choices), settings(config)

    def settings_of(*keys: str) -> list[str]:
        return [f"{key.rpartition('.')[2]} {_value(values[key])}" for key in keys if values.get(key) is not None]

    def choices_of(*groups: str) -> list[str]:
        return [f"{group} {chosen[group]}" for group in groups if chosen.get(group, "none") not in ("none", "default")]

    samples = [f"{facts[split]:,} {split}" for split in ("train", "val", "test") if facts.get(split)]
    schedule = [f"schedule {chosen['schedule']}"] if chosen.get("schedule") else []
    rows: dict[str, list[str | None]] = {
        "data": [chosen.get("data"), ", ".join(samples), *settings_of("data.batch_size"), *choices_of("augmentation")],
        "model": [chosen.get("model"), _parameters(facts), *choices_of("init")],
        "optimizer": [
            chosen.get("optimizer"),
            *settings_of("optimizer.lr", "optimizer.weight_decay"),
            *schedule,
            *choices_of("clip"),
        ],
        "run": [_length(facts), *_device(facts), *choices_of("stopping"), *settings_of("seed")],
        "folder": [facts.get("folder")],
    }
    present = {name: [part for part in parts if part] for name, parts in rows.items()}
    return {name: parts for name, parts in present.items() if parts}


def header(config: Mapping[str, Any], choices: Mapping[str, str], facts: Mapping[str, Any]) -> Table:
    """Renders `header_rows` as a table."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, parts in header_rows(config, choices, facts).items():
        table.add_row(name, Flow(parts, separator="  "))
    return table


def _parameters(facts: Mapping[str, Any]) -> str | None:
    total, trainable = facts.get("parameters"), facts.get("trainable")
    if total is None:
        return None
    return f"{total:,} parameters" + (f" ({trainable:,} trainable)" if trainable not in (None, total) else "")


def _length(facts: Mapping[str, Any]) -> str | None:
    if facts.get("epochs") is None:
        return None
    return f"{counted('epochs', facts['epochs'])} of {counted('steps', facts['steps_per_epoch'])}"


def _device(facts: Mapping[str, Any]) -> list[str]:
    processes, threads = facts.get("processes"), facts.get("threads")
    parts = [f"parallel {facts['parallel']} ({counted('processes', processes)})"] if (processes or 1) > 1 else []
    if "device" in facts:
        parts.append(str(facts["device"]) + (f" ({counted('threads', threads)})" if threads else ""))
    return parts + ([str(facts["precision"])] if "precision" in facts else [])


# -- epochs and results


def plain_epoch(metrics: Mapping[str, Any], epochs: int, *, best: bool) -> str:
    """Formats an evaluated epoch as a line that is read without a header, for train.log."""
    line = [f"epoch {metrics['epoch']}/{epochs}"]
    for split in ("train", "val"):
        if (loss := metrics.get(f"{split}_loss")) is not None:
            accuracy = metrics.get(f"{split}_accuracy")
            line.append(f"{split} loss {number(loss)}" + ("" if accuracy is None else f" accuracy {percent(accuracy)}"))
    if metrics.get("lr") is not None:
        line.append(f"lr {rate(metrics['lr'])}")
    if metrics.get("seconds") is not None:
        line.append(duration(metrics["seconds"]))
    return "  ".join(line + ["best"] * best)


class EpochRows:
    """The table of epochs, one row after the other.

    `first`: metrics of the first row, which decide about the columns. `width`: of the terminal; None: unlimited.
    `samples`: training samples of an epoch. `epoch`, `seconds`: where the run begins, later than 0 when it resumes.
    """

    def __init__(
        self,
        first: Mapping[str, Any],
        epochs: int,
        width: int | None,
        *,
        samples: int = 0,
        unit: str = "samples",
        epoch: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.width = width
        self._epochs, self._samples = epochs, samples
        self._last = (epoch, seconds)
        derived = {"epoch"} | ({"epoch_seconds"} if "seconds" in first else set())
        derived |= {"throughput"} if samples and "seconds" in first else set()
        titles = {**_TITLES, "throughput": f"{unit}/s"}
        sizes = {"epoch": 2 * len(str(epochs)) + 1, **_SIZES}
        self._titles = {key: title for key, title in titles.items() if key in derived | first.keys()}
        self._sizes = {key: max(sizes.get(key, 9), len(title)) for key, title in self._titles.items()}
        for expendable in ("step", "epoch_seconds", "throughput", "lr", "seconds", "train_accuracy"):
            if width is not None and sum(self._sizes.values()) + len(self._sizes) + 2 > width:
                self._sizes.pop(expendable, None)

    @property
    def last(self) -> tuple[int, float]:
        """Epoch and seconds of the last row."""
        return self._last

    def header(self) -> Text:
        return Text(" ".join(self._titles[key].rjust(size) for key, size in self._sizes.items()), "bold", no_wrap=True)

    def row(self, metrics: Mapping[str, Any], best: bool) -> Text:
        epochs, seconds = metrics["epoch"] - self._last[0], metrics.get("seconds", 0.0) - self._last[1]
        throughput = self._samples * epochs / seconds if seconds > 0 else None
        values = {**metrics, "epoch_seconds": seconds, "throughput": throughput}
        self._last = (metrics["epoch"], metrics.get("seconds", 0.0))
        cells = [self._cell(key, values.get(key)).rjust(size) for key, size in self._sizes.items()]
        return Text(" ".join(cells) + (" *" if best else ""), "green" if best else "", no_wrap=True)

    def _cell(self, key: str, value: Any) -> str:
        if key == "epoch":
            return f"{value}/{self._epochs}"
        if key == "throughput":
            return "-" if value is None else f"{value:,.0f}"
        if key in ("seconds", "epoch_seconds") and value is not None:
            return duration(value)
        return str(value) if key == "step" else metric(key, value)


_TITLES = {  # of the table of epochs
    "epoch": "epoch", "step": "step", "train_loss": "train loss", "train_accuracy": "train acc",
    "val_loss": "val loss", "val_accuracy": "val acc", "lr": "lr", "epoch_seconds": "epoch time",
    "seconds": "total time", "throughput": "",
}  # fmt: skip
_SIZES = {"step": 8, "lr": 9, "seconds": 7, "epoch_seconds": 7, "throughput": 8}  # characters; the other columns take 9
_STATUS = {"finished": "green", "stopped_early": "green", "interrupted": "yellow", "failed": "red"}


def result(summary: Mapping[str, Any]) -> Group:
    """How the run ended, and a table of the best validation and the test metrics."""
    status = str(summary.get("status", "finished"))
    line = Text(status.replace("_", " "), f"bold {_STATUS.get(status, '')}".strip())
    counts = [counted(key, summary[key]) for key in ("epochs", "steps") if summary.get(key) is not None]
    if counts:
        line.append(f" after {', '.join(counts)}", "none")
    if summary.get("seconds") is not None:
        line.append(f" in {duration(summary['seconds'])}", "none")

    metrics = {
        split: {
            key.removeprefix(prefix): value
            for key, value in summary.items()
            if key.startswith(prefix) and isinstance(value, int | float)
        }
        for split, prefix in (("best validation", "best_val_"), ("test", "test_"))
    }
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    if not names:
        return Group(line)
    table = plain_table()
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    if summary.get("best_epoch") is not None:
        table.add_column("epoch", justify="right")
    for split, row in metrics.items():
        if row:
            cells = [metric(name, row.get(name)) for name in names]
            table.add_row(Text(split, "bold"), *cells, str(summary["best_epoch"]) if "best_epoch" in summary else "")
    return Group(line, Text(""), Fitted(table))


# -- tables


def standard_output() -> Console:
    """As wide as the terminal."""
    return Console(highlight=False, markup=False, width=None if os.isatty(1) else _PIPED)


def plain_table(title: str | None = None) -> Table:
    """An empty table in the project's one look. A column that may be broken anywhere has overflow="fold"."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line of plain text for each row, its cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Fitted:
    """`table` as wide as there is room for; where its words do not fit, its rows one below the other."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted, least = [], []
        for column in self.table.columns:
            head = str(column.header)
            content = max((cell_len(line) for cell in column.cells for line in str(cell).split("\n")), default=0)
            wanted.append(max([content, *map(cell_len, head.split("\n"))]))
            words = max([content, *map(cell_len, head.split())])
            least.append(min(words, _FOLDED) if column.overflow == "fold" else words)
        room = options.max_width - self._set_widths(console, least)
        if room < 0:
            yield _records(self.table)
            return
        for i, most in enumerate(wanted):
            more = min(most - least[i], room)
            least[i] += more
            room -= more
        self._set_widths(console, least)
        yield self.table

    def _set_widths(self, console: Console, widths: list[int]) -> int:
        """Returns the width of the whole table."""
        for column, width in zip(self.table.columns, widths, strict=True):
            column.width = width
        return console.measure(self.table, options=console.options.update(width=10_000)).maximum


def _records(table: Table) -> Group:
    """Each row as its first cell, and below it the others with their columns' names."""
    heads = [" ".join(str(column.header).split()) for column in table.columns]
    parts: list[RenderableType] = [] if table.title is None else [table.title]
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        first, *others = (cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells)
        parts.append(Text.assemble(first, style=row.style or "bold"))
        pairs = [Text.assemble((name, "dim"), " ", cell) for name, cell in zip(heads[1:], others, strict=True) if cell]
        parts += [Flow(pairs, indent="  ")] if pairs else []
    parts += [] if table.caption is None else [table.caption]
    return Group(*parts)


class Flow:
    """Texts side by side as far as the width goes, where none is broken."""

    def __init__(self, parts: Sequence[Text | str], *, separator: str = "   ", indent: str = "") -> None:
        self.parts, self.separator, self.indent = parts, separator, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for part in self.parts:
            longer = Text.assemble(line, self.separator if line else self.indent, part, overflow="fold")
            if line and longer.cell_len > options.max_width:
                yield line
                longer = Text.assemble(self.indent, part, overflow="fold")
            line = longer
        yield line
