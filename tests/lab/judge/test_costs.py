"""What a gain costs: the table, the warning, equal=updates|flops|time, and what the ledger keeps of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dlopt.lab.judge import command, equal
from dlopt.lab.judge.ledger import Entry
from dlopt.lab.judge.sequential import rate_of
from dlopt.lab.judge.wording import cost_lines, cost_warning
from tests.support.judging import make_pair
from tests.support.line import dlopt, refused

# 144 of 1437 samples are for validation; 1294 train: 21 updates of 64 in an epoch, the last of 14.
BASE = "model=mlp model.widths=[8] model.norm=none epochs=2 device=cpu threads=1"
COSTS = {"steps": 10, "samples": 600, "parameters": 500, "flops": 6e6, "seconds": 2.0, "peak_memory": 2**29}


def entry(**change: float | None) -> Entry:
    costs = {"base": dict(COSTS), "change": {**COSTS, **change}}
    return Entry(1, "a", ["x=1"], None, rate_of(1, 0.05), 0.0, "d", gains=(0.1,), costs=costs)


def test_the_table() -> None:
    assert cost_lines(entry(steps=80, flops=None, seconds=3.0)) == [
        "cost of a run (median)     base   change    ratio",
        "updates                      10       80        8",
        "samples                     600      600        1",
        "parameters                  500      500        1",
        "FLOPs                     6e+06  unknown  unknown",
        "time                      2.0 s    3.0 s      1.5",
        "memory                  512 MiB  512 MiB        1",
    ]
    old = Entry(1, "a", ["x=1"], None, rate_of(1, 0.05), 0.0, "d", gains=(0.1,))
    assert all(line.split()[-3:] == ["unknown"] * 3 for line in cost_lines(old)[1:])
    assert cost_warning(old, []) is None


@pytest.mark.parametrize(
    ("change", "lengths", "warning"),
    [
        ({"steps": 11, "flops": 6.6e6, "seconds": 2.2, "peak_memory": 2**30, "parameters": 1000}, [], None),
        ({"steps": 80}, [], "8 times the updates: judge it at equal cost with equal=updates"),
        ({"flops": 24e6, "seconds": 3.0}, [],
         "4 times the FLOPs, 1.5 times the time: judge it at equal cost with equal=flops"),
        ({"flops": None, "samples": 700, "seconds": 3.0}, [],
         "1.17 times the samples, 1.5 times the time: judge it at equal cost with equal=time"),
        ({"steps": 80}, ["epochs"],
         "8 times the updates: a longer training may be all that it gains; leave out epochs to judge the rest"),
    ],
)  # fmt: skip
def test_the_warning(change: dict[str, float | None], lengths: list[str], warning: str | None) -> None:
    expected = None if warning is None else f"warning: the change costs {warning}"
    assert cost_warning(entry(**change), lengths) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((BASE, "epochs=8", "equal=updates"), "epochs=8: equal=updates sets the length of the change; leave one of"),
        ((BASE, "steps=9", "equal=time"), "steps=9: equal=time sets the length of the change; leave one of the two"),
        ((f"{BASE} schedule_epochs=5", "optimizer.lr=0.2", "equal=time"), "schedule_epochs=5: fixes the schedule, "),
        ((BASE, "optimizer=sam", "equal=flops"), "equal=flops: those of the change are not known; use equal=time"),
        ((BASE, "optimizer.lr=0.2", "code=other", "equal=time"), "other: equal=time cannot measure other code; "),
        ((f"{BASE} parallel=ddp parallel.processes=2", "optimizer.lr=0.2", "equal=time"), "equal=time: runs of sev"),
    ],
)
def test_what_cannot_be_equal_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.py").touch()
    assert message in refused(tmp_path, "judge", *words)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("base", "change", "kind", "updates"),
    [
        ("", "data.batch_size=16", "updates", 42),
        ("", "optimizer.lr=0.2", "flops", 42),
        ("", "data.batch_size=32", "flops", 82),  # 2588 samples: two epochs of 41
        ("", "data.drop_last=true", "updates", 42),
        # 592 and 1184 weights: half of the samples, 1294, are an epoch.
        ("", "model.widths=[16]", "flops", 21),
        (" accumulate={micro_batches:[1,2],epochs:[1]}", "accumulate=1", "updates", 21 + 11),
        (" accumulate={micro_batches:[1,2],epochs:[1]}", "accumulate=1", "flops", 42),
        ("", "accumulate={micro_batches:[1,2],epochs:[1]}", "flops", 32),
        ("", "optimizer.lr=0.2", "time", 17),  # 42 / 2.5 = 16.8
    ],
)
def test_the_length(
    base: str, change: str, kind: Any, updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal, "_seconds_ratio", lambda *configs: 2.5)
    lines: list[str] = []

    def run(judgement: Any, *_: object) -> None:
        lines.extend(judgement.line(judgement.pair(0)[1]))

    monkeypatch.setattr(command, "run", run)
    result = dlopt(tmp_path, "judge", BASE + base, change, f"equal={kind}")
    assert result.code == 4 and f"the change trains {updates} updates" in result.out, result.err
    assert f"steps={updates}" in lines


def test_the_ledger_keeps_length_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = [2.0, 3.0]
    monkeypatch.setattr(equal, "_seconds_ratio", lambda *configs: measured.pop(0))
    steps: list[int] = []

    def run(judgement: Any, *_: object) -> None:
        for trial in (trials := judgement.waiting()):
            side = judgement.sides[trial.side]
            path = make_pair(judgement, trial, accuracies=(0.1, 0.5 + 0.1 * (trial.side == "change")))
            cost = 21 if trial.side == "change" else 42
            summary = json.loads((path / "summary.json").read_text()) | {"samples": 60 * cost, "flops": 100 * cost}
            (path / "summary.json").write_text(json.dumps(summary))
            steps.append(side.plan.saved["steps"])
        if trials:
            run(judgement)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "_draw", lambda *_: None)
    words = ("judge", BASE, "optimizer.lr=0.2", "equal=time", "output=out")
    said = dlopt(tmp_path, *words)
    assert said.code == 0, said.err
    assert "equal=time: an update of the change costs 2 times that of the base; the change trains 21 up" in said.out
    assert {*steps} == {None, 21} and len(measured) == 1
    again = dlopt(tmp_path, *words, "--json")
    document = json.loads(again.out)
    assert (again.code, document["equal"], document["update_cost"], document["updates"]) == (0, "time", 2.0, 21)
    costs = document["costs"]
    assert (costs["base"]["samples"], costs["change"]["samples"], costs["ratio"]["samples"]) == (2520, 1260, 0.5)
    assert costs["ratio"]["flops"] == 0.5 and costs["base"]["peak_memory"] is None and len(measured) == 1
    # Without equal=, it is another proposal; a ledger without costs is read.
    other = dlopt(tmp_path, *words[:3], "output=out")
    assert "proposal 2 against this base" in other.out
    ledger = tmp_path / "out/ledger.jsonl"
    new = ("equal", "update_cost", "updates", "costs")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in new} for line in lines]
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in old))
    unknown = dlopt(tmp_path, *words[:3], "output=out")
    assert unknown.code == 0 and "from the ledger: proposal 2" in unknown.out, unknown.err
    assert "unknown" in unknown.out and "costs" not in unknown.err


def test_the_time_of_updates_is_measured_in_turn(tmp_path: Path) -> None:
    """SAM evaluates the gradients twice."""
    result = dlopt(tmp_path, "judge", BASE, "optimizer=sam", "equal=time", "minutes=1e-9")
    assert result.code == 4, result.err
    saved = json.loads(next(tmp_path.glob("outputs/judge/*/ledger.jsonl")).read_text().splitlines()[1])
    assert 1.2 < saved["update_cost"] < 5 and saved["updates"] == round(42 / saved["update_cost"])


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    assert "equal=epochs" in refused(tmp_path, "judge", BASE, "optimizer.lr=0.2", "equal=epochs")
