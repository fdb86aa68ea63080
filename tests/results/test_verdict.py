"""The sentence below a leaderboard."""

from pathlib import Path

import pytest

from dlopt.results.verdict import findings
from tests.support.folders import make_run, table
from tests.support.line import HeldByAnotherProcess


def sentence(folder: Path, **accuracies: tuple[float, ...]) -> str:
    """Returns the verdict on rows with these accuracies by learning rate (lr1=...), one per seed."""
    for number, (name, values) in enumerate(accuracies.items()):
        for seed, value in enumerate(values):
            make_run(folder / f"{number}-{seed}", lr=float(name[2:]), seed=seed, accuracies=(0.1, value))
    return table(folder).verdict


def test_better_than_all_others(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.80, 0.815, 0.82), lr3=(0.7, 0.71, 0.725))
    assert found == "verdict: lr=1 is better than all others (95 % for the whole table)"
    assert findings(table(tmp_path).board) == {"better": ["lr=2", "lr=3"]}
    make_run(tmp_path / "running", lr=4.0, seed=0, status=None, accuracies=(0.1, 0.2))
    with HeldByAnotherProcess(tmp_path / "running"):
        assert findings(table(tmp_path).board) == {}


def test_not_distinguishable(tmp_path: Path) -> None:
    """Half of the width needs more than four times the seeds: a later look has a larger quantile."""
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.89, 0.915, 0.9), lr3=(0.7, 0.71, 0.73))
    assert found == (
        "verdict: lr=1 is better than lr=3 (95 % for the whole table); not distinguishable from lr=2: 3 seeds "
        "cannot tell differences below 2.5 points; 16, fixed now, would tell 1.3 points"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_seeds_are_no_evidence(tmp_path: Path, count: int) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.911)[:count], lr2=(0.1, 0.1001)[:count])
    advice = {
        1: "by one run each: repeat it with seed=0,1,2 to tell a gain from luck",
        2: "by at most two runs each: at least 3 seeds, fixed before, tell a gain from luck: seed=0,1,2",
    }
    assert found == f"verdict: lr=1 is first, {advice[count]}"


def test_branches_are_repeated_from_other_runs(tmp_path: Path) -> None:
    for number, lines in enumerate((["epochs=5", "resume=/runs/a/checkpoints/step-5.pt"], ["epochs=9"])):
        config = {"epochs": 5 + number}
        make_run(tmp_path / str(number), accuracies=(0.5, 0.8 - number / 10), config=config, overrides=lines)
    assert table(tmp_path).verdict.endswith("branch from runs with other seeds, too, to tell a gain from luck")


def test_rows_that_are_equal_in_every_run(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.90, 0.91, 0.92), lr3=(0.2, 0.21, 0.225))
    assert found == ("verdict: lr=1 is better than lr=3 (95 % for the whole table); equal to lr=2 in every run")


def test_equal_means(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.92, 0.91, 0.90))
    assert found.startswith("verdict: lr=1 is tied with lr=2; 3 seeds cannot tell differences below")


def test_equal_values_of_one_run_each_are_a_tie(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.9,), lr2=(0.9,), lr3=(0.8,))
    assert found == (
        "verdict: lr=1 is tied with lr=2, by one run each: repeat them with seed=0,1,2 to tell a gain from luck"
    )


def test_rows_without_common_seeds(tmp_path: Path) -> None:
    for row in range(2):
        for seed in range(3):
            make_run(tmp_path / f"{row}-{seed}", lr=1.0 + row, seed=seed + 5 * row, accuracies=(0.9 - row / 10,))
    assert table(tmp_path).verdict == "verdict: lr=1 is first; not compared with lr=2: fewer than 3 common seeds"


def test_a_better_row_with_harder_seeds(tmp_path: Path) -> None:
    """The first row has the best mean, because it lacks the hard seed; over common seeds it is worse."""
    for seed, value in enumerate((0.90, 0.91, 0.92)):
        make_run(tmp_path / f"easy-{seed}", lr=1.0, seed=seed, accuracies=(0.1, value))
    for seed, value in enumerate((0.93, 0.942, 0.951, 0.1)):
        make_run(tmp_path / f"all-{seed}", lr=2.0, seed=seed, accuracies=(0.1, value))
    assert table(tmp_path).verdict == "verdict: lr=1 has the best mean, but over common seeds it is worse than lr=2"


def test_losses(tmp_path: Path) -> None:
    for number, losses in enumerate([(0.5, 0.51, 0.52), (0.8, 0.815, 0.82)]):
        for seed, loss in enumerate(losses):
            make_run(tmp_path / f"{number}-{seed}", lr=number + 1.0, seed=seed, accuracies=(0.5,), losses=(loss,))
    assert table(tmp_path, "val_loss").verdict.startswith("verdict: lr=1 is better than lr=2 (95 %")


def test_names_few_of_many(tmp_path: Path) -> None:
    rows = {f"lr{number}": (0.5, 0.9 - number / 100, 0.7) for number in range(1, 7)}
    assert "from any of the 5 others: 3 seeds" in sentence(tmp_path, **rows)


def test_long_labels_are_ranks(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for number, accuracy in enumerate((0.8, 0.65 + seed / 10)):
            config = {f"model.{key}": number for key in ("width", "depth", "heads", "tokens")}
            make_run(tmp_path / f"{number}-{seed}", seed=seed, accuracies=(accuracy,), config=config)
    found = table(tmp_path).verdict
    assert found.startswith("verdict: #1 is first; not distinguishable from #2: 3 seeds cannot tell")


def test_a_run_that_failed_is_no_fair_sample(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path / f"a-{seed}", lr=1.0, seed=seed, accuracies=(0.1, 0.9 + 0.01 * seed))
        status = "failed" if seed == 3 else "finished"
        make_run(tmp_path / f"b-{seed}", lr=2.0, seed=seed, accuracies=(0.1, 0.5 + 0.011 * seed), status=status)
    assert table(tmp_path).verdict == "verdict: lr=1 is first; not compared with lr=2: some of the runs failed"


def test_one_row_has_no_verdict(tmp_path: Path) -> None:
    assert sentence(tmp_path, lr1=(0.90, 0.91)) == ""


def test_running_runs_are_awaited(tmp_path: Path) -> None:
    from dlopt.basics.folders import RunFolder

    sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.1, 0.12, 0.11))
    folder = make_run(tmp_path / "live", lr=2.0, seed=3, status=None)
    with RunFolder(folder).lock():
        assert table(tmp_path).verdict == "verdict: after the last run; 1 is running"
