import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dlopt.build.batches import evaluation_batches, training_batches
from dlopt.build.norms import _smallest_part, check_single_values
from dlopt.build.optimizer import evaluations, optimizer_of
from dlopt.build.setup import Setup, choose_device, load_weights
from dlopt.build.setup import set_up as set_up_experiment
from dlopt.data.samples import Dataset, InMemory
from dlopt.engine.precision import Precision
from dlopt.errors import UserError
from tests.engine.runs import SMALL, experiment, same


def set_up(*overrides: str) -> Setup:
    return set_up_experiment(experiment(*SMALL, *overrides))


# -- the machine


def test_auto_is_an_accelerator_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for found, expected in (("cuda", "cuda"), ("mps", "mps"), ("xpu", "cpu"), (None, "cpu")):
        device = None if found is None else torch.device(found)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=found: found is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=device: device)
        assert choose_device("auto") == torch.device(expected)


# -- model and weights


def test_weights_follow_their_own_seed_alone() -> None:
    first = dict(set_up("seed=1", "init_seed=7").module.state_dict())
    torch.rand(5)  # whatever was drawn before
    assert same(first, dict(set_up("seed=2", "init_seed=7").module.state_dict()))
    assert not same(first, dict(set_up("seed=1").module.state_dict()))


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_weights_are_the_same_in_every_precision(precision: str) -> None:
    reference = set_up("precision=fp32").module
    setup = set_up(f"precision={precision}")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for a, b in zip(reference.parameters(), setup.module.parameters(), strict=True):
        assert b.dtype == dtype and torch.equal(a.to(dtype), b)
    inputs, _ = next(training_batches(setup).epoch(0))
    assert inputs.dtype == dtype


def test_outputs_follow_the_data() -> None:
    inputs = torch.zeros(4, 3)

    def outputs(targets: torch.Tensor, classes: tuple[str, ...] | None) -> int:
        return Dataset(InMemory(inputs, targets), None, None, classes).outputs

    assert outputs(torch.zeros(4, dtype=torch.int64), ("a", "b", "c")) == 3
    assert outputs(torch.zeros(4), None) == 1
    assert outputs(torch.zeros(4, 5), None) == 5


@pytest.mark.parametrize("wanted", ["auto", "true", "false"])
@pytest.mark.parametrize("model", ["resnet20", "mlp"])
def test_memory_format(wanted: str, model: str) -> None:
    lines = [line for line in SMALL if not line.startswith("model")]
    setup = set_up_experiment(experiment(*lines, f"model={model}", f"channels_last={wanted}"))
    expected = wanted == "true" or (wanted == "auto" and model == "resnet20")
    assert (setup.memory_format == torch.channels_last) is expected
    inputs, _ = next(training_batches(setup).epoch(0))
    assert inputs.is_contiguous(memory_format=setup.memory_format)


def test_normalization_comes_from_a_checkpoint_where_there_is_one() -> None:
    first = set_up()
    state = {name: value * 2 for name, value in first.normalize.state_dict().items()}
    resumed = set_up_experiment(experiment(*SMALL), state)
    assert same(dict(resumed.normalize.state_dict()), state)
    assert not same(dict(first.normalize.state_dict()), state)


# -- batches


def test_order_and_augmentation_have_streams_of_their_own() -> None:
    def first(*overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
        return next(training_batches(set_up("augmentation=crop_flip", *overrides)).epoch(0))

    reference = first()
    assert same(first(), reference)
    other_order = first("order_seed=5")
    assert not torch.equal(other_order[1], reference[1])
    other_draws = first("augmentation_seed=5")
    assert torch.equal(other_draws[1], reference[1]) and not torch.equal(other_draws[0], reference[0])
    assert same(first("init_seed=5"), reference)


def test_evaluation_batches_are_neither_shuffled_nor_augmented_nor_cut() -> None:
    setup = set_up("augmentation=crop_flip", "data.drop_last=true")
    assert setup.dataset.val is not None
    batches = list(evaluation_batches(setup, setup.dataset.val).epoch(0))
    assert [len(targets) for _, targets in batches] == [25, 5]
    everything = setup.normalize(setup.dataset.val.fetch(torch.arange(30)))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), everything)
    assert torch.equal(torch.cat([targets for _, targets in batches]), setup.dataset.val.targets)


# -- optimizer


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (["scale_lr=none"], 1.0),
        (["scale_lr=linear"], 25 / 256),
        (["scale_lr=sqrt"], math.sqrt(25 / 256)),
        (["scale_lr=linear", "scale_lr_reference=5"], 5.0),
        (["scale_lr=linear", "data.batch_size=full", "scale_lr_reference=45"], 2.0),
    ],
)
def test_learning_rate_by_batch_size(overrides: list[str], factor: float) -> None:
    optimizer = optimizer_of(set_up("optimizer.lr=0.2", *overrides))
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.2 * factor, rel=1e-15)]


def test_every_trainable_parameter_is_in_one_group() -> None:
    setup = set_up("model.norm=batch", "decay_norm_and_bias=false", "optimizer.weight_decay=0.1")
    optimizer = optimizer_of(setup)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(setup.module.parameters()))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in setup.module.named_parameters():
        assert decays[parameter] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_how_often_an_optimizer_evaluates() -> None:
    setup, parameters = set_up(), [nn.Parameter(torch.zeros(2))]
    assert evaluations(setup, torch.optim.SGD(parameters, lr=1.0)) == "once"
    lbfgs = torch.optim.LBFGS(parameters)
    assert evaluations(setup, lbfgs) == "many"
    setup.precision = Precision("fp16", torch.device("cpu"))
    assert evaluations(setup, torch.optim.SGD(parameters, lr=1.0)) == "once"
    with pytest.raises(UserError, match=r"precision=fp16: LBFGS .*=bf16 or fp32"):
        evaluations(setup, lbfgs)


# -- batch norm over one value


@given(count=st.integers(1, 60), size=st.integers(1, 60), accumulate=st.integers(1, 12), drop_last=st.booleans())
def test_the_smallest_micro_batch_is_found(count: int, size: int, accumulate: int, drop_last: bool) -> None:
    size = min(size, count)
    parts = torch.zeros(count).split(size)
    if drop_last:
        parts = tuple(part for part in parts if len(part) == size)
    sizes = [len(micro) for part in parts for micro in part.tensor_split(min(accumulate, len(part)))]
    assert _smallest_part(count, size, accumulate, drop_last) == min(sizes)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["data.batch_size=1"], True),
        (["data.batch_size=1", "model.norm=none"], False),
        (["data.batch_size=1", "model.norm=layer"], False),
        (["data.batch_size=89"], True),  # 90 samples: one is left over
        (["data.batch_size=89", "data.drop_last=true"], False),
        (["data.batch_size=30"], False),
        (["data.batch_size=30", "accumulate=30"], True),
        (["data.batch_size=31", "accumulate=10"], False),  # the last batch of 28 is cut into parts of 3 and 2
        (["data.batch_size=31", "accumulate=15"], True),  # and here of 2 and 1
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_batch_norm_over_one_value_is_refused(overrides: list[str], refused: bool) -> None:
    setup = set_up("model.norm=batch", *overrides)
    before = {name: value.clone() for name, value in setup.module.state_dict().items()}
    if refused:
        with pytest.raises(UserError, match=r"one value per channel"):
            check_single_values(setup)
    else:
        check_single_values(setup)
    assert same(dict(setup.module.state_dict()), before)
    assert setup.module.training


def test_batch_norm_over_one_image_has_many_values() -> None:
    lines = [line for line in SMALL if not line.startswith("model")]
    check_single_values(set_up_experiment(experiment(*lines, "model=resnet20", "data.batch_size=1")))


# -- weights from a file


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "weights.pt"
        torch.save(content, path)
        return path

    return write


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes)


def net(classes: int = 3) -> Net:
    return Net(classes)


def test_weights_of_the_same_model(save: Callable[[Any], Path]) -> None:
    source, model = net(), net()
    lines = load_weights(model, save(source.state_dict()))
    assert same(dict(model.state_dict()), dict(source.state_dict()))
    assert len(lines) == 1


def test_another_head_keeps_its_own_weights_and_is_told(save: Callable[[Any], Path]) -> None:
    source, model = net(10), net(3)
    head = model.head.weight.detach().clone()
    lines = load_weights(model, save({**source.state_dict(), "extra": torch.zeros(1)}))
    assert torch.equal(model.hidden.weight, source.hidden.weight) and torch.equal(model.head.weight, head)
    told = "\n".join(lines)
    assert "head.weight, head.bias" in told and "extra" in told


def test_weights_of_which_none_fits_are_refused(save: Callable[[Any], Path]) -> None:
    with pytest.raises(UserError, match=r"init_from=.*weights\.pt: none"):
        load_weights(net(), save({"other": torch.zeros(3)}))
