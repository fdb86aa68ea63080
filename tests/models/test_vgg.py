from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from dlopt.basics.errors import UserError

Build = Callable[..., nn.Module]


def test_imagenet_network_matches_torchvision(build: Build) -> None:
    """Compares shapes on the meta device, and the values of the convolutional part."""
    with torch.device("meta"):
        ours = build("vgg11", "classifier=imagenet", input_shape=(3, 224, 224), classes=1000)
        theirs = torchvision.models.vgg11()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    small = build("vgg11", "classifier=small", input_shape=(3, 64, 64), classes=10).double().eval()
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"]).double()
    state = dict(zip(features.state_dict(), list(small.state_dict().values())[:-2], strict=True))
    features.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = small.get_submodule("head")(features(images).mean((2, 3)))
    torch.testing.assert_close(small(images), expected)


def test_with_batch_norm(build: Build) -> None:
    model = build("vgg11_bn", input_shape=(3, 32, 32), classes=10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 8


def test_instance_norm_needs_images_of_32_pixels(build: Build) -> None:
    build("vgg11", "norm=instance", input_shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match=r"model\.norm=instance: images of 16x16"):
        build("vgg11", "norm=instance", input_shape=(3, 16, 16), classes=10)
