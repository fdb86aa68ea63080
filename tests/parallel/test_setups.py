"""Setups of modes: refused with one line where they cannot work, and without a group in one process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from tests.support.modes import build_mode
from tests.support.runs import start
from tests.support.sizes import MLP

MPS = torch.device("mps")


@pytest.mark.parametrize(
    ("mode", "started", "arguments", "message"),
    [
        ("ddp", 2, {"processes": 3}, "parallel.processes=3: torchrun started 2 processes"),
        ("ddp", 2, {"device": MPS}, "parallel=ddp: device=mps is not supported"),
        ("ddp", 1, {"processes": 2}, "parallel.processes=2: "),
        ("fsdp", 4, {"processes": 3}, "parallel.processes=3: torchrun started 4 processes"),
        ("fsdp", 4, {"shards": 3}, "parallel.shards=3: must divide the number of processes (4)"),
        ("fsdp", 4, {"shards": 8}, "parallel.shards=8: must divide the number of processes (4)"),
        ("fsdp", 4, {"cpu_offload": True}, "parallel.cpu_offload=true: requires a GPU"),
        ("fsdp", 4, {"device": MPS}, "parallel=fsdp: device=mps is not supported"),
        ("pipeline", 2, {"processes": 3}, "parallel.processes=3: torchrun started 2 processes"),
        ("pipeline", 2, {"micro_batches": 4, "accumulate": 2}, "parallel.micro_batches=4: conflicts with accumulate=2"),
        ("pipeline", 2, {"micro_batches": 33}, "parallel.micro_batches=33: must be at most data.batch_size=32"),
        ("hybrid", 1, {}, "parallel=hybrid: data_degree x model_degree = 1 x 2 = 2, but there is 1 process; set paral"),
        ("hybrid", 1, {"data_degree": 3}, "parallel=hybrid: data_degree x model_degree = 3 x 2 = 6, but there is 1 pr"),
    ],
)
def test_invalid_setups_raise_one_line(
    mode: str, started: int, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if started > 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        build_mode(mode, **arguments)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pipeline"])
def test_one_process_needs_no_group(name: str) -> None:
    mode = build_mode(name)
    assert (mode.name, mode.ranks.processes, mode.split.shard) == (name, 1, None)


def test_single_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^parallel=single: torchrun started 2 processes"):
        start(Path("unused"), *MLP)
