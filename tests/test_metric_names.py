import pytest

from dlopt.metric_names import lower_is_better

LOWER = [
    "val_loss", "best_val_loss", "test_error", "val_mae", "val_calibration_error", "val_perplexity",
    "val_bits_per_byte", "accuracy_gap", "seconds", "parameters", "val_rmse",
]  # fmt: skip
HIGHER = [
    "val_accuracy", "best_val_accuracy", "val_top5_accuracy", "val_worst_class_accuracy", "val_token_accuracy",
    "val_class_accuracy/loss", "val_macro_f1", "best_val_macro_f1", "val_r2",
]  # fmt: skip


@pytest.mark.parametrize("metric", [*LOWER, *HIGHER])
def test_direction_of_every_metric(metric: str) -> None:
    assert lower_is_better(metric) == (metric in LOWER)
