"""Weights of the samples in the loss, beside a plain loop over the samples in float64."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batch
from dlopt.losses import MSE, BinaryCrossEntropy, CrossEntropy, PixelCrossEntropy, Weighted
from dlopt.parallel.batch_shards import BatchSplit
from dlopt.training.batch_growth import joined
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.further import describe_weights
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload
from tests.support.runs import same, small_workload

N, K = 6, 3
DRAWS = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(N, K, generator=DRAWS, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
FRACTIONS = torch.rand(N, K, generator=DRAWS, dtype=torch.float64)
WEIGHTS = torch.tensor([0.0, 1.0, 3.0, 2.0, 1.0, 2.0], dtype=torch.float64)


def weighted_workload(*overrides: str, weights: Tensor | None = None) -> Workload:
    workload = small_workload(*overrides)
    train = copy(workload.dataset.train)
    values = torch.arange(len(train)) % 3 if weights is None else weights
    train.further = {"weight": values}
    return replace(workload, dataset=replace(workload.dataset, train=train))


@pytest.mark.parametrize(
    ("loss", "targets", "of_samples"),
    [
        (
            CrossEntropy(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5), classes=K),
            LABELS,
            F.cross_entropy(
                OUTPUTS,
                LABELS,
                torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
                label_smoothing=0.1,
                reduction="none",
            ),
        ),
        (MSE(classes=K), LABELS, F.mse_loss(OUTPUTS, F.one_hot(LABELS, K).double(), reduction="none").mean(1)),
        (MSE(classes=None), FRACTIONS, F.mse_loss(OUTPUTS, FRACTIONS, reduction="none").mean(1)),
        (
            BinaryCrossEntropy(label_smoothing=0.0, pos_weight=(1.0, 2.0, 3.0), labels=K),
            FRACTIONS,
            F.binary_cross_entropy_with_logits(
                OUTPUTS, FRACTIONS, pos_weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), reduction="none"
            ).mean(1),
        ),
        (
            PixelCrossEntropy(classes=None),
            FRACTIONS,
            F.binary_cross_entropy_with_logits(OUTPUTS, FRACTIONS, reduction="none").mean(1),
        ),
        (nn.HuberLoss(), FRACTIONS, F.huber_loss(OUTPUTS, FRACTIONS, reduction="none").mean(1)),
    ],
)
def test_is_the_mean_of_weight_times_loss(loss: nn.Module, targets: Tensor, of_samples: Tensor) -> None:
    found = Weighted(loss.double())(OUTPUTS, targets, WEIGHTS)
    torch.testing.assert_close(found, (WEIGHTS * of_samples).mean(), rtol=1e-12, atol=1e-12)


def test_integer_weights_repeat_samples() -> None:
    loss, outputs = CrossEntropy(label_smoothing=0.1, class_weights=None, classes=K), OUTPUTS.clone().requires_grad_()
    times = WEIGHTS.long()
    (of_weights,) = torch.autograd.grad(Weighted(loss)(outputs, LABELS, WEIGHTS / WEIGHTS.mean()), outputs)
    repeated = loss(outputs.repeat_interleave(times, 0), LABELS.repeat_interleave(times))
    torch.testing.assert_close(of_weights, *torch.autograd.grad(repeated, outputs), rtol=1e-12, atol=1e-12)


def _gradients(workload: Workload, **changed: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of the first batch."""
    step = probe_trainer(workload, Path("unused")).step
    step.begin(next(iter(training_batches(workload).epoch(0))), 0, log_norm=False)
    for name, value in changed.items():
        setattr(step, name, value)
    step.loss_and_gradients()
    return tuple(p.grad for p in step.parameters if p.grad is not None)


@pytest.mark.parametrize("memory", ["true", "false"])
def test_an_update_equals_a_plain_loop(memory: str) -> None:
    workload = weighted_workload("precision=fp64", "model.norm=none", f"data.memory={memory}")
    weights = workload.weights
    assert weights is not None and weights.mean() == pytest.approx(1, rel=1e-12)
    batches = training_batches(workload)
    batch, indices = next(iter(batches.epoch(0))), batches.sampler.order(0)[: batches.batch_size]
    workload.close()
    assert torch.equal(batch.further["weight"], weights[indices])
    losses = F.cross_entropy(workload.module.train()(batch.inputs), batch.targets, reduction="none")
    expected = torch.autograd.grad((losses * weights[indices]).mean(), [*workload.module.parameters()])
    for accumulate in (1, 3):
        for found, reference in zip(_gradients(workload, accumulate=accumulate), expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)


def test_equal_weights_change_nothing() -> None:
    count = len(small_workload().dataset.train)
    workload = weighted_workload(weights=torch.full((count,), 2.0))
    assert same(_gradients(workload), _gradients(small_workload()))
    assert describe_weights(workload) == "weights of the training samples: all 2, which changes nothing"


def test_micro_batches_of_ranks_and_joined_batches_keep_them() -> None:
    batch = Batch(OUTPUTS, LABELS, N, further={"weight": WEIGHTS})
    twice = joined([batch, batch])
    assert torch.equal(twice.further["weight"], torch.cat([WEIGHTS, WEIGHTS]))
    of_ranks = [
        BatchSplit(1, rank, 2).micro_batches(
            Batch(OUTPUTS[part], LABELS[part], N, further={"weight": WEIGHTS[part]}), 2
        )
        for rank, part in enumerate((torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])))
    ]
    for part in (each for parts in of_ranks for each in parts):
        slots = [int((row == OUTPUTS).all(1).nonzero()) for row in part.inputs]
        assert torch.equal(part.further["weight"], WEIGHTS[slots])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "data.weight: training sample 4 has the weight -1; must be finite and not negative"),
        (float("nan"), "data.weight: training sample 4 has the weight nan; must be finite and not negative"),
        (None, "data.weight: all training samples have the weight 0; at least one must have more"),
    ],
)
def test_refuses_weights_that_weigh_nothing(value: float | None, message: str) -> None:
    weights = torch.zeros(len(small_workload().dataset.train))
    if value is not None:
        weights[4] = value
    with pytest.raises(UserError) as error:
        training_batches(weighted_workload(weights=weights))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augmentation=mixup", "augmentation: Mixup mixes samples of different weights"),
        ("diagnostics=[gradients] tracking=[tensorboard]", "diagnostics measure the loss without weights"),
    ],
)
def test_refuses_what_has_no_weights(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^data.weight: {message}"):
        training_batches(weighted_workload(*override.split()))
