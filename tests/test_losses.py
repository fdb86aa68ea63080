import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt import losses
from dlopt.basics.errors import UserError
from dlopt.losses import MSE, BinaryCrossEntropy, CrossEntropy, PixelCrossEntropy, sampled_cross_entropy

CLASSES = 5


def batch(n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, CLASSES, generator=draw, dtype=torch.float64)
    return outputs, torch.randint(CLASSES, (n,), generator=draw)


def test_cross_entropy_in_training_smooths_the_targets() -> None:
    outputs, targets = batch()
    loss = CrossEntropy(label_smoothing=0.2, class_weights=None, classes=CLASSES)
    q = 0.8 * F.one_hot(targets, CLASSES) + 0.2 / CLASSES
    logs = outputs - outputs.exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(loss(outputs, targets), -(q * logs).sum(1).mean())
    torch.testing.assert_close(loss(outputs, F.one_hot(targets, CLASSES).double()), -(q * logs).sum(1).mean())
    loss.eval()
    torch.testing.assert_close(loss(outputs, targets), -logs[torch.arange(7), targets].mean())


def test_class_weights_multiply_the_terms() -> None:
    outputs, targets = batch()
    weights = (0.0, 1.0, 2.0, 3.0, 4.0)
    loss = CrossEntropy(label_smoothing=0.0, class_weights=weights, classes=CLASSES)
    terms = F.cross_entropy(outputs, targets, reduction="none") * torch.tensor(weights).double()[targets]
    torch.testing.assert_close(loss(outputs, targets), terms.mean())
    torch.testing.assert_close(loss.eval()(outputs, targets), F.cross_entropy(outputs, targets))
    assert not loss.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_class_weights_are_not_rounded(dtype: torch.dtype) -> None:
    """bf16 has 8 digits of binary precision: 0.3 would become 0.3008."""
    outputs, targets = batch()
    outputs = outputs.to(dtype)
    loss = CrossEntropy(label_smoothing=0.0, class_weights=(0.3,) * CLASSES, classes=CLASSES)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(outputs, targets)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(value.double(), 0.3 * F.cross_entropy(outputs.double(), targets), rtol=rtol, atol=0)


def test_mse() -> None:
    outputs, targets = batch()
    one_hot = F.one_hot(targets, CLASSES).double()
    expected = ((outputs - one_hot) ** 2).mean(1).mean()
    torch.testing.assert_close(MSE(classes=CLASSES)(outputs, targets), expected)
    torch.testing.assert_close(MSE(classes=CLASSES)(outputs, one_hot), expected)
    direct = torch.randn(7, CLASSES, dtype=torch.float64)
    torch.testing.assert_close(MSE(classes=None)(outputs, direct), ((outputs - direct) ** 2).mean())
    torch.testing.assert_close(MSE(classes=None)(outputs[:, :1], direct[:, 0]), F.mse_loss(outputs[:, 0], direct[:, 0]))
    with pytest.raises(UserError, match=r"\[5\] numbers per sample, the targets have \[1\]"):
        MSE(classes=None)(outputs, direct[:, 0])


@given(seed=st.integers(0, 999), cut=st.integers(1, 6), smoothing=st.floats(0, 0.9), weighted=st.booleans())
def test_micro_batch_losses_add_up_to_the_batch_loss(seed: int, cut: int, smoothing: float, weighted: bool) -> None:
    outputs, targets = batch(seed=seed)
    weights = (0.5, 1.0, 2.0, 3.0, 4.0) if weighted else None
    for loss in (CrossEntropy(label_smoothing=smoothing, class_weights=weights, classes=CLASSES), MSE(classes=CLASSES)):
        parts = cut * loss(outputs[:cut], targets[:cut]) + (7 - cut) * loss(outputs[cut:], targets[cut:])
        torch.testing.assert_close(parts / 7, loss(outputs, targets))


def test_sampled_classes_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([0.3, -2.0, 1.5, -torch.inf, 0.0])
    outputs = logits.expand(2, 500, 5).clone().requires_grad_()
    noise = ((torch.arange(1000) + 0.5) / 1000).view(2, 500)
    sampled_cross_entropy(outputs, noise).backward()
    assert outputs.grad is not None
    probabilities = logits.softmax(0)
    frequencies = probabilities - outputs.grad.sum((0, 1))  # the gradient is the mean of p - one_hot(class)
    assert (frequencies - probabilities).abs().max() < 1.1e-3 and frequencies[3] == 0
    assert torch.isfinite(sampled_cross_entropy(logits[None], torch.tensor([1.0])))  # rounded up to 1


def test_rejects_invalid_settings() -> None:
    with pytest.raises(UserError, match="loss=mse"):
        CrossEntropy(label_smoothing=0.0, class_weights=None, classes=None)
    with pytest.raises(UserError, match="all samples have the same class"):
        CrossEntropy(label_smoothing=0.0, class_weights=None, classes=1)
    with pytest.raises(UserError, match=r"loss\.class_weights=\[1\.0, 2\.0\]: 2 weights for 5 classes"):
        CrossEntropy(label_smoothing=0.0, class_weights=(1.0, 2.0), classes=CLASSES)


def test_targets_of_bf16_outputs_are_not_rounded() -> None:
    outputs, targets = torch.tensor([[1000.0]], dtype=torch.bfloat16), torch.tensor([[1003.0]])
    assert float(MSE(classes=None)(outputs, targets)) == 9.0  # 1003 would be 1004
    pixels, grey = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True), torch.tensor([[0.501]])
    PixelCrossEntropy(classes=None)(pixels, grey).backward()
    assert pixels.grad is not None and float(pixels.grad) == pytest.approx(0.5 - 0.501, rel=0.01)


def test_balanced_weights_equal_those_of_scikit_learn() -> None:
    targets = torch.tensor([0, 0, 0, 1, 2, 2, 0, 0])
    counts = targets.bincount().tolist()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    assert losses.balanced_weights(counts) == pytest.approx(expected.tolist(), rel=1e-12)
    loss = CrossEntropy(label_smoothing=0.0, class_weights="balanced", classes=3, class_counts=counts)
    assert loss.weight is not None and loss.weight[targets].mean() == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"^loss.class_weights=balanced: class 1 has no training samples"):
        CrossEntropy(label_smoothing=0.0, class_weights="balanced", classes=3, class_counts=[2, 0, 1])


# -- in chunks


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows of seven outputs."""
    monkeypatch.setattr(losses, "_MAX_CHUNK", 20)


WEIGHTS = (0.5, 1.0, 2.0, 0.0, 1.5, 0.25, 3.0)


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    outputs = torch.randn(11, 7, generator=draws, dtype=torch.float64).mul(4).to(dtype).requires_grad_()
    return outputs, torch.randint(7, (11,), generator=draws)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_equal_the_whole(smoothing: float, weights: tuple[float, ...] | None) -> None:
    """Value, gradient and second derivative equal those of torch."""
    outputs, targets = logits()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    direction = torch.randn(11, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def derivatives(loss: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
        return gradient, torch.autograd.grad((gradient * direction).sum(), outputs)[0]

    actual = CrossEntropy(label_smoothing=smoothing, class_weights=weights, classes=7)(outputs, targets)
    summed = F.cross_entropy(outputs, targets, weight, label_smoothing=smoothing, reduction="sum") / 11
    assert torch.allclose(actual, summed, rtol=1e-12, atol=0)
    expected = derivatives(summed)
    for a, b in zip(derivatives(actual), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    (3 * CrossEntropy(label_smoothing=smoothing, class_weights=weights, classes=7)(outputs, targets)).backward()
    assert outputs.grad is not None
    assert torch.allclose(outputs.grad, 3 * expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("chunks")
def test_chunks_of_a_text_in_evaluation() -> None:
    outputs, targets = (tensor.detach() for tensor in logits())
    texts, labels = outputs[:10].view(2, 5, 7), targets[:10].view(2, 5)
    loss = CrossEntropy(label_smoothing=0.2, class_weights=WEIGHTS, classes=7).eval()
    assert float(loss(texts, labels)) == pytest.approx(float(F.cross_entropy(outputs[:10], targets[:10])), rel=1e-12)


class Memory(TorchDispatchMode):
    """Peak bytes of the tensors that operations allocate, and the largest allocation in fp32, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest_fp32 = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        if tensor.dtype == torch.float32:
            self.largest_fp32 = max(self.largest_fp32, tensor.numel())
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size


def head_of_gpt2(dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]) -> Memory:
    """Runs head and loss of gpt2_small, forward and backward, on 8 texts of 1024 tokens; nothing is computed."""
    head = nn.Linear(768, 50257, bias=False, device="meta", dtype=dtype)
    features = torch.empty(8, 1024, 768, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(8, 1024, device="meta", dtype=torch.int64)
    with Memory() as memory:
        loss(head(features), targets).backward()
    return memory


@pytest.mark.parametrize(("dtype", "before", "after"), [(torch.float32, 12, 8), (torch.bfloat16, 12, 4)])
def test_memory_of_the_head_of_gpt2(dtype: torch.dtype, before: int, after: int) -> None:
    """In bytes per output. The gradients of features and head, and a few chunks, add up to one byte."""
    count = 8 * 1024 * 50257
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, classes=50257)

    def plain(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())

    assert before <= head_of_gpt2(dtype, plain).peak / count < before + 1
    memory = head_of_gpt2(dtype, loss)
    assert after <= memory.peak / count < after + 1
    if dtype == torch.bfloat16:
        assert memory.largest_fp32 <= 1 << 24


def binary_terms(outputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    p = 1 / (1 + (-outputs).exp())
    return -(weight * targets * p.log() + (1 - targets) * (1 - p).log())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_weights_positives_in_training(smoothing: float) -> None:
    outputs, classes = batch()
    targets = F.one_hot(classes, CLASSES).double()
    weights = (1.0, 2.0, 0.5, 3.0, 1.5)
    loss = BinaryCrossEntropy(label_smoothing=smoothing, pos_weight=weights, labels=CLASSES)
    smoothed = targets * (1 - smoothing) + smoothing / 2
    expected = binary_terms(outputs, smoothed, torch.tensor(weights, dtype=torch.float64)).mean()
    torch.testing.assert_close(loss(outputs, targets), expected)
    loss.eval()
    plain = binary_terms(outputs, targets, torch.ones(CLASSES, dtype=torch.float64)).mean()
    torch.testing.assert_close(loss(outputs, targets.float()), plain)  # targets are never wider than the outputs
    assert loss.state_dict() == {}


def test_balanced_positive_weights_make_both_terms_weigh_the_same() -> None:
    targets = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.2).double()
    fractions = targets.mean(0).tolist()
    loss = BinaryCrossEntropy(label_smoothing=0.0, pos_weight="balanced", labels=3, label_fractions=fractions)
    assert loss.pos_weight is not None
    torch.testing.assert_close((loss.pos_weight * targets).sum(0), (1 - targets).sum(0))
    for fraction, which in ((0.0, "no training sample has label 1"), (1.0, "all training samples have label 1")):
        with pytest.raises(UserError, match=which):
            BinaryCrossEntropy(label_smoothing=0.0, pos_weight="balanced", labels=2, label_fractions=[0.5, fraction])
