"""Comparison of configurations over seeds, against scipy."""

import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dlopt.results.intervals import statistic
from dlopt.results.leaderboard import (
    Record,
    Search,
    canonical,
    front,
    goal_of,
    is_number,
    leaderboard,
    look_of,
)
from tests.support.records import record


def entry(lr: float, seed: int, accuracy: float | None, status: str = "finished", **more: Any) -> Record:
    config = {"seed": seed, "init_seed": seed, "optimizer": {"lr": lr}, "threads": seed + 1}
    metrics = {"status": status, "best_val_accuracy": accuracy, "test_accuracy": 0.5, **more}
    typed = [f"optimizer.lr={lr}", f"seed={seed}", "epochs=3", f"threads={seed}"]
    return record(Path(f"{lr}/{seed}"), config, metrics, typed)


def test_groups_seeds_of_a_configuration() -> None:
    runs = [entry(lr, seed, 0.9 + lr + 0.01 * seed) for lr in (0.01, 0.02) for seed in range(5)]
    board = leaderboard(runs)
    assert board.metric == "val_accuracy" and board.direction == "maximize"
    assert [row.label for row in board.rows] == ["optimizer.lr=0.02", "optimizer.lr=0.01"]
    best, second = board.rows
    assert best.value is not None and best.value.count == 5 and best.difference is None
    assert best.value.mean == pytest.approx(0.94)
    assert best.value.std == pytest.approx(stats.tstd([0.92, 0.93, 0.94, 0.95, 0.96]))
    assert second.difference is not None and second.difference.mean == pytest.approx(-0.01)
    assert second.difference.low is None  # seeds have the same effect on both: nothing to estimate a spread from


def test_groups_equal_settings_of_different_types() -> None:
    runs = [entry(lr, seed, 0.9) for seed, lr in enumerate((1, 1.0, True))]
    runs += [
        record(Path(str(betas)), {"betas": betas, "seed": i}, {}, ()) for i, betas in enumerate(([0, 0.9], [0.0, 0.9]))
    ]
    assert sorted(len(row.runs) for row in leaderboard(runs).rows) == [1, 2, 2]


def test_null_is_as_good_as_no_key() -> None:
    """Configs of older versions have keys that are gone, with null."""
    configs: list[dict[str, Any]] = [{"lr": 0.1, "state_dtype": None}, {"lr": 0.1}, {"lr": 0.1, "state_dtype": "bf16"}]
    runs = [record(Path(str(i)), {"optimizer": each, "seed": i}, {}, ()) for i, each in enumerate(configs)]
    assert [len(row.runs) for row in leaderboard(runs).rows] == [2, 1]


@pytest.mark.parametrize("key", ["compile", "check", "profile", "diagnostics", "recovery.attempts", "name", "max_time"])
def test_keys_of_the_machine_and_of_logging_split_no_row(key: str) -> None:
    def runs(key: str) -> list[Record]:
        found = [entry(lr, seed, 0.9 + lr) for lr in (0.01, 0.02) for seed in range(3)]
        return [replace(each, config={**each.config, key: each.config["seed"]}, overrides=()) for each in found]

    rows = leaderboard(runs(key)).rows
    assert [len(row.runs) for row in rows] == [3, 3]
    assert rows[1].difference is not None and rows[1].difference.count == 3  # pairs of seeds
    assert len(leaderboard(runs("parallel.processes")).rows) == 6  # parallel modes are compared by their speed


def test_repetitions_of_a_run_do_not_shrink_the_spread() -> None:
    runs = [entry(0.1, seed, accuracy) for seed, accuracy in ((0, 0.8), (1, 0.9), (1, 0.9), (1, 0.85))]
    board = leaderboard(runs)
    [row] = board.rows
    assert row.value == statistic([0.8, 0.85])  # the last run of a seed
    assert row.count(board.metric) == "2 of 4"


def test_a_seed_that_was_run_twice_counts_once_in_mean_and_difference() -> None:
    runs = [entry(0.1, 0, 0.8), entry(0.1, 1, 0.9), entry(0.1, 1, 0.7), entry(0.2, 0, 0.6), entry(0.2, 1, 0.65)]
    first, second = leaderboard(runs).rows
    assert first.value is not None and second.value is not None and second.difference is not None
    assert first.value.mean == pytest.approx((0.8 + 0.7) / 2)
    assert second.difference.mean == pytest.approx(second.value.mean - first.value.mean)


@pytest.mark.parametrize("known", [True, False])
def test_two_data_sets_are_never_one_row(known: bool) -> None:
    def run(root: str, seed: int, content: str) -> Record:
        made = entry(0.1, seed, 0.9 if content == "a" else 0.5)
        origin = {"data": {"train": {"content": content}}} if known else {}
        return replace(made, config={**made.config, "data.root": root}, origin=origin)

    runs = [run("x", 0, "a"), run("y", 0, "b"), run("x", 1, "a")]
    board = leaderboard(runs)
    assert [len(row.runs) for row in board.rows] == [2, 1]
    assert [row.data for row in board.rows] == ["data.root=x", "data.root=y"]
    assert [row.label.endswith(f"({row.data})") for row in board.rows] == [True, True]
    if known:
        moved = leaderboard([run("x", 0, "a"), run("z", 1, "a")])
        assert [len(row.runs) for row in moved.rows] == [2]  # the same content elsewhere
        replaced = leaderboard([run("x", 0, "a"), run("x", 1, "b")])
        assert [row.data for row in replaced.rows] == ["data 1", "data 2"]


def test_a_seed_of_one_side_does_not_prevent_pairing() -> None:
    def run(lr: float, seed: int, accuracy: float, noise: int | None = None) -> Record:
        made = entry(lr, seed, accuracy)
        return made if noise is None else replace(made, config={**made.config, "optimizer.seed": noise})

    runs = [run(0.1, seed, 0.9 + 0.01 * seed) for seed in range(3)]
    noisy = [run(0.2, seed, 0.8 + 0.01 * seed, 0) for seed in range(3)]
    found = leaderboard([*runs, *noisy]).rows[1].difference
    assert found is not None and found.count == 3 and found.mean == pytest.approx(-0.1)
    others = [run(0.2, 0, 0.8, seed) for seed in range(3)]  # runs that differ in it only
    assert leaderboard([*runs, *others]).rows[1].difference is None


def test_statistics_of_few_values() -> None:
    assert statistic([]) is None
    one = statistic([2.0])
    assert one is not None and (one.mean, one.std, one.count) == (2.0, None, 1)


def test_excludes_failed_pruned_and_unfinished_runs() -> None:
    runs = [
        entry(0.1, 0, 0.8),
        entry(0.1, 1, None, "failed"),
        entry(0.2, 0, math.nan),
        entry(0.3, 0, 0.99, "stopped_early", pruned=True),
        entry(0.4, 0, 0.99, "interrupted"),
        entry(0.5, 0, 0.7, "stopped_early"),
    ]
    board = leaderboard(runs)
    assert [row.label for row in board.rows[:2]] == ["optimizer.lr=0.1", "optimizer.lr=0.5"]
    assert [row.value for row in board.rows[2:]] == [None] * 3
    assert board.rows[0].failed == 1 and board.rows[0].value == statistic([0.8])
    assert list(leaderboard([]).rows) == []


def test_counts_name_failed_and_pruned_runs() -> None:
    runs = [entry(0.2, 0, 0.9), entry(0.2, 1, None, "failed")]
    runs += [entry(0.1, seed, 0.5, "stopped_early", pruned=True) for seed in range(2)]
    runs.append(entry(0.3, 0, 0.4, "stopped_early", pruned=True))
    rows = leaderboard(runs).rows
    assert sorted(row.count("val_accuracy") for row in rows) == ["1 of 2", "2 pruned", "pruned"]
    counts = {row.label: row.count_with_failed("val_accuracy") for row in rows}
    assert sorted(counts.values()) == ["1 of 2, 1 failed", "2 pruned", "pruned"]


def test_does_not_rank_by_test_metrics() -> None:
    runs = [entry(0.1, 0, 0.8, test_accuracy=0.1), entry(0.2, 0, 0.7, test_accuracy=0.9)]
    assert leaderboard(runs).rows[0].label == "optimizer.lr=0.1"


def test_ranks_by_the_metric_that_all_runs_monitor() -> None:
    runs = [entry(0.1, 0, 0.8, best_val_loss=2.0), entry(0.2, 0, 0.7, best_val_loss=1.0)]
    for monitors, metric in ((["val_loss"] * 2, "val_loss"), (["val_loss", "auto"], "val_accuracy")):
        each = [replace(run, config={**run.config, "monitor": name}) for run, name in zip(runs, monitors, strict=True)]
        assert leaderboard(each).metric == metric
    # A metric that no run has, and one that is not of the validation set.
    for name in ("val_precision", "train_loss"):
        each = [replace(run, config={**run.config, "monitor": name}) for run in runs]
        assert leaderboard(each).metric == "val_accuracy"


def test_recipes_are_named_by_their_names() -> None:
    runs = [replace(entry(lr, 0, 0.8), overrides=[f"experiment={name}"]) for lr, name in ((0.1, "a"), (0.2, "b"))]
    assert {row.label for row in leaderboard(runs).rows} == {"experiment=a", "experiment=b"}


def test_minimizes_losses() -> None:
    runs = [entry(0.1, 0, None, best_val_loss=2.0), entry(0.2, 0, None, best_val_loss=1.0)]
    board = leaderboard(runs)
    assert (board.metric, board.direction, board.rows[0].label) == ("val_loss", "minimize", "optimizer.lr=0.2")
    assert (goal_of("test_accuracy"), goal_of("seconds")) == ("maximize", "minimize")


def test_pareto_front() -> None:
    points = [(0.9, 10.0), (0.8, 5.0), (0.7, 7.0), (0.9, 12.0), (0.9, 10.0)]
    assert front(points, ["maximize", "minimize"]) == [0, 1, 4]


def test_a_limit_of_time_distinguishes_no_configurations() -> None:
    runs = [
        record(Path(str(seed)), {"seed": seed, "max_time": 10 * seed}, {"status": "finished"}, ()) for seed in range(3)
    ]
    assert len(leaderboard(runs).rows) == 1


def test_numbers_and_equal_settings() -> None:
    for value, expected in ((1e300, True), (-1e300, True), (1.1e300, False), (True, False), ("1", False), (0, True)):
        assert is_number(value) is expected
    for value, shared in ((1.0, 1), (-0.5, -0.5), (2.0**53 - 1, 2**53 - 1), ([1.0, {"a": 2.0}], (1, (("a", 2),)))):
        assert canonical(value) == shared and type(canonical(value)) is type(shared)
    assert (
        isinstance(canonical(2.0**53), float)
        and canonical(None) is None
        and canonical(date(2026, 1, 2)) == "2026-01-02"
    )


def test_the_front_keeps_equal_points() -> None:
    points = [(1.0, 2.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (1.0, 3.0)]
    assert front(points, ["minimize", "minimize"]) == [0, 1, 2] and front(points, ["maximize", "maximize"]) == [3, 4]
    assert front(points, ["minimize", "maximize"]) == [4]


def test_equal_means_share_a_rank_and_the_smaller_loss_comes_first() -> None:
    losses = {0.1: 0.0548, 0.2: 0.0349, 0.3: 0.01}
    runs = [entry(lr, 0, 0.9 if lr < 0.3 else 0.8, best_val_loss=loss) for lr, loss in losses.items()]
    rows = leaderboard(runs).rows
    assert [(row.rank, row.label) for row in rows] == [
        (1, "optimizer.lr=0.2"), (1, "optimizer.lr=0.1"), (3, "optimizer.lr=0.3"),
    ]  # fmt: skip
    assert [row.is_first for row in rows] == [True, True, False]


@pytest.mark.parametrize("key", ["data", "code", "versions"])
def test_rows_that_differ_in_more_than_their_config_are_not_compared(key: str) -> None:
    """Whichever other key differs, too: here the learning rate."""

    def run(lr: float, seed: int, value: str) -> Record:
        origin = {key: {"mine": {"content": value}}}
        return replace(entry(lr, seed, 0.9 - lr + 0.01 * seed**lr), origin=origin)

    runs = [run(lr, seed, "a" if lr < 0.3 else "b") for lr in (0.1, 0.2, 0.3) for seed in range(3)]
    board = leaderboard(runs)
    assert [bool(row.apart) for row in board.rows] == [False, False, True]
    second, third = board.rows[1:]
    assert second.difference is not None and second.difference.low is not None and third.difference is None
    mixed = leaderboard([run(0.1, 0, "a"), run(0.1, 1, "a"), run(0.1, 2, "b" if key != "data" else "a"), *runs[3:6]])
    expected = key == "data"  # runs on other data are another row
    assert (mixed.rows[1].difference is not None) == expected


def test_a_row_that_has_lost_a_seed_has_no_interval() -> None:
    runs = [entry(lr, seed, 0.9 - lr + 0.01 * seed**lr) for lr in (0.1, 0.2, 0.3) for seed in range(4)]
    runs[4] = entry(0.2, 0, None, "failed")
    _, second, third = leaderboard(runs).rows
    assert second.difference is not None and (second.difference.low, second.difference.count) == (None, 3)
    assert third.difference is not None and third.difference.low is not None


def test_a_trial_of_a_search_counts_with_all_its_seeds_only() -> None:
    search = Search("best_val_accuracy", "maximize", 2)
    runs = [entry(lr, seed, 0.9 - lr) for lr in (0.1, 0.2, 0.3) for seed in (0, 1)]
    runs[0] = entry(0.1, 0, None, "failed")
    runs[2] = entry(0.2, 0, 0.99, "stopped_early", pruned=True)
    rows = leaderboard([replace(run, search=search) for run in runs]).rows
    assert [row.rank for row in rows] == [1, None, None] and rows[0].label == "optimizer.lr=0.3"
    counts = {row.label: row.count_with_failed("val_accuracy") for row in rows}
    assert counts == {"optimizer.lr=0.3": "2", "optimizer.lr=0.1": "0 of 2, 1 failed", "optimizer.lr=0.2": "2 pruned"}


def test_looks_at_fewer_seeds_are_counted() -> None:
    runs = [entry(lr, seed, 0.9 - lr + 0.01 * seed**lr) for lr in (0.1, 0.2) for seed in range(5)]
    of_three, of_two = ([run for run in runs if run.config["seed"] < seeds] for seeds in (3, 2))
    assert look_of(leaderboard(of_two)) == {}, "without a verdict"
    look = look_of(leaderboard(of_three))
    assert set(look.values()) == {3} and len(look) == 2
    assert leaderboard(of_three, looks=[look]).comparison.seen == []
    later = leaderboard(runs, looks=[look, look, {"another": 3}, look_of(leaderboard(runs))])
    assert later.comparison.seen == [3]
    first, second = (each.rows[1].difference for each in (leaderboard(runs), later))
    assert first is not None and second is not None and first.low is not None and second.low is not None
    assert second.low < first.low
    one_row = leaderboard([*of_three, runs[3]], looks=[look])
    assert one_row.comparison.seen == [3], "also if some rows only have more seeds"
