"""What dlopt measures of a run: name, title and format of each column, where it is shown, and how it is computed.

The columns of metrics.jsonl and summary.json without a split, and those derived from them. `dlopt.metrics.declared` has
the metrics of an evaluation, and `dlopt.metrics.shown` where their columns are shown. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dlopt.basics.formats import (
    format_amount,
    format_clock,
    format_duration,
    format_gib,
    format_lr,
    format_mib,
    format_number,
    format_percent,
    format_rate,
)
from dlopt.metrics.declaration import Direction

if TYPE_CHECKING:
    from torch import nn

Place = Literal["table", "log", "live", "leaderboard", "terminal", "runs", "details", "sweep", "python"]
"""Where a column is shown.

table: the table of epochs; log: the same in train.log; live: the live display of a run; leaderboard: that of the page,
of papers and CSV files; terminal: its columns on a terminal; runs: `dlopt runs`; details: the runs of a configuration
on the page; sweep: the running jobs of a sweep; python: `repr` of `dlopt.Run`.
"""
KEPT = None
"""Of a column that is shown however narrow the terminal or the page is."""


@dataclass(frozen=True)
class Row:
    """A row of the table of epochs, for the columns that are derived from several lines of metrics.jsonl.

    Attributes:
        line: of metrics.jsonl.
        previous: seconds and step of the row before; of the first row: `start`.
        start: seconds and step at the start of this process; > 0 if it resumed the run.
        done: updates of this process; if the batch grows, batches of data.batch_size.
        left: of the run, in the same unit.
    """

    line: Mapping[str, Any]
    previous: Mapping[str, float]
    start: Mapping[str, float]
    done: int
    left: int


@dataclass(frozen=True)
class Training:
    """Training between two evaluations or logging points, for the throughput.

    Attributes:
        rate: samples per second, of all processes.
        tokens: of a sample of a text; None if samples are counted.
        flops: of a training sample; None if unknown.
        nominal: FLOP/s of the GPU of each process; None if unknown.
        processes: with one GPU each.
        gpu_bytes: peak of the allocated GPU memory; None if there is no GPU.
    """

    rate: float
    tokens: int | None = None
    flops: float | None = None
    nominal: float | None = None
    processes: int = 1
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class Measure:
    """A column of a run.

    Attributes:
        name: the key in metrics.jsonl and summary.json.
        title: in the table of epochs, the live display and train.log; "{unit}" is the unit of the samples.
        format: of a value.
        direction: "min" if smaller values are better.
        shown: the places. Where space is limited, with the order in which columns are hidden: the smallest number
            first, `KEPT` never. Three places have an order each, which cannot be one: the table of epochs hides seconds
            before train_accuracy, the page the other way round; a terminal hides val_loss, the page never does.
        priority: position in places with a column or line per run; the others have the order of declaration.
        brief: format in a narrow column: without its unit, and of a mean without its standard deviation.
        width: characters of its column in the table of epochs.
        text: in train.log.
        words: its name on the page; default: `name` in words.
        axis: its label in plots; default: `name` in words.
        is_state: of the training at a line of metrics.jsonl; the run as a whole has no such metric.
        is_cost: a leaderboard leaves it out if it is the same for all runs.
        ranks: whether runs can be ranked by it.
        varies: whether it differs between runs that compute the same.
        needs: the columns of a line from which `of_line` or `of_row` computes it.
        of_line: computes it from the values of `needs`.
        of_row: computes it when a row of the table of epochs is printed; None if unknown.
        of_training: computes it of each interval of the training; None if it has no such column.
        at_end: computes it of the model when the run ends, for summary.json.
    """

    name: str
    title: str
    format: Callable[[float], str] = format_number
    direction: Direction = "min"
    shown: Mapping[Place, int | None] = field(default_factory=dict)
    priority: int = 0
    brief: Callable[[float], str] | None = None
    width: int = 9
    text: str = "{title} {value}"
    words: str = ""
    axis: str = ""
    is_state: bool = False
    is_cost: bool = False
    ranks: bool = True
    varies: bool = False
    needs: tuple[str, ...] = ()
    of_line: Callable[..., float] | None = None
    of_row: Callable[[Row], float | None] | None = None
    of_training: Callable[[Training], float | None] | None = None
    at_end: "Callable[[nn.Module], float] | None" = None

    @property
    def tag(self) -> str:
        """The tag in TensorBoard of a measure without a split: throughput/utilization, lr."""
        return self.name if self.of_training is None else f"throughput/{self.name}"

    @property
    def is_logged_by_steps(self) -> bool:
        """Whether it is logged with the training loss every few updates: rates, throughput, GPU memory."""
        return self.is_state or self.of_training is not None

    def show(self, value: float | None) -> str:
        return "-" if value is None else self.format(value)

    def show_brief(self, value: float | None) -> str:
        return self.show(value) if self.brief is None or value is None else self.brief(value)

    def show_in_log(self, value: float) -> str:
        return self.text.format(title=self.title, value=self.show_brief(value))


def _utilization(training: Training) -> float | None:
    if training.flops is None or training.nominal is None:
        return None
    return training.rate * training.flops / (training.processes * training.nominal)


PROGRESS = (
    Measure("epoch", "epoch", brief=str, shown={"sweep": KEPT}, is_state=True),  # the table's first column in any case
    Measure("step", "step", brief=str, width=8, shown={"table": 10}, is_state=True),
    Measure("evaluations", "evaluations", format_amount),  # of the loss so far, by optimizers with several per update
    Measure(
        "epochs", "epochs", format_amount, is_cost=True, ranks=False, priority=110,
        shown={"leaderboard": 60, "runs": KEPT, "details": KEPT, "python": KEPT},
    ),
    Measure(
        "steps", "steps", format_amount, is_cost=True, ranks=False, priority=120, brief="{:,.0f}".format,
        shown={"leaderboard": 70, "terminal": 10},
    ),
    Measure("best_epoch", "best epoch", format_amount, ranks=False, priority=100, shown={"details": KEPT}),
)  # fmt: skip
"""How far a run is. Where columns have the order of their declaration, those of evaluations follow, then `OTHERS`."""

OTHERS = (
    # Generalization gaps: overfitting makes them positive.
    Measure(
        "gap", "gap", needs=("val_loss", "train_loss"), of_line=lambda val, train: val - train, priority=90,
        shown={"leaderboard": 30}, words="validation − training loss",
        axis="gap: validation loss minus training loss",
    ),
    Measure(
        "accuracy_gap", "accuracy gap", lambda gap: f"{100 * gap:.2f}", needs=("train_accuracy", "val_accuracy"),
        of_line=lambda train, val: train - val, priority=80, shown={"leaderboard": 40},
        words="training − validation accuracy (points)", axis="gap: training accuracy minus validation accuracy",
    ),

    Measure("lr", "lr", format_lr, shown={"table": 50, "log": KEPT, "live": KEPT}, is_state=True),
    Measure("weight_decay", "weight decay", is_state=True),
    Measure("momentum", "momentum", shown={"table": 55, "log": KEPT, "live": KEPT}, is_state=True),
    Measure(
        "epoch_seconds", "epoch time", format_duration, width=7, shown={"table": 20}, needs=("seconds",),
        of_row=lambda row: row.line["seconds"] - row.previous["seconds"],
    ),
    Measure(
        "seconds", "total time", format_duration, is_cost=True, priority=130, brief=format_duration, width=7,
        text="{value}", varies=True,
        shown={"table": 60, "log": KEPT, "leaderboard": 80, "terminal": 30, "runs": KEPT, "details": KEPT},
    ),
    Measure(
        "seconds_left", "left", format_clock, width=7, shown={"table": 5}, needs=("step", "seconds"),
        # At the speed of this process: a resumed run may be on another machine.
        of_row=lambda row: seconds_left(
            row.line["seconds"] - row.start["seconds"], row.done, row.left,
        ),
    ),
    # A run has one of these two.
    Measure(
        "samples_per_second", "{unit}/s", format_rate, "max", width=8, text="{value} samples/s",
        shown={"table": 30, "log": KEPT}, varies=True,
        of_training=lambda training: training.rate if training.tokens is None else None,
    ),
    Measure(
        "tokens_per_second", "{unit}/s", format_rate, "max", width=8, text="{value} tokens/s",
        shown={"table": 40, "log": KEPT}, varies=True,
        of_training=lambda training: None if training.tokens is None else training.rate * training.tokens,
    ),
    Measure(
        "utilization", "MFU", format_percent, "max", width=7, shown={"table": 70, "log": KEPT, "live": KEPT},
        varies=True, of_training=_utilization,
    ),
    Measure(
        "gpu_memory_gib", "memory", format_gib, shown={"live": KEPT}, varies=True,
        of_training=lambda training: None if training.gpu_bytes is None else training.gpu_bytes / 2**30,
    ),
    Measure(
        "parameters", "parameters", format_amount, is_cost=True, ranks=False, priority=140, shown={"leaderboard": 50},
        at_end=lambda model: sum(each.numel() for each in model.parameters()),
    ),
    # Of the updates, on all processes.
    Measure(
        "samples", "samples", format_amount, is_cost=True, ranks=False, priority=122, shown={"leaderboard": 47},
        words="training samples",
    ),
    Measure(
        "flops", "FLOPs", "{:.3g}".format, is_cost=True, ranks=False, priority=124, shown={"leaderboard": 65},
        words="training FLOPs",
    ),
    Measure(
        "peak_memory", "memory", format_mib, is_cost=True, priority=150, shown={"leaderboard": 45}, varies=True,
        words="peak memory",
    ),
    Measure("processes", "processes", format_amount, ranks=False),
    Measure("found_lr", "found lr", format_lr),  # by a range test
    Measure("batch_variation", "batch variation"),  # of the diverse sampler
    Measure("skipped_updates", "skipped updates", format_amount),
    Measure("pruned_at_epoch", "pruned at epoch", format_amount),
    Measure("decay_correlation", "decay correlation", direction="max"),  # of the laboratory
)  # fmt: skip

MEASURES: Mapping[str, Measure] = {each.name: each for each in (*PROGRESS, *OTHERS)}
VARYING = tuple(name for name, each in MEASURES.items() if each.varies)
"""Columns that differ between runs that compute the same."""
_OF_LINES = [(each.name, each.needs, each.of_line) for each in OTHERS if each.of_line is not None]


# -- values


def derived(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns what follows from a line of metrics.jsonl alone: the generalization gaps."""
    found = {}
    for name, needs, compute in _OF_LINES:
        values = [line.get(need) for need in needs]
        if None not in values:
            found[name] = compute(*values)
    return found


def measured(training: Training) -> dict[str, float]:
    """Returns samples or tokens per second and, on a GPU, utilization and the peak of the allocated memory."""
    values = {each.name: each.of_training(training) for each in OTHERS if each.of_training is not None}
    return {name: value for name, value in values.items() if value is not None}


def at_end(model: "nn.Module") -> dict[str, float]:
    """Returns the measures at the end of a run, for summary.json: parameters."""
    return {each.name: each.at_end(model) for each in OTHERS if each.at_end is not None}


def seconds_left(seconds: float, done: int, left: int) -> float | None:
    """Returns the time of the updates `left` at the speed of those `done` in `seconds`; None if none is done."""
    return seconds / done * max(left, 0) if done > 0 else None
