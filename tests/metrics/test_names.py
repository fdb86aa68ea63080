from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.metrics.names import common_modes, former_mode, known_mode, lower_is_better, mode_of, monitored_modes

LOWER = [
    "val_loss", "best_val_loss", "test_error", "val_mae", "val_calibration_error", "val_perplexity",
    "val_bits_per_byte", "accuracy_gap", "seconds", "parameters", "evaluated_train_loss", "idle_units",
]  # fmt: skip
HIGHER = [
    "val_accuracy", "best_val_accuracy", "val_top5_accuracy", "val_worst_class_accuracy", "val_token_accuracy",
    "val_class_accuracy/loss", "val_macro_f1", "best_val_macro_f1", "val_r2", "val_mean_average_precision",
    "samples_per_second",
]  # fmt: skip
OWN = ["val_brier_score", "best_val_kappa", "test_my_accuracy", "val_rmse", "val_reconstruction_loss", "val_auc"]


@pytest.mark.parametrize("metric", [*LOWER, *HIGHER])
def test_direction_of_every_metric(metric: str) -> None:
    assert lower_is_better(metric) == (metric in LOWER)


@pytest.mark.parametrize("metric", OWN)
def test_names_of_the_user_say_nothing(metric: str) -> None:
    assert known_mode(metric) is None
    with pytest.raises(UserError, match=f"{metric}: whether smaller or larger"):
        lower_is_better(metric)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"monitor": "val_brier_score", "monitor_mode": "min"}, {"brier_score": "min"}),
        ({"monitor": "auto", "stopping.monitor": "val_kappa", "monitor_mode": "max"}, {"kappa": "max"}),
        ({"monitor": "val_loss", "monitor_mode": None, "schedule.monitor": "val_kappa", "schedule.mode": "max"},
         {"kappa": "max"}),
        ({"monitor_mode": "min", "schedule.monitor": "val_a", "schedule.mode": "auto"}, {"a": "min"}),
        ({"monitor": "val_brier_score"}, {"brier_score": "max"}),  # a config of an older version, which guessed
        ({"monitor": "val_loss", "monitor_mode": None}, {}),
    ],
)  # fmt: skip
def test_modes_of_a_config(config: dict[str, Any], modes: dict[str, str]) -> None:
    assert monitored_modes(config) == modes
    assert all(mode_of(f"best_val_{name}", modes) == mode for name, mode in modes.items())  # type: ignore[arg-type]


def test_runs_that_disagree_give_no_direction() -> None:
    configs = [{"monitor": "val_a", "monitor_mode": mode} for mode in ("min", "max")]
    assert common_modes(configs) == {} and common_modes(configs[:1]) == {"a": "min"}
    assert former_mode({"monitor": "val_loss"}) is None
