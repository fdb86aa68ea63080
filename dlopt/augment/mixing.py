"""Mixed samples: each sample and its partner, the neighbour in the shuffled batch.

The samples 2i and 2i + 1 of the global batch are partners, so that they sit on the same rank wherever ranks have
even numbers of samples. A sample whose partner is not in the same part (the last of an odd batch, the outermost ones
of a part with odd bounds) stays unmixed; where that happens, the result depends on the sharding.

Labels become probabilities [b, classes], which cross-entropy takes as they are; numbers to be predicted are mixed
as numbers.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dlopt.augment.erasing import inside
from dlopt.augment.operation import Draws, MixingStep, Operation, Shape, Step
from dlopt.ranges import Positive, Probability


@dataclass
class _Mix(MixingStep):
    share: Tensor  # [n]: of the sample itself; the rest is the partner's
    classes: int | None
    start: int = 0  # of the part

    def take(self, part: slice) -> Self:
        start, _, step = part.indices(len(self.share))
        if step != 1:
            raise ValueError(f"mixing needs neighbours, but {part} leaves gaps")
        taken = super().take(part)
        return replace(taken, start=start)

    def only(self, mask: Tensor) -> Self:
        return replace(self, share=torch.where(mask, self.share, 1.0))

    def partners(self) -> Tensor:
        """[b] position of the partner within the part; the own one where there is none."""
        own = torch.arange(len(self.share), device=self.share.device)
        partner = ((own + self.start) ^ 1) - self.start
        return torch.where((partner >= 0) & (partner < len(own)), partner, own)

    def mix_targets(self, targets: Tensor, share: Tensor, partners: Tensor) -> Tensor:
        if not targets.is_floating_point() and self.classes is not None:
            targets = (targets[:, None] == torch.arange(self.classes, device=targets.device)).float()
        share = share.to(targets.dtype).view(-1, *(1 for _ in targets.shape[1:]))
        return targets * share + targets[partners] * (1.0 - share)


@dataclass
class _Mixup(_Mix):
    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        partners = self.partners()
        share = self.share.view(-1, 1, 1, 1)
        images = images.float()
        mixed = images * share + images[partners] * (1.0 - share)
        return mixed, self.mix_targets(targets, self.share, partners)


class Mixup(Operation):
    """x = s x_i + (1 - s) x_j and the same for the labels, s ~ Beta(alpha, alpha) per sample (Zhang et al. 2018)."""

    def __init__(self, *, alpha: Positive, p: Probability, classes: int | None) -> None:
        self.alpha = alpha
        self.p = p
        self.classes = classes

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Mixup(draws.beta(self.alpha), self.classes).only(draws.chance(self.p))]


@dataclass
class _CutMix(_Mix):
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    y: Tensor = field(default_factory=lambda: torch.zeros(0))

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        partners = self.partners()
        side = (1.0 - self.share).sqrt()
        columns = inside(self.x, (side * width).floor(), width)
        rows = inside(self.y, (side * height).floor(), height)
        box = rows[:, :, None] & columns[:, None, :]
        share = 1.0 - box.sum((1, 2)) / (height * width)
        return torch.where(box[:, None], images[partners], images), self.mix_targets(targets, share, partners)


class CutMix(Operation):
    """Pastes a box of the partner's image; labels are mixed by area (Yun et al. 2019).

    The box has the image's proportions and an area of 1 - s, s ~ Beta(alpha, alpha) per sample, a uniform centre,
    and is cut off at the edges; the labels' weights are those of the area that is left.
    """

    def __init__(self, *, alpha: Positive, p: Probability, classes: int | None) -> None:
        self.alpha = alpha
        self.p = p
        self.classes = classes

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        share = torch.where(draws.chance(self.p), draws.beta(self.alpha), 1.0)
        return [_CutMix(share, self.classes, x=draws.position(), y=draws.position())]
