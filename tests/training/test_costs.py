"""What a run costs, in summary.json: samples, FLOPs and peak memory, against numbers computed by hand."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlopt.training.builders import speed
from tests.support.runs import execute, metrics, start

# 64 pixels, 10 classes, one hidden layer of 8: 64 * 8 + 8 * 10 weights of matrices; 100 samples in batches of 24.
RUN = (
    "model=mlp", "model.widths=[8]", "model.norm=none", "data.subset=125", "data.val_split=0.2", "data.batch_size=24",
    "epochs=3", "device=cpu", "threads=1", "tracking=[]",
)  # fmt: skip
SAMPLE = 6 * (64 * 8 + 8 * 10)  # FLOPs: 2 for each weight, forward, and 4 backward


@pytest.mark.parametrize(
    ("keys", "updates", "samples", "passes"),
    [
        ((), 15, 300, 1),
        (("data.drop_last=true",), 12, 288, 1),
        (("sampler.epoch_size=30",), 6, 90, 1),
        (("steps=7",), 7, 100 + 2 * 24, 1),
        (("accumulate={micro_batches:[1,2],epochs:[2]}",), 5 + 5 + 3, 300, 1),
        (("accumulate=3",), 15, 300, 1),
        (("data.batch_size=full",), 3, 300, 1),
        (("optimizer=sam",), 15, 300, 2),
        (("optimizer=sophia",), 15, 300, None),  # products with the Hessian
        (("optimizer.groups=[{match:'layer1*',freeze:true}]",), 15, 300, None),
        (("optimizer.groups=[{match:'layer1*',horizon:0.5}]",), 15, 300, None),
        (("adapt=lora",), 15, 300, None),
        (("activation_checkpointing=all",), 15, 300, None),
    ],
)
def test_samples_and_flops(
    keys: tuple[str, ...], updates: int, samples: int, passes: int | None, tmp_path: Path
) -> None:
    summary = start(tmp_path, *RUN, *keys)
    assert (summary["steps"], summary["samples"]) == (updates, samples)
    assert summary["flops"] == (None if passes is None else samples * passes * SAMPLE)
    assert summary["peak_memory_of"] == "process" and 1e8 < summary["peak_memory"] < 1e11


def test_every_evaluation_of_a_line_search_counts(tmp_path: Path) -> None:
    summary = start(tmp_path, *RUN, "optimizer=lbfgs", "data.batch_size=full")
    evaluations = metrics(tmp_path)[-1]["evaluations"]
    assert evaluations > 3 and (summary["samples"], summary["flops"]) == (300, evaluations * 100 * SAMPLE)


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_resumed_run_has_the_costs_of_the_whole_run(optimizer: str, tmp_path: Path) -> None:
    keys = (*RUN, f"optimizer={optimizer}", "checkpoint.every_steps=1")
    whole = start(tmp_path / "whole", *keys)
    assert execute(tmp_path / "parts", *keys, "max_time=1e-9") == 75
    first = json.loads((tmp_path / "parts/summary.json").read_text())
    assert first["samples"] < whole["samples"] and first["flops"] < whole["flops"]
    assert execute(tmp_path / "parts", *keys, "resume=auto") == 0
    parts = json.loads((tmp_path / "parts/summary.json").read_text())
    for name in ("samples", "flops"):
        assert parts[name] == whole[name]
    assert parts["peak_memory"] >= first["peak_memory"]


def test_processes_share_the_samples(tmp_path: Path) -> None:
    keys = (*RUN, "parallel=ddp", "parallel.processes=2")
    assert execute(tmp_path, *keys) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["samples"], summary["flops"], summary["processes"]) == (300, 300 * SAMPLE, 2)
    assert summary["peak_memory"] > 1e8


class _Called(nn.Module):
    def __init__(self, layer: nn.Module, call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.call(self.layer, inputs)


def test_a_part_that_cannot_be_counted_makes_the_flops_unknown() -> None:
    """Not a lower bound."""
    linear, steps, width, hidden = nn.Linear(16, 4), 8, 16, 32
    counted: list[tuple[nn.Module, tuple[int, ...], float]] = [
        (_Called(nn.LSTM(width, hidden, batch_first=True), lambda m, x: m(x)[0]), (steps, width),
         6 * steps * 4 * hidden * (width + hidden)),
        (_Called(nn.MultiheadAttention(width, 2, batch_first=True), lambda m, x: m(x, x, x)[0]), (steps, width),
         6 * (4 * steps * width**2 + 2 * steps**2 * width)),
        (_Called(linear, lambda m, x: torch.einsum("bi,oi->bo", x, m.weight)), (16,), 6 * 16 * 4),
        (_Called(nn.Conv2d(3, 5, 3), lambda m, x: m(x).relu()), (3, 8, 8), 6 * 36 * 5 * 27),
    ]  # fmt: skip
    for module, shape, flops in counted:
        assert speed.training_flops(module, shape) == flops
    uncounted = [
        lambda m, x: torch.stack([m.weight @ row for row in x]),
        lambda m, x: torch.fft.rfft(m(x)).real,
        lambda m, x: torch.linalg.inv(m.weight[:, :4]) @ m(x).T,
        lambda m, x: torch.cdist(m(x), m(x)),
        lambda m, x: m(x) * x.sum().item(),
    ]
    for call in uncounted:
        assert speed.training_flops(_Called(linear, call), (16,)) is None
    assert speed.training_flops(_Called(nn.Bilinear(16, 16, 4), lambda m, x: m(x, x)), (16,)) is None


def test_counting_changes_nothing() -> None:
    def call(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(3)
        return layer(inputs)

    module = _Called(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)), call)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert speed.training_flops(module, (4,)) == 6 * (4 * 8 + 8 * 2)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
