"""`dlopt grid`: the arguments of one job of a sweep."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.commands.grid import overrides_of
from tests.support.line import dlopt, refused


def test_order_of_the_jobs() -> None:
    line = ["optimizer=sgd,adamw", "epochs=3", "optimizer.lr=0.1,0.2"]
    jobs = [overrides_of(number, line) for number in range(4)]
    assert jobs[1] == ["optimizer=sgd", "epochs=3", "optimizer.lr=0.2"]
    assert jobs[2] == ["optimizer=adamw", "epochs=3", "optimizer.lr=0.1"]
    with pytest.raises(UserError, match="job 4: the sweep has jobs 0 to 3"):
        overrides_of(4, line)


def test_tasks_share_one_order_of_shuffled_values() -> None:
    jobs = [overrides_of(number, ["seed=shuffle(range(0,20))"]) for number in range(20)]
    assert sorted(jobs) == sorted([f"seed={seed}"] for seed in range(20)) and jobs != sorted(jobs)


def test_prints_one_job(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "grid", "1", "optimizer=sgd,adamw", "epochs=3")
    assert result.code == 0 and result.out == "optimizer=adamw\nepochs=3\n"


@pytest.mark.parametrize("arguments", [[], ["seed=1,2"]])
def test_rejects_a_missing_number(arguments: list[str], tmp_path: Path) -> None:
    assert "number of a job" in refused(tmp_path, "grid", *arguments)


def test_keeps_the_flags_that_name_config_files(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/mine.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.1\n")
    (tmp_path / "short.yaml").write_text("defaults: [train, _self_]\nepochs: 1\n")
    folder = str(tmp_path)
    job = overrides_of(1, ["-cd", folder, "optimizer=sgd,mine", "--config-name", "short"])
    assert job == [f"--config-dir={folder}", "--config-name=short", "optimizer=mine"]


def test_jobs_of_a_recipe_with_a_sweep(tmp_path: Path) -> None:
    jobs = [overrides_of(number, ["experiment=study/schedules", "seed=0,1"]) for number in range(4)]
    assert jobs[0] == ["schedule=constant", "seed=0", "experiment=study/schedules", "hydra.mode=RUN"]
    assert [job[:2] for job in jobs[1:3]] == [["schedule=constant", "seed=1"], ["schedule=step", "seed=0"]]
    assert "_target_: dlopt.schedules.step" in dlopt(tmp_path, "train", "--cfg", "job", *jobs[2]).out
    refusal = refused(tmp_path, "grid", "0", "hydra/sweeper=dlopt_optuna", "optimizer.lr=0.1,0.2")
    assert "a search draws its jobs when they start" in refusal
