"""A run as anybody writes it in plain torch, from dlopt's data and initial weights."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import build_workload
from tests.support.crossings.features import KIND, Row
from tests.support.runs import run_config

LR = 0.03
FEATURES = {
    KIND: ("mlp", "resnet", "vit", "folder", "table", "binary", "regression", "recurrent", "gpt"),
    "dropout": ("0",),
    "optimizer": ("sgd", "nesterov", "adamw"),
    "schedule": ("constant", "cosine"),
    "decay": ("constant",),
    "clip": ("none", "norm", "value"),
    "average": ("none", "ema"),
    "accumulate": ("1",),
    "scale": ("none", "linear"),
    "augmentation": ("none", "crop", "noise", "mixup"),
    "sampler": ("random", "balanced", "replaced", "sequential"),
    "loss": ("plain", "smooth"),
    "groups": ("none", "frozen", "slower"),
    "layers": ("equal",),
    "adapt": ("none",),
    "init": ("default", "kaiming", "lsuv"),
    "stopping": ("none",),
}
"""The values that the loop below can express; of other features all."""


def train(row: Row, words: Sequence[str], updates: int, horizon: float, folder: Path) -> None:
    """Trains for `updates` in double precision, and writes the weights, and their average, to folder/plain.pt."""
    config = run_config(*words)
    workload = build_workload(config)
    batches, model = training_batches(workload), workload.module
    average = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    rate = LR * (config.data_settings.batch_size / 256 if row["scale"] == "linear" else 1)  # type: ignore[operator]
    bias = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weight = [p for name, p in model.named_parameters() if name.endswith("weight")]
    other = [p for name, p in model.named_parameters() if not name.endswith(("bias", "weight"))]
    if row["groups"] == "frozen":
        for parameter in bias:
            parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": weight, "lr": rate * (0.1 if row["groups"] == "slower" else 1)},
        {"params": [*other, *bias]},
    ]
    optimizer: torch.optim.Optimizer
    if row["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.1)
    else:
        is_nesterov = row["optimizer"] == "nesterov"
        decay = 0.01 if is_nesterov else 0.0
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=is_nesterov, weight_decay=decay)
    rates = [group["lr"] for group in optimizer.param_groups]

    update = 0
    model.train()
    for epoch in range(updates):
        for batch in batches.epoch(epoch, 0, update):
            if update == updates:
                break
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * (cosine(update, horizon) if row["schedule"] == "cosine" else 1)
            optimizer.zero_grad()
            losses = losses_of(row, model(batch.inputs), batch.targets)
            (losses * batch.further.get("weight", 1)).mean().backward()
            clip(row["clip"], [p for p in model.parameters() if p.grad is not None])
            optimizer.step()
            update += 1
            memory = min(0.9, (1 + update) / (10 + update))
            for mean, tensor in zip(average, (*model.parameters(), *model.buffers()), strict=True):
                if mean.is_floating_point():
                    mean.mul_(memory).add_(tensor.detach(), alpha=1 - memory)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "plain.pt")
    if row["average"] == "ema":
        with torch.no_grad():
            for mean, tensor in zip(average, (*model.parameters(), *model.buffers()), strict=True):
                tensor.copy_(mean)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "evaluated.pt")


def cosine(update: int, horizon: float) -> float:
    """Linear warmup over a tenth of the run, then half a cosine to 0."""
    warmup = int(0.1 * horizon)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / (horizon - warmup))) / 2


def losses_of(row: Row, outputs: Tensor, targets: Tensor) -> Tensor:
    if row[KIND] == "regression":
        return F.mse_loss(outputs, targets.view_as(outputs), reduction="none").squeeze(1)
    smoothing = 0.1 if row["loss"] == "smooth" else 0.0
    # Mixed targets are probabilities; those of a text have a class per position.
    targets = targets if targets.is_floating_point() else targets.flatten()
    return F.cross_entropy(outputs.flatten(0, -2), targets, label_smoothing=smoothing, reduction="none")


def clip(choice: str, parameters: Iterable[nn.Parameter]) -> None:
    if choice == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
    if choice == "value":
        torch.nn.utils.clip_grad_value_(parameters, 0.001)
