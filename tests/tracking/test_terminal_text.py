import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text
from torch import nn
from torch.nn import functional as F

from dlopt.basics.folders import short_path
from dlopt.metrics.names import Split
from dlopt.run.runner import job_environment
from dlopt.tasks.classification import Classification
from dlopt.tasks.report import TestReport
from dlopt.tracking import terminal_text
from tests.support.lengths import constant

METRICS = {
    "epoch": 100,
    "step": 46900,
    "lr": 0.00669873,
    "train_loss": 1.23456,
    "train_accuracy": 0.5,
    "val_loss": 12.3456,
    "val_accuracy": 1.0,
    "seconds": 123.4,
}


def rendered(renderable: object, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def test_format_epoch() -> None:
    assert terminal_text.format_epoch(METRICS, 200, best=True) == (
        "epoch 100/200  train loss 1.2346 accuracy 50.00 %  val loss 12.3456 accuracy 100.00 %  lr 0.006699  2:04  best"
    )
    on_gpu = {**METRICS, "tokens_per_second": 480_123.4, "utilization": 0.417}
    assert terminal_text.format_epoch(on_gpu, 200, best=False).endswith("  2:04  480,123 tokens/s  MFU 41.70 %")
    regression = {key: value for key, value in METRICS.items() if "accuracy" not in key}
    assert terminal_text.format_epoch(regression, 200, best=False) == (
        "epoch 100/200  train loss 1.2346  val loss 12.3456  lr 0.006699  2:04"
    )


@pytest.mark.parametrize("width", [60, 80, 120, None])
@pytest.mark.parametrize("regression", [True, False])
def test_rows_are_aligned_with_their_header_and_fit(width: int | None, regression: bool) -> None:
    metrics = {key: value for key, value in METRICS.items() if not (regression and "accuracy" in key)}
    rows = terminal_text.EpochRows(constant(200, 1))
    header, row = rows.header(metrics, width).plain, rows.row(metrics, best=False).plain
    assert len(header) == len(row) <= (width or 200) - 2
    assert ("val acc" in header) != regression
    assert header.index("val loss") + len("val loss") == row.index("12.3456") + len("12.3456")


def test_rows_show_the_time_of_their_own_epochs_and_the_throughput() -> None:
    """Also for the first row after a resume."""
    rows = terminal_text.EpochRows(constant(47369, 237), unit="images", seconds=103.4, step=46431)
    metrics = {**METRICS, "samples_per_second": 1234.5, "utilization": 0.417, "gpu_memory_gib": 3.0}
    header = rows.header(metrics, None).plain
    columns = header.replace("epoch time", "epoch_time").replace("total time", "total_time").split()
    assert columns[-5:] == ["epoch_time", "total_time", "left", "images/s", "MFU"]
    assert rows.row(metrics, best=True).plain.endswith("20.0 s       2:04    0:20    1,234 41.70 % *")
    later = {**metrics, "epoch": 101, "step": 47369, "seconds": 125.4, "samples_per_second": math.nan}
    assert rows.row(later, best=False).plain.endswith("2.0 s       2:06    0:00        - 41.70 %")
    text = terminal_text.EpochRows(constant(200, 1), unit="tokens")
    assert text.header({**METRICS, "tokens_per_second": 480_000.0}, None).plain.endswith(" tokens/s")


@pytest.mark.parametrize(
    ("step", "seconds", "left"),
    [
        (500, 100.0, "3:20"),  # 100 updates in 20 s by this process; those before took 0.1 s each, on another machine
        (1500, 300.0, "0:00"),
        (1600, 320.0, "0:00"),  # of a longer run, resumed with fewer updates
        (400, 40.0, "-"),  # the evaluation that the process before did not finish
        (350, 60.0, "-"),  # at an update before the resumed one
    ],
)
def test_time_left_is_at_the_speed_of_this_process(step: int, seconds: float, left: str) -> None:
    rows = terminal_text.EpochRows(constant(1500, 8), seconds=80.0, step=400)
    metrics = {"epoch": 5, "step": step, "seconds": seconds}
    header, row = rows.header(metrics, None).plain, rows.row(metrics, best=False).plain
    assert header.endswith("total time    left") and row[-7:].strip() == left


def test_a_narrow_terminal_hides_the_time_left_first() -> None:
    rows = terminal_text.EpochRows(constant(200, 1))
    width = len(rows.header(METRICS, None).plain) + len(" * ")  # the mark of the best epoch
    hidden = rows.header(METRICS, width - 1).plain
    assert rows.header(METRICS, width).plain.endswith("total time    left") and hidden.endswith("epoch time total time")


CONFIG = {
    "name": "try",
    "seed": 3,
    "data": {"_target_": "dlopt.data.images.digits.digits", "batch_size": 64},
    "model": {"_target_": "dlopt.models.MLP", "widths": [64, 64], "dropout": None},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": None},
    "schedule": {"_target_": "dlopt.schedules.cosine"},
    "clip": None,
}


def test_header_summarizes_the_run() -> None:
    facts: dict[str, Any] = {"parameters": 272474, "trainable": 650, "train": 1437, "val": 0, "test": 360}
    facts |= {"length": constant(23, 23), "parallel": "ddp", "processes": 2, "overrides": ["seed=3", "packages=[mine]"]}
    facts |= {"device": "cpu", "threads": 2, "precision": "bf16", "inputs": "1x8x8, 10 classes", "unit": "images"}
    choices = {"data": "digits", "model": "mlp", "optimizer": "sgd", "schedule": "cosine", "clip": "none"}
    lines = rendered(terminal_text.header(CONFIG, choices, {**facts, "folder": "out/1"}), 100)
    assert [line.rstrip() for line in lines] == [
        "overrides  seed=3  'packages=[mine]'",
        "data       digits  1,437 train, 360 test  1x8x8, 10 classes  batch_size 64",
        "model      mlp  272,474 parameters (650 trainable)",
        "optimizer  sgd  lr 0.1  schedule cosine",
        "run        1 epoch of 23 steps  parallel ddp (2 processes)  cpu (2 threads)  bf16  seed 3",
        "folder     out/1",
    ]


@given(st.integers(40, 120))
def test_header_wraps_only_between_texts(width: int) -> None:
    lines = rendered(terminal_text.header(CONFIG, {}, {"parameters": 272474, "train": 1437, "test": 360}), width)
    assert all(len(line) <= width for line in lines) and any("272,474 parameters" in line for line in lines)


def test_short_paths_are_those_of_the_shell_that_started_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outputs/run"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    job = {"chdir": True, "env_set": {}}
    hydra = {"job": job, "job_logging": {"root": None}, "runtime": {}, "verbose": False}
    with job_environment(OmegaConf.create({"hydra": hydra}), folder):
        assert Path.cwd() == folder
        assert short_path(folder) == "outputs/run"
        assert short_path(Path("curves.png")) == "outputs/run/curves.png"
    assert Path.cwd() == tmp_path and short_path(folder) == "outputs/run"


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": False}, "lr 0.1  momentum 0.9"),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}, "momentum 0.9  nesterov"),
        ({"_target_": "mine.Foo", "foo": 2.0, "groups": [], "fast": False, "lr": 0.1}, "lr 0.1  foo 2.0  fast false"),
        ({"_target_": "dlopt.optim.SGDW", "lr": 0.1, "momentum": 0.9}, "lr 0.1  momentum 0.9, average of gradients"),
        ({"_target_": "dlopt.optim.SGDW", "lr": 0.1, "momentum": 0.0}, "lr 0.1  momentum 0.0"),
        ({"betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}, "betas [0.9,0.999]  weight_decay 0.01"),
        ({"_target_": "mine.Adam", "momentum": [0.9, 0.99], "lr": "auto"}, "lr auto  momentum [0.9,0.99]"),
    ],
)
def test_header_shows_what_defines_the_optimizer(optimizer: dict[str, Any], expected: str) -> None:
    row = terminal_text.header_rows({"optimizer": optimizer}, {}, {})["optimizer"]
    assert "  ".join(row).endswith(expected)


def test_header_shows_initialization_augmentation_and_warmup() -> None:
    """Also the defaults, which nobody types: each of them changes what is trained."""
    choices = {"augmentation": "none", "init": "default", "schedule": "cosine_warmup", "clip": "none", "adapt": "none"}
    config: dict[str, Any] = {group: {} for group in choices}
    lengths = {"warmup_epochs": None, "warmup_steps": None, "warmup_fraction": 0.1}
    rows = terminal_text.header_rows({**config, "schedule": lengths}, choices, {})
    assert rows == {
        "data": ["augmentation none"],
        "model": ["init default"],
        "optimizer": ["schedule cosine_warmup", "warmup 10 %"],
    }
    warmups = {"warmup_epochs": 5}, {"warmup_steps": 100}, {"warmup_steps": 0}, {"warmup_fraction": 0.0}
    shown = [terminal_text.header_rows({"schedule": {**lengths, **each}}, {}, {}) for each in warmups]
    assert [each.get("optimizer") for each in shown] == [["warmup 5 epochs"], ["warmup 100 steps"], None, None]


def test_header_reports_what_is_missing_or_overruled() -> None:
    facts = {"train": 1437, "val": 0, "test": 0, "unit": "tokens", "overrides": ["epochs=2"]}
    facts |= {"length": constant(3, 23)}
    rows = terminal_text.header_rows({"epochs": 2, "steps": 3, "data": {}}, {}, facts)
    assert rows["data"] == ["1,437 train tokens, no test set"]
    assert rows["run"] == ["3 steps (23 per epoch)", "steps=3 wins over epochs=2"]
    assert len(terminal_text.header_rows({"epochs": 2, "steps": None}, {}, facts)["run"]) == 1
    assert len(terminal_text.header_rows({"epochs": 2, "steps": 3}, {}, {**facts, "overrides": []})["run"]) == 1


def test_header_shows_the_batch_as_it_is_drawn() -> None:
    for size, drawn, shown in ((256, 20, "batch_size 20"), (64, 64, "batch_size 64"), ("full", 90, "batch_size full")):
        rows = terminal_text.header_rows({"data": {"batch_size": size}}, {}, {"batch_size": drawn})
        assert shown in rows["data"]


def test_header_of_a_run_that_is_not_built() -> None:
    assert terminal_text.header_rows({}, {}, {}) == {}


def test_hparams_are_flat() -> None:
    config = {"seed": 3, "steps": None, "model": {"_target_": "a.MLP", "widths": [64, 64], "inner": {"bias": True}}}
    assert terminal_text.hparams(config, {}) == {
        "model": "MLP",
        "seed": 3,
        "model.widths": "[64,64]",
        "model.inner.bias": True,
    }
    assert terminal_text.hparams(config, {"model": "mlp"})["model"] == "mlp"


@pytest.mark.parametrize("status", ["finished", "stopped_early", "interrupted", "failed"])
def test_result_of_every_status(status: str) -> None:
    text = "\n".join(
        rendered(terminal_text.format_result({"status": status, "epochs": 3, "steps": 1200, "seconds": 61.0}), 60)
    )
    assert text.startswith(f"{status.replace('_', ' ')} after 3 epochs, 1,200 steps in 1:01")


def test_result_table() -> None:
    summary = {
        "best_epoch": 2,
        "best_val_loss": 0.5,
        "best_val_accuracy": 0.75,
        "test_loss": 0.25,
        "test_accuracy": 0.5,
    }
    rows = [line.split() for line in rendered(terminal_text.format_result(summary), 60)]
    assert ["best", "validation", "0.5000", "75.00", "%", "2"] in rows
    assert ["test", "0.2500", "50.00", "%", "2"] in rows


def reported(count: int, split: Split) -> TestReport:
    """Of 300 samples of `count` classes, of which every 7th is predicted as the next class."""
    task, targets = Classification(count), torch.arange(300) % count
    outputs = F.one_hot((targets + (torch.arange(300) % 7 == 0)) % count, count).double() * 2
    metrics = {f"{split}_loss": 0.25, f"{split}_accuracy": 0.86, f"{split}_macro_f1": 0.85, f"{split}_roc_auc": 0.9876}
    for name in ("balanced_accuracy", "log_loss", "brier_score", "calibration_error"):
        metrics[f"{split}_{name}"] = 0.125
    report = task.report(metrics, task.evaluated(outputs, targets, nn.CrossEntropyLoss()))
    return replace(report, split=split, guessing=task.beside_guessing(report.part, targets, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("count", "split", "classes"), [(2, "test", 2), (10, "val", 10), (100, "test", 5)])
def test_result_of_a_test(count: int, split: Split, classes: int, width: int) -> None:
    """The metrics that were requested in the table, the others in a block, then the classes; nothing is cut."""
    names = [f"class {number}" for number in range(count)]
    summary = {"best_epoch": 3, "best_val_loss": 0.25, "best_val_accuracy": 0.86, "best_val_macro_f1": 0.85}
    tested = reported(count, split)
    lines = rendered(terminal_text.format_result(summary, tested, names), width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    text = "\n".join(lines)
    table, block = text[: text.index("guessing")], text[text.index("guessing") :]
    assert "macro f1" in table and table.count("0.8500") == (2 if split == "test" else 1)
    assert "ROC AUC 0.9876" in block and "balanced accuracy 12.50 %" in block and "macro f1" not in block
    assert ("split: validation, which chose the epoch: optimistic" in text) == (split == "val")
    assert ("the 5 of 100 with the lowest F1" in text) == (count == 100)
    rows = [line.split() for line in lines if line.startswith("class ")][1:]
    assert len(rows) == classes
    if count == 2:
        assert f"test: {100 * (tested.part.predictions == tested.part.targets).double().mean() - 50:.1f} points" in text  # type: ignore[union-attr]
        assert "(always 0: 50.0 %)" in text
    by_class = {row["class"]: row for row in tested.per_class(names)}
    for _, number, precision, recall, f1, samples, *_areas in rows:
        row = by_class[f"class {number}"]
        assert [precision, recall, f1] == [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        assert int(samples) == row["samples"] == 300 // count
    logged = terminal_text.plain_lines(terminal_text.format_result(summary, tested, names))
    assert all(logged) and not any("\x1b" in line for line in logged)


def test_hparams_leave_out_derived_seeds() -> None:
    config = {"seed": 3, "init_seed": 3, "order_seed": 5, "data": {"split_seed": 3, "batch_size": 8}}
    assert terminal_text.hparams(config, {"data": "digits"}) == {
        "data": "digits", "seed": 3, "order_seed": 5, "data.batch_size": 8
    }  # fmt: skip


# -- tables


def runs_table() -> terminal_text.FittedTable:
    table = terminal_text.plain_table("runs")
    table.add_column("run", overflow="fold")
    table.add_column("best epoch", justify="right")
    table.add_column("val accuracy", justify="right")
    table.add_column("note")
    table.add_row("outputs/train/2026-01-01_12-00-00", "12", Text("97.57 ± 1.47 %"), "")
    table.add_row("outputs/b", "3", Text("9.10 %"), "failed")
    return terminal_text.FittedTable(table)


def shown(width: int) -> list[str]:
    return rendered(runs_table(), width)


def test_wide_table_has_one_line_per_row() -> None:
    assert shown(90) == [
        "runs",
        "run                                 best epoch     val accuracy   note",
        "────────────────────────────────────────────────────────────────────────",
        "outputs/train/2026-01-01_12-00-00           12   97.57 ± 1.47 %",
        "outputs/b                                    3           9.10 %   failed",
    ]


@pytest.mark.parametrize("width", [30, 60, 90, 200])
def test_table_has_no_trailing_spaces(width: int) -> None:
    assert all(line == line.rstrip() for line in shown(width))


def test_fits_if_each_row_needs_one_line() -> None:
    """The header may take two lines."""
    narrowest = min(width for width in range(40, 100) if runs_table().fits(Console(), width))
    rows, smaller = shown(narrowest), shown(narrowest - 1)
    assert len(rows) == 6 and rows[-2].startswith("outputs/train/2026-01-01_12-00-00 ") and "failed" in rows[-1]
    assert not any("outputs/train/2026-01-01_12-00-00 " in line for line in smaller)


def test_folding_column_shrinks_first() -> None:
    lines = shown(60)
    assert [line for line in lines if "97.57 ± 1.47 %" in line] and [line for line in lines if "failed" in line]
    assert all(len(line) <= 60 for line in lines)
    assert lines[4].split()[0] + lines[5].strip() == "outputs/train/2026-01-01_12-00-00"


@pytest.mark.parametrize("width", [20, 40, 45])
def test_narrow_table_stacks_cells(width: int) -> None:
    lines = shown(width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    for figure in ("best epoch 12", "val accuracy 97.57 ± 1.47 %", "best epoch 3", "note failed"):
        assert figure in text
    assert "…" not in text and text.count("note") == 1  # an empty cell is left out


def test_columns_shrink_to_their_longest_word() -> None:
    widths = [width for width in range(20, 90) if len(shown(width)) in (5, 6, 7) and "best" in shown(width)[1]]
    assert min(widths) <= 55
