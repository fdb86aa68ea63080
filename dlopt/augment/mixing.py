"""Mixup and CutMix: each sample is mixed with its partner, its neighbour in the shuffled batch.

Samples 2i and 2i + 1 of the global batch are partners, so they are on the same rank if all ranks have even numbers of
samples. A sample whose partner is not in the same shard (the last of an odd batch, or at an odd bound of a shard) is
not mixed; only then does the result depend on the sharding.

Labels become probabilities [b, classes], which cross-entropy accepts; regression targets are mixed as numbers.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dlopt.augment.erasing import centred_interval
from dlopt.augment.operation import DrawnStep, Draws, MixingStep, Operation, Shape
from dlopt.basics.ranges import Positive, Probability


@dataclass
class _Mix(MixingStep):
    weight: Tensor  # [n] of the sample itself; its partner has 1 - weight
    classes: int | None
    start: int = 0  # of the shard, in the global batch

    def shard(self, shard: slice) -> Self:
        start, _, step = shard.indices(len(self.weight))
        if step != 1:
            raise ValueError(f"mixing needs contiguous samples, but {shard} has gaps")
        return replace(super().shard(shard), start=start)

    def masked(self, mask: Tensor) -> Self:
        return replace(self, weight=torch.where(mask, self.weight, 1.0))

    def partners(self) -> Tensor:
        """Returns [b]: position of each sample's partner in the shard; its own position if it has none."""
        positions = torch.arange(len(self.weight), device=self.weight.device)
        partners = ((positions + self.start) ^ 1) - self.start
        return torch.where((partners >= 0) & (partners < len(positions)), partners, positions)

    def mix_targets(self, targets: Tensor, weight: Tensor, partners: Tensor) -> Tensor:
        if not targets.is_floating_point() and self.classes is not None:
            targets = (targets[:, None] == torch.arange(self.classes, device=targets.device)).float()
        weight = weight.to(targets.dtype).view(-1, *(1 for _ in targets.shape[1:]))
        return targets * weight + targets[partners] * (1.0 - weight)


class _MixOperation(Operation):
    def __init__(self, *, alpha: Positive, p: Probability, classes: int | None) -> None:
        self.alpha = alpha
        self.p = p
        self.classes = classes


@dataclass
class _Mixup(_Mix):
    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        partners = self.partners()
        weight = self.weight.view(-1, 1, 1, 1)
        images = images.float()
        mixed = images * weight + images[partners] * (1.0 - weight)
        return mixed, self.mix_targets(targets, self.weight, partners)


class Mixup(_MixOperation):
    """x = w x_i + (1 - w) x_j and the same for the labels, w ~ Beta(alpha, alpha) per sample (Zhang et al. 2018)."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [_Mixup(draws.beta(self.alpha), self.classes).masked(draws.chance(self.p))]


@dataclass(kw_only=True)
class _CutMix(_Mix):
    x: Tensor  # [n] centre, as a fraction of the width
    y: Tensor

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        partners = self.partners()
        side = (1.0 - self.weight).sqrt()
        columns = centred_interval(self.x, (side * width).floor(), width)
        rows = centred_interval(self.y, (side * height).floor(), height)
        box = rows[:, :, None] & columns[:, None, :]
        weight = 1.0 - box.sum((1, 2)) / (height * width)  # after clipping at the edges
        return torch.where(box[:, None], images[partners], images), self.mix_targets(targets, weight, partners)


class CutMix(_MixOperation):
    """Pastes a box of the partner's image; labels are mixed by area (Yun et al. 2019).

    The box has the image's aspect ratio, a uniform centre, and 1 - w of the image's area with w ~ Beta(alpha, alpha)
    per sample. It is clipped at the edges, and labels are weighted by the clipped area.
    """

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        weight = torch.where(draws.chance(self.p), draws.beta(self.alpha), 1.0)
        return [_CutMix(weight, self.classes, x=draws.position(), y=draws.position())]
