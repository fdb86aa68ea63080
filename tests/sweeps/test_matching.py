"""Which jobs of a sweep count as those in its folder, and which of several sweeps is resumed."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dlopt.basics.folders import RunFolder
from dlopt.sweeps.jobs import Job, prepare
from dlopt.sweeps.matching import distance_of_jobs, swept_keys
from tests.support.line import SMALL, Result, dlopt

LINE = ("train", "-m", *SMALL, "epochs=1", "tracking=[]")
HERE = "hydra.sweep.dir=sweep"


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Jobs end as soon as they are described; returns what is started."""
    started: list[list[str]] = []

    def run_jobs(jobs: Sequence[Job], total: int, pool: Any, folder: Path) -> dict[int, str]:
        for job in jobs:
            if prepare(job) is None:
                started.append(job.plan.texts)
                end(job.folder.path, job.plan.saved["epochs"])
        return {job.number: "finished" for job in jobs}

    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    monkeypatch.setattr("dlopt.sweeps.pool.run_jobs", run_jobs)
    return started


def end(run: Path, epochs: int) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "finished", "epochs": epochs}))


def interrupt(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "interrupted"}))


def sweep(folder: Path, *words: str) -> Result:
    result = dlopt(folder, *LINE, *words)
    assert "Traceback" not in result.err
    return result


@pytest.mark.parametrize(
    ("first", "then", "new"),
    [
        ("threads=1,2", "threads=3,2", 1),
        ("threads=1,2", "threads=3", 1),
        ("threads=2", "threads=1,2", 1),
        ("device=cpu,auto", "device=auto,cpu", 0),
        ("epochs=1,2", "epochs=2,1", 0),
        ("check=auto,step", "check=step,auto", 0),
        ("parallel=ddp,fsdp", "parallel=fsdp,ddp", 0),
        ("a=zip(log_every_steps=[1,2],name=[a,b])", "a=zip(log_every_steps=[1,2],name=[c,b])", 1),
        ("data.memory=auto,true", "data.memory=false,true", 1),
        ("data.root=a,b", "data.root=c,b", 1),
        ("experiment=first,second", "experiment=third,second", 1),
        ("a=zip(note=[a,b],tags=[x,y])", "a=zip(note=[c,b],tags=[x,y])", 1),
        ("tags=[a],[b]", "tags=[c],[b]", 1),
        ("seed=1,2 check=auto,step", "check=auto,step seed=1,2", 0),
        ("optimizer=sgd,adamw seed=0,1", "optimizer=sgd,adamw seed=0,1,2", 2),
        ("seed=1,2", "seed=0,1,2", 1),
        ("seed=0,1 optimizer=sgd", "seed=0,1 optimizer=sgd,adamw", 2),
        ("optimizer=sgd,adamw", "optimizer=sgd,adamw seed=1,0", 2),  # had the default seed, 0
        ("optimizer.lr=1e-1,0.2", "optimizer.lr=0.2,0.1,0.3", 1),
    ],
)
def test_equal_jobs_keep_their_numbers_and_new_ones_follow(
    first: str, then: str, new: int, tmp_path: Path, started: list[list[str]]
) -> None:
    """An axis tells jobs apart whatever its role: also a key that may change when a run is resumed."""
    words = [HERE]
    if "experiment" in first:
        recipes = tmp_path / "conf/experiment"
        recipes.mkdir(parents=True)
        for number, name in enumerate(("first", "second", "third"), 2):
            (recipes / f"{name}.yaml").write_text(f"# @package _global_\nlog_every_steps: {number}\n")
        words += ["--config-dir=conf"]  # Hydra then composes each job, which is slow
    if "data.root" in first:
        words += ["data=image_folder", "data.subset=null"]
        for name in "abc":
            (tmp_path / name).mkdir()
    assert sweep(tmp_path, *words, *first.split(" ")).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").glob("*/*.*ml")}
    listed = yaml.safe_load((tmp_path / "sweep/sweep.yaml").read_text())
    assert len(before) == 2 * len(listed) == 2 * len(started)
    started.clear()
    result = sweep(tmp_path, *words, *then.split(" "), "resume=auto")
    assert result.code == 0 and len(started) == new, result
    assert {path: path.read_bytes() for path in before} == before
    extended = yaml.safe_load((tmp_path / "sweep/sweep.yaml").read_text())
    assert len(extended) == len(listed) + new and [job[-1] for job in extended[len(listed) :]] == ["resume=auto"] * new
    numbers = [int(path.parent.name) for path in (tmp_path / "sweep").glob("*/config.yaml")]
    assert sorted(numbers) == [*range(len(extended))]
    assert (f"adds {new} job{'s' * (new > 1)} to the {len(listed)} of this sweep\n" in result.out) == (new > 0)
    started.clear()
    assert sweep(tmp_path, *words, *then.split(" "), "resume=auto").code == 0 and not started


def test_a_job_that_never_began_keeps_its_number(tmp_path: Path, started: list[list[str]]) -> None:
    """Although its words are others in the extended sweep, and no config tells its settings."""
    assert sweep(tmp_path, HERE, "optimizer=sgd,adamw").code == 0
    shutil.rmtree(tmp_path / "sweep/1")
    started.clear()
    assert sweep(tmp_path, HERE, "optimizer=adamw,sgd", "seed=0,1", "resume=auto").code == 0
    optimizers = [yaml.safe_load((tmp_path / f"sweep/{number}/config.yaml").read_text()) for number in range(4)]
    names = [each["optimizer"]["_target_"].split(".")[-1] for each in optimizers]
    assert names[:2] == ["SGD", "adamw"] and len(started) == 3
    assert sorted((name, each["seed"]) for name, each in zip(names, optimizers, strict=True)) == [
        ("SGD", 0), ("SGD", 1), ("adamw", 0), ("adamw", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "then", "there", "here"),
    [
        ("seed=1,2 optimizer=sgd", "seed=1,3 optimizer=adamw", "optimizer=sgd", "optimizer=adamw"),
        ("threads=1,2", "threads=2 seed=5", "no override", "seed=5"),
        ("seed=1,2 optimizer.lr=0.3", "seed=1,2,3", "optimizer.lr=0.3", "no override"),
    ],
)
def test_jobs_that_differ_in_more_than_axes_are_another_sweep(
    first: str, then: str, there: str, here: str, tmp_path: Path
) -> None:
    assert sweep(tmp_path, HERE, *first.split()).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*.*ml")}
    result = sweep(tmp_path, HERE, *then.split(), "resume=auto")
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"sweep: this folder contains another sweep ({there} there, {here} here); use another folder" in result.err
    assert {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*.*ml")} == before


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("parallel=ddp,fsdp", "parallel=ddp,fsdp"),
        ("optimizer.lr=1e-3,0.1", "optimizer.lr=0.001,1e-1"),
        ("threads=1,2", "threads=1,2 device=cpu data.workers=0"),
        ("seed=1,2 threads=1", "seed=1,2 threads=2"),
        (
            "data=image_folder data.subset=null data.root=a,b",
            "data=image_folder data.subset=null data.root=./a,{here}/b",
        ),
        ("a=zip(note=[a,b],seed=[1,2])", "a=zip(note=['a',b],seed=[1,2])"),
    ],
)
def test_the_same_jobs_in_any_words(first: str, then: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    assert sweep(tmp_path, HERE, *first.split(" ")).code == 0
    result = sweep(tmp_path, HERE, *then.format(here=tmp_path).split(" "), "resume=auto")
    assert result.code == 0 and result.out.startswith("this sweep is already finished"), result


def test_a_changed_tag_changes_no_job(tmp_path: Path) -> None:
    line = (HERE, "tags=[a],[b]")
    assert sweep(tmp_path, *line).code == 0
    assert dlopt(tmp_path, "runs", "tag", "sweep/0", "good").code == 0
    assert sweep(tmp_path, *line, "resume=auto").out.startswith("this sweep is already finished")


def job(texts: list[str], saved: dict[str, Any], former: dict[str, Any] | None = None) -> Any:
    """A job with these overrides and this config, whose folder has the config `former`."""
    return SimpleNamespace(
        plan=SimpleNamespace(texts=texts, saved=saved), folder=SimpleNamespace(config=lambda: former)
    )


def test_a_key_that_only_some_jobs_have_is_an_axis() -> None:
    jobs = [job(["seed=1"], {"seed": 1, "threads": 1}), job(["seed=1", "threads=2"], {"seed": 1, "threads": 2})]
    assert swept_keys(None, [each.plan for each in jobs]) == {"threads"}


def test_the_distance_of_a_sweep_is_that_of_its_farthest_job(tmp_path: Path) -> None:
    new = {"seed": 1, "epochs": 4}
    jobs = [job(["seed=1"], new, former) for former in (new, {"seed": 1, "epochs": 3}, None)]
    assert distance_of_jobs(RunFolder(tmp_path), jobs) == 4  # of another length


def test_jobs_in_folders_named_by_their_overrides(tmp_path: Path) -> None:
    line = [HERE, "seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}"]
    assert sweep(tmp_path, *line).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = sweep(tmp_path, *line, "resume=auto")
    assert result.code == 0 and result.out.startswith("this sweep is already finished: ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_sweep_compares_no_runs_of_different_lengths(tmp_path: Path) -> None:
    assert sweep(tmp_path, HERE, "seed=1,2", "epochs=2").code == 0
    result = sweep(tmp_path, HERE, "seed=1,2,3", "resume=auto")
    assert result.code == 2 and not (tmp_path / "sweep/2").exists()
    assert "sweep: job 0 has finished after 2 epochs, which is more than the other jobs would train" in result.err
    again = sweep(tmp_path, HERE, "seed=1,2", "resume=auto")
    assert again.code == 0 and again.out.startswith("this sweep is already finished: ")
    assert sweep(tmp_path, HERE, "seed=1,2,3", "epochs=2", "resume=auto").code == 0


def test_resume_auto_skips_a_sweep_of_other_values_with_jobs_that_never_started(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1,2").code == 0
    (first,) = tmp_path.glob("outputs/train/*")
    shutil.rmtree(first / "1")
    assert sweep(tmp_path, "seed=1,3", "resume=auto").code == 0
    assert not (first / "1").exists()  # seed=1 is the first job of both
    assert sweep(tmp_path, "seed=1,2", "resume=auto", "log_every_steps=9").code == 0
    assert (first / "1/summary.json").exists()


def test_resume_auto_finds_the_newest_unfinished_sweep(tmp_path: Path) -> None:
    for seeds in ("1,2", "3,4"):
        assert sweep(tmp_path, f"seed={seeds}").code == 0
    first, second = sorted(tmp_path.glob("outputs/train/*"))
    for folder in (first, second):
        (folder / "1/summary.json").unlink()
    assert sweep(tmp_path, "seed=1,2", "resume=auto").code == 0
    assert (first / "1/summary.json").exists() and not (second / "1/summary.json").exists()
    assert len(list(tmp_path.glob("outputs/train/*"))) == 2
    assert sweep(tmp_path, "seed=1,2,3", "resume=auto").code == 0  # another space: afresh
    assert len(list(tmp_path.glob("outputs/train/*"))) == 3


def test_resume_auto_continues_the_sweep_of_the_same_length(tmp_path: Path) -> None:
    """Of two that match, the older one is that of this command; the newest one if there is none."""
    for epochs in (2, 3):
        assert sweep(tmp_path, "seed=1,2", f"epochs={epochs}").code == 0
    older, newer = sorted(tmp_path.glob("outputs/train/*"))
    for folder in (older, newer):
        interrupt(folder / "1")
    assert sweep(tmp_path, "seed=1,2", "epochs=2", "resume=auto").code == 0
    statuses = [json.loads((each / "1/summary.json").read_text())["status"] for each in (older, newer)]
    assert statuses == ["finished", "interrupted"]
    assert yaml.safe_load((newer / "1/config.yaml").read_text())["epochs"] == 3


def test_the_printed_words_continue_this_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an equal one was started."""
    place = tmp_path / "a 'quoted', (odd) place"
    place.mkdir()
    monkeypatch.setattr(
        "dlopt.sweeps.pool.run_jobs", lambda jobs, *_: dict.fromkeys((0, 1), prepare(jobs[0]) or "failed")
    )
    out, _ = (sweep(place, "seed=1,2").out for _ in range(2))
    [line] = [each for each in out.splitlines() if "added to this command" in each]
    words = shlex.split(line.partition(" added to")[0])
    older, _ = sorted(place.glob("outputs/train/*"))
    seen: list[Path] = []
    monkeypatch.setattr(
        "dlopt.sweeps.pool.run_jobs", lambda jobs, *_: seen.extend(job.folder.path for job in jobs) or {}
    )
    sweep(tmp_path, "seed=1,2", *words)
    assert seen == [older / "0", older / "1"]


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (["optimizer=sgd,muon", "optimizer.lr=0.01,0.1"], True),
        (["optimizer=muon", "hydra/sweeper=dlopt_optuna", "optimizer.lr=interval(0.01,0.1)"], True),
        (["optimizer=muon", "optimizer.lr=0.01,0.1", "optimizer.rest_lr=0.002"], False),
        (["optimizer=muon", "rates=zip(optimizer.lr=[0.01,0.1],optimizer.rest_lr=[0.001,0.01])"], False),
        (["optimizer=muon", "seed=0,1"], False),
        (["optimizer=dmuon", "optimizer.lr=0.01,0.1"], False),  # whose other parameters have lr
    ],
)
def test_a_rate_that_stays_is_said(
    words: list[str], warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.run.dry_run.show", lambda *_, **__: None)
    result = sweep(tmp_path, *words, "dry_run=true", "threads=1")
    assert result.code == 0, result.err
    assert ("warning: optimizer.lr is swept, but optimizer.rest_lr stays at 0.001; " in result.err) == warns
