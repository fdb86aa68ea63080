"""The order of the windows of a text, which move in every epoch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlopt.data.windows import Windows
from dlopt.errors import UserError
from dlopt.random import generator

if TYPE_CHECKING:
    from dlopt.data.samplers import Sampler


class ShiftedWindows:
    """Orders the windows of a text by a sampler, and shifts all of them by a random number of tokens in each epoch.

    An epoch covers every token about once, each time in other windows. The order consists of the windows' first tokens,
    for `Windows.at_every_token`. A subset of the windows is not shifted.
    """

    def __init__(self, sampler: "Sampler", windows: Windows, seed: int) -> None:
        self._sampler = sampler
        self._windows = windows
        self._seed = seed

    def __len__(self) -> int:
        return len(self._sampler)

    def order(self, epoch: int) -> Tensor:
        starts = self._windows.starts(self._sampler.order(epoch))
        if self._windows.is_subset:
            return starts
        length = self._windows.length
        shift = int(torch.randint(length, (), generator=generator("cpu", self._seed, epoch, length)))
        return (starts + shift).clamp(max=len(self._windows.tokens) - length - 1)


def shifted(sampler: "Sampler", windows: Windows, seed: int) -> tuple["Sampler", Windows]:
    """Returns the order and the samples of training on a text. Raises `UserError` for samplers that need labels."""
    if type(sampler).__module__.startswith("dlopt.data.samplers."):
        name = type(sampler).__name__
        raise UserError(f"sampler={name}: the windows of a text have no labels and change in every epoch; use random")
    return ShiftedWindows(sampler, windows, seed), windows.at_every_token()
