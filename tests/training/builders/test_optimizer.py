import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.optim.traits import OptimizerTraits
from dlopt.parallel.mode import Mode, Placed
from dlopt.training.averaging import ExponentialAverage
from dlopt.training.builders.optimizer import (
    build_optimizer,
    build_schedule,
    check_label_sampling,
    check_optimizer,
    evaluates_once,
)
from dlopt.training.builders.precision import Precision
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support.lengths import constant
from tests.support.runs import resume, run_config, small_workload, start
from tests.support.sizes import SMALL, without


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (["scale_lr=none"], 1.0),
        (["scale_lr=linear"], 25 / 256),
        (["scale_lr=sqrt"], math.sqrt(25 / 256)),
        (["scale_lr=linear", "scale_lr_reference=5"], 5.0),
        (["scale_lr=linear", "data.batch_size=full", "scale_lr_reference=45"], 2.0),
        (["scale_lr=linear", "data.batch_size=512", "scale_lr_reference=45"], 2.0),  # 90 samples are one batch
        (["scale_lr=linear", "sampler.epoch_size=9", "data.batch_size=512", "scale_lr_reference=45"], 0.2),
        (["scale_lr=linear", "sampler.epoch_size=9", "data.batch_size=full", "scale_lr_reference=45"], 0.2),
        (["scale_lr=linear", "sampler.epoch_size=30", "scale_lr_reference=5"], 5.0),  # batches of 25 and 5
    ],
)
def test_learning_rate_by_batch_size(overrides: list[str], factor: float) -> None:
    optimizer = build_optimizer(small_workload("optimizer.lr=0.2", *overrides))
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.2 * factor, rel=1e-15)]


def test_every_trainable_parameter_is_in_one_group() -> None:
    workload = small_workload("model.norm=batch", "decay_norm_and_bias=false", "optimizer.weight_decay=0.1")
    optimizer = build_optimizer(workload)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(workload.module.parameters()))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in workload.module.named_parameters():
        assert decays[parameter] == (0.1 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize(("lr", "expected"), [("0.2", 0.1), ("null", 0.25)])
def test_the_rate_of_sam_replaces_that_of_its_base(lr: str, expected: float) -> None:
    keys = ["optimizer=sam", f"optimizer.lr={lr}", "optimizer.base.lr=0.5", "scale_lr=linear", "scale_lr_reference=50"]
    assert [group["lr"] for group in build_optimizer(small_workload(*keys)).param_groups] == [pytest.approx(expected)]


def test_rules_of_sam_refer_to_its_base() -> None:
    """The weight decay is a key of the base; the learning rate of SAM replaces that of the base before it is scaled."""
    rules = "optimizer.groups=[{match: head.weight, lr: 10, weight_decay: 2}]"
    keys = ["optimizer=sam", "optimizer.lr=0.2", "optimizer.base.lr=0.5", "optimizer.base.weight_decay=0.1"]
    workload = small_workload(*keys, rules, "decay_norm_and_bias=false", "scale_lr=linear", "scale_lr_reference=50")
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in build_optimizer(workload).param_groups
        for parameter in group["params"]
    }
    for name, parameter in workload.module.named_parameters():
        expected = (1.0, 0.2) if name == "head.weight" else (0.1, 0.1 if parameter.ndim > 1 else 0.0)
        assert found[parameter] == pytest.approx(expected), name


@pytest.mark.parametrize("name", ["newton", "newton_cg", "newton_undamped"])
def test_refuses_clipping_that_would_be_ignored(name: str, tmp_path: Path) -> None:
    workload = small_workload(f"optimizer={name}", "clip=norm")
    with pytest.raises(UserError, match=r"clip=norm: .*Newton.* computes the gradient of its step itself"):
        probe_trainer(workload, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "freezes"),
    [
        ([], True),
        (["clip=value"], True),
        (["clip=norm"], False),
        (["optimizer=sam"], False),
        (["optimizer=lars"], False),
        (["optimizer=rprop"], False),
        (["optimizer=irprop"], False),
        pytest.param(
            ["optimizer=schedule_free_sgd"],
            False,
            marks=pytest.mark.skipif(find_spec("schedulefree") is None, reason="needs schedulefree"),
        ),
    ],
)
def test_freezes_finished_groups_only_where_others_do_not_depend_on_their_gradients(
    overrides: list[str], freezes: bool
) -> None:
    """A norm over all layers would lack the gradients of the frozen ones. Some methods move at a learning rate of 0."""
    workload = small_workload("optimizer.groups=[{match: '*1*', horizon: 0.5}]", "schedule=linear", *overrides)
    schedule = build_schedule(workload, build_optimizer(workload), constant(40, 10))
    for _ in range(30):
        schedule.step()
    assert schedule.resting == 1 and all(p.requires_grad for p in workload.module.parameters()) != freezes


def test_evaluates_once() -> None:
    workload, parameters = small_workload(), [nn.Parameter(torch.zeros(2))]
    assert evaluates_once(workload, torch.optim.SGD(parameters, lr=1.0))
    lbfgs = torch.optim.LBFGS(parameters)
    assert not evaluates_once(workload, lbfgs)
    workload.precision = Precision("fp16", torch.device("cpu"))
    assert evaluates_once(workload, torch.optim.SGD(parameters, lr=1.0))
    with pytest.raises(UserError, match=r"precision=fp16: LBFGS .*=bf16 or fp32"):
        evaluates_once(workload, lbfgs)
    workload.precision = Precision("bf16_pure", torch.device("cpu"))
    with pytest.raises(UserError, match=r"precision=bf16_pure: LBFGS .*=bf16 or fp32"):
        evaluates_once(workload, lbfgs)


def test_refuses_to_draw_labels_without_class_probabilities() -> None:
    sophia = "optimizer=sophia", "optimizer.hessian=gnb"
    assert not evaluates_once(small_workload(*sophia), build_optimizer(small_workload(*sophia)))
    for extra, message in (
        (["loss=mse"], "loss=MSE: the outputs are no class probabilities; use loss=cross_entropy"),
        ([f"loss.class_weights=[{','.join('1' * 10)}]"], r"loss.class_weights: .*; set loss.class_weights=null"),
    ):
        workload = small_workload(*sophia, *extra)
        with pytest.raises(UserError, match=message):
            build_optimizer(workload)
    workload, mode = small_workload(*sophia), Mode(torch.device("cpu"), "ddp")
    mode.ranks.processes = 2
    with pytest.raises(UserError, match=r"parallel=ddp: Sophia draws labels .*; use parallel=single"):
        check_label_sampling(mode, build_optimizer(workload), workload.loss)


# -- fused kernels


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (["optimizer=sgd"], True),
        (["optimizer=adam"], True),
        (["optimizer=adamw"], True),
        (["optimizer=adagrad"], True),
        (["optimizer=rmsprop"], False),
        (["optimizer=adamw", "+optimizer.fused=false"], False),
        (["optimizer=adamw", "optimizer.cautious=true"], False),
        (["optimizer=adam", "+optimizer.foreach=true"], False),
    ],
)
def test_torch_optimizers_are_fused_unless_configured(overrides: list[str], fused: bool) -> None:
    optimizer = build_optimizer(small_workload(*overrides))
    assert bool(optimizer.param_groups[0].get("fused")) is fused


def convolutional(*more: str) -> tuple[Workload, torch.optim.Optimizer]:
    """Returns a convolutional net in channels-last format and in fp64, and its optimizer."""
    model = ["model=resnet20", "model.depth=8", "precision=fp64", "channels_last=true"]
    workload = build_workload(run_config(*without(SMALL, "model"), *model, *more))
    return workload, build_optimizer(workload)


def update(workload: Workload, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(6, *workload.dataset.train.shape, dtype=torch.float64)
    optimizer.zero_grad()
    workload.module(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in workload.module.parameters())
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_fused_kernel_equals_loop(name: str) -> None:
    loop = ["+optimizer.fused=false", *([] if name == "adamw" else ["+optimizer.foreach=false"])]
    weights = []
    for more in ([], loop):
        workload, optimizer = convolutional(f"optimizer={name}", "optimizer.weight_decay=0.01", *more)
        for step in range(4):
            update(workload, optimizer, step)
        weights.append([p.detach().clone() for p in workload.module.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keys", ["", "nesterov=true", "dampening=0.5"])
def test_fused_sgd_takes_gradients_that_begin_later(keys: str) -> None:
    """As of a layer that the first batches skip; torch's kernel fails on a momentum that only others have."""
    weights = []
    for more in ([], ["+optimizer.fused=false", "+optimizer.foreach=false"]):
        own = [f"optimizer.{keys}"] if keys else []
        workload = small_workload("optimizer=sgd", "precision=fp64", "optimizer.weight_decay=0.1", *own, *more)
        optimizer, params = build_optimizer(workload), list(workload.module.parameters())
        torch.manual_seed(0)
        for step in range(4):
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
            for index, p in enumerate(params):
                gradient = torch.randn_like(p)
                p.grad = None if step < index else gradient
            optimizer.step()
        weights.append([p.detach().clone() for p in params])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_resuming_chooses_kernels_anew(tmp_path: Path) -> None:
    start(tmp_path, *SMALL, "optimizer=adamw", "+optimizer.fused=false", "epochs=1")
    assert not load(tmp_path / "checkpoints" / "last.pt").optimizer["param_groups"][0]["fused"]
    resume(tmp_path, *SMALL, "optimizer=adamw", "epochs=2", "schedule_epochs=2")
    assert load(tmp_path / "checkpoints" / "last.pt").optimizer["param_groups"][0]["fused"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_loading_a_state_restores_its_layout(name: str) -> None:
    """Another mode may have saved it with other strides, for which a fused kernel would pair the wrong elements."""

    choice = f"optimizer={name}"
    (one, fused), (other, plain) = convolutional(choice), convolutional(choice, "+optimizer.fused=false")
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


def test_gradients_with_other_strides_disable_the_fused_kernel() -> None:
    workload = small_workload("optimizer=sgd")
    optimizer = build_optimizer(workload)
    for parameter in workload.module.parameters():
        parameter.grad = torch.randn(*reversed(parameter.shape)).permute(*range(parameter.ndim - 1, -1, -1))
    expected = [p.detach() - 0.1 * p.grad for p in workload.module.parameters() if p.grad is not None]
    optimizer.param_groups[0].update(lr=0.1, momentum=0.0)
    optimizer.step()
    assert not optimizer.param_groups[0]["fused"]
    for parameter, value in zip(workload.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_buffers_are_synchronized_before_they_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    synchronize = partial(calls.append, "synchronized")
    monkeypatch.setattr(Mode, "place", lambda self, model, shape: Placed(model, synchronize))
    monkeypatch.setattr(ExponentialAverage, "update", lambda self: calls.append("averaged"))
    trainer = probe_trainer(small_workload("ema=0.9"), tmp_path)
    for number, batch in enumerate(trainer.batches.epoch(0)):
        trainer.run_update(batch, number)
    assert calls == ["synchronized", "averaged"] * (number + 1)


@pytest.mark.parametrize(("sharding", "scope", "needs"), [
    ("tensors", "model", "full tensors or the full model"), ("tensors", "tensor", "full tensors or the full model"),
    ("layers", "model", "all layers"),
])  # fmt: skip
def test_modes_that_split_the_model_refuse_optimizers_that_need_it(sharding: Any, scope: Any, needs: str) -> None:
    class Mine(torch.optim.SGD):
        traits: ClassVar[OptimizerTraits] = OptimizerTraits(scope=scope, rests_at_zero_lr=True)

    mode = Mode(torch.device("cpu"), "filter")
    mode.sharding.kind = sharding
    optimizer = Mine([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(UserError, match=rf"parallel=filter: Mine needs {needs}, but"):
        check_optimizer(mode, optimizer)


@pytest.mark.parametrize("sharding", ["tensors", "layers"])
def test_modes_that_split_the_model_refuse_optimizers_without_traits(sharding: Any) -> None:
    class Mine(torch.optim.SGD):
        """States no traits."""

    mode = Mode(torch.device("cpu"), "fsdp")
    optimizer = Mine([torch.zeros(2, requires_grad=True)], lr=0.1)
    check_optimizer(mode, optimizer)
    mode.sharding.kind = sharding
    with pytest.raises(UserError, match=r'Mine does not say .* add to the class: traits = .*\(scope="element"\)$'):
        check_optimizer(mode, optimizer)
