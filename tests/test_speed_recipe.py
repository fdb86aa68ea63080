"""Tests of a small `experiment=cifar10_speed`: settings of every parameter, and training."""

import json
from pathlib import Path

import pytest
import torch

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload
from tests.support.line import dlopt

SMALL = ("experiment=cifar10_speed", "data=digits", "device=cpu", "threads=1", "precision=fp32", "compile=false")


def build(*overrides: str) -> Workload:
    return build_workload(parse(to_plain(Composer().compose([*SMALL, *overrides]))[0]))


def test_published_learning_rates_and_weight_decay(tmp_path: Path) -> None:
    """For sums over 2000 samples: lr 0.24 (filters), 0.053 (biases), 0.67 (head); lr times weight decay 0.004."""
    workload = build("model.widths=[4,4,8]", "data.batch_size=100")
    optimizer = probe_trainer(workload, tmp_path).step.optimizer
    names = {p: name for name, p in workload.module.named_parameters()}
    found = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    filters = {f"stage{i}.conv{j}.weight" for i in (1, 2, 3) for j in (1, 2)}
    biases = {f"stage{i}.norm{j}.bias" for i in (1, 2, 3) for j in (1, 2)} | {"whiten.bias"}
    assert set(found) == filters | biases | {"head.weight"}  # whitening filters and gammas are frozen
    for name, group in found.items():
        rate, decay = group["initial_lr"], group["weight_decay"]
        if name in filters:
            assert (rate, decay, group["momentum"], group["ns_steps"]) == (0.24, 0.0, 0.6, 3)
            continue
        published = 0.67 if name == "head.weight" else 0.053
        assert rate / 2000 == pytest.approx(published, rel=1e-4)
        assert rate * decay == pytest.approx(0.004, rel=1e-4) and group["momentum"] == 0.85 and group["nesterov"]
        assert group.get("horizon") == (0.375 if name == "whiten.bias" else None)


def test_one_update_changes_trainable_parameters(tmp_path: Path) -> None:
    workload = build("model.widths=[4,4,8]", "data.batch_size=100")
    trainer = probe_trainer(workload, tmp_path)
    before = {name: p.detach().clone() for name, p in workload.module.named_parameters()}
    batch = next(iter(trainer.batches.epoch(0)))
    trainer.run_update(batch, 0)
    moved = {name for name, p in workload.module.named_parameters() if not torch.equal(p, before[name])}
    still = {"whiten.weight"} | {f"stage{i}.norm{j}.weight" for i in (1, 2, 3) for j in (1, 2)}
    assert moved == set(before) - still
    for i in (1, 2, 3):  # normalized to sqrt(rows), then moved by a rate of 0.24 times about sqrt(rows)
        weight = workload.module.get_parameter(f"stage{i}.conv2.weight")
        assert 0.6 < weight.norm().item() / len(weight) ** 0.5 < 1.4


@pytest.mark.slow
def test_trains(tmp_path: Path) -> None:
    typed = ("data.batch_size=200", "model.widths=[8,16,256]", "tracking=[]", "hydra.run.dir=run")
    result = dlopt(tmp_path, "train", *SMALL, *typed)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 56 and summary["test_accuracy"] > 0.8
