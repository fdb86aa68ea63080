"""Tokens as inputs and targets: in batches, losses and metrics."""

import math

import pytest
import torch
from torch.nn import functional as F

from dlopt.data.batches import Batches, Delivery
from dlopt.data.samplers import Random
from dlopt.data.samples import InMemory
from dlopt.losses import MSE, CrossEntropy
from dlopt.metrics.sums import MetricSum
from dlopt.tasks.text import NextToken

NEXT_TOKEN = NextToken(11, predictions=5, unit="byte")


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_split_the_tokens_of_a_text(in_memory: bool) -> None:
    windows = torch.randint(11, (9, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = InMemory(windows, torch.zeros(9))
    delivery = Delivery(torch.device("cpu"), in_memory, 0, task=NEXT_TOKEN)
    batches = Batches(samples, delivery, batch_size=4, sampler=Random(targets=samples.targets, seed=1, epoch_size=None))
    order = batches.sampler.order(0)
    inputs, targets = (torch.cat(column) for column in zip(*batches.epoch(0), strict=True))
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, windows[order, :-1].long()) and torch.equal(targets, windows[order, 1:].long())


def test_loss_and_metrics_of_a_text_are_means_over_tokens() -> None:
    draws = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(size, 5, 11, generator=draws), torch.randint(11, (size, 5), generator=draws)) for size in (3, 1)
    ]
    loss = CrossEntropy(label_smoothing=0.1, class_weights=None, classes=11)
    sums = MetricSum(NEXT_TOKEN)
    for training in (True, False):
        for outputs, targets in batches:
            value = loss.train(training)(outputs, targets)
            flat = outputs.flatten(0, 1), targets.flatten()
            torch.testing.assert_close(value, F.cross_entropy(*flat, label_smoothing=0.1 * training))
    for outputs, targets in batches:
        sums.add(sums.keep(loss(outputs, targets), outputs, targets))
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    nats = F.cross_entropy(outputs.flatten(0, 1).double(), targets.flatten()).item()
    correct = (outputs.argmax(2) == targets).double().mean().item()
    expected = {"val_loss": nats, "val_token_accuracy": correct, "val_bits_per_byte": nats / math.log(2)}
    assert sums.means("val") == pytest.approx(expected, rel=1e-6)
    weighted = CrossEntropy(label_smoothing=0.0, class_weights=(2.0,) * 11, classes=11).train()
    assert weighted(outputs, targets).item() == pytest.approx(2 * nats, rel=1e-6)
    one_hot = F.one_hot(targets, 11).double()
    assert MSE(classes=11)(outputs, targets).item() == pytest.approx((outputs - one_hot).square().mean().item())


def test_tokens_have_a_perplexity() -> None:
    assert NextToken(50257).loss_metrics(2.0) == {"perplexity": pytest.approx(math.exp(2))}
    assert NextToken(50257).loss_metrics(1e9) == {"perplexity": math.inf}
