"""Fully sharded runs against single-process runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dlopt.errors import UserError
from dlopt.parallel.fsdp import fsdp_units, fully_sharded
from tests.support.equality import MLP, RESNET, Cases, compare, run_distributed
from tests.support.runs import metrics, start

FSDP = ["parallel=fsdp", "parallel.unit_parameters=100"]
SYNC_FSDP = [*FSDP, "parallel.sync_batchnorm=true"]
KEPT = "parallel.reshard_after_forward=false"

CASES: Cases = {
    "last batch of two": ([*RESNET, "data.batch_size=47", "steps=6"], SYNC_FSDP),
    "accumulation": (
        [*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*SYNC_FSDP, KEPT],
    ),
    "no norm, empty shards": (
        [
            *MLP,
            "model.norm=none",
            "data.batch_size=19",
            "epochs=3",
            "accumulate=2",
            "clip=value",
            "clip.max_value=0.01",
        ],
        [*FSDP, "parallel.sync_every_micro_batch=true"],
    ),
    "average, adaptive clipping": (
        [*MLP, "ema=0.9", "clip=adaptive", "clip.clipping=0.02", "data.batch_size=32", "epochs=2"],
        [*SYNC_FSDP, KEPT],
    ),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2"], SYNC_FSDP),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], [*SYNC_FSDP, KEPT]),
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_four_processes_with_two_replicas(tmp_path: Path) -> None:
    case = [*RESNET, "data.batch_size=18", "accumulate=2", "steps=4"]
    compare(tmp_path, 4, {"two replicas": (case, [*SYNC_FSDP, "parallel.shards=2"])})


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_fifty_steps(tmp_path: Path, accumulate: int) -> None:
    case = [*RESNET, "data.batch_size=35", f"accumulate={accumulate}", "steps=50"]
    compare(tmp_path, 2, {"fifty": (case, SYNC_FSDP)})


@pytest.mark.slow
def test_low_precision_trains(tmp_path: Path) -> None:
    case = [*MLP, "model.dropout=0", "data.batch_size=32", "epochs=8", "precision=bf16"]
    run_distributed(2, tmp_path, {"run": (case, SYNC_FSDP)})
    losses = [line["train_loss"] for line in metrics(tmp_path / "run")]
    start(tmp_path / "single", *case)
    assert losses == pytest.approx([line["train_loss"] for line in metrics(tmp_path / "single")], rel=0.05)
    assert losses[-1] < 0.7 * losses[0]


def test_fsdp_units_skip_small_and_tied_blocks() -> None:
    tied = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)),
        nn.ModuleList([tied]),
        nn.TransformerEncoderLayer(4, 1),
    )
    model.again = tied
    assert fsdp_units(model, 20) == [model[0][0], model[2]]  # type: ignore[index]
    assert fsdp_units(model, 1) == [model[0][0], model[0][2], model[2]]  # type: ignore[index]


ARGUMENTS: dict[str, Any] = {
    "device": torch.device("cpu"), "accumulate": 1, "precision": "fp32", "processes": None, "shards": None,
    "unit_parameters": 1, "reshard_after_forward": True, "sync_every_micro_batch": False, "cpu_offload": False,
    "sync_batchnorm": True, "timeout_minutes": 1.0, "master_addr": None, "master_port": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 3}, "parallel.processes=3: torchrun started 4 processes"),
        ({"shards": 3}, "parallel.shards=3: must divide the number of processes (4)"),
        ({"shards": 8}, "parallel.shards=8: must divide the number of processes (4)"),
        ({"cpu_offload": True}, "parallel.cpu_offload=true: requires a GPU"),
        ({"precision": "fp16"}, "precision=fp16: not supported with parallel=fsdp"),
        ({"device": torch.device("mps")}, "parallel=fsdp: device=mps is not supported"),
    ],
)
def test_invalid_setups_raise_one_line(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        fully_sharded(**{**ARGUMENTS, **arguments})


def test_one_process_needs_no_group() -> None:
    assert (fully_sharded(**ARGUMENTS).name, fully_sharded(**ARGUMENTS).ranks.processes) == ("fsdp", 1)
