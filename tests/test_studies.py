"""Studies: experiment files that are sweeps, with and without -m."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode

from dlopt.basics.errors import UserError
from dlopt.basics.files import read_json
from dlopt.commands.train import train as train_command
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from dlopt.config.overrides import grid, parse_axes
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.sweeps import jobs, pool

STUDIES = {path.stem: path for path in sorted((config_folder() / "experiment" / "study").glob("[!_]*.yaml"))}
SCHEDULES = ("constant", "step", "cosine", "cosine_warmup", "one_cycle", "wsd")


@pytest.mark.parametrize("name", STUDIES)
def test_header_lists_the_command_and_swept_values_are_valid(name: str) -> None:
    assert f"  dlopt train experiment=study/{name}" in STUDIES[name].read_text()
    composer = Composer()
    config = composer.compose([f"experiment=study/{name}"], multirun=True)
    assert config.hydra.mode == RunMode.MULTIRUN
    params = config.hydra.sweeper.params or {}
    if any("(" in str(value) and not str(value).startswith("range") for value in params.values()):
        return  # a search draws its values
    all_jobs = grid(parse_axes([f"{key}={value}" for key, value in params.items()], composer))
    assert len(all_jobs) > 3
    for job in (all_jobs[0], all_jobs[-1]):
        lines = [*job, f"experiment=study/{name}"]
        parse(*to_plain(composer.compose(lines)))


@pytest.mark.parametrize(
    ("typed", "schedules", "seeds"),
    [
        ([], SCHEDULES, (0, 1, 2)),
        (["seed=7"], SCHEDULES, (7,)),
        (["-m", "seed=7"], SCHEDULES, (7,)),
        (["-m", "schedule=step", "seed=5,6"], ("step",), (5, 6)),
    ],
)
def test_a_study_sweeps_with_and_without_multirun_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], schedules: tuple[str], seeds: tuple[int]
) -> None:
    seen = []

    def record(batch: Any, pool: object, overview: object) -> None:
        while (job := batch.next()) is not None:
            seen.append(" ".join(line for line in job.plan.texts if not line.startswith("experiment=")))
            job.folder.path.mkdir(parents=True, exist_ok=True)
            (job.folder.path / "summary.json").write_text('{"status": "finished"}')
            batch.ended(job, jobs.JobResult("finished", {}))

    monkeypatch.setattr(pool, "run", record)
    monkeypatch.chdir(tmp_path)
    assert train_command(["experiment=study/schedules", *typed]) == 0
    assert seen == [f"schedule={schedule} seed={seed}" for schedule, seed in product(schedules, seeds)]
    [folder] = (tmp_path / "outputs" / "study_schedules").iterdir()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {str(number) for number in range(len(seen))}


def test_several_values_require_multirun_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"seed=5,6: several values need `dlopt train -m`"):
        train_command(["experiment=study/schedules", "seed=5,6"])
    assert not list(tmp_path.iterdir())


def test_single_run_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["experiment=study/schedules", "hydra.mode=RUN", "epochs=1", "data.subset=100", "hydra.run.dir=run"]
    assert train_command(typed) == 0
    assert (read_json(tmp_path / "run" / "summary.json") or {})["epochs"] == 1


def test_suggests_a_similar_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean experiment=lecture/capacity\?"):
        train_command(["experiment=lecture/capasity"])
