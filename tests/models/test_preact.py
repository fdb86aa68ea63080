from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.models.preact import PreActBlock, PreActBottleneck, PreActResNet, WideResNet
from tests.support.norm import NORM


def wide(**changes: Any) -> WideResNet:
    keys = {"input_shape": (3, 8, 8), "classes": 10, "depth": 10, "widen": 1, "dropout": 0.0}
    return WideResNet(**{**keys, **NORM, **changes})


def basic(**changes: Any) -> PreActResNet:
    keys = {"input_shape": (3, 8, 8), "classes": 10, "depth": 8, "block": "basic", "dropout": 0.0}
    return PreActResNet(**{**keys, **NORM, **changes})


def bottleneck(**changes: Any) -> PreActResNet:
    return basic(**{"depth": 11, "block": "bottleneck", **changes})


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("choice", "keys", "millions"),
    [
        ("wrn_16_4", [], 2.7),
        ("wrn_28_10", ["depth=22", "widen=8"], 17.2),
        ("wrn_28_10", [], 36.5),
        ("wrn_28_10", ["widen=20"], 145.8),
        ("preact_resnet20", ["depth=56"], 0.85),
        ("preact_resnet20", ["depth=110"], 1.7),
        ("preact_resnet20", ["depth=164", "block=bottleneck"], 1.7),
        ("preact_resnet20", ["depth=1001", "block=bottleneck"], 10.3),
    ],
)
def test_parameter_counts_match_the_papers(
    build: Callable[..., nn.Module], choice: str, keys: list[str], millions: float
) -> None:
    """Tables 3 and 4 of the wide ResNet paper; the identity mappings paper prints 10.2 M for the deepest."""
    with torch.device("meta"):
        model = build(choice, *keys, input_shape=(3, 32, 32), classes=10)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2 if millions < 1 else 1) == millions


def test_depth_of_a_wide_network_counts_its_convolutions() -> None:
    for depth in (10, 16, 22):
        kernels = [module for module in wide(depth=depth).modules() if isinstance(module, nn.Conv2d)]
        assert len(kernels) == depth - 1  # and the classifier; the three projections are counted


def test_wide_block_matches_the_formula() -> None:
    block = wide(widen=2).double().get_submodule("stage1.0")
    maps = images(4, 16, 6, 6, dtype=torch.float64)
    assert isinstance(block, PreActBlock) and isinstance(block.shortcut, nn.Conv2d)

    def active(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, None, None, training=True).relu()

    def convolved(x: torch.Tensor, name: str, padding: int) -> torch.Tensor:
        return nn.functional.conv2d(x, block.get_parameter(name), padding=padding)

    branch = convolved(active(convolved(active(maps), "conv1.weight", 1)), "conv2.weight", 1)
    torch.testing.assert_close(block(maps), branch + convolved(active(maps), "shortcut.weight", 0))


@pytest.mark.parametrize("make", [basic, bottleneck])
def test_skip_path_is_the_identity(make: Callable[..., nn.Module]) -> None:
    model = make(depth=14 if make is basic else 20)
    block = model.get_submodule("stage2.1")
    assert isinstance(block, PreActBlock | PreActBottleneck)
    block.zero_init_last()
    maps = images(4, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(maps), maps)  # negative numbers pass


def test_block_dropout_acts_between_the_convolutions_only_in_training() -> None:
    model = wide(dropout=0.5, widen=4)
    seen = []
    model.get_submodule("stage1.0.conv2").register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = images(8, 3, 8, 8)
    model.eval()(batch)
    zeros_without = (seen[-1] == 0).float().mean()
    model.train()(batch)
    assert (seen[-1] == 0).float().mean() > zeros_without + 0.15


@pytest.mark.parametrize("make", [wide, basic, bottleneck])
@pytest.mark.parametrize("depth", [1, 9, 12, 13])
def test_rejects_invalid_depths(make: Callable[..., nn.Module], depth: int) -> None:
    with pytest.raises(UserError, match=rf"model\.depth={depth}: "):
        make(depth=depth)
