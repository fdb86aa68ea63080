"""Batches that grow: against an independent loop, against runs of constant batch, interrupted and lengthened."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.length import Length
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.length import length_of_run
from tests.support.runs import (
    assert_same_run,
    at_update,
    metrics,
    result,
    resume,
    run_config,
    same,
    small_workload,
    start,
    terminate,
    timeless,
)
from tests.support.sizes import BASE, RICH, SMALL

# 90 samples in batches of 25, 25, 25, 15: the updates of epoch 2 have 50 and 40 samples, the later ones 75 and 15.
GROWS = "accumulate={micro_batches:[1,2,3],epochs:[1,1.5]}"
LOOP = [*BASE, "data.batch_size=20", "model=mlp", "model.widths=[9]", "epochs=3", "optimizer=sgd"]


def independent_loop(model: torch.nn.Module, batches: list[list[tuple[Tensor, Tensor]]], ratio: str) -> int:
    """Trains with heavy-ball momentum on micro-batches of 10 samples; the batch is 20, from update 7 on 40, from 10 80.

    The rate falls linearly over the samples, and grows with the batch by `ratio`. Returns the number of updates.
    """
    total, per_epoch = sum(map(len, batches)), len(batches[0])
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    updates = 0
    for epoch, of_epoch in enumerate(batches):
        position = 0
        while position < per_epoch:
            count = 1 if updates < 7 else 2 if updates < 10 else 4
            group = of_epoch[position : position + count]
            micro = [part for x, y in group for part in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]
            samples = sum(len(y) for _, y in micro)
            model.zero_grad()
            for x, y in micro:
                (torch.nn.functional.cross_entropy(model(x), y) * (len(y) / samples)).backward()
            rate = 0.05 * (1 - (epoch * per_epoch + position) / total)
            rate *= {"none": 1.0, "linear": float(count), "sqrt": math.sqrt(count)}[ratio]
            with torch.no_grad():
                for name, p in model.named_parameters():
                    velocity[name].mul_(0.9).add_(p.grad)
                    p.sub_(rate * velocity[name])
            updates += 1
            position += count
    return updates


@pytest.mark.parametrize("ratio", ["none", "linear", "sqrt"])
def test_equals_an_independent_loop(tmp_path: Path, ratio: str) -> None:
    """With batch norm over micro-batches, and groups that the end of an epoch cuts short. fp64, to 1e-12."""
    overrides = [*LOOP, "accumulate={micro_batches:[2,4,8],steps:[7,10]}", f"scale_lr={ratio}", "scale_lr_reference=20"]
    overrides = [*overrides, "schedule=linear", "optimizer.momentum=0.9", "optimizer.weight_decay=0", "clip=none"]
    summary = start(tmp_path, *overrides)
    workload = build_workload(run_config(*overrides))
    batches = [[(x, y) for x, y in training_batches(workload).epoch(epoch)] for epoch in range(3)]
    workload.module.train()
    assert summary["steps"] == independent_loop(workload.module, batches, ratio) == 5 + 4 + 2
    trained = load(tmp_path / "checkpoints/last.pt").state["model"]
    for name, value in workload.module.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_batch_that_never_grows_equals_a_constant_one(tmp_path: Path, number: int, optimizer: str) -> None:
    both = [*RICH, f"optimizer={optimizer}", "epochs=2", "scale_lr=linear"]
    start(tmp_path / "grows", *both, f"accumulate={{micro_batches:[{number},{2 * number}],samples:[200]}}")
    start(tmp_path / "constant", *both, f"accumulate={number}")
    assert timeless(tmp_path / "grows") == timeless(tmp_path / "constant")
    grows, constant = result(tmp_path / "grows"), result(tmp_path / "constant")
    del grows["progress"]["length"], constant["progress"]["length"]
    for part in ("model", "optimizer", "ema", "progress"):
        assert same(grows[part], constant[part])


@pytest.mark.parametrize("step", [3, 5, 6, 8])
def test_stopped_by_a_signal_and_resumed(tmp_path: Path, step: int) -> None:
    """Before it grows, within the first larger batches, and at the end of their epoch; with a decay that varies."""
    lines = [*RICH, GROWS, "scale_lr=linear", "optimizer=sgdw", "decay=linear", "optimizer.weight_decay=0.01"]
    start(tmp_path / "whole", *lines)
    with at_update(step, terminate):
        assert start(tmp_path / "run", *lines)["steps"] == step
    assert resume(tmp_path / "run", *lines)["resumed_from"] == [step]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_samples_of_a_run_do_not_change(tmp_path: Path) -> None:
    assert start(tmp_path, *SMALL, GROWS, "epochs=4", "log_every_steps=1")["steps"] == 4 + 2 + 2 + 2
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert [line["step"] for line in metrics(tmp_path)] == [4, 6, 8, 10]
    assert "update 5: the batch grows to 50 samples" in (tmp_path / "train.log").read_text()
    summary = start(tmp_path / "steps", *SMALL, GROWS, "steps=7")
    assert (summary["steps"], summary["epochs"]) == (7, 3)


def test_lengthened_after_an_end_within_an_epoch(tmp_path: Path) -> None:
    """As of any run: the next update is the first of another epoch. Milestones and lengths count on."""
    grows = "accumulate={micro_batches:[1,2],steps:[6]}"
    start(tmp_path, *SMALL, grows, "steps=5", "schedule=constant")
    assert resume(tmp_path, *SMALL, grows, "epochs=4", "schedule=constant")["steps"] == 6 + 2 + 2
    with pytest.raises(UserError, match=r"^epochs=3: this run has already done 4 epochs"):
        resume(tmp_path, *SMALL, grows, "epochs=3", "schedule=constant")


def growing(line: str) -> Length:
    workload = small_workload(f"accumulate={line}")
    return length_of_run(workload.run_config.settings, training_batches(workload), None)


@pytest.mark.parametrize("milestones", ["steps:[4,5]", "epochs:[1,1.5]", "samples:[90,140]"])
def test_milestones_in_every_unit(milestones: str) -> None:
    length = growing(f"{{micro_batches:[2,4,6],{milestones}}}")
    assert (length.starts, length.counts) == ((0, 4, 6), (1, 2, 3))


def test_a_milestone_within_a_batch_takes_effect_with_the_next_one() -> None:
    """Of 90 samples in batches of 25, 100 samples end within batch 5 (from 0: 4), and 140 with batch 6."""
    assert growing("{micro_batches:[1,2,3],samples:[100,140]}").starts == (0, 5, 6)


def test_a_batch_that_is_larger_than_an_epoch() -> None:
    message = r"^accumulate.micro_batches=\[1, 5\]: a batch of 125 samples is larger than an epoch \(90\)"
    with pytest.raises(UserError, match=message):
        growing("{micro_batches:[1,5],steps:[9]}")
