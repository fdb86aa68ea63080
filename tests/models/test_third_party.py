from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from dlopt import init
from dlopt.basics.errors import UserError
from dlopt.models.third_party import pretrained_inputs

Build = Callable[..., nn.Module]


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_channels_classes_and_image_size_come_from_the_data(build: Build, name: str) -> None:
    pytest.importorskip("timm")
    model = build("timm", f"name={name}", input_shape=(1, 32, 32), classes=7)
    assert model.training
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_rejects_unknown_names_and_wrong_sizes(build: Build) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"resnet19: unknown model of timm; did you mean model\.name=resnet"):
        build("timm", "name=resnet19", input_shape=(3, 32, 32), classes=10)
    with pytest.raises(UserError, match=r"model\.name=vit_tiny_patch16_224: timm cannot build it"):
        build("timm", "name=vit_tiny_patch16_224", input_shape=(3, 9, 9), classes=10)


def test_timm_blocks_support_zero_last_gamma(build: Build) -> None:
    pytest.importorskip("timm")
    model = build("timm", "name=resnet10t", input_shape=(3, 32, 32), classes=10)
    nn.init.ones_(model.get_parameter("layer1.0.bn2.weight"))
    init.default(model, torch.Generator(), zero_last_gamma=True)
    assert not model.get_parameter("layer1.0.bn2.weight").any()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, torch.Tensor]]:
    """Torchvision's cache of downloads, with random weights of ResNet-18."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    yield state


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_b_32", marks=pytest.mark.slow), "squeezenet1_1"])
def test_torchvision_models_take_channels_classes_and_size_of_the_data(build: Build, name: str) -> None:
    model = build("torchvision", f"name={name}", input_shape=(1, 32, 32), classes=7)
    assert model.training and model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_torchvision_models_without_auxiliary_heads_return_tensors(build: Build) -> None:
    with torch.device("meta"):
        model = build("torchvision", "name=inception_v3", input_shape=(3, 96, 96), classes=7)
        assert model(torch.empty(2, 3, 96, 96)).shape == (2, 7)


def test_pretrained_torchvision_weights(build: Build, hub: dict[str, torch.Tensor]) -> None:
    reference = torchvision.models.resnet18()
    reference.load_state_dict(hub)
    images = torch.randn(2, 1, 40, 40)
    same = build("torchvision", "pretrained=true", input_shape=(3, 40, 40), classes=1000).eval()
    expected = reference.eval()(images.expand(-1, 3, -1, -1))
    assert torch.equal(same(images.expand(-1, 3, -1, -1)), expected)
    grey = build("torchvision", "pretrained=IMAGENET1K_V1", input_shape=(1, 40, 40), classes=7).eval()
    assert grey(images).shape == (2, 7)
    grey.set_submodule("fc", reference.fc)
    torch.testing.assert_close(grey(images), expected)


def test_errors_of_torchvision_models(build: Build) -> None:
    keys = {"input_shape": (3, 32, 32), "classes": 10}
    for overrides, error in (
        (["name=resnet19"], r"resnet19: unknown classifier of torchvision; did you mean model\.name=r"),
        (["name=resnet18", "pretrained=V3"], r"model\.pretrained=V3: .* of resnet18 .*IMAGENET1K_V1, DEFAULT"),
        (["name=vgg11", "pretrained=V3"], r"model\.pretrained=V3"),
    ):
        with pytest.raises(UserError, match=error):
            build("torchvision", *overrides, **keys)
    with pytest.raises(UserError, match=r"requires square images, not 32x64"):
        build("torchvision", "name=vit_b_32", input_shape=(3, 32, 64), classes=10)


def test_pretrained_inputs() -> None:
    ours = "dlopt.models.third_party"
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name, size in (("resnet18", 224), ("efficientnet_b3", 300)):
        inputs = pretrained_inputs(f"{ours}.torchvision_model", name, True)
        assert inputs is not None and (inputs.mean, inputs.std, inputs.size) == (*imagenet, (size, size))
    assert pretrained_inputs(f"{ours}.torchvision_model", "resnet18", False) is None
    pytest.importorskip("timm")
    inputs = pretrained_inputs(f"{ours}.timm_model", "vit_base_patch16_224", True)
    assert inputs is not None and (inputs.mean, inputs.size) == ((0.5, 0.5, 0.5), (224, 224))
