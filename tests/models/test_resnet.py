from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.models.resnet import BasicBlock, CifarResNet, ResNet, ZeroPadShortcut
from tests.support.norm import NORM


def cifar(**changes: Any) -> CifarResNet:
    keys = {"input_shape": (3, 16, 16), "classes": 10, "depth": 8, "width": 16, "residual": True, "dropout": 0.0}
    keys["shortcut_padding"] = "end"
    return CifarResNet(**{**keys, **NORM, **changes})


def imagenet(**changes: Any) -> ResNet:
    keys = {"input_shape": (3, 32, 32), "classes": 10, "depth": 18, "stem": "small", "dropout": 0.0}
    return ResNet(**{**keys, **NORM, **changes})


def first_block(model: nn.Module) -> BasicBlock:
    block = model.get_submodule("stage1.0")
    assert isinstance(block, BasicBlock)
    return block


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(shape: tuple[int, ...], batch: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("choice", "depth", "millions"),
    [
        ("resnet20", 20, 0.27),
        ("resnet32", 32, 0.46),
        ("resnet44", 44, 0.66),
        ("resnet56", 56, 0.85),
        ("resnet110", 110, 1.7),
        ("resnet110", 1202, 19.4),
        ("plain20", 20, 0.27),
        ("plain56", 56, 0.85),
    ],
)
def test_cifar_parameter_counts_match_the_paper(
    build: Callable[..., nn.Module], choice: str, depth: int, millions: float
) -> None:
    """Table 6 of the paper; exactly: convolutions of 16, 32, 64 channels, two norms' numbers each, one classifier."""
    n = (depth - 2) // 6
    expected = 27 * 16 + 2 * 16 + 64 * 10 + 10
    for inputs, width in ((16, 16), (16, 32), (32, 64)):
        expected += 9 * inputs * width + (2 * n - 1) * 9 * width**2 + 2 * n * 2 * width
    with torch.device("meta"):
        keys = () if depth < 1000 else (f"depth={depth}",)
        model = build(choice, *keys, input_shape=(3, 32, 32), classes=10)
    assert count(model) == expected
    assert expected / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.006)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_imagenet_parameter_counts_match_torchvision(build: Callable[..., nn.Module], depth: int) -> None:
    with torch.device("meta"):
        ours = build(f"resnet{depth}", "stem=imagenet", input_shape=(3, 224, 224), classes=1000)
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert count(ours) == count(theirs)


def test_imagenet_network_matches_torchvision() -> None:
    ours = imagenet(stem="imagenet", classes=7, depth=50).double().eval()
    theirs = torchvision.models.resnet50(num_classes=7).double().eval()
    state = ours.state_dict()
    theirs_by_shape = theirs.state_dict()
    # Both list stem, blocks, head; within a block torchvision's names differ, and its activations have no entries.
    assert [value.shape for value in state.values()] == [value.shape for value in theirs_by_shape.values()]
    for value in theirs_by_shape.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.02 + 0.005)
    ours.load_state_dict(dict(zip(state, theirs_by_shape.values(), strict=True)))
    torch.testing.assert_close(
        ours(images((3, 64, 64), 2, torch.float64)), theirs(images((3, 64, 64), 2, torch.float64))
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 9), (2, 1, 1)])
def test_any_image_size_and_number_of_channels(shape: tuple[int, ...]) -> None:
    assert cifar(input_shape=shape, classes=3)(images(shape)).shape == (4, 3)


def test_the_stages_halve_the_maps_and_double_the_channels() -> None:
    shapes = []
    model = cifar(depth=14)
    for stage in (1, 2, 3):
        model.get_submodule(f"stage{stage}").register_forward_hook(
            lambda module, arguments, output: shapes.append(tuple(output.shape))
        )
    model(images((3, 16, 16)))
    assert shapes == [(4, 16, 16, 16), (4, 32, 8, 8), (4, 64, 4, 4)]


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_the_stems(stem: str) -> None:
    model = imagenet(stem=stem)
    expected = (2, 64, 32, 32) if stem == "small" else (2, 64, 8, 8)
    assert model.get_submodule("stem")(images((3, 32, 32), 2)).shape == expected
    assert model(images((3, 32, 32), 2)).shape == (2, 10)


def test_option_a_takes_every_second_pixel_and_appends_zero_channels() -> None:
    maps = images((3, 5, 4))
    output = ZeroPadShortcut(3, 5, 2)(maps)
    assert torch.equal(output[:, :3], maps[:, :, ::2, ::2])
    assert output.shape == (4, 5, 3, 2) and not output[:, 3:].any()


def test_shortcut_padding_on_both_sides() -> None:
    maps = images((4, 5, 4))
    planes = 8  # the usual lambda layer: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes//4, planes//4))
    expected = F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4))
    assert torch.equal(ZeroPadShortcut(4, planes, 2, "both")(maps), expected)
    assert ZeroPadShortcut(3, 6, 2, "both")(images((3, 4, 4))).shape[1] == 6, "odd numbers of channels"
    with pytest.raises(UserError, match=r"model\.shortcut_padding=both: a plain network has no shortcuts"):
        cifar(residual=False, shortcut_padding="both")


def test_residual_and_plain_block_match_the_formula() -> None:
    maps = images((16, 6, 6), dtype=torch.float64)
    for residual in (True, False):
        block = first_block(cifar(residual=residual).double())
        w1, w2 = (block.get_parameter(name) for name in ("conv1.weight", "conv2.weight"))

        def normalized(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(x, None, None, training=True)

        hidden = normalized(nn.functional.conv2d(maps, w1, padding=1)).relu()
        expected = normalized(nn.functional.conv2d(hidden, w2, padding=1))
        torch.testing.assert_close(block(maps), (expected + maps if residual else expected).relu())


def test_rejects_instance_norm_over_one_pixel() -> None:
    assert cifar(norm="instance", input_shape=(1, 8, 8))(images((1, 8, 8))).shape == (4, 10)
    with pytest.raises(UserError, match=r"model\.norm=instance: images of 4x4"):
        cifar(norm="instance", input_shape=(1, 4, 4))


def test_channels_last_gives_the_same_and_stays_channels_last() -> None:
    model = cifar(dropout=0.0).double()
    batch = images((3, 16, 16), dtype=torch.float64)
    expected = model(batch)
    seen = []
    model.get_submodule("stage3").register_forward_hook(lambda module, arguments, output: seen.append(output))
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(batch.to(memory_format=torch.channels_last)), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_dropout_is_before_the_classifier() -> None:
    model = cifar(dropout=0.5)
    features = []
    model.get_submodule("head").register_forward_hook(lambda module, arguments, output: features.append(arguments[0]))
    model(images((3, 16, 16), 16))
    assert 0.3 < (features[0] == 0).float().mean() < 0.7


def test_zero_init_last_makes_blocks_equal_their_shortcut() -> None:
    maps = images((16, 6, 6)).relu()
    for kind in ("batch", "none"):
        block = first_block(cifar(norm=kind))
        assert not torch.equal(block(maps), maps)
        block.zero_init_last()
        assert torch.equal(block(maps), maps)
    for refused in (cifar(norm_affine=False), cifar(residual=False)):
        with pytest.raises(UserError, match="zero_last_gamma"):
            first_block(refused).zero_init_last()


@pytest.mark.parametrize("depth", [2, 7, 21, 100])
def test_rejects_invalid_depths(depth: int) -> None:
    with pytest.raises(UserError, match=rf"model\.depth={depth}: "):
        cifar(depth=depth)


def test_rejects_vectors() -> None:
    with pytest.raises(UserError, match=r"\[channels, height, width\]"):
        cifar(input_shape=(64,))
