import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import RunError
from dlopt.tracking.metrics import MetricsFile, read_metrics, read_summary, to_json, write_summary


def no_warning(text: str) -> None:
    raise AssertionError(text)


def strict(text: str | bytes) -> object:
    """JSON as other languages read it: NaN and Infinity are errors."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"not JSON: {literal}")

    return json.loads(text, parse_constant=refuse)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_any_value_becomes_one_line_of_strict_json(value: object) -> None:
    text = to_json(value)
    strict(text)
    assert "\n" not in text


def test_non_finite_values_become_null() -> None:
    item = {"a": math.nan, "b": [math.inf, 1.5], "c": torch.tensor(2.0), "d": torch.tensor(math.nan), "e": True}
    assert strict(to_json(item)) == {"a": None, "b": [None, 1.5], "c": 2.0, "d": None, "e": True}


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """A class is named after its folder, which may have any bytes."""
    file = MetricsFile(tmp_path, None, no_warning)
    line = {"epoch": 1, "step": 1, "val_class_accuracy/caf\udce9": 0.5}
    file.write(line)
    assert read_metrics(tmp_path) == [line]
    file.close()


def write_epochs(folder: Path, epochs: range) -> None:
    file = MetricsFile(folder, (epochs.start - 1, 10 * (epochs.start - 1)), no_warning)
    for epoch in epochs:
        file.write({"epoch": epoch, "step": 10 * epoch, "val_loss": 1 / epoch})
        assert read_metrics(folder)[-1]["epoch"] == epoch, "a line must be on disk at once"
    file.close()


def test_resume_removes_lines_after_the_checkpoint(tmp_path: Path) -> None:
    write_epochs(tmp_path, range(1, 6))
    file = MetricsFile(tmp_path, (3, 34), no_warning)  # a checkpoint in the middle of epoch 4
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    file.write({"epoch": 4, "step": 40})
    file.close()
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_resume_removes_evaluations_after_the_checkpoint(tmp_path: Path) -> None:
    # The checkpoint was taken after the last update of epoch 2, before its evaluation.
    write_epochs(tmp_path, range(1, 4))
    MetricsFile(tmp_path, (1, 20), no_warning).close()
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write_epochs(tmp_path, range(1, 3))
    MetricsFile(tmp_path, None, no_warning).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("keep", range(1, 40))
def test_a_torn_last_line_is_ignored_by_readers_and_repaired_on_resume(tmp_path: Path, keep: int) -> None:
    write_epochs(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    torn = whole[: min(first + keep, len(whole) - 2)]
    path.write_bytes(torn)
    assert read_metrics(tmp_path) == [{"epoch": 1, "step": 10, "val_loss": 1.0}]
    write_epochs(tmp_path, range(2, 4))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    write_epochs(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_epochs(tmp_path, range(3, 4))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_summary_round_trip_without_nan_and_without_leftovers(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "failed", "test_loss": math.nan})
    write_summary(tmp_path, {"status": "finished", "test_loss": math.inf, "resumed_from": [30]})
    assert strict((tmp_path / "summary.json").read_bytes()) == {
        "status": "finished",
        "test_loss": None,
        "resumed_from": [30],
    }
    assert read_summary(tmp_path) == strict((tmp_path / "summary.json").read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_missing_files_read_as_empty(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    assert read_metrics(tmp_path) == []
    (tmp_path / "summary.json").write_text('{"status": "fin')
    assert read_summary(tmp_path) is None


def test_a_summary_that_cannot_be_written_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"summary\.json"):
        write_summary(tmp_path / "missing", {"status": "finished"})
