from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.choices import names

CONF = Path(__file__).parents[2] / "conf" / "model"
CHOICES = names("model")
SHAPES = {"polynomial": (1,), "alexnet_224": (3, 224, 224), "two_column_alexnet_224": (3, 224, 224)}

DEEP = {"resnet1202", "preact_resnet1001", "resnet110", "preact_resnet110", "preact_resnet164", "resnet101"}
# one choice of each family
FAMILIES = [
    "resnet20",
    "plain20",
    "resnet18",
    "resnet50",
    "mlp",
    "residual_mlp",
    "wrn_16_4",
    "preact_resnet20",
    "vgg11",
]
FAMILIES += [
    "airbench94",
    "preact_resnet164",
    "alexnet",
    "two_column_alexnet",
    "rnn",
    "lstm",
    "locally_connected",
    "vit",
]


@pytest.mark.parametrize(
    "choice", [pytest.param(choice, marks=[pytest.mark.slow] if choice in DEEP else []) for choice in CHOICES]
)
def test_every_choice_builds_on_meta_and_maps_a_batch_to_outputs(build: Callable[..., nn.Module], choice: str) -> None:
    if choice == "timm":
        pytest.importorskip("timm")
    shape = SHAPES.get(choice, (3, 32, 32))
    vocabulary = 7 if choice.startswith("gpt") else None
    with torch.device("meta"):
        model = build(choice, input_shape=shape if vocabulary is None else (16,), classes=7, vocabulary=vocabulary)
        if vocabulary is None:
            assert model(torch.empty(2, *shape)).shape == (2, 7)
        else:
            assert model(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 7)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert choice in ("timm", "torchvision") or isinstance(model.get_submodule("head"), nn.Linear)


@pytest.mark.parametrize("choice", FAMILIES)
def test_every_model_with_hidden_layers_has_a_norm_key(build: Callable[..., nn.Module], choice: str) -> None:
    counts = {}
    for keys in (["norm=layer", "norm_affine=true"], ["norm=layer", "norm_affine=false"], ["norm=none"]):
        with torch.device("meta"):
            model = build(choice, *keys, input_shape=SHAPES.get(choice, (3, 32, 32)), classes=7)
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
        counts[tuple(keys)] = len(norms), sum(1 for module in norms for _ in module.parameters(recurse=False))
    with_affine, without, none = counts.values()
    assert with_affine[0] == without[0] > 0 and with_affine[1] == 2 * with_affine[0]
    assert without[1] == 0 and none == (0, 0)


def test_the_first_line_of_every_choice_describes_it() -> None:
    assert set(FAMILIES) < set(CHOICES)
    for choice in CHOICES:
        assert (CONF / f"{choice}.yaml").read_text().splitlines()[0].startswith("# "), choice
