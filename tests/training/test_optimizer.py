import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.errors import UserError
from dlopt.training.build import Workload
from dlopt.training.build import build_workload as set_up_experiment
from dlopt.training.checkpoint import load
from dlopt.training.optimizer import evaluations, optimizer_of
from dlopt.training.precision import Precision
from tests.training.runs import SMALL, experiment, resume, start


def build_workload(*overrides: str) -> Workload:
    return set_up_experiment(experiment(*SMALL, *overrides))


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
    optimizer = optimizer_of(build_workload("optimizer.lr=0.2", *overrides))
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.2 * factor, rel=1e-15)]


def test_every_trainable_parameter_is_in_one_group() -> None:
    workload = build_workload("model.norm=batch", "decay_norm_and_bias=false", "optimizer.weight_decay=0.1")
    optimizer = optimizer_of(workload)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(workload.module.parameters()))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in workload.module.named_parameters():
        assert decays[parameter] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_how_often_an_optimizer_evaluates() -> None:
    workload, parameters = build_workload(), [nn.Parameter(torch.zeros(2))]
    assert evaluations(workload, torch.optim.SGD(parameters, lr=1.0)) == "once"
    lbfgs = torch.optim.LBFGS(parameters)
    assert evaluations(workload, lbfgs) == "many"
    workload.precision = Precision("fp16", torch.device("cpu"))
    assert evaluations(workload, torch.optim.SGD(parameters, lr=1.0)) == "once"
    with pytest.raises(UserError, match=r"precision=fp16: LBFGS .*=bf16 or fp32"):
        evaluations(workload, lbfgs)


# -- one kernel for an update


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (["optimizer=sgd"], True),
        (["optimizer=adam"], True),
        (["optimizer=adamw"], True),
        (["optimizer=adagrad"], True),
        (["optimizer=rmsprop"], False),
        (["optimizer=adamw", "+optimizer.fused=false"], False),
        (["optimizer=adamw", "+optimizer.foreach=true"], False),
    ],
)
def test_torchs_optimizers_are_fused_unless_something_is_typed(overrides: list[str], fused: bool) -> None:
    optimizer = optimizer_of(build_workload(*overrides))
    assert bool(optimizer.param_groups[0].get("fused")) is fused


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_the_one_kernel_does_what_torchs_loop_does(name: str) -> None:
    """Through the backward pass of a convolutional net, channels last."""
    lines = [each for each in SMALL if not each.startswith("model")]
    overrides = [*lines, "model=resnet20", "model.depth=8", f"optimizer={name}", "optimizer.weight_decay=0.01"]
    weights = []
    for more in ([], ["+optimizer.fused=false", "+optimizer.foreach=false"]):
        workload = set_up_experiment(experiment(*overrides, *more, "precision=fp64", "channels_last=true"))
        optimizer = optimizer_of(workload)
        for step in range(4):
            torch.manual_seed(step)
            inputs = torch.randn(6, *workload.dataset.train.shape, dtype=torch.float64)
            optimizer.zero_grad()
            workload.module(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
            assert all(p.grad is not None and p.grad.stride() == p.stride() for p in workload.module.parameters())
            optimizer.step()
        weights.append([p.detach().clone() for p in workload.module.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_kernels_are_not_the_checkpoints_affair(tmp_path: Path) -> None:
    start(tmp_path, *SMALL, "optimizer=adamw", "+optimizer.fused=false", "epochs=1")
    state = load(tmp_path / "checkpoints" / "last.pt")
    assert not state["optimizer"]["param_groups"][0]["fused"]
    resume(tmp_path, *SMALL, "optimizer=adamw", "epochs=2")
    assert load(tmp_path / "checkpoints" / "last.pt")["optimizer"]["param_groups"][0]["fused"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_a_state_that_lies_otherwise_is_laid_out_anew(name: str) -> None:
    """As another mode may have saved it: the one kernel would mix up its elements."""

    def made(*more: str) -> tuple[Workload, torch.optim.Optimizer]:
        lines = [each for each in SMALL if not each.startswith("model")]
        model = ["model=resnet20", "model.depth=8", "precision=fp64", "channels_last=true"]
        workload = set_up_experiment(experiment(*lines, *model, f"optimizer={name}", *more))
        return workload, optimizer_of(workload)

    def update(workload: Workload, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        inputs = torch.randn(6, *workload.dataset.train.shape, dtype=torch.float64)
        optimizer.zero_grad()
        workload.module(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()

    (one, fused), (other, plain) = made(), made("+optimizer.fused=false")
    update(one, fused, 1)
    update(other, plain, 1)
    state = fused.state_dict()
    for values in state["state"].values():
        for key, value in values.items():
            values[key] = value.contiguous() if isinstance(value, torch.Tensor) else value
    fused.load_state_dict(state)
    update(one, fused, 2)
    update(other, plain, 2)
    assert fused.param_groups[0]["fused"]
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_that_lie_otherwise_have_torchs_loop() -> None:
    workload = build_workload("optimizer=sgd")
    optimizer = optimizer_of(workload)
    for parameter in workload.module.parameters():
        parameter.grad = torch.randn(*reversed(parameter.shape)).permute(*range(parameter.ndim - 1, -1, -1))
    expected = [p.detach() - 0.1 * p.grad for p in workload.module.parameters() if p.grad is not None]
    optimizer.param_groups[0].update(lr=0.1, momentum=0.0)
    optimizer.step()
    assert not optimizer.param_groups[0]["fused"]
    for parameter, value in zip(workload.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
