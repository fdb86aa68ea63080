import re
from pathlib import Path
from typing import Any, get_args

import pytest

import dlopt
from dlopt.basics.errors import UserError
from dlopt.metrics.names import (
    EVALUATED,
    FINAL_TAGS,
    Metric,
    Split,
    base_name,
    best_key,
    by_column,
    column_of,
    common_directions,
    direction_of,
    final_metrics,
    in_words,
    known_direction,
    lower_is_better,
    monitored_directions,
    split_of,
    tag_of,
)

LOWER = [
    "val_loss", "best_val_loss", "test_error", "val_mae", "val_calibration_error", "val_perplexity",
    "val_bits_per_byte", "accuracy_gap", "seconds", "parameters", "evaluated_train_loss", "idle_units",
]  # fmt: skip
HIGHER = [
    "val_accuracy", "best_val_accuracy", "val_top5_accuracy", "val_worst_class_accuracy", "val_token_accuracy",
    "val_class_accuracy/loss", "val_macro_f1", "best_val_macro_f1", "val_r2", "val_mean_average_precision",
    "samples_per_second",
]  # fmt: skip
OWN = ["val_dice_score", "best_val_kappa", "test_my_accuracy", "val_rmse", "val_reconstruction_loss", "val_auc"]


@pytest.mark.parametrize("metric", [*LOWER, *HIGHER])
def test_direction_of_every_metric(metric: str) -> None:
    assert lower_is_better(metric) == (metric in LOWER)


@pytest.mark.parametrize("metric", OWN)
def test_names_of_the_user_say_nothing(metric: str) -> None:
    assert known_direction(metric) is None
    with pytest.raises(UserError, match=f"{metric}: whether smaller or larger"):
        lower_is_better(metric)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"monitor": "val_dice_score", "monitor_mode": "min"}, {"dice_score": "min"}),
        ({"monitor": "auto", "stopping.monitor": "val_kappa", "monitor_mode": "max"}, {"kappa": "max"}),
        ({"monitor": "val_loss", "monitor_mode": None, "schedule.monitor": "val_kappa", "schedule.mode": "max"},
         {"kappa": "max"}),
        ({"monitor_mode": "min", "schedule.monitor": "val_a", "schedule.mode": "auto"}, {"a": "min"}),
        ({"monitor": "val_loss", "monitor_mode": None}, {}),
    ],
)  # fmt: skip
def test_modes_of_a_config(config: dict[str, Any], modes: dict[str, str]) -> None:
    assert monitored_directions(config) == modes
    assert all(direction_of(f"best_val_{name}", modes) == mode for name, mode in modes.items())  # type: ignore[arg-type]


def test_runs_that_disagree_give_no_direction() -> None:
    configs = [{"monitor": "val_a", "monitor_mode": mode} for mode in ("min", "max")]
    assert common_directions(configs) == {} and common_directions(configs[:1]) == {"a": "min"}


# -- spelling

NAMES = [*EVALUATED, "class_accuracy/8", "class_accuracy/loss", "class_accuracy/best_val_loss", "kappa", "val_loss", ""]


@pytest.mark.parametrize("split", get_args(Split))
def test_what_is_spelled_is_parsed(split: Split) -> None:
    for name in NAMES:
        check_spelling(split, name)


def check_spelling(split: Split, name: str) -> None:
    metric = Metric(split, name)
    assert Metric.of(metric.column) == Metric.of(metric.best) == metric
    assert column_of(metric.best) == column_of(metric.column) == metric.column
    assert best_key(metric.column) == metric.best
    assert (split_of(metric.column), split_of(metric.best)) == (split, None)
    assert base_name(metric.column) == base_name(metric.best) == metric.base
    assert known_direction(metric.column) == known_direction(metric.best), "one direction, however it is spelled"
    assert (tag_of(metric.column), tag_of(metric.best)) == (metric.tag, metric.best)
    assert by_column(split, {name: 1.0}) == {metric.column: 1.0}


def test_spelling_of_the_contract() -> None:
    loss, test, rare = Metric("val", "loss"), Metric("test", "accuracy"), Metric("val", "class_accuracy/8")
    assert (loss.column, loss.best) == ("val_loss", "best_val_loss")
    assert (loss.tag, loss.best_tag, test.tag) == ("val/loss", "best/val_loss", "test/accuracy")
    assert [tag.startswith(FINAL_TAGS) for tag in (loss.tag, loss.best_tag, test.tag)] == [False, True, True]
    assert (rare.column, rare.base, rare.class_name) == ("val_class_accuracy/8", "class_accuracy", "8")
    assert loss.class_name is None
    assert (in_words("val_accuracy"), in_words("train_loss")) == ("validation accuracy", "training loss")


@pytest.mark.parametrize("key", ["seconds", "gap", "accuracy_gap", "best_epoch", "trained", "valid_loss", "val/loss"])
def test_keys_without_a_split(key: str) -> None:
    assert Metric.of(key) is None and split_of(key) is None
    assert base_name(key) == tag_of(key) == key


def test_final_metrics_of_a_summary() -> None:
    others = ["status", "best_epoch", "val_loss", "best_test_loss", "best_train_loss", "seconds"]
    found = final_metrics(dict.fromkeys([*others, "best_val_loss", "test_loss"], 1.0))
    assert found == {"best_val_loss": Metric("val", "loss"), "test_loss": Metric("test", "loss")}


def test_one_module_spells_metrics() -> None:
    apart = re.compile(
        r"""(removeprefix|removesuffix|startswith|replace|partition|split)\(\(?["'](best|val|train|test)_["']"""
        r"""|f["'](best_)?(val|train|test)_\{|f["']best_\{|["'](best|val|train|test|best_val)_["'] ?[+,)]"""
        r"""|\{(split|prefix)\}_|["']best_val_|(?<!r)partition\(["']_["']\)"""
    )
    package = Path(dlopt.__file__).parent
    assert not [path for path in package.rglob("*.py") if apart.search(path.read_text())]
