import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt import init
from dlopt.errors import UserError

Build = Callable[..., nn.Module]


def test_missing_timm_suggests_the_install_command(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'dlopt\[timm\]'"):
        build("timm", input_shape=(3, 32, 32), classes=10)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_channels_classes_and_image_size_come_from_the_data(build: Build, name: str) -> None:
    pytest.importorskip("timm")
    model = build("timm", f"name={name}", input_shape=(1, 32, 32), classes=7)
    assert model.training
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_rejects_unknown_names_and_wrong_sizes(build: Build) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"model\.name=resnet19: timm has no such model; did you mean resnet"):
        build("timm", "name=resnet19", input_shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match=r"model\.name=vit_tiny_patch16_224: timm cannot build it"):
        build("timm", "name=vit_tiny_patch16_224", input_shape=(3, 9, 9), classes=10)


def test_timm_blocks_support_zero_last_gamma(build: Build) -> None:
    pytest.importorskip("timm")
    model = build("timm", "name=resnet10t", input_shape=(3, 32, 32), classes=10)
    nn.init.ones_(model.get_parameter("layer1.0.bn2.weight"))
    init.default(model, torch.Generator(), zero_last_gamma=True)
    assert not model.get_parameter("layer1.0.bn2.weight").any()
