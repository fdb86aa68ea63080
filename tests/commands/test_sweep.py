"""`dlopt sweep`: how far a sweep is, from its folder."""

import json
from pathlib import Path

import pytest

from dlopt.basics.files import write_json, write_yaml
from dlopt.basics.folders import FORMAT, SPACE
from dlopt.basics.locks import hold
from dlopt.sweeps import status as statuses
from tests.support.line import dlopt, refused


def write_run(folder: Path, status: str | None, reason: str | None = None) -> None:
    """Writes a run; None: it has no summary, as one that was killed."""
    folder.mkdir(parents=True)
    write_yaml(folder / "config.yaml", {"seed": int(folder.name), "monitor": "auto"})
    write_yaml(folder / "overrides.yaml", [f"seed={folder.name}"])
    write_json(folder / "environment.json", {"folder_format": FORMAT})
    if status is not None:
        summary = {"status": status, "best_val_accuracy": 0.5 + int(folder.name) / 10}
        write_json(folder / "summary.json", summary | ({} if reason is None else {"reason": reason}))


@pytest.mark.parametrize(
    ("runs", "code", "line"),
    [
        (["finished", "stopped_early"], 0, "2 jobs: 1 finished, 1 stopped early"),
        (["finished", "failed"], 1, "2 jobs: 1 finished, 1 failed"),
        (["failed", None], 75, "2 jobs: 1 unfinished, 1 failed"),
        (["finished", "interrupted"], 75, "2 jobs: 1 finished, 1 interrupted"),
        (["finished"], 75, "2 jobs: 1 finished, 1 queued"),
        ([], 75, "2 jobs: 2 queued"),
    ],
)
def test_a_sweep_of_another_shell(runs: list[str | None], code: int, line: str, tmp_path: Path) -> None:
    for number, status in enumerate(runs):
        write_run(tmp_path / f"s/{number}", status, "disk full" if status == "failed" else None)
    (tmp_path / "s").mkdir(exist_ok=True)
    write_yaml(tmp_path / "s" / SPACE, [["seed=0"], ["seed=1"]])
    result = dlopt(tmp_path, "sweep", "status", "s")
    assert (result.code, result.out.splitlines()[0]) == (code, line)
    assert ("failed: disk full" in result.out) == ("failed" in runs)
    how = f"nothing runs the jobs that are left; to continue: its command with output={tmp_path / 's'} resume=auto"
    assert (how in result.out) == (code == 75)
    with hold(tmp_path / "s/.lock"):
        document = json.loads(dlopt(tmp_path, "sweep", "status", "s", "--json").out)
    assert document["exit_code"] == code and document["total"] == 2 and sum(document["counts"].values()) == 2
    assert document["workers"] == ["the command that started it"] and len(document["jobs"]) == len(runs)
    board = document["leaderboard"]
    assert (board is None) == (not {"finished", "stopped_early"} & {*runs}) and document["slurm_arrays"] == []
    if board is not None:
        last = max(i for i, status in enumerate(runs) if status in ("finished", "stopped_early"))
        assert board["best_run"]["folder"] == str(tmp_path / f"s/{last}")
        assert board["best_run"]["command"] == f"dlopt train seed={last}"


def test_a_folder_with_a_blank_is_quoted(tmp_path: Path) -> None:
    """The commands that are printed can be pasted."""
    write_run(tmp_path / "a b%c/0", "finished")
    write_yaml(tmp_path / "a b%c" / SPACE, [["seed=0"]])
    assert dlopt(tmp_path, "sweep", "status", "a b%c").out.endswith("next:\n  dlopt report 'a b%c'\n")


def test_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all jobs have ended, or until nobody is left to run them."""
    sweep = tmp_path / "s"
    for number in range(3):
        write_run(sweep / str(number), "finished")
    write_yaml(sweep / SPACE, [[f"seed={number}"] for number in range(3)])
    monkeypatch.setattr(statuses, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(statuses, "_LOST_SECONDS", 0.0)
    result = dlopt(tmp_path, "sweep", "wait", "s")
    assert result.code == 0 and "3 jobs: 3 finished" in result.out and "val accuracy (higher is better)" in result.out
    write_json(sweep / "2/summary.json", {"status": "interrupted"})
    result = dlopt(tmp_path, "sweep", "wait", "s")
    assert result.code == 75 and "nothing runs the jobs that are left" in result.out


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in {
        (): "needs one of these words; allowed: status, wait, stop, resume, work",
        ("stat", "empty"): "did you mean status?",
        ("optimizer=sgd,adamw", "seed=0,1"): "use `dlopt train -m optimizer=sgd,adamw seed=0,1`",
        ("status", "none"): "none: no such folder",
        ("status", "empty"): "empty: not the folder of a series (series.yaml is missing)",
        ("status", "empty", "--paths"): "--paths: unknown flag",
        ("work", "empty", "n_jobs=0"): "n_jobs=0: input should be greater than or equal to 1",
        ("stop", "empty"): "empty: no sweep was submitted in this folder",
    }.items():
        assert message in refused(tmp_path, "sweep", *words)
