"""Figures that a run does not log, computed from the checkpoints that it kept: (progress, figure) of each, in order."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.config.compose import resolve_saved
from dlopt.config.parsing import parse
from dlopt.data.batches import Batches
from dlopt.training.build import Workload, build_workload, evaluation_batches, training_batches
from dlopt.training.checkpoint import load
from dlopt.training.step import frozen_statistics

Probe = Callable[[Path], list[tuple[Mapping[str, Any], float]]]


def checkpoints(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The states of a run in the order of their updates."""
    kept = sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))
    seen = set()
    for path in [*kept, folder / "checkpoints" / "last.pt"]:
        if path.is_file() and (state := load(path))["progress"]["step"] not in seen:
            seen.add(state["progress"]["step"])
            yield state


def effective_rate(folder: Path) -> list[tuple[Mapping[str, Any], float]]:
    """The median over all weights of what an adaptive method multiplies the gradient with.

    Adagrad: lr / (sqrt(sum g^2) + eps); RMSprop: lr / (sqrt(E g^2) + eps); Adam: the same without the bias of E g^2;
    Adadelta: lr sqrt(E delta^2 + eps) / sqrt(E g^2 + eps); others: lr.
    """
    found = []
    for saved in checkpoints(folder):
        groups, states = saved["optimizer"]["param_groups"], saved["optimizer"]["state"]
        rates = [_rates(states.get(index, {}), group).flatten() for group in groups for index in group["params"]]
        found.append((saved["progress"], float(torch.cat(rates).median())))
    return found


def _rates(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    lr, eps = float(group["lr"]), group.get("eps", 0.0)
    if "sum" in state:
        return lr / (state["sum"].sqrt() + eps)
    if "acc_delta" in state:
        return lr * (state["acc_delta"] + eps).sqrt() / (state["square_avg"] + eps).sqrt()
    if "square_avg" in state:
        return lr / (state["square_avg"].sqrt() + eps)
    if "exp_avg_sq" in state:
        correction = 1 - group["betas"][1] ** float(state["step"])
        return lr / ((state["exp_avg_sq"] / correction).sqrt() + eps)
    return torch.tensor([lr])


def _set_up(state: Mapping[str, Any]) -> Workload:
    """The run's data and its model at the initial weights."""
    return build_workload(parse(resolve_saved(state["config"])), state["normalize"])


def input_drift(folder: Path) -> list[tuple[Mapping[str, Any], float]]:
    """How far the distribution of the hidden layers' inputs has moved since the checkpoint before.

    For each input of a linear layer but the first: the Wasserstein distance between the normal distributions with its
    mean and standard deviation over 500 training samples then and now, sqrt((m - m')^2 + (s - s')^2), in units of the
    layer's mean standard deviation then; the mean over inputs and layers. Batch norm takes the batch's statistics.
    """
    workload: Workload | None = None
    found: list[tuple[Mapping[str, Any], float]] = []
    before: list[tuple[Tensor, Tensor]] = []
    for state in checkpoints(folder):
        if workload is None:
            workload = _set_up(state)
            few = workload.dataset.train.select(torch.arange(min(500, len(workload.dataset.train))))
            inputs = torch.cat([batch for batch, _ in evaluation_batches(workload, few).epoch(0)])
        workload.module.load_state_dict(state["model"])
        now = _moments(workload.module.train(), inputs)
        if before:
            distances = [
                ((mean - old).square() + (spread - old_spread).square()).sqrt().mean() / old_spread.mean()
                for (mean, spread), (old, old_spread) in zip(now, before, strict=True)
            ]
            found.append((state["progress"], float(torch.stack(distances).mean())))
        before = now
    return found


def gradient_variance(folder: Path) -> list[tuple[Mapping[str, Any], float]]:
    """How much the gradient varies from batch to batch, in units of what a random order would make it vary.

    E ||g_b - g||^2 over the batches of ten epochs in the order of the run's sampler, by its expectation over all orders
    of the N samples, s^2 / B (N - B) / (N - 1) with s^2 = E ||g_i - g||^2 (Cochran 1977, theorem 2.2): 1 for a random
    order. Each sample's gradient is computed once, alone, without augmentation: for nets without batch norm. The first
    figure is that of the initial weights.
    """
    workload: Workload | None = None
    found: list[tuple[Mapping[str, Any], float]] = []
    for state in checkpoints(folder):
        if workload is None:
            workload = _set_up(state)
            batches = training_batches(workload)
            found.append(({"epoch": 0, "step": 0, "seconds": 0.0}, _variance(workload, batches, 0)))
        workload.module.load_state_dict(state["model"])
        found.append((state["progress"], _variance(workload, batches, state["progress"]["epoch"])))
    return found


def _variance(workload: Workload, batches: Batches, epoch: int) -> float:
    workload.module.train()
    parameters = [p for p in workload.module.parameters() if p.requires_grad]
    rows = []
    for inputs, targets in evaluation_batches(workload, workload.dataset.train).epoch(0):
        for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
            gradients = torch.autograd.grad(workload.loss(workload.module(sample), target), parameters)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    deviations = torch.stack(rows)
    deviations = deviations - deviations.mean(0)
    size, count = batches.batch_size, len(rows)
    expected = deviations.square().sum(1).mean() / size * (count - size) / (count - 1)
    whole = count // size * size  # the last batch may be smaller
    orders = [batches.sampler.order(number)[:whole] for number in range(epoch, epoch + 10)]
    means = torch.cat([deviations[order].view(-1, size, deviations.shape[1]).mean(1) for order in orders])
    return float(means.square().sum(1).mean() / expected)


@torch.no_grad()
def _moments(module: nn.Module, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation over the samples of each input of the linear layers but the first."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append((arguments[0].mean(0), arguments[0].std(0)))

    with ExitStack() as hooks, frozen_statistics(module):
        for each in module.modules():
            if isinstance(each, nn.Linear):
                hooks.enter_context(each.register_forward_pre_hook(look))
        module(inputs)
    return found[1:]


PROBES: Mapping[str, Probe] = {
    "effective_rate": effective_rate,
    "gradient_variance": gradient_variance,
    "input_drift": input_drift,
}
