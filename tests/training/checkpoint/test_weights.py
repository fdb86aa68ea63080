"""Weights of torchvision, timm, other implementations and `dlopt export` in dlopt's models give the same outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from dlopt.basics.errors import UserError
from dlopt.models.alexnet import AlexNet
from dlopt.models.resnet import CifarResNet, ResNet
from dlopt.models.vgg import VGG11
from dlopt.models.vit import ViT
from dlopt.training.builders.workload import load_weights
from dlopt.training.checkpoint.weights import match_weights
from tests.support.norm import NORM


def resnet(depth: int, size: int = 64) -> ResNet:
    return ResNet(input_shape=(3, size, size), classes=7, depth=depth, stem="imagenet", dropout=0.0, **NORM)  # type: ignore[arg-type]


def vit(**changes: Any) -> ViT:
    keys = {"patch": 8, "width": 16, "depth": 2, "heads": 2, "expansion": 4.0, "pre_norm": True, "dropout": 0.0}
    return ViT(input_shape=(3, 32, 32), classes=7, **{**keys, **NORM, "norm": "layer", "norm_eps": 1e-6, **changes})


def vgg(norm: str) -> VGG11:
    keys = {**NORM, "norm": norm}
    return VGG11(input_shape=(3, 32, 32), classes=7, classifier="imagenet", dropout=0.5, **keys)


def randomized(model: nn.Module) -> nn.Module:
    """Fills all parameters and statistics with random numbers, for outputs of a moderate size."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(-1, 1, generator=generator)
            if value.ndim > 1:
                value.mul_((3 / value[0].numel()) ** 0.5)
            elif name.endswith(("running_var", "weight")):
                value.abs_().add_(0.5)
    return model.eval()


def check_same_outputs(origin: nn.Module, ours: nn.Module, path: Path, size: int) -> list[str]:
    torch.save(randomized(origin).state_dict(), path)
    lines = load_weights(ours, path, complete=True)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, outputs = origin(images), ours.eval()(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    return lines


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_resnets_of_torchvision(tmp_path: Path, depth: int) -> None:
    [line] = check_same_outputs(get_model(f"resnet{depth}", num_classes=7), resnet(depth), tmp_path / "w.pt", 64)
    assert line.endswith("tensors loaded (from the names of torchvision or timm)")


@pytest.mark.parametrize("depth", [34, 50, 101])
def test_names_and_shapes_of_the_deeper_resnets(tmp_path: Path, depth: int) -> None:
    with torch.device("meta"):
        origin, ours = get_model(f"resnet{depth}", num_classes=7), resnet(depth)
    zero = torch.zeros(())
    torch.save({name: zero.expand(value.shape) for name, value in origin.state_dict().items()}, tmp_path / "w.pt")
    match = match_weights(tmp_path / "w.pt", ours)
    assert not match.missing and len(match.weights) == len(origin.state_dict())


def test_resnet_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    check_same_outputs(timm.create_model("resnet18", num_classes=7), resnet(18), tmp_path / "w.pt", 64)


def vgg_pair(norm: str) -> tuple[nn.Module, VGG11]:
    with torch.device("meta"):  # without the initialization of 100 M weights
        return get_model("vgg11_bn" if norm == "batch" else "vgg11", num_classes=7), vgg(norm)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_convolutions_of_vgg11(tmp_path: Path, norm: str) -> None:
    """Torchvision's convolutions also have biases before the batch normalization."""
    theirs, _ = vgg_pair(norm)
    features = randomized(theirs.get_submodule("features").to_empty(device="cpu"))
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, tmp_path / "w.pt")
    keys = {**NORM, "norm": norm}
    ours = VGG11(input_shape=(3, 32, 32), classes=7, classifier="small", dropout=0.5, **keys).eval()
    lines = load_weights(ours, tmp_path / "w.pt")
    assert lines[1].endswith(": head.weight, head.bias") and len(lines) == 2
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*list(ours)[:5])(images), features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_vgg11(tmp_path: Path, norm: str) -> None:
    theirs, ours = vgg_pair(norm)
    check_same_outputs(theirs.to_empty(device="cpu"), ours.to_empty(device="cpu"), tmp_path / "w.pt", 32)


@pytest.mark.slow
def test_vgg11_of_timm_has_convolutions_as_linear_layers(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model("vgg11", num_classes=7), vgg("none")
    theirs, ours = randomized(theirs.to_empty(device="cpu")), ours.to_empty(device="cpu").eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    load_weights(ours, tmp_path / "w.pt", complete=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_vision_transformers(tmp_path: Path) -> None:
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=7)
    assert len(check_same_outputs(theirs, vit(), tmp_path / "w.pt", 32)) == 1
    timm = pytest.importorskip("timm.models.vision_transformer")
    other = timm.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=7)
    lines = check_same_outputs(other, vit(norm_eps=1.1e-6), tmp_path / "w.pt", 32)
    assert "model.norm_eps=1.1e-06: vision transformers of torchvision and timm use 1e-06" in lines[-1]


class OtherBlock(nn.Module):
    """Residual block of other implementations for CIFAR, with zero channels on both sides of the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class OtherResNet8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(OtherBlock(16, 16, 1))
        self.layer2 = nn.Sequential(OtherBlock(16, 32, 2))
        self.layer3 = nn.Sequential(OtherBlock(32, 64, 2))
        self.linear = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(maps.mean((2, 3)))


def test_cifar_resnets_of_other_implementations(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"input_shape": (3, 16, 16), "classes": 7, "depth": 8, "width": 16, "residual": True}
    ours = CifarResNet(**keys, shortcut_padding="both", dropout=0.0, **NORM)
    assert len(check_same_outputs(OtherResNet8(), ours, tmp_path / "w.pt", 16)) == 1
    named = "(from the names of other networks for CIFAR (kuangliu's, akamaster's))"
    [line] = load_weights(ours, tmp_path / "w.pt")
    assert line.endswith(f"{len(ours.state_dict())} of {len(ours.state_dict())} tensors loaded {named}")
    old = {name: value for name, value in torch.load(tmp_path / "w.pt").items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pt")  # as saved before PyTorch counted the batches
    [line] = load_weights(ours, tmp_path / "old.pt", complete=True)
    assert line.endswith(f"{len(old)} of {len(old)} tensors loaded {named}")
    other = CifarResNet(**keys, shortcut_padding="end", dropout=0.0, **NORM)
    assert "model.shortcut_padding=end: many other" in load_weights(other, tmp_path / "w.pt")[-1]


def test_names_what_does_not_fit(tmp_path: Path) -> None:
    torch.save(get_model("resnet18", num_classes=10).state_dict(), tmp_path / "w.pt")
    small = ResNet(input_shape=(3, 8, 8), classes=7, depth=18, stem="small", dropout=0.0, **NORM)
    lines = load_weights(small, tmp_path / "w.pt")
    assert "stem.0.weight (64x3x7x7 in the file), head.weight (10x512 in the file), head.bias (10 in" in lines[1]
    with pytest.raises(UserError, match=r"an untrained part cannot be tested; .*: stem\.0\.weight, head\.weight, head"):
        load_weights(small, tmp_path / "w.pt", complete=True)
    # Torchvision's AlexNet is that of Krizhevsky 2014, with other widths.
    torch.save({f"features.{i}.weight": torch.zeros(2, 2, 3, 3) for i in (0, 3)}, tmp_path / "w.pt")
    alexnet = AlexNet(
        input_shape=(3, 64, 64), classes=7, stem="small", hidden=8, local_response=False, dropout=0.0, **NORM
    )
    with pytest.raises(UserError, match=r"none of its 2 weights matches .* model=torchvision or model=timm"):
        load_weights(alexnet, tmp_path / "w.pt")


def test_files_of_dlopt_export(tmp_path: Path) -> None:
    """Exported files also contain the normalization."""
    source, target = vit(), vit()
    weights = {f"model.{name}": value for name, value in source.state_dict().items()}
    save_file(
        {**weights, "normalize.scale": torch.ones(3), "normalize.shift": torch.ones(3)}, tmp_path / "w.safetensors"
    )
    [line] = load_weights(target, tmp_path / "w.safetensors", complete=True)
    assert "without its normalization" in line and "without the prefix model." in line
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
