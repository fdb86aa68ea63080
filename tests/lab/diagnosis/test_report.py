"""What the report of runs shows of diagnoses."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dlopt.config.reads import refuse_unread
from dlopt.lab.diagnosis.command import READS
from dlopt.lab.diagnosis.report import problem_of, section
from dlopt.results.page_data import page_data
from tests.support.folders import make_run, table

LAYER = {"name": "head", "activation": None, "output_std": 0.5, "gradient_norm": None, "saturated": None, "dead": 0.25,
         "verdict": "dead", "reason": "99 % of the units"}  # fmt: skip


def shown(folder: Path) -> dict[str, Any]:
    """Returns what the page shows of the only run below a folder."""
    ranking = table(folder)
    data = page_data(ranking, target=None, test=False, refresh=None, sections=[section(ranking.records)])
    [found] = data["rows"][0]["runs"][0]["sections"]
    result: dict[str, Any] = found
    return result


def test_runs_that_did_not_train(tmp_path: Path) -> None:
    rising = (0.1, 0.5, 0.9)
    cases: dict[str, tuple[dict[str, Any], str | None]] = {
        "good": ({"accuracies": rising}, None),
        "failed": ({"accuracies": rising, "status": "failed"}, "The run failed."),
        "constant": ({"accuracies": rising, "losses": (2.3, 2.31, 2.3)}, "loss did not fall: 2.3000 to 2.3000."),
        "at chance": ({"accuracies": (0.1, 0.11, 0.105), "losses": (9e9, 9e3, 9.0)}, "accuracy did not rise: 10.00 %"),
        "already good": ({"accuracies": (0.97, 0.97), "losses": (0.1, 0.05)}, None),
        "one epoch": ({"accuracies": (0.1,)}, None),
    }
    for name, (arguments, problem) in cases.items():
        make_run(tmp_path / name, **arguments)
        [record] = table(tmp_path / name).records
        found = problem_of(record)
        assert (found is None) == (problem is None) and (problem or "") in (found or ""), name
        assert shown(tmp_path / name)["urgent"] == (problem is not None)


def test_command_has_the_overrides_that_diagnose_reads(tmp_path: Path) -> None:
    typed = ["optimizer=sgd", "optimizer.lr=1e4", "seed=1", "epochs=3", "experiment=x y", "resume=auto", "parallel=ddp",
             "allow_packages=[evil]", "tags=[a]", "hydra.run.dir=z", "early_stopping=patience"]  # fmt: skip
    make_run(tmp_path / "a", overrides=typed)
    words = shlex.split(shown(tmp_path)["command"])
    assert words == ["dlopt", "diagnose", *typed[:5], f"output={tmp_path / 'a/diagnosis'}"]
    refuse_unread(words[2:], "dlopt diagnose", READS, command_keys=["output"])
    make_run(tmp_path / "b/c", overrides=["optimizer.lr=auto"], config={"optimizer.lr": "auto"})
    words = shlex.split(shown(tmp_path / "b")["command"])
    assert words[2:] == [f"checkpoint={tmp_path / 'b/c'}", f"output={tmp_path / 'b/c/diagnosis'}"]


def test_result_in_the_folder_of_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    snapshots = [{"updates": 0, "loss": 2.25, "layers": [LAYER | {"verdict": "healthy"}]},
                 {"updates": 20, "loss": None, "layers": [LAYER], "advice": ["try\x1b[31m norm=batch"]}]  # fmt: skip
    (tmp_path / "a/diagnosis").mkdir()
    file = tmp_path / "a/diagnosis/diagnosis.json"
    file.write_text(json.dumps([{"snapshots": snapshots}]))
    found = shown(tmp_path)
    assert found["lines"] == ["before: loss 2.25", "after 20 updates: loss -", "after 20 updates: try�[31m norm=batch"]
    assert found["heads"][2:4] == ["before", "after 20 updates"] and found["texts"] == 4
    assert found["rows"] == [["head", "", "healthy", "dead: 99 % of the units", "0.5", "25 %", "-"]]


@pytest.mark.parametrize("content", ["", "{}", "[]", "[[]]", "[1]", '[{"snapshots": []}]', '[{"snapshots": [{}]}]',
                                     '[{"snapshots": [{"updates": "x", "loss": "y", "layers": 3}]}]', "[" * 5000,
                                     '[{"snapshots": [{"updates": 1e400, "loss": 1, "layers": []}]}]'])  # fmt: skip
def test_a_damaged_result_is_not_shown(tmp_path: Path, content: str) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "a/diagnosis.json").write_text(content)
    found = shown(tmp_path)
    assert (found["lines"], found["rows"]) == ([], []) and found["command"]
