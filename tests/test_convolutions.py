"""Gradients of convolutions with one thread are the same bits as those of several."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dlopt import convolutions, openmp
from dlopt.convolutions import Kernel

THREADS = 2
LAYERS = {
    "3x3": nn.Conv2d(16, 16, 3, padding=1, bias=False),
    "wider": nn.Conv2d(32, 64, 3, padding=1, bias=False),
    "stride": nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
    "1x1": nn.Conv2d(16, 32, 1, stride=2, bias=False),
    "stem": nn.Conv2d(1, 16, 3, padding=1, bias=False),
    "bias": nn.Conv2d(16, 8, 3, padding=1),
    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "dilated": nn.Conv2d(8, 8, 3, dilation=2),
    "transposed": nn.ConvTranspose2d(16, 8, 2, stride=2),
    "one dimension": nn.Conv1d(8, 8, 3, padding=1),
    "double precision": nn.Conv2d(4, 4, 3, dtype=torch.float64),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernel(two_threads: None) -> Iterator[Kernel]:
    if not (libraries := openmp.libgomp()):
        pytest.skip("needs libgomp: this PyTorch uses another OpenMP")
    kernel = Kernel(libraries)
    yield kernel
    kernel.close()


def gradients(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    inputs = inputs.detach().requires_grad_()
    weights = torch.randn(layer(inputs).shape, generator=torch.Generator().manual_seed(1)).to(inputs.dtype)
    return list(torch.autograd.grad((layer(inputs) * weights).sum(), [inputs, *layer.parameters()]))


def images(layer: nn.Module, batch: int, size: int) -> Tensor:
    dimensions = [size] * (layer.weight.ndim - 2)  # type: ignore[union-attr, operator]
    shape = (batch, layer.in_channels, *dimensions)  # type: ignore[arg-type]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "size", "channels_last"), [(32, 8, True), (32, 8, False), (7, 16, True)])
@pytest.mark.parametrize("name", LAYERS)
def test_one_thread_gives_the_same_bits(
    two_threads: None, request: pytest.FixtureRequest, name: str, batch: int, size: int, channels_last: bool
) -> None:
    layer, inputs = LAYERS[name], images(LAYERS[name], batch, size)
    if channels_last and inputs.ndim == 4:
        layer, inputs = (each.to(memory_format=torch.channels_last) for each in (layer, inputs))
    expected = gradients(layer, inputs)
    request.getfixturevalue("kernel")
    for _ in range(2):  # the first time compares, the second uses what it has found
        assert all(map(torch.equal, gradients(layer, inputs), expected))


def test_uses_one_thread_where_it_can(kernel: Kernel) -> None:
    layer = LAYERS["3x3"]
    gradients(layer, images(layer, 32, 8))
    assert set(kernel._found.values()) <= {1, 2, None}
    threads = []
    original, number = kernel._original, torch.get_num_threads

    class Counted:
        @staticmethod
        def call_boxed(*arguments: object) -> object:
            threads.append(number())
            return original.call_boxed(*arguments)

    kernel._original = Counted()
    kernel._found = dict.fromkeys(kernel._found, 2)
    found = gradients(layer, images(layer, 32, 8))
    assert threads == [2, 1, 1], "the gradient of the inputs, then those of the halves of the batch"
    assert number() == 2
    kernel.close()
    # Sums of 2048 products, in fp32 and another order.
    torch.testing.assert_close(found, gradients(layer, images(layer, 32, 8)), rtol=1e-5, atol=1e-3)


def test_restores_threads_after_an_error(kernel: Kernel) -> None:
    with pytest.raises(ZeroDivisionError), kernel._one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == THREADS


def test_frozen_layers_have_no_gradient(kernel: Kernel) -> None:
    layer = nn.Conv2d(4, 4, 3)
    layer.weight.requires_grad_(False)
    inputs = images(layer, 2, 6).requires_grad_()
    layer(inputs).sum().backward()
    assert layer.weight.grad is None and layer.bias is not None and layer.bias.grad is not None
    assert inputs.grad is not None and not kernel._found


def test_draws_no_numbers_of_the_run(kernel: Kernel) -> None:
    layer = nn.Conv2d(4, 4, 3)
    state = torch.get_rng_state()
    gradients(layer, images(layer, 2, 6))
    assert kernel._found and torch.equal(state, torch.get_rng_state())


def test_zeros_do_not_decide_how_a_shape_is_added(kernel: Kernel) -> None:
    layer = LAYERS["3x3"]
    layer(torch.zeros(32, 16, 8, 8)).sum().mul(0).backward()
    first = dict(kernel._found)
    kernel._found.clear()
    inputs = images(layer, 32, 8)
    layer(inputs).square().sum().backward()
    assert list(kernel._found.values()) == list(first.values())


def test_follows_the_watch_between_updates(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp.libgomp():
        pytest.skip("needs libgomp: this PyTorch uses another OpenMP")
    shared = True
    monkeypatch.setattr(openmp, "are_cores_shared", lambda: shared)
    convolutions.adapt()
    kernel = convolutions._kernel
    assert kernel is not None
    layer = LAYERS["bias"]
    gradients(layer, images(layer, 4, 8))
    assert len(kernel._found) == 1
    convolutions.adapt()
    assert convolutions._kernel is kernel, "still shared"
    shared = False
    convolutions.adapt()
    assert convolutions._kernel is None
    gradients(layer, images(layer, 5, 8))
    assert len(kernel._found) == 1, "PyTorch's own kernel again"
