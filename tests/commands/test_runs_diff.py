"""`dlopt runs diff`: keys and metrics of two runs."""

import re
from pathlib import Path

import pytest

from tests.support.folders import make_run
from tests.support.line import dlopt, refused
from tests.support.terminal import in_terminal, plain


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    make_run(tmp_path / "a", lr=0.1, accuracies=(0.2, 0.5), config={"tags": ["base"]})
    make_run(tmp_path / "b", optimizer="adamw", lr=0.01, seed=1, accuracies=(0.3, 0.75, 0.7), test=None)
    make_run(tmp_path / "c", optimizer="adamw", lr=0.01, seed=1, accuracies=(0.3,))
    return tmp_path


def test_lists_the_keys_and_metrics_that_differ(outputs: Path) -> None:
    result = dlopt(outputs, "runs", "diff", "a", "b")
    assert (result.code, result.err) == (0, "")
    rows = dict((line.split("\t")[0], tuple(line.split("\t")[1:])) for line in result.out.splitlines())
    assert rows[""] == ("a", "b")
    assert rows["optimizer"] == ("sgd", "adamw") and rows["optimizer.lr"] == ("0.1", "0.01")
    assert rows["optimizer.momentum"] == ("0.9", "-") and rows["optimizer.betas"] == ("-", "[0.9,0.999]")
    assert rows["seed"] == ("0", "1") and rows["tags"] == ("[base]", "-")
    assert "model" not in rows and "data.batch_size" not in rows
    assert rows["val_accuracy"] == ("0.5", "0.75") and not {"best_epoch", "status"} & {*rows}
    assert rows["test_accuracy"] == ("0.75", "-")
    assert list(rows).index("tags") < list(rows).index("val_accuracy")


def test_equal_configs(outputs: Path) -> None:
    result = dlopt(outputs, "runs", "diff", "c", "c")
    assert (result.err, result.out) == ("the configs are equal\n", "\tc\tc\n")
    assert in_terminal(outputs, 80, "runs", "diff", "c", "c") == (0, "the configs are equal\n")


@pytest.mark.parametrize("width", [40, 100])
def test_table_in_a_terminal(outputs: Path, width: int) -> None:
    code, shown = in_terminal(outputs, width, "runs", "diff", "a", "b")
    text = plain(shown)
    assert code == 0 and max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    words = re.sub(r"\b[ab] (?=\d)", "", words) if width == 40 else words  # a line per cell
    assert "validation accuracy 50.00 % 75.00 %" in words and "val_accuracy" not in text
    assert "processes" not in words and "best epoch" not in words and "training loss 0.5000 0.2500" in words
    assert "50.00 %" in text and "75.00 %" in text and "optimizer.momentum" in text


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a nowhere", "nowhere: no such folder"),
        ("a .", "config.yaml is missing"),
        ("a b --full", "--full: unknown flag"),
    ],
)
def test_refused(outputs: Path, typed: str, message: str) -> None:
    assert message in refused(outputs, "runs", "diff", *typed.split())
