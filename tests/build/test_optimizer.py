import math

import pytest
import torch
from torch import nn

from dlopt.build.optimizer import evaluations, optimizer_of
from dlopt.build.setup import Setup
from dlopt.build.setup import set_up as set_up_experiment
from dlopt.engine.precision import Precision
from dlopt.errors import UserError
from tests.engine.runs import SMALL, experiment


def set_up(*overrides: str) -> Setup:
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
