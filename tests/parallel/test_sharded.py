"""Runs with sharded checkpoints: bitwise identical to unsharded ones, and resumable in any mode."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint import sharded
from dlopt.training.checkpoint.checkpoints import Checkpoints, load
from dlopt.training.progress import TrainingRun
from tests.support.equality import metric_values, resume_run, run_legs
from tests.support.line import dlopt, refused
from tests.support.modes import FILTER, SPATIAL, SYNC_DDP, SYNC_FSDP
from tests.support.processes import run_dlopt, start_dlopt
from tests.support.ranks import ROOT, run_ranks
from tests.support.runs import at_update, metrics, result, run_config, run_job, same, start, terminate, timeless
from tests.support.sizes import MLP

SHARDED = [*SYNC_FSDP, "checkpoint.sharded=true"]
ASYNCHRONOUS = "checkpoint.asynchronous=true"
CASE = [
    *MLP, "model.norm=batch", "augmentation=crop_flip", "data.batch_size=35", "ema=0.9", "optimizer=adamw",
    "optimizer.lr=0.01",
]  # fmt: skip


def train_all(folder: str) -> None:
    """Called on all ranks: the same run with one file, with shards, with asynchronous shards, and interrupted."""
    root, case = Path(folder), [*CASE, "epochs=4"]
    resume_run(root / "one", *case, *SYNC_FSDP)
    resume_run(root / "sharded", *case, *SHARDED)
    resume_run(root / "asynchronous", *case, *SHARDED, ASYNCHRONOUS)
    with at_update(4, terminate if os.environ["DLOPT_RANK"] == "1" else lambda: None):
        assert resume_run(root / "stopped", *case, *SHARDED)["status"] == "interrupted"
    resume_run(root / "stopped", *case, *SHARDED)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_ranks("tests.parallel.test_sharded:train_all", 2, folder, str(folder))
    return folder


@pytest.mark.parametrize("name", ["sharded", "asynchronous", "stopped"])
def test_runs_are_bitwise_identical(finished: Path, name: str) -> None:
    assert timeless(finished / name) == timeless(finished / "one")
    for file in ("last.pt", "best.pt"):
        assert same(result(finished / name, file), result(finished / "one", file))
        raw = torch.load(finished / name / "checkpoints" / file, weights_only=True)
        assert len(raw["shards"]["files"]) == 2 and not any(
            isinstance(value, torch.Tensor) and value.numel() > 100 for value in raw["model"].values()
        )
    best = load(finished / name / "checkpoints/best.pt").step
    shards = {each.name for each in (finished / name / "checkpoints/shards").iterdir()}
    assert shards == {f"step-{step}" for step in (best, 9, 12)}


# -- other modes


def assert_ended_like(run: Path, whole: Path, case: Sequence[str] = CASE) -> None:
    """Compares a run with a single-process run in `whole`."""
    epochs = len(metrics(run))
    start(whole, *case, f"epochs={epochs}")
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert metric_values(b) == pytest.approx(metric_values(a), rel=1e-9)
    one, other = (load(folder / "checkpoints/last.pt").state for folder in (whole, run))
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-9, atol=1e-9)
    for number, values in one["optimizer"]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(other["optimizer"]["state"][number][name], value, rtol=1e-9, atol=1e-9)


def resume_in_one_process(run: Path, epochs: int, case: Sequence[str] = CASE) -> None:
    state = Checkpoints(run / "checkpoints").load_newest()
    run_job(TrainingRun(run_config(*case, f"epochs={epochs}"), run, state))


def test_shards_resume_in_any_mode(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, *CASE, "epochs=1")
    modes = [SHARDED, FILTER, [*SHARDED, ASYNCHRONOUS], SYNC_DDP, SHARDED]
    legs = [(mode, number) for number, mode in enumerate(modes, 2)]
    run_legs(2, tmp_path, run, CASE, legs)
    resume_in_one_process(run, 7)
    assert_ended_like(run, tmp_path / "whole")
    assert len(json.loads((run / "summary.json").read_text())["resumed_from"]) == 6


@pytest.mark.slow
def test_states_that_each_have_an_owner_resume_in_any_mode(tmp_path: Path) -> None:
    run, case = tmp_path / "run", [*CASE, "optimizer=muon"]
    start(run, *case, "epochs=1")
    run_legs(2, tmp_path, run, case, [(SHARDED, 2), (SYNC_DDP, 3), (SYNC_FSDP, 4), ([*SHARDED, ASYNCHRONOUS], 5)])
    resume_in_one_process(run, 6, case)
    assert_ended_like(run, tmp_path / "whole", case)


@pytest.mark.slow
def test_shards_resume_with_another_number_of_processes(tmp_path: Path) -> None:
    """Also with two replicas of two shards each (HSDP), and with parallel=spatial in between."""
    run = tmp_path / "run"
    copies = [*SHARDED, "parallel.shards=2"]
    run_legs(2, tmp_path / "two", run, CASE, [(SHARDED, 1)])
    legs = [(SHARDED, 2), (copies, 3), (SPATIAL, 4), (copies, 5)]
    run_legs(4, tmp_path / "four", run, CASE, legs)
    run_legs(2, tmp_path / "again", run, CASE, [(SHARDED, 6)])
    resume_in_one_process(run, 7)
    assert_ended_like(run, tmp_path / "whole")


def line(folder: Path, *overrides: str) -> list[str]:
    saving = ["parallel.processes=2", "checkpoint.every_steps=1", "epochs=15", "resume=auto"]
    return ["train", f"hydra.run.dir={folder}", *CASE, *SHARDED, *saving, *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["synchronous", "asynchronous"])
def test_killed_during_saves_resumes_bitwise_identical(tmp_path: Path, asynchronous: str) -> None:
    """kill -9 of all processes of a run that mostly saves; the resumed run ends like an uninterrupted one."""
    folder, option, draws = tmp_path / "run", f"checkpoint.asynchronous={asynchronous}", random.Random(0)
    log, during_write = tmp_path / "log.txt", 0
    for _ in range(2):
        process = start_dlopt(ROOT, *line(folder, option), log=log)
        last_step = step_of(folder)
        deadline = time.monotonic() + 300
        while step_of(folder) in (None, last_step) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(draws.uniform(0, 0.6))
        assert process.is_alive() and process.pid is not None, log.read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        during_write += any((folder / "checkpoints/shards").glob(".*.tmp"))
    done = run_dlopt(ROOT, *line(folder, option))
    assert done.returncode == 0, done.stderr
    print(f"{during_write} of 2 while shards were written")
    whole = run_dlopt(ROOT, *line(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert len(json.loads((folder / "summary.json").read_text())["resumed_from"]) == 2
    assert timeless(folder) == timeless(tmp_path / "whole")
    for file in ("last.pt", "best.pt"):
        assert same(result(folder, file), result(tmp_path / "whole", file))
    assert not list(folder.rglob("*.tmp"))


def step_of(folder: Path) -> int | None:
    """Returns the step of the newest checkpoint, if any."""
    raw = sharded.load_without_shards(folder / "checkpoints/last.pt")
    return raw["progress"]["step"] if raw else None


# -- commands


def test_commands_read_shards_and_consolidate_them(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "sharded", tmp_path / "run")
    best = tmp_path / "run/checkpoints/best.pt"
    done = dlopt(tmp_path, "consolidate", "checkpoint=run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("run/checkpoints/best-whole.pt: ") and " updates, " in done.out
    whole = tmp_path / "run/checkpoints/best-whole.pt"
    assert same(load(whole).state, load(best).state)
    raw = torch.load(whole, weights_only=True)
    assert raw["format"] == 1 and "shards" not in raw and same(raw["model"], load(best).model)
    outputs = [dlopt(tmp_path, "eval", f"checkpoint={path}", "device=cpu") for path in (best, whole)]
    assert outputs[0].code == outputs[1].code == 0
    tables = [[line for line in each.out.splitlines() if "best" not in line] for each in outputs]
    assert tables[0] == tables[1]
    shutil.rmtree(tmp_path / "run/checkpoints/shards")
    assert dlopt(tmp_path, "eval", f"checkpoint={whole}", "device=cpu").code == 0
    assert "the folder of its shards is missing" in refused(tmp_path, "eval", f"checkpoint={best}", "device=cpu")
    assert "the folder of its shards is missing" in refused(
        tmp_path, "consolidate", "checkpoint=run/checkpoints/last.pt"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint: a path is needed: dlopt consolidate "),
        (["checkpoint=nothing.pt"], "checkpoint=nothing.pt: no such file"),
        (["checkpoint=."], "checkpoint=.: this folder contains neither best.pt nor last.pt"),
        (["checkpoint=one"], "checkpoint=one/checkpoints/best.pt: is not sharded"),
        (["checkpoint=sharded", "output=sharded"], "output=sharded: is a folder; must be a file"),
        (
            ["checkpoint=sharded", "output=sharded/checkpoints/best.pt"],
            "output=sharded/checkpoints/best.pt: is the checkpoint",
        ),
        (["checkpoint=sharded", "to=x.pt"], "to: unknown key; allowed: checkpoint, output"),
    ],
)
def test_invalid_consolidate_commands_raise(finished: Path, arguments: list[str], message: str) -> None:
    assert refused(finished, "consolidate", *arguments).startswith(f"dlopt: {message}")


@pytest.mark.slow
def test_resume_in_a_new_folder_copies_the_best_checkpoint(finished: Path, tmp_path: Path) -> None:
    """`resume=PATH` in another folder takes the best model so far, whose shards are in the old one."""
    typed = [*CASE, *SHARDED, "checkpoint.sharded=auto", "parallel.processes=1", "epochs=5"]
    line = ["train", *typed, f"resume={finished}/sharded/checkpoints/last.pt", "hydra.run.dir=new"]
    done = dlopt(tmp_path, *line)
    assert done.code == 0, done.err
    assert metrics(tmp_path / "new")[:4] == metrics(finished / "sharded")
    load(tmp_path / "new/checkpoints/best.pt")


def test_clean_removes_shards(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "sharded", tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    (tmp_path / "run/config.yaml").write_text(json.dumps(load(checkpoints / "last.pt").config))
    best = load(checkpoints / "best.pt").step
    done = dlopt(tmp_path, "runs", "clean", "run", "--yes")
    assert done.code == 0 and "step-9.pt" in done.out, done
    assert {each.name for each in (checkpoints / "shards").iterdir()} == {f"step-{best}", "step-12"}
    assert load(checkpoints / "last.pt") and load(checkpoints / "best.pt")


# -- refusals


def refusals(folder: str) -> None:
    """Called on all ranks."""
    for mode in ("ddp", "filter", "pipeline"):
        with pytest.raises(UserError, match=rf"^checkpoint\.sharded=true: not with parallel={mode}; use "):
            start(Path(folder), *MLP, "model.norm=none", f"parallel={mode}", "checkpoint.sharded=true")
        rendezvous.leave()


@pytest.mark.slow
def test_unsupported_modes_refuse_sharded_checkpoints(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_sharded:refusals", 2, tmp_path, str(tmp_path / "several"))


@pytest.mark.parametrize("mode", ["single", "fsdp"])
def test_one_process_refuses_sharded_checkpoints(tmp_path: Path, mode: str) -> None:
    with pytest.raises(
        UserError, match=r"^checkpoint\.sharded=true: one process has nothing to shard; use parallel=fsdp "
    ):
        start(tmp_path, *MLP, f"parallel={mode}", "checkpoint.sharded=true")
