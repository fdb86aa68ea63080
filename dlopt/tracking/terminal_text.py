"""Formats configs, results and tables for terminals of any width."""

import io
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dlopt.basics.formats import (
    format_count,
    format_duration,
    format_epoch_number,
    format_number,
    format_value,
)
from dlopt.basics.length import NO_UPDATES, Length, UpdateCount
from dlopt.basics.plain_values import choices_of_groups, flatten
from dlopt.metrics.declared import OF_TESTS
from dlopt.metrics.measures import Measure, Row
from dlopt.metrics.names import (
    SPLITS,
    VAL_ACCURACY,
    VAL_LOSS,
    Metric,
    Split,
    direction_of,
    monitored_directions,
    set_of,
    split_of,
    without_set,
)
from dlopt.metrics.shown import COLUMNS, expendable_in, format_metric, live_name, shown_in, title

if TYPE_CHECKING:
    from dlopt.tasks.report import TestReport

_MIN_FOLDED_WIDTH = 16  # characters of a column with overflow="fold"
_PIPE_WIDTH = 200  # characters per line when the output is not a terminal
# The keys that define an optimizer of dlopt or torch; its other keys are rarely set.
_DEFINING = ("lr", "momentum", "nesterov", "betas", "amsgrad", "cautious", "hyperball", "weight_decay")
_AVERAGING = "dlopt.optim.SGDW"  # its momentum is an average: its steps are torch's SGD steps times 1 - momentum
_REPORT_KEYS = ("published", "tags", "note")  # read by `dlopt report` and `dlopt runs` only: not shown as settings


# -- configs


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config's values by dotted key, without `_target_` and empty groups."""
    flat = flatten(config).items()
    return {key: value for key, value in flat if key.rpartition(".")[2] != "_target_" and value != {}}


def hparams(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, str | bool | float]:
    """Flattens the config into hyperparameters by dotted key. A group's name maps to its choice; nulls are left out.

    Seeds that are equal to `seed` are left out as well: TensorBoard shows five columns by default.
    """
    flat: dict[str, str | bool | float] = {**choices_of_groups(config, choices)}
    for key, value in settings(config).items():
        is_derived_seed = key.endswith("_seed") and value == config.get("seed")
        if value is not None and key not in _REPORT_KEYS and not is_derived_seed:
            flat[key] = value if isinstance(value, str | bool | int | float) else format_value(value)
    return flat


def header_rows(
    config: Mapping[str, Any], choices: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Summarizes a run: overrides, data, model, optimizer and schedule, length and device, folder.

    `facts`: facts beside the config: `overrides` (of the command line), `parameters`, `trainable`, `train`,
    `val`, `test` (samples), `sets` (samples of each named validation set), `all_val` (if `val` is a subset), `unit`
    (of their counts), `drawn` (of an epoch), `batch_size` (as drawn), `inputs` (3x32x32, 10 classes), `length`,
    `device`, `precision`, `threads`, `folder`. Empty rows are left out.
    """
    names, values = choices_of_groups(config, choices), settings(config)
    if values.get("data.batch_size") != "full":
        values["data.batch_size"] = facts.get("batch_size", values.get("data.batch_size"))

    def settings_of(*keys: str) -> list[str]:
        return [f"{key.rpartition('.')[2]} {format_value(values[key])}" for key in keys if values.get(key) is not None]

    def choices_of(*groups: str, unless: str | None = None) -> list[str]:
        return [f"{group} {names[group]}" for group in groups if names.get(group) not in (None, unless)]

    samples = [f"{facts[split]:,} {split}" for split in ("train", "val", "test") if facts.get(split)]
    if (all_val := facts.get("all_val")) is not None:  # evaluate.samples
        samples = [text.replace(" val", f" of {all_val:,} val") for text in samples]
    samples += [f"{count:,} {name}" for name, count in facts.get("sets", {}).items()]
    unit = facts.get("unit", "images")
    if samples and unit not in ("images", "samples"):
        samples[-1] += f" {unit}"
    if facts.get("train") and facts.get("test") == 0:
        samples.append("no test set")
    rows: dict[str, list[str | None]] = {
        "overrides": [
            shlex.quote(re.sub(r"^hydra\.run\.dir=", "output=", line)) for line in facts.get("overrides", ())
        ],
        "data": [
            names.get("data"),
            ", ".join(samples),
            facts.get("inputs"),
            *settings_of("data.batch_size"),
            _growth(values),
            *choices_of("augmentation"),
        ],
        "model": [names.get("model"), _parameters(facts), *choices_of("init"), *choices_of("adapt", unless="none")],
        "optimizer": [
            names.get("optimizer"),
            *_optimizer(config.get("optimizer")),
            *choices_of("schedule"),
            _warmup(values),
            *choices_of("decay", unless="constant"),
            "cautious decay" if values.get("decay.cautious") else None,
            *choices_of("clip", unless="none"),
        ],
        "run": [
            _length(facts.get("length")),
            f"steps={values['steps']} wins over epochs={values['epochs']}" if _is_overruled(values, facts) else None,
            *_device(facts),
            *choices_of("stopping", unless="none"),
            *settings_of("seed"),
            _kept(values),
        ],
        "folder": [facts.get("folder")],
    }
    texts = {row: [text for text in content if text] for row, content in rows.items()}
    return {row: content for row, content in texts.items() if content}


def header(config: Mapping[str, Any], choices: Mapping[str, str], facts: Mapping[str, Any]) -> Table:
    """Renders `header_rows` as a table."""
    return rows_table(header_rows(config, choices, facts))


def rows_table(rows: Mapping[str, Sequence[str]]) -> Table:
    """Renders named rows of texts."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row, texts in rows.items():
        table.add_row(row, Flow(texts, separator="  "))
    return table


def _optimizer(keys: Any) -> list[str]:
    """Says what defines an optimizer, given its keys: lr 0.1, momentum 0.9, average of gradients.

    Of an optimizer of the user's own, all keys.
    """
    if not isinstance(keys, Mapping):
        return []
    if not str(keys.get("_target_", "dlopt.")).startswith(("dlopt.", "torch.")):
        values = {key: value for key, value in keys.items() if key != "_target_" and value not in (None, [], {})}
        return [f"{key} {format_value(values[key])}" for key in sorted(values, key=_defining_first)]
    texts = []
    for key in _DEFINING:
        value = keys.get(key)
        if isinstance(value, bool):
            texts += [key] if value else []
        elif value is not None:
            is_average = key == "momentum" and keys.get("_target_") == _AVERAGING and value > 0
            texts.append(f"{key} {format_value(value)}{', average of gradients' if is_average else ''}")
    return texts


def _defining_first(key: str) -> int:
    """Sorts the keys that most optimizers have before the others."""
    return _DEFINING.index(key) if key in _DEFINING else len(_DEFINING)


def _warmup(values: Mapping[str, Any]) -> str | None:
    """Says how long the warmup of the schedule is: warmup 10 %."""
    for unit in ("steps", "epochs"):
        if (length := values.get(f"schedule.warmup_{unit}")) is not None:
            return f"warmup {format_value(length)} {unit}" if length else None
    fraction = values.get("schedule.warmup_fraction")
    return f"warmup {100 * fraction:g} %" if fraction else None


def _growth(values: Mapping[str, Any]) -> str | None:
    """Says when the batch grows: x2, x4 after 5, 10 epochs."""
    first, *later = values.get("accumulate.micro_batches") or [None]
    for unit in ("steps", "epochs", "samples"):
        if (milestones := values.get(f"accumulate.{unit}")) and later:
            factors = ", ".join(f"x{number // first}" for number in later)
            return f"{factors} after {', '.join(map(format_value, milestones))} {unit}"
    return None


def _kept(values: Mapping[str, Any]) -> str | None:
    """Says which model is kept, if `monitor` is not the default."""
    monitor = values.get("monitor", "auto")
    direction = None if monitor == "auto" else direction_of(str(monitor), monitored_directions(values))
    return None if direction is None else f"keeps the {'lowest' if direction == 'min' else 'highest'} {monitor}"


def _parameters(facts: Mapping[str, Any]) -> str | None:
    total, trainable = facts.get("parameters"), facts.get("trainable")
    if total is None:
        return None
    return f"{total:,} parameters" + (f" ({trainable:,} trainable)" if trainable not in (None, total) else "")


def _length(length: Length | None) -> str | None:
    if length is None:
        return None
    epochs, updates = format_count("epochs", length.epochs), format_count("steps", length.updates)
    if length.grows:
        return f"{epochs} of {format_count('batches', length.per_epoch)}, {updates}"
    if length.updates != length.epochs * length.per_epoch:
        return f"{updates} ({length.per_epoch:,} per epoch)"
    return f"{epochs} of {format_count('steps', length.per_epoch)}"


def _is_overruled(values: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Returns whether the typed `epochs` is overridden by `steps`."""
    typed = any(re.match(r"\+*epochs=\d+$", str(each)) for each in facts.get("overrides", ()))
    return typed and values.get("steps") is not None


def _device(facts: Mapping[str, Any]) -> list[str]:
    processes, threads = facts.get("processes") or 1, facts.get("threads")
    texts = [f"parallel {facts['parallel']} ({format_count('processes', processes)})"] if processes > 1 else []
    if "device" in facts:
        texts.append(str(facts["device"]) + (f" ({format_count('threads', threads)})" if threads else ""))
    return texts + ([str(facts["precision"])] if "precision" in facts else [])


# -- epochs and results


def format_epoch(metrics: Mapping[str, Any], epochs: int, *, best: bool, sets: Iterable[str] = ()) -> str:
    """Formats an evaluated epoch as one line without a table header, for train.log. `sets`: named validation sets."""
    texts: dict[str, list[str]] = {"epoch": [f"epoch {format_epoch_number(metrics['epoch'])}/{epochs}"]}
    for each in shown_in("log"):
        if (value := metrics.get(each.name)) is None:
            continue
        split = split_of(each.name)
        if split is None:
            texts[each.name] = [each.show_in_log(value)]
        else:  # train loss 0.5 accuracy 80.00 %
            texts.setdefault(split, [split]).append(f"{live_name(each.name)} {each.show(value)}")
    for name in sets:
        for metric in (VAL_LOSS, VAL_ACCURACY):
            if (value := metrics.get(metric.on_set(name).column)) is not None:
                shown = f"{live_name(metric.column)} {format_metric(metric.column, value)}"
                texts.setdefault(f"set {name}", [name]).append(shown)
    return "  ".join([" ".join(each) for each in texts.values()] + ["best"] * best)


@dataclass(frozen=True)
class _Column:
    """A column of the table of epochs.

    Attributes:
        name: the key in metrics.jsonl.
        title: its header.
        width: characters of a cell, at least.
        needs: keys of the first epoch without which there is no column.
        cell: formats the cell of a row.
    """

    name: str
    title: str
    width: int
    needs: tuple[str, ...]
    cell: Callable[[Row], str]

    @property
    def characters(self) -> int:
        return max(self.width, len(self.title))


def _measured(measure: Measure, unit: str) -> _Column:
    """Returns the column of a measure. `unit`: of the samples."""

    def cell(row: Row) -> str:
        value = row.line.get(measure.name) if measure.of_row is None else measure.of_row(row)
        return measure.show_brief(value)

    needs = (measure.name,) if measure.of_row is None else measure.needs
    return _Column(measure.name, measure.title.format(unit=unit), measure.width, needs, cell)


def _additional(name: str, unit: str, sets: Iterable[str]) -> _Column:
    """Returns the column of a metric that the table does not list: of labels, of the user, or of one of the `sets`."""
    if name in COLUMNS:
        return _measured(COLUMNS[name], unit)

    def cell(row: Row) -> str:
        return format_metric(name, row.line.get(name))

    header = title(without_set(name, sets))
    if of := set_of(name, sets):
        header = header.replace(VAL_LOSS.split, of, 1)
    return _Column(name, header, Measure.width, (name,), cell)


class EpochRows:
    """The epoch table, printed row by row. The best epoch so far is marked with `*`.

    Does not use a table of rich, which needs all rows before it prints the first one.

    `seconds`, `step`: training time and updates before this process started (0 unless resumed). `metrics`: keys of
    additional columns. `sets`: names of validation sets.
    """

    def __init__(
        self,
        length: Length,
        *,
        unit: str = "samples",
        seconds: float = 0.0,
        step: UpdateCount = NO_UPDATES,
        metrics: Iterable[str] = (),
        sets: Sequence[str] = (),
    ) -> None:
        listed = [_measured(each, unit) for each in shown_in("table")]
        names = [each.name for each in listed]
        additional = [_additional(name, unit, sets) for name in dict.fromkeys(metrics) if name not in names]
        end = max(i for i, name in enumerate(names) if split_of(name) is not None) + 1  # of training and validation
        self._columns = [*listed[:end], *additional, *listed[end:]]
        self._shown: list[_Column] = []
        self._length = length
        self._start: Mapping[str, Any] = {"seconds": seconds, "step": step}
        self._previous: Mapping[str, Any] = self._start

    def header(self, first: Mapping[str, Any], width: int | None) -> Text:
        """Chooses the columns by the metrics of the first row, and the `width` of the terminal (None for no limit)."""
        shown = [self._epoch_column(first)]
        for column in self._columns:
            if column.name in first or all(name in first for name in column.needs):
                shown.append(column)
        for expendable in expendable_in("table"):
            if width is not None and _total_width(shown) > width:
                shown = [column for column in shown if column.name != expendable]
        self._shown = shown
        return Text(" ".join(each.title.rjust(each.characters) for each in shown), "bold", no_wrap=True)

    def row(self, metrics: Mapping[str, Any], best: bool) -> Text:
        """Formats an evaluated epoch."""
        updates = (self._start["step"], metrics["step"], self._length.updates)
        start, now, end = map(self._length.batches, updates)  # which take the same time each
        row = Row(metrics, self._previous, self._start, now - start, end - now)
        self._previous = metrics
        cells = [each.cell(row).rjust(each.characters) for each in self._shown]
        return Text(" ".join(cells) + (" *" if best else ""), "green" if best else "", no_wrap=True)

    def _epoch_column(self, first: Mapping[str, Any]) -> _Column:
        """Returns the first column: 3/200; of a run that is evaluated within epochs 2.25/200."""

        def cell(row: Row) -> str:
            return f"{format_epoch_number(row.line['epoch'])}/{self._length.epochs}"

        fraction = len(".25") if isinstance(first.get("epoch"), float) else 0
        width = 2 * len(str(self._length.epochs)) + len("/") + fraction
        return _Column("epoch", "epoch", width, (), cell)


def _total_width(columns: Sequence[_Column]) -> int:
    """Returns the characters of a row: columns, a space after each, and the mark of the best epoch."""
    return sum(each.characters + len(" ") for each in columns) + len(" *")


_ROWS = {"val": "validation", "evaluated_train": "training", "test": "test"}  # of a test, by split
_STATUS_COLOURS = {"finished": "green", "stopped_early": "green", "interrupted": "yellow", "failed": "red"}
_MAX_CLASSES = 20  # of the table of classes; of more, those with the lowest F1
_LOWEST = 5
_OF_CLASSES = {
    "precision": "precision", "recall": "recall", "f1": "F1", "samples": "samples", "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}  # fmt: skip


def format_result(summary: Mapping[str, Any], tested: "TestReport | None" = None, classes: Sequence[str] = ()) -> Group:
    """Builds the status line, a table of the best validation metrics and the test metrics, and what a test adds.

    `tested`: the test of the run, with the names of its `classes` or labels. It adds a comparison with a constant
    prediction, the metrics that only tests have, and a table of the classes.
    """
    status = str(summary.get("status", "finished"))
    line = Text(status.replace("_", " "), f"bold {_STATUS_COLOURS.get(status, '')}".strip())
    counts = [format_count(key, summary[key]) for key in ("epochs", "steps") if summary.get(key) is not None]
    if counts:
        line.append(f" after {', '.join(counts)}", "none")
    if summary.get("seconds") is not None:
        line.append(f" in {format_duration(summary['seconds'])}", "none")

    by_class = [] if tested is None or not classes else tested.per_class(classes)
    best: dict[str, float] = {}  # of the best evaluation, by name
    final: dict[str, float] = {}  # of the test
    for key, value in summary.items():
        metric = Metric.of(key)
        if metric is not None and isinstance(value, int | float):
            (best if key == metric.best else final)[metric.name] = value
    split: Split = "test" if tested is None else tested.split
    if tested is not None and tested.metrics:
        final = {metric.name: value for key, value in tested.metrics.items() if (metric := Metric.of(key)) is not None}
    if by_class:  # their recalls
        best, final = ({name: value for name, value in row.items() if "/" not in name} for row in (best, final))
    added = {name: value for name, value in final.items() if name not in best and name in OF_TESTS}
    rows = {"best validation": best, _ROWS[split]: final}
    if best.get(VAL_LOSS.name) == final.get(VAL_LOSS.name) and split == "val":
        del rows[_ROWS[split]]
    names = [name for name in dict.fromkeys([*best, *final]) if name not in added]
    if not names:
        return Group(line)
    best_epoch = summary.get("best_epoch")
    epoch = [] if best_epoch is None else [format_epoch_number(best_epoch)]
    titles = [_words(name) for name in names]
    table = plain_table(left=[""], right=[*titles, "epoch"] if epoch else titles)
    for title_of_row, row in rows.items():
        if row:
            cells = [format_metric(name, row.get(name)) for name in names]
            table.add_row(Text(title_of_row, "bold"), *cells, *epoch)
    blocks: list[RenderableType] = [line, Text(""), FittedTable(table)]
    notes = [Text(f"{_ROWS[split]}: {tested.guessing}")] if tested is not None and tested.guessing else []
    if split != "test":
        notes.append(Text(f"split: {SPLITS[split]}"))
    texts = [f"{_words(name)} {format_metric(name, value)}" for name, value in added.items()]
    parts = [Group(*notes) if notes else None, Flow(texts) if texts else None, _table_of_classes(by_class)]
    for part in parts:
        blocks += [Text(""), part] if part is not None else []
    return Group(*blocks)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("roc auc", "ROC AUC")


def _table_of_classes(rows: Sequence[Mapping[str, Any]]) -> "FittedTable | None":
    """Renders the metrics of each class or label; of many, the lowest ones."""
    if not rows:
        return None
    title = None
    if len(rows) > _MAX_CLASSES:
        title = f"the {_LOWEST} of {len(rows)} with the lowest F1"
        rows = sorted(rows, key=lambda row: math.inf if row["f1"] is None else row["f1"])[:_LOWEST]
    table = plain_table(title, fold=["class"], right=[*_OF_CLASSES.values()])
    for row in rows:
        cells = [f"{row[key]:,}" if key == "samples" else format_number(row[key]) for key in _OF_CLASSES]
        table.add_row(str(row["class"]), *cells)
    return FittedTable(table)


def plain_lines(renderable: RenderableType, width: int = 100) -> list[str]:
    """Renders without colours, for train.log."""
    file = io.StringIO()
    # Without force_jupyter=False, a notebook shows what is printed to a file.
    console = Console(
        file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False, force_jupyter=False
    )
    console.print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


# -- tables


def show_table(table: Table) -> None:
    """Prints a table to stdout."""
    standard_output().print(FittedTable(table))


def standard_output() -> Console:
    """Returns a console on stdout, as wide as the terminal."""
    return Console(highlight=False, markup=False, width=None if os.isatty(1) else _PIPE_WIDTH)


def plain_table(
    title: str | None = None, *, left: Sequence[str] = (), fold: Sequence[str] = (), right: Sequence[str] = ()
) -> Table:
    """Returns an empty table in dlopt's style.

    Its columns: those aligned `left`; those that may also be wrapped inside words (`fold`); those aligned `right`.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="",
    )
    for name in left:
        table.add_column(name)
    for name in fold:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns heads, a rule and one line of plain text per row, with aligned columns: those of numbers to the right."""
    columns = list(zip(*rows, strict=True))
    # "search" and "diverged" are in columns of numbers.
    are_numbers = [any(cell == "-" or cell[:1].isdigit() for cell in column[1:]) for column in columns[1:]]
    signs = [">" if each else "<" for each in are_numbers]
    forms = [f"{sign}{max(map(len, column))}" for sign, column in zip(["<", *signs], columns, strict=True)]
    lines = ["   ".join(map(format, row, forms)).rstrip() for row in rows]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


class FittedTable:
    """A table that wraps only between words; if it does not fit even then, each row becomes a list of its cells.

    A table of rich shares out a narrow terminal without regard to words: it shows 0.1234 as 0.1 and an ellipsis, splits
    keys, and leaves out columns. Lines have no trailing spaces.
    """

    def __init__(self, table: Table) -> None:
        self.table = table

    def fits(self, console: Console, width: int, *, folded: bool = False) -> bool:
        """Returns whether the table fits into `width` characters with each row on one line, or `folded`.

        Headers may wrap at spaces.
        """
        return self._set_widths(console, self._min_widths(folded)) <= width

    def _min_widths(self, folded: bool) -> list[int]:
        widths = []
        for column in self.table.columns:
            width = max(_longest_line(column.cells), *map(cell_len, str(column.header).split()), 0)
            least = column.min_width or (_MIN_FOLDED_WIDTH if column.overflow == "fold" else width)
            widths.append(min(width, least) if folded else width)
        return widths

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Start with every column at its minimum (headers wrapped at spaces), then widen columns from left to right.
        widths = self._min_widths(folded=True)
        max_widths = [_longest_line([column.header, *column.cells]) for column in self.table.columns]
        free = options.max_width - self._set_widths(console, widths)
        if free < 0:
            yield _stack_cells(self.table)
            return
        for i, max_width in enumerate(max_widths):
            extra = min(max_width - widths[i], free)
            widths[i] += extra
            free -= extra
        self._set_widths(console, widths)
        for line in console.render_lines(self.table, options, pad=False):
            yield from _strip_end(line)
            yield Segment.line()

    def _set_widths(self, console: Console, widths: list[int]) -> int:
        """Sets the column widths and returns the width of the table with its padding."""
        for column, width in zip(self.table.columns, widths, strict=True):
            column.width = width
        return console.measure(self.table, options=console.options.update(width=10_000)).maximum


def _longest_line(cells: Iterable[RenderableType]) -> int:
    return max((cell_len(line) for cell in cells for line in str(cell).split("\n")), default=0)


def _strip_end(line: list[Segment]) -> list[Segment]:
    """Removes the spaces at the end of a rendered line."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


def _stack_cells(table: Table) -> Group:
    """Renders each row as its first cell, followed by the other cells that it has, with their column headers."""
    headers = [" ".join(str(column.header).split()) for column in table.columns]
    blocks: list[RenderableType] = [] if table.title is None else [table.title]
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        first, *others = (cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells)
        blocks.append(Text.assemble(first, style=row.style or "bold"))
        pairs = zip(headers[1:], others, strict=True)
        texts = [Text.assemble((header, "dim"), " ", cell) for header, cell in pairs if str(cell) not in ("", "-")]
        blocks += [Flow(texts, indent="  ")] if texts else []
    blocks += [] if table.caption is None else [table.caption]
    return Group(*blocks)


class Flow:
    """Texts side by side, with line breaks only between them; rich's `Columns` would align them to a grid."""

    def __init__(self, texts: Sequence[Text | str], *, separator: str = "   ", indent: str = "") -> None:
        self.texts, self.separator, self.indent = texts, separator, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for text in self.texts:
            extended = Text.assemble(line, self.separator if line else self.indent, text, overflow="fold")
            if line and extended.cell_len > options.max_width:
                yield line
                extended = Text.assemble(self.indent, text, overflow="fold")
            line = extended
        yield line
