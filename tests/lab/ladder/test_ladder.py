"""The trials of a ladder."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.ladder.family import Branch
from dlopt.lab.ladder.ladder import LadderRequest, Outcome, Search, Trial, read_ladder, save_every, update_ladder
from dlopt.lab.ladder.rates import Optimum, RateFit
from dlopt.lab.ladder.results import to_json
from tests.support.ladders import results, simulate, with_arms


def test_an_interrupted_ladder_has_a_seed_of_every_optimizer_before_the_next(tmp_path: Path) -> None:
    waiting = LadderRequest(tmp_path, results(1.5).ladder).waiting()
    assert [(each.optimizer, each.rung, each.seed) for each in waiting[:5]] == [
        ("adamw", "r0", 0),
        ("mine", "r0", 0),
        ("adamw", "r0", 1),
        ("mine", "r0", 1),
        ("adamw", "r1", 0),
    ]


def test_a_searched_rung_has_its_own_learning_rate() -> None:
    search = Search({}, {"r0": Optimum(0.03, 2.0, at_end=False)}, RateFit(1.0, -0.5, None))
    assert (search.lr("r0", 1e4), search.lr("r1", 1e4)) == (0.03, 0.01)
    unfinished = Search({}, {"r0": Optimum(0.03, 2.0, at_end=False)}, None)
    assert (unfinished.lr("r0", 1e4), unfinished.lr("r1", 1e4)) == (0.03, None)


def test_more_rungs_are_searched_until_a_run_has_an_extrapolated_rate(tmp_path: Path) -> None:
    ladder = results(1.5).ladder
    first, second, third = (replace(ladder, searched=[*ladder.rungs][:count]) for count in (1, 2, 3))
    update_ladder(tmp_path, first)
    (tmp_path / Trial("adamw", "r0", 0).subfolder).mkdir(parents=True)
    (tmp_path / Trial("adamw", "r1", 0, index=0).subfolder).mkdir(parents=True)
    assert update_ladder(tmp_path, second).searched == ["r0", "r1"]
    (tmp_path / Trial("mine", "r2", 0).subfolder).mkdir(parents=True)
    for other in (first, third, replace(second, searched=["r1", "r2"])):
        with pytest.raises(UserError, match=r"runs of another ladder \(different: searched\)"):
            update_ladder(tmp_path, other)
    assert update_ladder(tmp_path, second).searched == ["r0", "r1"]


def test_more_rungs_are_not_searched_if_that_changes_the_weight_decay_of_arms(tmp_path: Path) -> None:
    ladder = with_arms(("inverse",))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, count in ((one, 1), (two, 2)):
        folder.mkdir()
        update_ladder(folder, replace(ladder, searched=[*ladder.rungs][:count]))
    with pytest.raises(UserError, match=r"\(different: searched\)"):
        update_ladder(one, replace(ladder, searched=["r0", "r1"]))
    assert update_ladder(two, ladder).searched == ["r0", "r1", "r2"]


def test_the_fourth_rung_is_searched_around_the_extrapolation_of_the_others(tmp_path: Path) -> None:
    ladder = with_arms(("zero",), rungs=5)
    ladder = replace(ladder, searched=[*ladder.rungs][:4])
    request = LadderRequest(tmp_path, ladder)
    assert {each.rung for each in request.waiting()} == {"r0", "r1", "r2"}
    done = simulate(request, scaled=1.0)
    counts = {rung: sum(each.rung == rung and each.optimizer == "mine.zero" for each in done) for rung in ladder.rungs}
    assert counts == {"r0": 7 + 2, "r1": 7 + 2, "r2": 7 + 2, "r3": 5 + 2, "r4": 2} and request.expected() == len(done)
    assert request.lr(Trial("mine.zero", "r3", 0)) == pytest.approx(0.02)


def test_searched_rates_outside_the_grid_around_the_extrapolation_count(tmp_path: Path) -> None:
    """A fit of other rungs may have searched them."""
    ladder = with_arms(("zero",), rungs=4)
    request = LadderRequest(tmp_path, replace(ladder, searched=[*ladder.rungs]))
    outside = Trial("mine.zero", "r3", 0, index=8)
    request._known[outside] = Outcome(math.inf, 1.0, "diverged")
    simulate(request, scaled=1.0)
    search = request.search("mine.zero")
    assert math.isinf(search.losses["r3"][1.0]) and search.optima["r3"].lr == pytest.approx(0.02)


def test_no_larger_rung_is_searched_where_all_runs_of_a_smaller_one_failed(tmp_path: Path) -> None:
    ladder = with_arms(("zero",), rungs=4)
    request = LadderRequest(tmp_path, replace(ladder, searched=[*ladder.rungs]))
    while waiting := request.waiting():
        request._known |= dict.fromkeys(waiting, Outcome(math.inf, 1.0, "diverged"))
    assert {each.rung for each in request.known()} == {"r0", "r1", "r2"}
    assert request.search("mine.zero").fit is None


def test_a_rung_trains_as_soon_as_its_own_search_has_ended(tmp_path: Path) -> None:
    request = LadderRequest(tmp_path, with_arms(("zero",), rungs=4))
    while searched := [each for each in request.waiting() if each.rung == "r0" and each.index is not None]:
        losses = [math.log(request.lr(trial) / 0.02) ** 2 for trial in searched]
        request._known |= {trial: Outcome(loss, 1.0) for trial, loss in zip(searched, losses, strict=True)}
    waiting = request.waiting()
    assert {each.rung for each in waiting if each.index is None} == {"r0"}
    assert {each.rung for each in waiting if each.index is not None} == {"r1", "r2"}


def test_branches_begin_with_a_checkpoint_of_the_longest_run(tmp_path: Path) -> None:
    ladder = results(1.5, rungs=2).ladder
    rungs = {name: replace(rung, updates=1000, warmup=25) for name, rung in ladder.rungs.items()}
    rungs = {name: replace(rung, branches=(Branch(250, 205), Branch(500, 405))) for name, rung in rungs.items()}
    ladder = replace(ladder, rungs=rungs, shorter=(5.0, 10.0), seeds=1)
    # 200: a multiple of a fiftieth of the run; branches repeat 5 updates each.
    assert save_every(rungs["r0"]) == 200 and ladder.added("r0") == 50 + 100
    request = LadderRequest(tmp_path, ladder)
    update_ladder(tmp_path, ladder)
    found = read_ladder(tmp_path)
    assert found is not None and (found.rungs, found.shorter) == (ladder.rungs, ladder.shorter)
    assert all(each.length is None for each in request.waiting()) and request.expected() == 2 * 2 * 3
    run, short, middle = (Trial("adamw", "r0", 0, length=length) for length in (None, 5.0, 10.0))
    request._known[run] = Outcome(1.0, 1.0)
    assert [each for each in request.waiting() if each.optimizer == "adamw"][:2] == [short, middle]
    kept = tmp_path / run.subfolder / "checkpoints"
    assert "checkpoint.keep=1000" in request.line(run) and "steps=1000" in request.line(run)
    straight = request.line(short)  # the run has left no checkpoint
    assert "steps=250" in straight and not any(each.startswith("resume=") for each in straight)
    kept.mkdir(parents=True)
    for step in (200, 400, 600):
        (kept / f"step-{step}.pt").touch()
    assert f"resume='{kept}/step-200.pt'" in request.line(short) and "schedule.warmup_steps=25" in request.line(short)
    needed = {each for each in kept.iterdir() if request.is_needed(each)}
    assert needed == {kept / "step-200.pt", kept / "step-400.pt"} and request.is_needed(kept / "step-400.pt.sha256")
    request._known[short] = Outcome(1.0, 1.0)
    request.remove_unneeded()
    assert {each.name for each in kept.iterdir()} == {"step-400.pt", "step-600.pt"}


CHANGES: list[tuple[str, list[str], Any]] = [
    *(("ladder.json", ["seeds"], value) for value in ("x", 10**4, 10**9, 10**18, 0, True, 1.5)),
    *(("ladder.json", ["rungs", "r0", "updates"], value) for value in ("x", 0, -1, 10**99, None)),
    ("ladder.json", ["searched"], 5), ("ladder.json", ["searched"], ["zz"]), ("ladder.json", ["shorter"], ["x"]),
    ("ladder.json", ["shorter"], [5.0]), ("ladder.json", ["rungs", "r0", "parameters"], "x"),
    ("ladder.json", ["rungs", "r0", "compute"], 0), ("ladder.json", ["rungs"], {}),
    ("ladder.json", ["optimizers", "mine", "rates"], "x"), ("ladder.json", ["optimizers", "mine", "lr"], None),
    ("ladder.json", ["optimizers", "mine", "arm"], "x"), ("ladder.json", ["optimizers"], {"../x": {}}),
    ("results.json", ["runs"], 5), ("results.json", ["runs"], [5]), ("results.json", ["ladder"], 5),
    *(("results.json", ["runs", "0", key], "x") for key in ("loss", "seconds", "seed")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "value"), CHANGES)
def test_files_of_strangers_are_refused_in_one_line(name: str, keys: list[str], value: Any, tmp_path: Path) -> None:
    made = results(1.5, rungs=3)
    contents = {"ladder.json": asdict(made.ladder), "results.json": json.loads(to_json(made))}
    node: Any = contents[name]
    for key in keys[:-1]:
        node = node[int(key) if isinstance(node, list) else key]
    node[keys[-1]] = value
    for each, content in contents.items():
        (tmp_path / each).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        found = read_ladder(tmp_path)
        assert found is not None and name != "ladder.json" and found.rungs == made.ladder.rungs
        LadderRequest(tmp_path, found)
    assert f"{name}: is damaged: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "summary", "expected"),
    [
        (2.5, {"status": "finished", "seconds": "x"}, (2.5, 0.0, "")),
        (-1.0, {"status": "finished", "seconds": 3.0}, (math.inf, 3.0, "val_loss=-1.0 is not above 0")),
        ("x", {"status": "finished", "seconds": [1]}, (math.inf, 0.0, "diverged")),
        (2.5, {"status": "failed", "reason": {"a": 1}}, (math.inf, 0.0, "{'a': 1}")),
    ],
)
def test_runs_of_strangers(value: Any, summary: Any, expected: Any, tmp_path: Path) -> None:
    ladder, trial = results(1.5, rungs=2).ladder, Trial("adamw", "r0", 0)
    folder = tmp_path / trial.subfolder
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 100, "val_loss": value}))
    found = LadderRequest(tmp_path, ladder).outcome(trial)
    assert found is not None and (found.loss, found.seconds, found.failure) == expected
