"""Weight decay and layer-wise rates of the parameters of dlopt's own models."""

from typing import Any

import pytest
import torch
from torch import nn

from dlopt.optim.parameters import Grouping, parameter_groups
from tests.models.conftest import Build
from tests.support.gpt import gpt

VIT = ("depth=2", "patch=4", "width=8", "heads=2")


def groups(model: nn.Module, layer_decay: float | None = None) -> dict[str, dict[str, Any]]:
    """Name of each parameter -> the settings of its group, with decay_norm_and_bias=false."""
    grouping, arguments = (
        Grouping(groups=[], layer_decay=layer_decay),
        {"lr": 0.1, "weight_decay": 0.2},
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = parameter_groups(model, grouping, arguments, decay_norm_and_bias=False)
    return {
        names[p]: {"lr": 0.1, "weight_decay": 0.2} | {k: v for k, v in group.items() if k != "params"}
        for group in found
        for p in group["params"]
    }


def test_vision_transformer_has_the_groups_of_timms(build: Build) -> None:
    """Patches, positions and class token are one layer, each block is one, the last norm belongs to the last block."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}
    with torch.device("meta"):
        theirs = timm.models.VisionTransformer(**sizes)
    pairs = {
        "embedding.project.weight": "patch_embed.proj.weight", "embedding.project.bias": "patch_embed.proj.bias",
        "embedding.class_token": "cls_token", "embedding.positions": "pos_embed", "norm.weight": "norm.weight",
        "block1.norm1.weight": "blocks.0.norm1.weight", "block1.attention.qkv.weight": "blocks.0.attn.qkv.weight",
        "block1.mlp.3.weight": "blocks.0.mlp.fc2.weight", "block2.attention.qkv.weight": "blocks.1.attn.qkv.weight",
        "block2.mlp.0.weight": "blocks.1.mlp.fc1.weight", "head.weight": "head.weight", "head.bias": "head.bias",
    }  # fmt: skip
    own = groups(build("vit", *VIT, input_shape=(3, 8, 8), classes=4), layer_decay=0.5)
    foreign = groups(theirs, layer_decay=0.5)
    assert {name: own[name] for name in pairs} == {name: foreign[other] for name, other in pairs.items()}
    assert own["embedding.positions"] == {"lr": 0.1 * 0.5**3, "weight_decay": 0.0}


@pytest.mark.parametrize("changed", [{}, {"norm": "rms", "positions": "rotary", "tied_embeddings": False}])
def test_gpt(changed: dict[str, Any]) -> None:
    """Only the matrices of linear layers decay; embedding, each block and an untied head are one layer each."""
    model = gpt(**changed)
    found = groups(model, layer_decay=0.5)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, group in found.items() if group["weight_decay"]} == linear & set(found)
    stages: dict[str, set[float]] = {}
    for name, group in found.items():
        stages.setdefault(name.partition(".")[0], set()).add(group["lr"])
    assert all(len(rates) == 1 for rates in stages.values())
    assert len({group["lr"] for group in found.values()}) == (4 if changed else 3)


@pytest.mark.parametrize("choice", ["resnet20", "mlp", "lstm"])
def test_vectors_of_other_models(build: Build, choice: str) -> None:
    model = build(choice, input_shape=(3, 8, 8), classes=4)
    exempt = {name for name, group in groups(model).items() if not group["weight_decay"]}
    assert exempt == {name for name, p in model.named_parameters() if p.ndim <= 1}
    rates = {name: group["lr"] for name, group in groups(model, layer_decay=0.5).items()}
    assert next(iter(rates.values())) < next(reversed(rates.values())) == 0.1
    if choice == "lstm":  # both matrices of a recurrent layer
        assert len(set(rates.values())) == 2
