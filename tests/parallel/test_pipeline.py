"""Pipeline-parallel runs against single-process runs."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlopt.errors import UserError
from dlopt.parallel.pipeline import PipelineMode, pipeline
from tests.support.equality import MLP, RESNET, Cases, compare, run_distributed
from tests.support.runs import metrics, start

PIPELINE = ["parallel=pipeline"]
TWO_LAYERS = ["model.widths=[12,8]"]  # dropout and batch norm on both stages

CASES: Cases = {
    "accumulation": (
        [*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*PIPELINE, "parallel.split=[stage2]"],
    ),
    "gpipe, one by one": (
        [*MLP, "model.norm=none", "data.batch_size=19", "epochs=2", "accumulate=4", "augmentation=cutmix"],
        [*PIPELINE, "parallel.schedule=gpipe"],
    ),
    "average, adaptive clipping": (
        [*MLP, *TWO_LAYERS, "ema=0.9", "clip=adaptive", "clip.clipping=0.02", "data.batch_size=32", "epochs=2"],
        PIPELINE,
    ),
    "exact statistics": (
        [*MLP, *TWO_LAYERS, "norm_statistics=exact", "data.batch_size=32", "accumulate=2", "epochs=2"],
        PIPELINE,
    ),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], PIPELINE),
}


def test_two_stages_equal_one_process(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_four_stages_and_fewer_micro_batches_than_stages(tmp_path: Path) -> None:
    case = [*MLP, "data.batch_size=35", "accumulate=2", "steps=4", "optimizer=lamb"]
    compare(tmp_path, 4, {"lamb": (case, PIPELINE)})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_fifty_steps(tmp_path: Path, schedule: str) -> None:
    case = [*RESNET, "data.batch_size=35", "accumulate=3", "steps=50"]
    compare(tmp_path, 2, {"fifty": (case, [*PIPELINE, f"parallel.schedule={schedule}"])})


@pytest.mark.slow
def test_low_precision_trains(tmp_path: Path) -> None:
    case = [*RESNET, "model.dropout=0", "data.batch_size=32", "accumulate=2", "epochs=3", "precision=bf16"]
    run_distributed(2, tmp_path, {"run": (case, PIPELINE)})
    start(tmp_path / "single", *case)
    losses = [[line["train_loss"] for line in metrics(tmp_path / run)] for run in ("run", "single")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


ARGUMENTS: dict[str, Any] = {
    "device": torch.device("cpu"), "accumulate": 1, "batch_size": 32, "precision": "fp32", "threads": 1,
    "processes": None, "micro_batches": None, "schedule": "1f1b", "split": None, "timeout_minutes": 1.0,
    "master_addr": None, "master_port": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 3}, "parallel.processes=3: torchrun started 2 processes"),
        ({"micro_batches": 4, "accumulate": 2}, "parallel.micro_batches=4: conflicts with accumulate=2"),
        ({"micro_batches": 33}, "parallel.micro_batches=33: must be at most data.batch_size=32"),
        ({"precision": "fp16"}, "precision=fp16: not supported with parallel=pipeline"),
    ],
)
def test_invalid_setups_raise_one_line(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        pipeline(**{**ARGUMENTS, **arguments})


@pytest.mark.parametrize(("threads", "device", "chosen"), [("auto", "cpu", [6]), (2, "cpu", []), ("auto", "cuda", [])])
def test_stages_of_a_machine_divide_its_cores(
    threads: int | str, device: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 of three, whose machine runs the last two stages, has three quarters of that machine's work."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    group = SimpleNamespace(rank=2, world=SimpleNamespace(local_rank=1))
    ranks = SimpleNamespace(local_processes=2)
    mode: Any = SimpleNamespace(threads=threads, device=torch.device(device), ranks=ranks, group=group)
    PipelineMode._set_threads(mode, [0.5, 0.125, 0.375])
    assert numbers == chosen


def test_one_process_needs_no_group() -> None:
    assert (pipeline(**ARGUMENTS).name, pipeline(**ARGUMENTS).ranks.processes) == ("pipeline", 1)
