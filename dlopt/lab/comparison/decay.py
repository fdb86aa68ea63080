"""How fast weight decay shrinks each weight, measured by updates with and without it."""

import copy
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from dlopt.extend import Checkpoint, UserError, Workload, training_batches
from dlopt.lab.comparison.measures import gradient
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders.optimizer import build_optimizer

_UPDATES = 20


class Decays(NamedTuple):
    """Of each weight [n]: the weight, by how much the decay moved it, and the root mean square of its gradients.

    `moved` is in units of lr * weight_decay * updates, so decoupled decay moves a weight w by w.
    """

    weights: Tensor
    moved: Tensor
    gradients: Tensor


def decays(workload: Workload, checkpoint: Checkpoint) -> Decays:
    """Makes 20 updates with the optimizer of a checkpoint, with its weight decay and without, from the same gradients.

    The gradients are of training batches at the weights of the checkpoint. Raises `UserError` without decay, and
    for optimizers that evaluate the loss themselves.
    """
    workload.module.train()
    batches = islice(iter(training_batches(workload).epoch(checkpoint.epoch)), _UPDATES)
    rows = [gradient(workload, workload.loss(workload.module(inputs), targets)) for inputs, targets in batches]
    initial = torch.nn.utils.parameters_to_vector(workload.module.parameters()).detach().clone()
    with_decay, scale = _updated(workload, checkpoint, rows, initial, decays=True)
    without, _ = _updated(workload, checkpoint, rows, initial, decays=False)
    return Decays((initial + without) / 2, (without - with_decay) / scale, torch.stack(rows).square().mean(0).sqrt())


def _updated(
    workload: Workload, checkpoint: Checkpoint, rows: list[Tensor], initial: Tensor, *, decays: bool
) -> tuple[Tensor, float]:
    """Returns the weights after an update per gradient, and lr * weight_decay * updates; restores the weights."""
    parameters = list(workload.module.parameters())
    torch.nn.utils.vector_to_parameters(initial.clone(), parameters)
    optimizer = build_optimizer(workload)
    if optimizer_traits(optimizer).evaluations == "many":
        raise UserError(
            f"comparison.metrics: decay_ratio and decay_correlation need an optimizer of given gradients, and "
            f"{type(optimizer).__name__} evaluates the loss itself"
        )
    optimizer.load_state_dict(copy.deepcopy(checkpoint.optimizer))  # which it would update in place
    [group] = optimizer.param_groups
    scale = float(group["lr"]) * group["weight_decay"] * len(rows)
    if not scale:
        raise UserError("comparison.metrics: decay_ratio and decay_correlation need a weight decay")
    if not decays:
        group["weight_decay"] = 0.0
    for row in rows:
        for parameter, part in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
    updated = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    torch.nn.utils.vector_to_parameters(initial.clone(), parameters)
    return updated, scale


def ratio(of: Decays) -> float:
    """Returns the decay of the quarter of the weights with the smallest gradients, relative to the largest quarter.

    The decay of a set of weights is the slope of `moved` over the weights, by least squares through the origin.
    """
    order = of.gradients.argsort()
    quarter = len(order) // 4
    small, large = (
        float((of.moved[part] * of.weights[part]).sum() / of.weights[part].square().sum())
        for part in (order[:quarter], order[-quarter:])
    )
    return small / large


def correlation(of: Decays) -> float:
    """Returns Spearman's rank correlation of a weight's decay, moved / weight, with the size of its gradients.

    Of the half of the weights that are largest: the others may cross zero in these updates.
    """
    large = of.weights.abs() >= of.weights.abs().median()
    ranks = [
        values.argsort().argsort().double() for values in (of.moved[large] / of.weights[large], of.gradients[large])
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
