from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt import init
from dlopt.basics.errors import UserError

Build = Callable[..., nn.Module]
CHOICES = ["alexnet", "two_column_alexnet"]


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_parameter_counts_of_one_and_two_columns(build: Build) -> None:
    """60 million in the paper's abstract; counted: kernels of section 3.5 with their biases."""
    two = 96 * (11 * 11 * 3) + 256 * (5 * 5 * 48) + 384 * (3 * 3 * 256) + 384 * (3 * 3 * 192) + 256 * (3 * 3 * 192)
    one = 96 * (11 * 11 * 3) + 256 * (5 * 5 * 96) + 384 * (3 * 3 * 256) + 384 * (3 * 3 * 384) + 256 * (3 * 3 * 384)
    both = 96 + 256 + 384 + 384 + 256 + 6 * 6 * 256 * 4096 + 4096 + 4096**2 + 4096 + 4096 * 1000 + 1000
    large = ("stem=imagenet", "hidden=4096")
    for choice, keys, kernels in (("two_column_alexnet_224", (), two), ("alexnet", large, one)):
        with torch.device("meta"):
            model = build(choice, *keys, input_shape=(3, 224, 224), classes=1000)
        assert sum(parameter.numel() for parameter in model.parameters()) == kernels + both


def test_shapes_of_the_papers_maps(build: Build) -> None:
    shapes = []
    with torch.device("meta"):
        model = build("two_column_alexnet_224", input_shape=(3, 224, 224), classes=1000)
        for module in model.get_submodule("columns.0").modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:])))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    maps = [(48, 55, 55), (128, 27, 27), (192, 13, 13), (192, 13, 13), (128, 13, 13)]
    assert shapes == [*maps, (2048,), (2048,)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
def test_small_images(build: Build, choice: str, shape: tuple[int, ...]) -> None:
    assert build(choice, input_shape=shape, classes=3)(images(2, *shape)).shape == (2, 3)


def test_two_columns_equal_one_column_without_cross_connections(build: Build) -> None:
    """Without cross connections, the kernel of the one-column network is block-diagonal."""
    shape = (3, 16, 16)
    keys = ["norm=none", "local_response=false", "hidden=8", "dropout=0.0"]
    two = build("two_column_alexnet", *keys, input_shape=shape, classes=5).double()
    one = build("alexnet", *keys, input_shape=shape, classes=5).double()
    for name, parameter in one.named_parameters():
        if name.startswith("head"):
            parameter.data = two.get_parameter(name).data
            continue
        first, second = (two.get_parameter(f"columns.{column}.{name}").data for column in (0, 1))
        if parameter.dim() > 1 and first.shape[1] < parameter.shape[1]:
            parameter.data.zero_()
            parameter.data[: len(first), : first.shape[1]] = first
            parameter.data[len(first) :, first.shape[1] :] = second
        else:
            parameter.data = torch.cat([first, second])
    block_diagonal = [name for name, p in one.named_parameters() if p.dim() == 4 and not p[: len(p) // 2, -1].any()]
    assert block_diagonal == ["front.4.weight", "back.3.weight", "back.6.weight"]
    batch = images(4, *shape).double()
    torch.testing.assert_close(two(batch), one(batch))


def test_local_response_normalization_matches_the_paper(build: Build) -> None:
    model = build("alexnet", input_shape=(1, 16, 16), classes=3)
    (first, _) = (module for module in model.modules() if isinstance(module, nn.LocalResponseNorm))
    maps = images(2, 9, 3, 3).double() * 30
    sums = torch.stack([maps[:, max(0, i - 2) : i + 3].square().sum(1) for i in range(9)], 1)
    torch.testing.assert_close(first(maps), maps / (2 + 1e-4 * sums) ** 0.75)


def test_rejects_invalid_settings(build: Build) -> None:
    with pytest.raises(UserError, match=r"model\.hidden=33"):
        build("two_column_alexnet", "hidden=33", input_shape=(1, 16, 16), classes=3)
    build("alexnet", "stem=imagenet", "hidden=4", input_shape=(3, 63, 63), classes=3)(images(2, 3, 63, 63))
    with pytest.raises(UserError, match=r"model\.stem=imagenet: images of 62x80 are too small"):
        build("alexnet", "stem=imagenet", input_shape=(3, 62, 80), classes=3)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_papers_initial_weights(build: Build, choice: str) -> None:
    """Section 5: N(0, 0.01); biases of 1 in convolutions 2, 4, 5 and the hidden fully connected layers, 0 elsewhere."""
    model = build(choice, "hidden=64", input_shape=(3, 32, 32), classes=10)
    init.alexnet(model, torch.Generator().manual_seed(0), std=0.01, zero_last_gamma=False)
    for column in getattr(model, "columns", [model]):
        layers = [layer for layer in column.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][:7]
        assert [layer.bias.detach().unique().item() for layer in layers] == [0, 1, 0, 1, 1, 1, 1]
    assert isinstance(model.head, nn.Linear) and not model.head.bias.any()
    matrices = [parameter.flatten() for parameter in model.parameters() if parameter.dim() > 1]
    assert torch.cat(matrices).std().item() == pytest.approx(0.01, rel=0.01)
    with pytest.raises(UserError, match=r"init=alexnet: .* use model=alexnet, or init=normal"):
        init.alexnet(nn.Linear(2, 2), torch.Generator(), std=0.01, zero_last_gamma=False)
