"""What is shown of a run is declared once, and nothing is forgotten."""

from pathlib import Path
from typing import get_args

import pytest

from dlopt.metrics.declared import DECLARED
from dlopt.metrics.measures import KEPT, MEASURES, Measure, Place, Training, derived, measured, seconds_left
from dlopt.metrics.names import Metric
from dlopt.metrics.shown import COLUMNS, expendable_in, listed_in, shown_in
from tests.support.runs import metrics, start
from tests.support.sizes import SMALL, without

# Overrides, and columns that only such a run has.
TEXT = ("data=text", "data.sequence_length=8", "data.batch_size=8", "model=gpt_nano", "model.width=6", "model.depth=1")
RUNS = {
    "images": ((*SMALL, "epochs=2"), {"samples_per_second", "val_accuracy"}),
    "several evaluations of an update": (
        (*SMALL, "epochs=1", "optimizer=sam", "sampler=diverse"),
        {"evaluations", "batch_variation"},
    ),
    "text": (
        (*without(SMALL, "data.subset", "data.batch_size", "model"), *TEXT, "epochs=1", "optimizer=adamw",
         "decay=cosine", "on_divergence=skip"),
        {"tokens_per_second", "val_bits_per_byte", "weight_decay", "skipped_updates"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_column_of_a_run_is_declared(name: str, tmp_path: Path) -> None:
    """Each number in metrics.jsonl and summary.json is a measure, or a metric of an evaluation."""
    overrides, own = RUNS[name]
    if name == "text":
        (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 20)
        overrides += (f"data.file={tmp_path / 'text.txt'}",)
    summary = start(tmp_path / "run", *overrides)
    columns = {key: value for line in metrics(tmp_path / "run") for key, value in line.items()} | summary
    costs = {"seconds", "parameters", "samples", "flops", "peak_memory"}
    assert columns.keys() >= own | costs | {"train_loss", "best_val_loss"}
    found = {key: Metric.of(key) for key, value in columns.items() if isinstance(value, int | float)}
    assert {key for key, each in found.items() if each is None} <= MEASURES.keys(), "declare it in dlopt.metrics"
    assert {each.base for each in found.values() if each is not None} <= DECLARED.keys()


@pytest.mark.parametrize("measure", COLUMNS.values(), ids=COLUMNS)
def test_every_measure_has_a_title_and_a_format(measure: Measure) -> None:
    assert measure.title and COLUMNS[measure.name] is measure and measure.shown.keys() <= {*get_args(Place)}
    for show in (measure.show, measure.show_brief):
        assert show(None) == "-" and any(map(str.isdigit, show(2)))
    assert str(measure.show_brief(2)) in measure.show_in_log(2)


@pytest.mark.parametrize("place", get_args(Place))
def test_no_two_columns_are_hidden_or_listed_at_once(place: Place) -> None:
    numbers = [number for each in shown_in(place) if (number := each.shown[place]) is not KEPT]
    assert len({*numbers}) == len(numbers) == len(expendable_in(place))
    columns = [COLUMNS[name] for name in listed_in(place) if not name.startswith("test_")]
    if place in ("leaderboard", "terminal", "runs", "details", "sweep"):
        assert len({each.priority for each in columns}) == len(columns)


def test_orders() -> None:
    assert expendable_in("table")[-1] == "train_accuracy" and expendable_in("leaderboard")[1] == "train_accuracy"
    assert listed_in("runs") == ["val_accuracy", "val_loss", "epochs", "seconds"]


def test_values_that_follow_from_others() -> None:
    assert derived({"val_loss": 0.75, "train_loss": 0.5, "val_accuracy": 0.5}) == {"gap": 0.25}
    assert derived({"train_accuracy": 0.75, "val_accuracy": 0.5, "val_loss": None}) == {"accuracy_gap": 0.25}
    assert measured(Training(8.0)) == {"samples_per_second": 8.0}
    assert measured(Training(8.0, 2, 3.0, 6.0, 2, 2**29)) == {
        "tokens_per_second": 16.0, "utilization": 2.0, "gpu_memory_gib": 0.5
    }  # fmt: skip
    assert (seconds_left(6.0, 3, 5), seconds_left(6.0, 3, -1), seconds_left(6.0, 0, 5)) == (10.0, 0.0, None)
