"""State-dict names of torchvision, timm and others for the architectures that dlopt has as well."""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dlopt.models.resnet import CifarResNet, ZeroPadShortcut

_EPS = 1e-6  # of the layer normalization of torchvision's and timm's vision transformers
_NEAR_CHANCE = 0.1  # fraction of the way from chance to 1

_RESNET = {
    r"conv1\.": "stem.0.",
    r"bn1\.": "stem.1.",
    r"layer(\d)\.(\d+)\.conv(\d)\.": r"stage\1.\2.conv\3.",
    r"layer(\d)\.(\d+)\.bn(\d)\.": r"stage\1.\2.norm\3.",
    r"layer(\d)\.(\d+)\.(downsample|shortcut)\.": r"stage\1.\2.shortcut.",
    r"fc\.": "head.",
}
_CIFAR_RESNET = {**_RESNET, r"linear\.": "head."}
_VIT_TORCHVISION = {
    r"class_token$": "embedding.class_token",
    r"encoder\.pos_embedding$": "embedding.positions",
    r"conv_proj\.": "embedding.project.",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.": r"block{\1}.norm\2.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_": r"block{\1}.attention.qkv.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.": r"block{\1}.attention.project.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(0|linear_1)\.": r"block{\1}.mlp.0.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(3|linear_2)\.": r"block{\1}.mlp.3.",
    r"encoder\.ln\.": "norm.",
    r"heads\.head\.": "head.",
}
_VIT_TIMM = {
    r"cls_token$": "embedding.class_token",
    r"pos_embed$": "embedding.positions",
    r"patch_embed\.proj\.": "embedding.project.",
    r"blocks\.(\d+)\.norm(\d)\.": r"block{\1}.norm\2.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"block{\1}.attention.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"block{\1}.attention.project.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"block{\1}.mlp.0.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"block{\1}.mlp.3.",
}
_VGG_LAYERS = ("stage1.0", "stage2.0", "stage3.0", "stage3.3", "stage4.0", "stage4.3", "stage5.0", "stage5.3")
_VGG_HEAD = {
    r"(classifier\.0|pre_logits\.fc1)\.": "hidden1.0.",
    r"(classifier\.3|pre_logits\.fc2)\.": "hidden2.0.",
    r"(classifier\.6|head\.fc)\.": "head.",
}


def _vgg(convolutions: tuple[int, ...], *, norm: bool) -> dict[str, str]:
    rules = {rf"features\.{index}\.": f"{name}." for index, name in zip(convolutions, _VGG_LAYERS, strict=True)}
    if norm:
        for index, name in zip(convolutions, _VGG_LAYERS, strict=True):
            stage, _, layer = name.partition(".")
            rules[rf"features\.{index + 1}\."] = f"{stage}.{int(layer) + 1}."
    return rules | _VGG_HEAD


_FAMILIES = (
    ("torchvision or timm", _RESNET),
    ("other networks for CIFAR (kuangliu's, akamaster's)", _CIFAR_RESNET),
    ("torchvision", _VIT_TORCHVISION),
    ("timm", _VIT_TIMM),
    ("torchvision or timm", _vgg((0, 3, 6, 8, 11, 13, 16, 18), norm=False)),
    ("torchvision or timm", _vgg((0, 4, 8, 11, 15, 18, 22, 25), norm=True)),
)
"""(origin, {pattern of a name's prefix: dlopt's prefix}) of each architecture."""


def translations(names: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields for each known family (its origin, {name: dlopt's name}); other names are kept."""
    names = list(names)
    for origin, rules in _FAMILIES:
        yield origin, {name: _translated(name, rules) for name in names}


def _translated(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        if match := re.match(pattern, name):
            own = match.expand(replacement)
            own = re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), own)  # dlopt counts blocks from 1
            return own + name[match.end() :]
    return name


def fold_biases(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns the weights without biases before a batch normalization, which dlopt's layers do not have.

    Subtracts the bias from the running mean, so the function of the network stays the same.
    """
    folded = dict(weights)
    for name, bias in weights.items():
        match = re.fullmatch(r"(.+)\.(\d+)\.bias", name)
        if match is None or name in shapes:
            continue
        mean = f"{match[1]}.{int(match[2]) + 1}.running_mean"
        if mean in folded and folded[mean].shape == bias.shape:
            folded[mean] = folded[mean] - bias
            del folded[name]
    return folded


def differences(model: nn.Module) -> list[str]:
    """Describes the keys by which `model` may differ from the model that the translated weights come from."""
    lines = []
    eps = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), _EPS)
    if eps != _EPS:
        lines.append(f"model.norm_eps={eps:g}: vision transformers of torchvision and timm use 1e-06")
    if _shortcut_padding(model) == "end":
        lines.append("model.shortcut_padding=end: many other implementations use both")
    return lines


def _shortcut_padding(model: nn.Module) -> str | None:
    """Returns `model.shortcut_padding`, or None for a network without such shortcuts."""
    pads = [module for module in model.modules() if isinstance(module, ZeroPadShortcut)]
    if not isinstance(model, CifarResNet) or not pads:
        return None
    return "end" if pads[0].extra[0] == 0 else "both"


def advice(model: nn.Module, accuracy: float, classes: int) -> list[str]:
    """Returns a line with what to try if weights fit `model` by name, but its test accuracy is near chance."""
    chance = 1 / classes
    if classes < 2 or accuracy - chance > _NEAR_CHANCE * (1 - chance):
        return []
    tries = ["normalize=fixed with normalize.mean and normalize.std of their training", "the order of their classes"]
    if (padding := _shortcut_padding(model)) is not None:
        tries.insert(0, f"model.shortcut_padding={'both' if padding == 'end' else 'end'}")
    return [
        f"the weights fit by name, but the test accuracy is near chance ({100 * chance:.3g} %); try {', '.join(tries)}"
    ]
