"""Linear layers in oneDNN agree with torch's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.models import linear
from dlopt.models.linear import Linear
from tests.support.processes import run

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch lacks oneDNN")

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses oneDNN on any processor and counts its products."""

    def counted(*tensors: Tensor) -> Tensor:
        CALLS.append("product")
        return torch.ops.dlopt.onednn_linear(*tensors)

    CALLS.clear()
    monkeypatch.setattr(linear, "_PREFERS_ONEDNN", True)
    monkeypatch.setattr(linear, "_onednn_linear", counted)


def layers(inputs: int, outputs: int, bias: bool) -> tuple[Linear, nn.Linear]:
    """Returns a layer and, in fp64, torch's with the same weights."""
    torch.manual_seed(0)
    layer, reference = Linear(inputs, outputs, bias=bias), nn.Linear(inputs, outputs, bias=bias)
    reference.load_state_dict(layer.state_dict())
    return layer, reference.double()


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 128), (5, 60, 128)])
def test_outputs_and_gradients_equal_torchs(shape: tuple[int, ...], bias: bool) -> None:
    layer, reference = layers(128, 112, bias)
    inputs = torch.randn(shape, requires_grad=True)
    wide = inputs.detach().double().requires_grad_()
    weights = torch.randn(*shape[:-1], 112)
    outputs, expected = layer(inputs), reference(wide)
    (outputs.tanh() * weights).sum().backward()
    (expected.tanh() * weights).sum().backward()
    assert close(outputs, expected) and close(inputs.grad, wide.grad)  # type: ignore[arg-type]
    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
        assert close(a.grad, b.grad) and a.grad.is_contiguous()  # type: ignore[arg-type, union-attr]
    assert len(CALLS) == 3


def test_second_derivatives_equal_torchs() -> None:
    layer, reference = layers(128, 128, True)
    inputs = torch.randn(300, 128)
    products = []
    for model, batch in ((layer, inputs), (reference, inputs.double())):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(model(batch).sigmoid().square().mean(), parameters, create_graph=True)
        products.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters))
    assert all(close(a, b) for a, b in zip(*products, strict=True))


def test_expanded_and_transposed_operands() -> None:
    layer, reference = layers(128, 128, True)
    inputs = torch.randn(128, 300).t().requires_grad_()
    layer(inputs).sum().backward()  # a gradient of stride 0
    wide = inputs.detach().double().requires_grad_()
    reference(wide).sum().backward()
    assert close(inputs.grad, wide.grad) and close(layer.weight.grad, reference.weight.grad)  # type: ignore[arg-type]


def test_only_the_needed_gradients_are_computed() -> None:
    layer, _ = layers(128, 128, True)
    layer(torch.randn(300, 128)).sum().backward()
    assert len(CALLS) == 2  # no gradient of the inputs
    layer.weight.requires_grad_(False)
    layer(torch.randn(300, 128)).sum().backward()
    assert len(CALLS) == 3
    with torch.inference_mode():
        layer(torch.randn(300, 128))
    assert len(CALLS) == 4


@pytest.mark.parametrize("case", ["small", "fp64", "autocast", "meta", "other processor"])
def test_torchs_kernels_compute_the_rest(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layers(128, 128, True)
    inputs = torch.randn(16 if case == "small" else 300, 128)
    if case == "fp64":
        layer, inputs = layer.double(), inputs.double()
    if case == "meta":
        layer, inputs = layer.to("meta"), inputs.to("meta")
    if case == "other processor":
        monkeypatch.setattr(linear, "_PREFERS_ONEDNN", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        outputs = layer(inputs)
    assert not CALLS and outputs.shape == (len(inputs), 128)


def test_exported_programs_do_not_need_dlopt() -> None:
    layer, _ = layers(128, 128, True)
    program = torch.export.export(layer, (torch.randn(300, 128),))
    assert not any("dlopt" in str(node.target) for node in program.graph.nodes)


def test_transforms_of_torch_func() -> None:
    layer, reference = layers(128, 128, True)
    inputs, directions = torch.randn(2, 300, 128)
    _, product = torch.func.jvp(layer, (inputs,), (directions,))
    assert close(product, directions.double() @ reference.weight.t()) and not CALLS


def test_results_do_not_vary() -> None:
    layer, _ = layers(256, 384, True)
    inputs = torch.randn(777, 256)
    first, *others = (gradients(copy.deepcopy(layer), inputs.clone()) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def gradients(layer: nn.Module, inputs: Tensor) -> list[Any]:
    layer(inputs).square().sum().backward()
    return [p.grad for p in layer.parameters()]


@pytest.mark.slow
def test_compiled_layers_equal_eager_ones() -> None:
    done = run(_check_compiled_layers)
    assert done.returncode == 0, done.stderr


def _check_compiled_layers() -> None:
    linear._PREFERS_ONEDNN = True
    layer, _ = layers(128, 128, True)
    inputs = torch.randn(300, 128)
    eager = gradients(copy.deepcopy(layer), inputs)
    compiled = gradients(torch.compile(layer, fullgraph=True), inputs)  # type: ignore[arg-type]
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
