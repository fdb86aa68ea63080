import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from torch import Tensor, nn

from tests.support.runs import composed


def _build(node: dict[str, Any], params: Any) -> torch.optim.Optimizer:
    keys = {k: _build(v, params) if isinstance(v, dict) else v for k, v in node.items() if k != "_target_"}
    if "base" not in keys:
        keys["params"] = params
    built = get_object(node["_target_"])(**keys)
    assert isinstance(built, torch.optim.Optimizer)
    return built


@pytest.fixture(scope="session")
def keys_of() -> Callable[..., dict[str, Any]]:
    """Returns the keys of a choice, including `_target_`, with overrides applied."""

    def keys(name: str, *typed: str) -> dict[str, Any]:
        plain, _ = composed(f"optimizer={name}", *(f"optimizer.{each}" for each in typed))
        every = ("groups", "layer_decay")  # keys of every choice
        return {key: copy.deepcopy(value) for key, value in plain["optimizer"].items() if key not in every}

    return keys


@pytest.fixture(scope="session")
def choose(keys_of: Callable[..., dict[str, Any]]) -> Callable[..., torch.optim.Optimizer]:
    """`choose(name, params, "lr=0.1", ...)` builds a choice from its YAML."""
    return lambda name, params, *typed: _build(keys_of(name, *typed), params)


class Problem:
    """A small net (kernel, matrix, vectors) on fixed data in float64, with the closure that every optimizer takes."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
        self.inputs = torch.randn(12, 1, 3, 3, generator=draw, dtype=torch.float64)
        self.targets = torch.randint(3, (12,), generator=draw)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params]).clone()


@pytest.fixture
def problem() -> Callable[[], Problem]:
    return Problem
