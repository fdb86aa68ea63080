"""Operations and memory against papers and manual counts."""

import pytest
import torch
from torch import nn

from dlopt.instruments.model_summary import summarize
from tests.support.runs import run_config


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
def test_counts_match_papers(
    typed: list[str], shape: tuple[int, ...], classes: int, macs: float, parameters: float
) -> None:
    module = run_config(*typed).model.build(input_shape=shape, classes=classes)
    result = summarize(module, _meta(module, 2, *shape))
    assert result.forward_macs == pytest.approx(macs, rel=0.02)
    assert result.parameters == pytest.approx(parameters, rel=0.005)
    assert sum(layer.macs for layer in result.layers) == result.forward_macs
    # Backward: once for the weights and once for the inputs, except the first layer's.
    first = next(layer.macs for layer in result.layers if layer.macs)
    assert result.update_flops == 6 * result.forward_macs - 2 * first


def test_small_network_matches_manual_count() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    module[2].weight.requires_grad_(False)
    result = summarize(module, _meta(module, 7, 3))
    assert [(layer.name, layer.kind, layer.output) for layer in result.layers] == [
        ("0", "Linear", (5,)),
        ("1", "Tanh", (5,)),
        ("2", "Linear", (2,)),
    ]
    assert [layer.macs for layer in result.layers] == [15, 0, 10]
    assert (result.parameters, result.trainable, result.parameter_bytes) == (30, 20, 120)
    # Saved: the inputs for the first weight's gradient, and tanh's outputs once, although two layers need them.
    assert result.activation_bytes == 4 * 7 * (3 + 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_activation_memory_is_proportional_to_batch_size() -> None:
    module = run_config("model=lstm").model.build(input_shape=(1, 8, 8), classes=10)
    one, four = (summarize(module, _meta(module, size, 1, 8, 8)) for size in (1, 4))
    assert four.activation_bytes == 4 * one.activation_bytes and four.forward_macs == one.forward_macs
