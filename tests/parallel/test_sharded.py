"""Runs whose checkpoints are sharded: the same as any other, and in any other mode."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.errors import UserError
from dlopt.parallel import rendezvous
from dlopt.training import sharded
from dlopt.training.checkpoint import Checkpoints, load
from dlopt.training.trainer import Run, train
from tests.commands.line import dlopt, refused
from tests.parallel.equality import MLP, metric_values
from tests.parallel.ranks import ROOT, run_ranks
from tests.training.runs import at_update, experiment, metrics, result, same, start, terminate, timeless

FSDP = ["parallel=fsdp", "parallel.unit_parameters=100"]
SYNC = "parallel.sync_batchnorm=true"
SHARDED = [*FSDP, SYNC, "checkpoint.sharded=true"]
BEHIND = "checkpoint.asynchronous=true"
CASE = [
    *MLP, "model.norm=batch", "augmentation=crop_flip", "data.batch_size=35", "ema=0.9", "optimizer=adamw",
    "optimizer.lr=0.01",
]  # fmt: skip


def go_on(folder: Path, *overrides: str) -> dict[str, Any]:
    """In each rank: the run in `folder`, whose checkpoint rank 0 reads."""
    main = os.environ["DLOPT_RANK"] == "0"
    state = Checkpoints(folder / "checkpoints").load_newest() if main else None
    summary = train(Run(experiment(*overrides), folder, state), console=False)
    rendezvous.leave()
    return summary


def runs(folder: str) -> None:
    """In each rank: the same run in one file, in shards, in shards behind the training, and interrupted."""
    place, case = Path(folder), [*CASE, "epochs=4"]
    go_on(place / "one", *case, *FSDP, SYNC)
    go_on(place / "sharded", *case, *SHARDED)
    go_on(place / "behind", *case, *SHARDED, BEHIND)
    with at_update(4, terminate if os.environ["DLOPT_RANK"] == "1" else lambda: None):
        assert go_on(place / "stopped", *case, *SHARDED)["status"] == "interrupted"
    go_on(place / "stopped", *case, *SHARDED)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_ranks("tests.parallel.test_sharded:runs", 2, folder, str(folder))
    return folder


@pytest.mark.parametrize("name", ["sharded", "behind", "stopped"])
def test_the_run_is_the_same_bit_for_bit(finished: Path, name: str) -> None:
    assert timeless(finished / name) == timeless(finished / "one")
    for file in ("last.pt", "best.pt"):
        assert same(result(finished / name, file), result(finished / "one", file))
        raw = torch.load(finished / name / "checkpoints" / file, weights_only=True)
        assert len(raw["shards"]["files"]) == 3 and not any(
            isinstance(value, torch.Tensor) and value.numel() > 100 for value in raw["model"].values()
        )
    best = load(finished / name / "checkpoints/best.pt")["progress"]["step"]
    shards = {each.name for each in (finished / name / "checkpoints/shards").iterdir()}
    assert shards == {f"step-{step}" for step in (best, 9, 12)}


# -- other modes


def in_turn(folder: str, legs: list[tuple[list[str], int]]) -> None:
    """In each rank: one run, of which every leg goes on with what the one before has left."""
    for mode, epochs in legs:
        go_on(Path(folder), *CASE, *mode, f"epochs={epochs}")


def ended_like(run: Path, whole: Path) -> None:
    """Against a run of one process."""
    epochs = len(metrics(run))
    start(whole, *CASE, f"epochs={epochs}")
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert metric_values(b) == pytest.approx(metric_values(a), rel=1e-9)
    one, other = (load(folder / "checkpoints/last.pt") for folder in (whole, run))
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-9, atol=1e-9)
    for number, values in one["optimizer"]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(other["optimizer"]["state"][number][name], value, rtol=1e-9, atol=1e-9)


def one_process(run: Path, epochs: int) -> None:
    state = Checkpoints(run / "checkpoints").load_newest()
    train(Run(experiment(*CASE, f"epochs={epochs}"), run, state), console=False)


def test_shards_resume_in_any_mode(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, *CASE, "epochs=1")
    modes = [SHARDED, ["parallel=filter"], [*SHARDED, BEHIND], ["parallel=ddp", SYNC], SHARDED]
    legs = [(mode, number) for number, mode in enumerate(modes, 2)]
    run_ranks("tests.parallel.test_sharded:in_turn", 2, tmp_path, str(run), legs)
    one_process(run, 7)
    ended_like(run, tmp_path / "whole")
    assert len(json.loads((run / "summary.json").read_text())["resumed_from"]) == 6


@pytest.mark.slow
def test_shards_resume_with_another_number_of_processes(tmp_path: Path) -> None:
    """Also with copies of a model that is cut over two, and with strips in between."""
    run = tmp_path / "run"
    copies = [*SHARDED, "parallel.shards=2"]
    run_ranks("tests.parallel.test_sharded:in_turn", 2, tmp_path / "two", str(run), [(SHARDED, 1)])
    legs = [(SHARDED, 2), (copies, 3), (["parallel=spatial"], 4), (copies, 5)]
    run_ranks("tests.parallel.test_sharded:in_turn", 4, tmp_path / "four", str(run), legs)
    run_ranks("tests.parallel.test_sharded:in_turn", 2, tmp_path / "again", str(run), [(SHARDED, 6)])
    one_process(run, 7)
    ended_like(run, tmp_path / "whole")


def command(folder: Path, *overrides: str) -> list[str]:
    lines = [*CASE, *SHARDED, "parallel.processes=2", "checkpoint.every_steps=1", "epochs=25", *overrides]
    return [sys.executable, "-m", "dlopt", "train", f"hydra.run.dir={folder}", "resume=auto", *lines]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["false", "true"], ids=["before going on", "behind"])
def test_killed_while_it_saves_all_the_time(tmp_path: Path, how: str) -> None:
    """kill -9 of all processes of a run that spends most of its time in saves; the last one ends as if undisturbed."""
    started = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    folder, asynchronous, draws = tmp_path / "run", f"checkpoint.asynchronous={how}", random.Random(0)
    inside = 0
    for _ in range(3):
        process = subprocess.Popen(command(folder, asynchronous), start_new_session=True, **started)  # type: ignore[call-overload]
        seen = step_of(folder)
        deadline = time.monotonic() + 120
        while step_of(folder) in (None, seen) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(draws.uniform(0, 0.6))
        assert process.poll() is None, process.communicate()[1]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        inside += any((folder / "checkpoints/shards").glob(".*.tmp"))
    done = subprocess.run(command(folder, asynchronous), timeout=200, **started)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    print(f"{inside} of 3 inside the writing of shards")
    whole = subprocess.run(command(tmp_path / "whole"), timeout=200, **started)  # type: ignore[call-overload]
    assert whole.returncode == 0, whole.stderr
    assert len(json.loads((folder / "summary.json").read_text())["resumed_from"]) == 3
    assert timeless(folder) == timeless(tmp_path / "whole")
    for file in ("last.pt", "best.pt"):
        assert same(result(folder, file), result(tmp_path / "whole", file))
    assert not list(folder.rglob("*.tmp"))


def step_of(folder: Path) -> int | None:
    """Of the newest checkpoint, if it is there."""
    raw = sharded.load_without_shards(folder / "checkpoints/last.pt")
    return raw["progress"]["step"] if raw else None


# -- commands


def test_commands_read_shards_and_make_one_file(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "sharded", tmp_path / "run")
    best = tmp_path / "run/checkpoints/best.pt"
    done = dlopt(tmp_path, "consolidate", "checkpoint=run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("run/checkpoints/best-whole.pt: ") and " updates, " in done.out
    whole = tmp_path / "run/checkpoints/best-whole.pt"
    assert same(load(whole), load(best))
    raw = torch.load(whole, weights_only=True)
    assert raw["format"] == 1 and "shards" not in raw and same(raw["model"], load(best)["model"])
    told = [dlopt(tmp_path, "eval", f"checkpoint={path}", "device=cpu") for path in (best, whole)]
    assert told[0].code == told[1].code == 0
    figures_told = [[line for line in each.out.splitlines() if "best" not in line] for each in told]
    assert figures_told[0] == figures_told[1]
    shutil.rmtree(tmp_path / "run/checkpoints/shards")
    assert dlopt(tmp_path, "eval", f"checkpoint={whole}", "device=cpu").code == 0
    assert "the folder of its shards is missing" in refused(tmp_path, "eval", f"checkpoint={best}", "device=cpu")
    assert "the folder of its shards is missing" in refused(
        tmp_path, "consolidate", "checkpoint=run/checkpoints/last.pt"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint: a path is needed: dlopt consolidate checkpoint="),
        (["checkpoint=nothing.pt"], "checkpoint=nothing.pt: no such file"),
        (["checkpoint=."], "checkpoint=.: this folder contains neither best.pt nor last.pt"),
        (["checkpoint=one"], "checkpoint=one/checkpoints/best.pt: is not sharded"),
        (["checkpoint=sharded", "output=sharded"], "output=sharded: is a folder; must be a file"),
        (
            ["checkpoint=sharded", "output=sharded/checkpoints/best.pt"],
            "output=sharded/checkpoints/best.pt: this is the",
        ),
        (["checkpoint=sharded", "to=x.pt"], "to: unknown key; allowed: checkpoint, output"),
    ],
)
def test_wrong_lines_for_consolidate(finished: Path, arguments: list[str], message: str) -> None:
    assert refused(finished, "consolidate", *arguments).startswith(f"dlopt: {message}")


def test_help_for_consolidate(tmp_path: Path) -> None:
    done = dlopt(tmp_path, "consolidate", "--help")
    assert done.code == 0 and done.out.startswith("dlopt consolidate checkpoint=PATH")


@pytest.mark.slow
def test_an_earlier_best_comes_along_to_a_new_folder(finished: Path, tmp_path: Path) -> None:
    """`resume=PATH` in another folder takes the best model so far, whose shards lie in the old one."""
    typed = [*CASE, *SHARDED, "checkpoint.sharded=auto", "parallel.processes=1", "epochs=5"]
    line = ["train", *typed, f"resume={finished}/sharded/checkpoints/last.pt", "hydra.run.dir=new"]
    done = dlopt(tmp_path, *line)
    assert done.code == 0, done.err
    assert metrics(tmp_path / "new")[:4] == metrics(finished / "sharded")
    load(tmp_path / "new/checkpoints/best.pt")


def test_cleaning_removes_shards(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "sharded", tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    for name in ("config.yaml", "summary.json"):
        assert (tmp_path / "run" / name).exists() or name == "config.yaml"
    (tmp_path / "run/config.yaml").write_text(json.dumps(load(checkpoints / "last.pt")["config"]))
    best = load(checkpoints / "best.pt")["progress"]["step"]
    done = dlopt(tmp_path, "runs", "clean", "run", "--yes")
    assert done.code == 0 and "step-9.pt" in done.out, done
    assert {each.name for each in (checkpoints / "shards").iterdir()} == {f"step-{best}", "step-12"}
    assert load(checkpoints / "last.pt") and load(checkpoints / "best.pt")


# -- where it makes no sense


def refusals(folder: str) -> None:
    """In each rank."""
    for mode in ("ddp", "filter", "pipeline"):
        with pytest.raises(UserError, match=rf"^checkpoint\.sharded=true: not with parallel={mode}; use "):
            start(Path(folder), *MLP, "model.norm=none", f"parallel={mode}", "checkpoint.sharded=true")
        rendezvous.leave()


@pytest.mark.slow
def test_elsewhere_it_is_refused(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_sharded:refusals", 2, tmp_path, str(tmp_path / "several"))
    for mode in ("single", "fsdp"):
        with pytest.raises(
            UserError, match=r"^checkpoint\.sharded=true: one process has nothing to shard; use parallel=fsdp "
        ):
            start(tmp_path / mode, *MLP, f"parallel={mode}", "checkpoint.sharded=true")
