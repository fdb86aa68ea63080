from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dlopt.models.layers import ACTIVATIONS
from dlopt.models.mlp import MLP, ResidualMLP

NORM: dict[str, Any] = {
    "norm": "none",
    "norm_affine": True,
    "norm_groups": 8,
    "norm_ghost_batch": None,
    "norm_eps": 1e-5,
    "norm_momentum": 0.1,
}


def mlp(**changes: Any) -> MLP:
    keys = {"input_shape": (1, 8, 8), "classes": 10, "widths": (16, 12), "activation": "relu", "dropout": 0.0}
    return MLP(**{**keys, **NORM, **changes})


def residual_mlp(**changes: Any) -> ResidualMLP:
    keys = {"input_shape": (1, 8, 8), "classes": 10, "width": 16, "blocks": 2, "residual": True, "activation": "relu"}
    return ResidualMLP(**{**keys, "dropout": 0.0, **NORM, **changes})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def samples(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp_matches_the_formula(name: str) -> None:
    model = mlp(activation=name).double()
    vectors = samples(5, 1, 8, 8).flatten(1)
    for layer in (model.layer1, model.layer2):
        assert isinstance(layer, nn.Sequential)
        linear = layer.get_submodule("linear")
        vectors = ACTIVATIONS[name]()(vectors @ linear.get_parameter("weight").T + linear.get_parameter("bias"))
    expected = vectors @ model.head.weight.T + model.head.bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(samples(5, 1, 8, 8)), expected)


def test_parameters_and_the_linear_model() -> None:
    assert count(mlp()) == 64 * 16 + 16 + 16 * 12 + 12 + 12 * 10 + 10
    assert count(mlp(widths=())) == 64 * 10 + 10
    assert count(mlp(norm="batch")) == 64 * 16 + 16 * 12 + 2 * (16 + 12) + 12 * 10 + 10
    assert count(residual_mlp(blocks=3)) == 64 * 16 + 16 + 6 * (16 * 16 + 16) + 16 * 10 + 10


@pytest.mark.parametrize("choice", ["mlp", "residual_mlp"])
def test_the_choices_build_for_vectors_and_one_output(build: Callable[..., nn.Module], choice: str) -> None:
    assert build(choice, input_shape=(3,), classes=1)(samples(4, 3, dtype=torch.float32)).shape == (4, 1)


def test_widths_and_activation_are_configurable(build: Callable[..., nn.Module]) -> None:
    model = build("mlp", "widths=[64,64]", "activation=tanh", "norm=none", input_shape=(5,), classes=2)
    assert count(model) == 5 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2
    assert sum(isinstance(module, nn.Tanh) for module in model.modules()) == 2


@pytest.mark.parametrize("make", [mlp, residual_mlp])
@pytest.mark.parametrize("kind", ["batch", "layer", "group", "none"])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_and_backward_with_every_norm(make: Callable[..., nn.Module], kind: str, affine: bool) -> None:
    model = make(norm=kind, norm_affine=affine, activation="tanh").double()
    model(samples(6, 1, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert any(name.endswith("norm.weight") for name, _ in model.named_parameters()) == (affine and kind != "none")


def test_dropout_acts_on_hidden_features_only_in_training() -> None:
    model = mlp(dropout=0.5, activation="sigmoid", widths=(400,)).double()
    features = []
    model.get_submodule("head").register_forward_hook(lambda module, arguments, output: features.append(arguments[0]))
    model(samples(8, 1, 8, 8))
    model.eval()(samples(8, 1, 8, 8))
    assert 0.4 < (features[0] == 0).double().mean() < 0.6
    assert (features[1] != 0).all()


def input_gradient(residual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of the block's input if the branch is dead: all inputs of its ReLU are negative."""
    model = residual_mlp(residual=residual, blocks=1).double()
    block = model.get_submodule("block1")
    with torch.no_grad():
        block.get_parameter("layer2.linear.bias").fill_(-1e3)
    hidden = samples(5, 16).requires_grad_()
    output = block(hidden)
    output.backward(samples(5, 16))
    assert hidden.grad is not None
    return output.detach(), hidden.grad


def test_skip_passes_the_gradient_around_a_dead_branch() -> None:
    output, gradient = input_gradient(residual=True)
    assert torch.equal(output, samples(5, 16))
    assert torch.equal(gradient, samples(5, 16))


def test_without_the_skip_a_dead_branch_stops_the_gradient() -> None:
    output, gradient = input_gradient(residual=False)
    assert not output.any()
    assert not gradient.any()


def test_the_gradient_of_a_deep_sigmoid_net_vanishes_without_skips() -> None:
    norms = {}
    for residual in (True, False):
        torch.manual_seed(0)
        model = residual_mlp(residual=residual, blocks=10, activation="sigmoid").double()
        inputs = samples(5, 64).requires_grad_()
        model(inputs).square().sum().backward()
        assert inputs.grad is not None
        norms[residual] = inputs.grad.norm().item()
    assert norms[True] > 1e-2
    assert norms[False] < 1e-10
