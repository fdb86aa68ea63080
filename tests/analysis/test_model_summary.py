"""Operations and memory against the papers' figures and a count by hand."""

import pytest
import torch
from torch import nn

from dlopt.analysis.model_summary import summarize
from tests.training.runs import experiment


def _meta(module: nn.Module, *shape: int) -> torch.Tensor:
    module.to("meta")
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    ("typed", "shape", "classes", "macs", "parameters"),
    [
        (["model=resnet20"], (3, 32, 32), 10, 41e6, 0.27e6),  # He et al. 2016, table 6; 41 M: Idelbayev's list
        (["model=resnet50", "model.stem=imagenet"], (3, 224, 224), 1000, 4.1e9, 25.557e6),  # torchvision: 4.09 G
    ],
)
def test_known_models(typed: list[str], shape: tuple[int, ...], classes: int, macs: float, parameters: float) -> None:
    module = experiment(*typed).model.build(input_shape=shape, classes=classes)
    found = summarize(module, _meta(module, 2, *shape))
    assert found.forward_macs == pytest.approx(macs, rel=0.02)
    assert found.parameters == pytest.approx(parameters, rel=0.005)
    assert sum(layer.macs for layer in found.layers) == found.forward_macs
    # Backward: once for the weights, once for the inputs, but for the first layer's.
    first = next(layer.macs for layer in found.layers if layer.macs)
    assert found.update_flops == 6 * found.forward_macs - 2 * first


def test_a_small_net_by_hand() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    module[2].weight.requires_grad_(False)
    found = summarize(module, _meta(module, 7, 3))
    assert [(layer.name, layer.kind, layer.output) for layer in found.layers] == [
        ("0", "Linear", (5,)),
        ("1", "Tanh", (5,)),
        ("2", "Linear", (2,)),
    ]
    assert [layer.macs for layer in found.layers] == [15, 0, 10]
    assert (found.parameters, found.trainable, found.parameter_bytes) == (30, 20, 120)
    # Kept: the inputs for the first weight's gradient, and tanh's outputs, once though two layers need them.
    assert found.activation_bytes == 4 * 7 * (3 + 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    module = experiment("model=lstm").model.build(input_shape=(1, 8, 8), classes=10)
    one, four = (summarize(module, _meta(module, size, 1, 8, 8)) for size in (1, 4))
    assert four.activation_bytes == 4 * one.activation_bytes and four.forward_macs == one.forward_macs
