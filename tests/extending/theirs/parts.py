"""What the YAML files beside this name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.extend import NonNegative, OptimizerTraits, Positive


class SignDescent(torch.optim.Optimizer):
    """A step of one length for every weight, against the sign of its gradient."""

    traits = OptimizerTraits(scope="element")

    def __init__(self, params: Any, *, lr: Positive) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


class Linear(nn.Sequential):
    """One linear layer."""

    def __init__(self, *, bias: bool, input_shape: tuple[int, ...], classes: int) -> None:
        inputs = int(torch.Size(input_shape).numel())
        super().__init__(nn.Flatten(), nn.Linear(inputs, classes, bias=bias))


class Stripes(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images with a bright column; its place is the class."""

    def __init__(self, count: int, noise: NonNegative, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 4
        images = noise * torch.rand(count, 1, 4, 4, generator=draws)
        images[torch.arange(count), 0, :, self.labels] += 1
        self.images = (100 * images).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])
