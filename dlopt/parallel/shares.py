"""Which samples of a global batch are a rank's: the same samples make a micro-batch whatever the number of ranks."""

from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Portion(NamedTuple):
    """A rank's part of the samples that all ranks put through the model at once."""

    total: int
    own: slice

    @property
    def samples(self) -> int:
        return int(self.own.stop - self.own.start)


def micro_batches(total: int, accumulate: int) -> list[tuple[int, int]]:
    """Bounds of the micro-batches of a batch of `total`, cut as `Tensor.tensor_split` does."""
    number = min(accumulate, total)
    size, longer = divmod(total, number)
    starts = [each * size + min(each, longer) for each in range(number + 1)]
    return list(pairwise(starts))


def cut(start: int, stop: int, rank: int, ranks: int) -> slice:
    """The part of [start, stop) that is the rank's; the parts of all ranks are neighbours and fill it.

    Samples 2i and 2i + 1 of the global batch stay together, since mixing augmentations make them partners, unless there
    is just one sample for each rank. A part may be empty.
    """
    count = stop - start

    def bound(index: int) -> int:
        if index == ranks:
            return stop
        at = start + count * index // ranks
        return at if count == ranks else max(at - at % 2, start)

    return slice(bound(rank), bound(rank + 1))


def pieces(total: int, accumulate: int, rank: int, ranks: int) -> list[slice]:
    """A rank's samples of each micro-batch, as positions in the global batch."""
    return [cut(start, stop, rank, ranks) for start, stop in micro_batches(total, accumulate)]


def positions(total: int, accumulate: int, rank: int, ranks: int) -> slice | Tensor:
    """Returns the same as one index."""
    own = pieces(total, accumulate, rank, ranks)
    return own[0] if len(own) == 1 else torch.cat([torch.arange(piece.start, piece.stop) for piece in own])


def portions(total: int, accumulate: int, rank: int, ranks: int) -> list[Portion]:
    """The same, as positions in the micro-batch."""
    bounds = micro_batches(total, accumulate)
    owns = pieces(total, accumulate, rank, ranks)
    return [
        Portion(stop - start, slice(own.start - start, own.stop - start))
        for (start, stop), own in zip(bounds, owns, strict=True)
    ]


class Augment(Protocol):
    def __call__(self, inputs: Tensor, targets: Tensor, **place: Any) -> tuple[Tensor, Tensor]: ...


class PiecewiseAugment:
    """An augmentation of a rank's samples where these are several pieces of the global batch, or none."""

    def __init__(self, augment: Augment, accumulate: int, rank: int, ranks: int) -> None:
        self.augment = augment
        self.accumulate = accumulate
        self.rank = rank
        self.ranks = ranks

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        generator: torch.Generator,
        total: int,
        part: slice | Tensor,
        indices: Tensor,
        epoch: int,
    ) -> tuple[Tensor, Tensor]:
        def augmented(inputs: Tensor, targets: Tensor, part: slice, indices: Tensor) -> tuple[Tensor, Tensor]:
            draws = generator.manual_seed(seed)
            return self.augment(inputs, targets, generator=draws, total=total, part=part, indices=indices, epoch=epoch)

        seed = generator.initial_seed()
        if len(inputs) == 0:  # shape and type of what the others get
            zeros = inputs.new_zeros(1, *inputs.shape[1:]), targets.new_zeros(1, *targets.shape[1:])
            inputs, targets = augmented(*zeros, slice(0, 1), indices.new_zeros(1))
            return inputs[:0], targets[:0]
        results, start = [], 0
        for own in pieces(total, self.accumulate, self.rank, self.ranks):
            stop = start + own.stop - own.start
            if stop > start:
                results.append(augmented(inputs[start:stop], targets[start:stop], own, indices[start:stop]))
            start = stop
        if len(results) == 1:
            return results[0]
        return torch.cat([each for each, _ in results]), torch.cat([each for _, each in results])
