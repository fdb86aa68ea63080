"""The network of airbench94 against its published description (Jordan 2024, section 3.1) and size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError

Build = Callable[..., nn.Module]


def test_published_size(build: Build) -> None:
    model = build("airbench94", input_shape=(3, 32, 32), classes=10)
    count = sum(p.numel() for p in model.parameters())
    assert count == 1_972_792  # "1.97 M"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    assert shapes == {
        "whiten.weight": (24, 3, 2, 2),
        "stage1.conv1.weight": (64, 24, 3, 3),
        "stage1.conv2.weight": (64, 64, 3, 3),
        "stage2.conv1.weight": (256, 64, 3, 3),
        "stage2.conv2.weight": (256, 256, 3, 3),
        "stage3.conv1.weight": (256, 256, 3, 3),
        "stage3.conv2.weight": (256, 256, 3, 3),
        "head.weight": (10, 256),
    }


def test_shapes_of_the_maps(build: Build) -> None:
    model = build("airbench94", input_shape=(3, 32, 32), classes=10)
    sizes = {}
    maps: Tensor = torch.zeros(2, 3, 32, 32)
    for name, layer in model.named_children():
        maps = layer(maps)
        sizes[name] = tuple(maps.shape[1:])
    assert sizes["whiten"] == (24, 31, 31) and sizes["stage1"] == (64, 15, 15) and sizes["stage2"] == (256, 7, 7)
    assert sizes["stage3"] == (256, 3, 3) and sizes["pool"] == (256, 1, 1) and sizes["head"] == (10,)


def test_the_outputs_are_divided_by_the_number_of_features(build: Build) -> None:
    model = build("airbench94", "widths=[8,8,16]", input_shape=(3, 16, 16), classes=5).eval()
    images = torch.randn(4, 3, 16, 16)
    features = images
    for name, layer in model.named_children():
        if name == "scale":
            break
        features = layer(features)
    head = model.get_parameter("head.weight")
    torch.testing.assert_close(model(images), features @ head.T / 16)


@pytest.mark.parametrize("size", [2, 5, 8, 28, 33])
def test_other_sizes_work(build: Build, size: int) -> None:
    model = build("airbench94", "widths=[4,4,4]", input_shape=(1, size, size), classes=3)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 3)


def test_rejects_images_smaller_than_the_first_filter(build: Build) -> None:
    with pytest.raises(UserError, match=r"model\.whiten_kernel=4: the images have only 3x3 pixels"):
        build("airbench94", "whiten_kernel=4", input_shape=(1, 3, 3), classes=3)
