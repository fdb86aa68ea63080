"""How figures, the config and the result look as text; no I/O."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dlopt.tracking.tables import Fitted, plain_table


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


def figure(name: str, value: float | None) -> str:
    """A metric by its kind: accuracies in percent, the rest as numbers."""
    return percent(value) if "accuracy" in name or name.endswith(("top1", "top5")) else number(value)


def short_path(path: Path) -> str:
    """Relative to the current folder where it lies below it, absolute elsewhere."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; `_target_` and empty groups left out."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def _choice(name: str, group: Mapping[str, Any], choices: Mapping[str, str]) -> str | None:
    if name in choices:
        return str(choices[name])
    target = group.get("_target_")
    return str(target).rpartition(".")[2] if target else None


_FOR_THE_REPORT = "published"  # a key that sets nothing


def hparams(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, str | bool | float]:
    """The config as flat hyperparameters; a group's own name holds its choice; nulls are left out.

    So are the seeds that follow `seed`: TensorBoard shows five columns before it is asked for more.
    """
    flat: dict[str, str | bool | float] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            choice = _choice(key, value, choices)
            if choice is not None:
                flat[key] = choice
        elif value is None and choices.get(key) is not None:
            flat[key] = choices[key]
    for key, value in flatten(config):
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


def _pairs(values: Mapping[str, Any], text: Text) -> Text:
    for key, value in flatten(values):
        if value is not None:
            if text:
                text.append("  ")
            text.append(f"{key}=", "dim").append(_value(value))
    return text


def config_tree(config: Mapping[str, Any], choices: Mapping[str, str]) -> Tree:
    """Groups with their choice and values, one row each (nulls left out), then the keys of the run itself."""
    top: dict[str, Any] = {}
    rows: list[tuple[str, Text]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows.append((key, _pairs(value, Text(_choice(key, value, choices) or "", "cyan"))))
        elif key in choices:  # a choice that has nothing to set, such as clip=none
            rows.append((key, Text(str(choices[key]), "cyan")))
        elif value is not None and key != _FOR_THE_REPORT:
            top[key] = value
    title = Text(str(top.pop("name", "config")), "bold")
    rows.append(("run", _pairs(top, Text())))
    width = max(len(name) for name, _ in rows)

    tree = Tree(title, guide_style="dim")
    for name, text in rows:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(min_width=width, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(name, "bold"), text)
        tree.add(grid)
    return tree


def facts_parts(facts: Mapping[str, Any]) -> list[str]:
    """What the config does not say: parameters, samples, device."""
    rest = dict(facts)
    parts = []
    if (parameters := rest.pop("parameters", None)) is not None:
        parts.append(f"{parameters:,} parameters")
    samples = [f"{rest.pop(split):,} {split}" for split in ("train", "val", "test") if rest.get(split) is not None]
    if samples:
        parts.append(f"samples: {', '.join(samples)}")
    parts += [
        f"{value:,} {key.removesuffix('s') if value == 1 else key}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{key} {value}"
        for key, value in rest.items()
        if value is not None and key not in ("train", "val", "test")
    ]
    return parts


def flow(parts: Sequence[str], width: int, separator: str = " | ") -> list[str]:
    """Join `parts` into lines of at most `width` characters, where no part is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines


def plain_epoch(metrics: Mapping[str, Any], epochs: int, *, best: bool, width: int | None = None) -> str:
    """An evaluated epoch as one line; where that is wider than `width`, a terse one of what fits."""
    line = [f"epoch {metrics['epoch']}/{epochs}"]
    terse = [f"{metrics['epoch']}/{epochs}"]
    for split in ("train", "val"):
        if (loss := metrics.get(f"{split}_loss")) is not None:
            line.append(f"{split} loss {number(loss)}")
            terse.append(f"{split} {number(loss)}")
            if (accuracy := metrics.get(f"{split}_accuracy")) is not None:
                line[-1] += f" accuracy {percent(accuracy)}"
                terse[-1] += f" {100 * accuracy:.2f}%"
    if metrics.get("lr") is not None:
        line.append(f"lr {rate(metrics['lr'])}")
        terse.append(f"lr {metrics['lr']:.2g}")
    if metrics.get("seconds") is not None:
        line.append(duration(metrics["seconds"]))
    if best:
        line.append("best")
    text = "  ".join(line)
    if width is None or len(text) <= width:
        return text
    while len(terse) > 2 and len(" ".join(terse)) > width - 2 * best:
        terse.pop()
    return " ".join(terse) + " *" * best


class EpochRows:
    """The table of epochs, printed row by row above the progress display."""

    def __init__(self, first: Mapping[str, Any], epochs: int, width: int) -> None:
        self.width = width
        self._epochs = epochs
        columns = [("epoch", "epoch", 2 * len(str(epochs)) + 1)]
        columns += [
            (key, title, size)
            for key, title, size in (
                ("step", "step", 8),
                ("train_loss", "train loss", 10),
                ("train_accuracy", "accuracy", 9),
                ("val_loss", "val loss", 9),
                ("val_accuracy", "accuracy", 9),
                ("lr", "lr", 9),
                ("seconds", "time", 7),
            )
            if key in first
        ]
        for expendable in ("step", "lr", "seconds", "train_accuracy"):
            if sum(max(size, len(title)) + 1 for _, title, size in columns) + 2 > width:
                columns = [column for column in columns if column[0] != expendable]
        self._columns = [(key, title, max(size, len(title))) for key, title, size in columns]

    def header(self) -> Text:
        return Text(" ".join(title.rjust(size) for _, title, size in self._columns), "bold", no_wrap=True)

    def row(self, metrics: Mapping[str, Any], best: bool) -> Text:
        cells = []
        for key, _, size in self._columns:
            value = metrics.get(key)
            if key == "epoch":
                cell = f"{value}/{self._epochs}"
            elif key == "step":
                cell = str(value)
            elif key == "lr":
                cell = rate(value)
            elif key == "seconds":
                cell = "-" if value is None else duration(value)
            else:
                cell = figure(key, value)
            cells.append(cell.rjust(size))
        return Text(" ".join(cells) + (" *" if best else ""), "green" if best else "", no_wrap=True)


_STATUS = {"finished": "green", "stopped_early": "green", "interrupted": "yellow", "failed": "red"}


def result(summary: Mapping[str, Any]) -> Group:
    """How the run ended, and a table of the best validation and the test figures."""
    status = str(summary.get("status", "finished"))
    line = Text(status.replace("_", " "), f"bold {_STATUS.get(status, '')}".strip())
    counts = [
        f"{summary[key]:,} {key.removesuffix('s') if summary[key] == 1 else key}"
        for key in ("epochs", "steps")
        if summary.get(key) is not None
    ]
    if counts:
        line.append(f" after {', '.join(counts)}", "none")
    if summary.get("seconds") is not None:
        line.append(f" in {duration(summary['seconds'])}", "none")

    figures = {
        split: {
            key.removeprefix(prefix): value
            for key, value in summary.items()
            if key.startswith(prefix) and isinstance(value, int | float)
        }
        for split, prefix in (("best validation", "best_val_"), ("test", "test_"))
    }
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    if not names:
        return Group(line)
    table = plain_table()
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    if summary.get("best_epoch") is not None:
        table.add_column("epoch", justify="right")
    for split, row in figures.items():
        if row:
            cells = [figure(name, row.get(name)) for name in names]
            table.add_row(Text(split, "bold"), *cells, str(summary["best_epoch"]) if "best_epoch" in summary else "")
    return Group(line, Text(""), Fitted(table))
