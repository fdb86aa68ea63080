"""What is said of the rows of a leaderboard: other seeds, equal differences, the end of what was tried."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlopt.results.leaderboard import Leaderboard, Record, leaderboard
from dlopt.results.remarks import Remark, lines, mark, remarks, texts
from tests.support.records import record

MISSING = "warning: without some seeds of other rows: compare by the difference over common seeds, not by the mean"
REPEATED = "a seed was run more than once: its last run that has ended counts"
END = "best at the end of what was tried, a better value may be beyond it: "
LIMIT = "differences below 0.69 points (1 of 144 images) cannot be seen"
EQUAL = "the same difference in every seed, so no interval"


def entry(lr: float, seed: int, accuracy: float | None, status: str = "finished", **config: Any) -> Record:
    metrics = {"status": status, "best_val_accuracy": accuracy, "best_val_loss": accuracy}
    origin = {"validation": {"count": 144, "unit": "images"}}
    settings = {"seed": seed, "optimizer": {"lr": lr}, "threads": seed + 1, "epochs": 2 + round(lr), **config}
    return record(Path(f"{lr}/{seed}"), settings, metrics, [f"optimizer.lr={lr}"], origin)


def rows(*values: Sequence[float], first: float = 0.1) -> list[Record]:
    """Returns a configuration per sequence, with a run per seed; the middle rate is the best, so no end is named."""
    runs = [entry(first + i, seed, value) for i, each in enumerate(values) for seed, value in enumerate(each)]
    return [*runs, entry(first - 0.01, 0, None, "failed"), entry(first + 9, 0, None, "failed")]


def of(board: Leaderboard) -> list[Remark]:
    return remarks(board)


def said(runs: Sequence[Record], **keys: Any) -> list[tuple[str, list[int]]]:
    return [(each.text, list(each.ranks)) for each in of(leaderboard(runs, **keys))]


def images(*counts: int) -> list[float]:
    return [count / 144 for count in counts]


def test_rows_without_some_seeds_are_named_where_they_rank() -> None:
    assert said(rows(images(140, 140, 140), images(136, 137, 139))) == []
    few_first = rows(images(140, 141), images(135, 138, 140), images(130, 134, 132))
    assert said(few_first) == [(MISSING, [1])]
    few_last = rows(images(140, 138, 141), images(135, 136))
    assert said(few_last) == [(MISSING, [2])]
    others = [replace(run, config={**run.config, "seed": 7}) for run in rows(images(120), first=0.2)[:1]]
    assert said([*few_last, *others]) == [(MISSING, [1, 2, 3])]


def test_a_row_that_is_better_over_common_seeds_is_named() -> None:
    """The second row has the two easy seeds only: it is worse in both of them, and has the larger mean."""
    board = leaderboard(rows(images(130, 127, 72), images(128, 124)))
    assert [row.label for row in board.rows][:2] == ["optimizer.lr=1.1", "optimizer.lr=0.1"]
    assert board.rows[1].difference is not None and board.rows[1].difference.mean == pytest.approx(2.5 / 144)
    better = "warning: #2 is better than #1 over common seeds: #1 is first because of its other seeds"
    assert [(each.text, list(each.ranks)) for each in of(board)] == [(MISSING, [1]), (better, [1, 2])]
    two = rows(images(130, 127, 72), images(128, 124), images(131, 126, 72))
    assert said(two)[1][0].startswith("warning: #2, #3 are better than #1 over common seeds") and said(two)[1][1] == [
        1,
        2,
        3,
    ]


def test_losses_are_better_when_smaller() -> None:
    runs = rows((1.0, 1.2, 3.0), (1.1, 1.4))
    [missing, better] = said(runs, metric="val_loss")
    assert missing == (MISSING, [1]) and better[0].startswith("warning: #2 is better than #1") and better[1] == [1, 2]


def test_equal_means_are_no_contradiction() -> None:
    """Sums in another order differ by rounding."""
    runs = rows((0.1, 0.2, 0.3), (0.3, 0.1, 0.2))
    assert not [text for text, _ in said(runs) if "better than" in text]


def test_repeated_seeds_are_named() -> None:
    runs = rows(images(140, 138), images(130, 131))
    runs.append(entry(1.1, 1, 132 / 144))
    assert said(runs) == [(REPEATED, [2])]


@pytest.mark.parametrize("known", [True, False])
def test_equal_differences_have_no_interval(known: bool) -> None:
    runs = rows(images(140, 138, 141), images(139, 137, 140), images(130, 134, 120))
    runs = [run if known else replace(run, origin={}) for run in runs]
    assert said(runs) == [(f"{EQUAL}: {LIMIT}" if known else EQUAL, [2])]
    single = rows(images(140), images(139))
    assert said(single) == [], "one pair"


def test_intervals_of_one_sample_are_named() -> None:
    second = [140 - (seed == 0) for seed in range(20)]
    runs = rows(images(*[140] * 20), images(*second), images(*range(100, 120)))
    assert said(runs) == [(f"interval widened to ± 0.69 points: {LIMIT}", [2])]
    difference = leaderboard(runs).rows[1].difference
    assert difference is not None and difference.low == pytest.approx(-1.05 / 144)
    without = leaderboard([replace(run, origin={}) for run in runs]).rows[1].difference
    assert without is not None and without.low is not None and without.low > -0.2 / 144


def test_the_resolution_is_known_of_fractions_only() -> None:
    """Neither of a loss, nor of an accuracy that is a mean over classes, nor if one run does not say it."""
    runs = rows(images(140, 138, 141), images(139, 137, 140))
    assert said(runs, metric="val_loss")[0][0] == EQUAL
    macro = rows((0.9, 0.8, 0.85), (0.91, 0.81, 0.86))
    assert said(macro)[0][0] == EQUAL
    assert said([replace(runs[0], origin={}), *runs[1:]])[0][0] == EQUAL
    larger = [replace(run, origin={"validation": {"count": 288, "unit": "images"}}) for run in runs]
    assert "differences below 0.35 points (1 of 288 images)" in said(larger)[0][0]
    assert "(1 of 144 images)" in said([*larger[:3], *runs[3:]])[0][0], "the coarsest"


def grid(best: Mapping[str, float], *tried: Mapping[str, float]) -> list[str]:
    """Returns what is said of a grid, of which one point is the best."""
    runs = [entry(0.1, 0, 0.9 if keys == best else 0.5, **keys) for keys in tried]
    return texts(of(leaderboard(runs)), 1)


def test_the_best_value_at_the_end_of_what_was_tried_is_named() -> None:
    rates = [{"optimizer.lr": lr, "epochs": round(10 * lr)} for lr in (0.1, 0.2, 0.3)]
    assert [grid(best, *rates) for best in rates] == [
        [f"{END}optimizer.lr=0.1 (smallest)"], [], [f"{END}optimizer.lr=0.3 (largest)"],
    ]  # fmt: skip
    both = [{"optimizer.lr": lr, "data.batch_size": size} for lr in (0.1, 0.2) for size in (32, 64)]
    assert grid(both[1], *both) == [f"{END}optimizer.lr=0.1 (smallest), data.batch_size=64 (largest)"]
    decays = [{"optimizer.weight_decay": decay} for decay in (0.0, 0.1)]
    assert [grid(best, *decays) for best in decays] == [[], [f"{END}optimizer.weight_decay=0.1 (largest)"]]


def test_rates_of_another_optimizer_and_failed_runs() -> None:
    def run(optimizer: str, lr: float, accuracy: float | None) -> Record:
        settings = {"optimizer": {"_target_": optimizer, "lr": lr}}
        return entry(lr, 0, accuracy, "failed" if accuracy is None else "finished", **settings)

    assert said([run("sgd", 0.1, 0.9), run("adam", 0.01, 0.8), run("adam", 0.5, 0.8)]) == []
    assert said([run("sgd", 0.1, 0.9), run("sgd", 0.5, None)]) == [(f"{END}optimizer.lr=0.1 (smallest)", [1])]
    assert said([run("sgd", 0.1, 0.9), run("sgd", 0.5, None), run("sgd", 0.01, None)]) == []
    assert said([run("sgd", 0.1, 0.9), run("sgd", 0.2, 0.9), run("sgd", 0.3, 0.8)]) == [], "two are the best"


def test_different_data_code_and_versions_are_named() -> None:
    def run(root: str, seed: int, content: str, torch: str = "2") -> Record:
        made = entry(0.1, seed, 0.9 if content == "a" else 0.5)
        origin = {
            "data": {"train": {"content": content}},
            "versions": {"torch": torch},
            "code": {"mine": {"sha256": torch}},
        }
        keys = {"data.root": root, "data.val_split": 0.1 if content == "a" else 0.2}  # no rate that was tried
        return replace(made, config={**made.config, **keys}, origin=origin)

    data = ("warning: other data than #1, so not comparable with it", [2])
    assert said([run("x", 0, "a"), run("y", 0, "b"), run("x", 1, "a"), run("y", 1, "b")]) == [data]
    assert said([run("x", 0, "a"), run("x", 1, "a", "3")]) == [
        ("warning: runs with different code of allow_packages in one mean", [1]),
        ("warning: runs with different versions of dlopt or torch in one mean", [1]),
    ]


def test_letters_mark_the_rows() -> None:
    found = [Remark("first", [1, 3]), Remark("second", [3]), Remark("third", [*range(4, 11)])]
    assert [mark(found, rank) for rank in range(1, 5)] == ["a", "", "ab", "c"]
    assert lines(found, 4) == ["a: first", "b: second", "c: third"]
    assert lines(found, 1) == ["a: first", "#3: second", "#4, #5, #6, #7, #8 and 2 more: third"]
    assert texts(found, 3) == ["first", "second"] and remarks(Leaderboard("val_loss", "minimize")) == []
