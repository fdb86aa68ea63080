from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt import losses
from dlopt.data.batches import Batch
from dlopt.losses import CrossEntropy
from dlopt.tasks.classification import Classification
from dlopt.tasks.regression import Regression
from dlopt.training.builders.precision import Precision
from dlopt.training.evaluate import evaluate

CLASSES, NUMBERS = Classification(3), Regression(1)
CROSS_ENTROPY = CrossEntropy(label_smoothing=0.2, class_weights=None, classes=3)


def data(count: int = 23) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=draws), torch.randint(3, (count,), generator=draws)


class Collected:
    """A further metric: the samples."""

    def __init__(self) -> None:
        self.samples = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.samples += len(outputs)

    def means(self, reduce: object) -> dict[str, float]:
        return {"samples": self.samples}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def cut(size: int, count: int = 23) -> Iterator[Batch]:
    inputs, targets = data(count)
    yield from (Batch(x, y, len(x)) for x, y in zip(inputs.split(size), targets.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 5, 22, 23, 50])
def test_result_does_not_depend_on_batch_size(size: int) -> None:
    model = net().double().eval()
    inputs, targets = data()
    loss, right = 0.0, 0
    for x, y in zip(inputs.double(), targets, strict=True):
        outputs = model(x[None])
        loss += F.cross_entropy(outputs, y[None]).item()
        right += int(outputs.argmax()) == int(y)
    batches = (Batch(x.double(), y, len(x)) for x, y in cut(size))
    found = evaluate(model.train(), model, batches, CROSS_ENTROPY, task=CLASSES, split="val")
    assert found is not None and set(found) == {"val_loss", "val_accuracy"}
    assert found["val_loss"] == pytest.approx(loss / 23, rel=1e-13)
    assert found["val_accuracy"] == right / 23


@pytest.mark.parametrize("training", [True, False])
def test_does_not_change_the_model(training: bool) -> None:
    model, loss = (
        net().train(training),
        CrossEntropy(label_smoothing=0.2, class_weights=None, classes=3).train(training),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(model, model, cut(5), loss, task=CLASSES, split="val")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in (*model.modules(), loss))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_restores_training_mode_of_each_layer_after_an_error() -> None:
    model = net()
    model[0].eval()
    with pytest.raises(RuntimeError):
        wrong = Batch(torch.zeros(2, 5), torch.zeros(2), 2)
        evaluate(model, model, [wrong], CROSS_ENTROPY, task=CLASSES, split="val")
    assert model.training and not model[0].training and CROSS_ENTROPY.training


class After:
    """Becomes true at the n-th check."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_returns_none_if_interrupted() -> None:
    model, taken = net(), []

    def batches() -> Iterator[Batch]:
        for number, each in enumerate(cut(5)):
            taken.append(number)
            yield each

    found = evaluate(model, model, batches(), CROSS_ENTROPY, task=CLASSES, split="val", interruption=After(2))
    assert found is None and taken == [0, 1, 2]
    assert model.training


def test_regression() -> None:
    model = nn.Linear(4, 1)
    inputs = data()[0]
    targets = inputs.sum(1)
    batches = [Batch(inputs[:20], targets[:20], 20), Batch(inputs[20:], targets[20:], 3)]
    found = evaluate(model, lambda x: model(x).squeeze(1), batches, nn.MSELoss(), task=NUMBERS, split="test")
    expected = F.mse_loss(model(inputs).squeeze(1), targets).item()
    assert found == {"test_loss": pytest.approx(expected, rel=1e-6)}


def test_bf16_outputs_have_an_fp32_loss() -> None:
    """A bf16 loss would have three digits."""
    model = net()
    autocast = Precision("bf16", torch.device("cpu")).autocast
    low = autocast(model)
    found = evaluate(model, low, cut(23), CROSS_ENTROPY, task=CLASSES, split="val")
    with torch.no_grad():
        outputs = autocast(model.eval())(data()[0])
    assert outputs.dtype == torch.bfloat16
    assert found is not None
    assert found["val_loss"] == pytest.approx(F.cross_entropy(outputs.float(), data()[1]).item(), rel=1e-6)


@pytest.mark.parametrize(("large", "extra", "dtype"), [
    (True, [], torch.bfloat16),  # the loss promotes its chunks
    (True, [Collected()], torch.float32),
    (False, [], torch.float32),
])  # fmt: skip
def test_outputs_in_chunks_are_not_promoted_as_a_whole(
    large: bool, extra: list[Collected], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_MAX_CHUNK", 8 if large else 1 << 24)
    seen: list[torch.dtype] = []
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, classes=3)
    loss.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    model = net()
    low = Precision("bf16", torch.device("cpu")).autocast(model)
    found = evaluate(model, low, cut(23), loss, task=CLASSES, split="val", extra=extra)
    assert set(seen) == {dtype}
    assert found is not None
    model.eval()
    with torch.no_grad():
        outputs = low(data()[0])
    assert found["val_loss"] == pytest.approx(F.cross_entropy(outputs.float(), data()[1]).item(), rel=1e-6)
    assert found["val_accuracy"] == (outputs.argmax(1) == data()[1]).double().mean().item()


def test_empty_batches_are_passed_to_the_model_and_not_counted() -> None:
    """A rank with samples may wait for this rank in a collective within the model."""
    model, sizes = net().double(), []
    inputs, targets = data()
    inputs = inputs.double()

    def call(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        outputs: Tensor = model(inputs)
        return outputs

    parts = [Batch(inputs, targets, 23), Batch(inputs[:0], targets[:0], 23)]
    whole, with_none = (
        evaluate(model, call, batches, CROSS_ENTROPY, task=CLASSES, split="val") for batches in (parts[:1], parts)
    )
    assert whole == with_none
    assert sizes == [23, 23, 0]
