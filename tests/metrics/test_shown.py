"""Formats and titles by the names of metrics."""

import math

import pytest

from dlopt.metrics.shown import axis_label, format_metric, is_percent, live_name, title, words


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val_accuracy", 0.9, "90.00 %"), ("lr", 0.00123456, "0.001235"), ("seconds", 8.84, "8.8 s"),
        ("steps", 43.333, "43.33"), ("parameters", 1234567, "1,234,567"), ("val_loss", 0.5, "0.5000"),
        ("seconds", None, "-"), ("epochs", None, "-"),
        ("best_val_accuracy", 0.9, "90.00 %"), ("class_accuracy/8", 0.9, "90.00 %"), ("val_macro_f1", 0.9, "0.9000"),
        ("utilization", 0.417, "41.70 %"), ("gpu_memory_gib", 3, "3.0 GiB"), ("samples_per_second", 1234.5, "1,234"),
        ("accuracy_gap", 0.01, "1.00"), ("gap", 0.01, "0.0100"), ("val_error", 0.1, "0.1000"),
    ],
)  # fmt: skip
def test_format_metric(name: str, value: float | None, text: str) -> None:
    assert format_metric(name, value) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("val_my_accuracy", "50.00 %"), ("accuracy_at_5", "50.00 %"), ("val_top1", "50.00 %"), ("val_kappa", "0.5000")],
)
def test_names_of_others_tell_fractions(name: str, text: str) -> None:
    assert format_metric(name, 0.5) == text and format_metric(name, None) == "-"
    assert is_percent(name) == ("accuracy" in name)


def test_percent() -> None:
    assert all(map(is_percent, ["val_accuracy", "val_class_accuracy/8", "test_top5_accuracy", "accuracy_gap"]))
    assert not any(map(is_percent, ["val_loss", "val_error", "gap", "utilization", "seconds"]))


def test_titles() -> None:
    columns = ["train_loss", "val_accuracy", "val_mean_average_precision", "val_micro_f1", "val_kappa", "utilization"]
    assert [*map(title, columns)] == ["train loss", "val acc", "val mAP", "val micro f1", "val kappa", "MFU"]
    assert title("val_worst_class_accuracy") == "val worst class accuracy", "not that of class_accuracy"
    assert [*map(live_name, ["train_loss", "val_accuracy", "lr", "gpu_memory_gib"])] == [
        "loss", "accuracy", "lr", "memory"
    ]  # fmt: skip
    assert (words("gap"), words("val_loss")) == ("validation − training loss", "validation loss")
    assert axis_label("gap") == "gap: validation loss minus training loss"


def test_non_finite_values_are_shown() -> None:
    assert [format_metric(name, math.inf) for name in ("val_loss", "val_accuracy")] == ["inf", "-"]
