"""Measures of networks against their definitions on networks with known answers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dlopt.basics.errors import UserError
from dlopt.lab.comparison import measures
from dlopt.models.layers import frozen_statistics
from dlopt.training.builders.workload import Workload, build_workload
from tests.support.runs import run_config

LINES = ("data.subset=64", "data.val_split=0.0", "data.batch_size=16", "threads=1")


def workload(*more: str, model: tuple[str, ...] = ("model=mlp", "model.widths=[6,5]")) -> Workload:
    return build_workload(run_config(*LINES, *model, *more))


def test_only_batch_norm_makes_samples_dependent() -> None:
    plain, layer, batch = (workload(f"model.norm={norm}") for norm in ("none", "layer", "batch"))
    for each in (plain, layer):
        assert measures.sample_dependence(each) < 1e-4 and measures.gradient_bias(each) < 1e-4
    assert measures.sample_dependence(batch) > 0.1
    sizes = (2, 8, 64, 100, "full")
    biases = [measures.gradient_bias(workload("model.norm=batch", f"data.batch_size={size}")) for size in sizes]
    assert biases[0] > biases[1] > 1e-2 and max(biases[2:]) < 1e-4  # from 64 on, all samples are in one batch
    statistics = [buffer.clone() for buffer in batch.module.buffers()]
    measures.sample_dependence(batch)
    assert all(torch.equal(a, b) for a, b in zip(statistics, batch.module.buffers(), strict=True))


def test_gradient_ratio_of_a_deep_network_vanishes() -> None:
    deep = workload("model.norm=none", f"model.widths={[8] * 12}", "model.activation=sigmoid")
    assert measures.gradient_ratio(deep) < 1e-6 < 0.1 < measures.gradient_ratio(workload("model.norm=none"))


def test_gradient_ratio_follows_the_order_of_execution() -> None:
    made = workload("model.norm=none", "model.widths=[8,8,8]", "model.activation=sigmoid")
    expected = measures.gradient_ratio(made)
    layers, forward = made.module, type(made.module).forward
    names = [*layers._modules]
    turned = nn.Module()
    for name in reversed(names):
        turned.add_module(name, layers.get_submodule(name))
    turned.forward = lambda x: forward(layers, x)  # type: ignore[method-assign]
    assert measures.gradient_ratio(replace(made, module=turned)) == expected


def test_the_condition_number_of_a_linear_regression_is_that_of_its_inputs() -> None:
    """The Hessian of the squared error is 2 X^T X / N with a column of ones for the bias."""
    linear = ("data=diabetes", "data.val_split=0.2", "model=mlp", "model.widths=[]", "model.norm=none", "loss=mse")
    made = build_workload(run_config(*linear, "normalize=standardize"))
    inputs = made.normalize(made.dataset.train.fetch(torch.arange(len(made.dataset.train)))).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    assert measures.condition_number(made) == pytest.approx(float(torch.linalg.cond(inputs)) ** 2, rel=1e-6)
    white = build_workload(run_config(*linear, "normalize=pca_whiten"))
    assert measures.condition_number(white) == pytest.approx(1, rel=0.05)


def test_the_condition_number_needs_a_small_model() -> None:
    with pytest.raises(UserError, match="at most 1,000 parameters; the model has"):
        measures.condition_number(workload(model=("model=mlp", "model.widths=[64]")))


def _set(module: nn.Module, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            dict(module.named_parameters())[name.replace("__", ".")].copy_(torch.as_tensor(value))


def test_units_without_outgoing_weights_are_idle() -> None:
    made = workload("model.norm=none", "model.widths=[4]")
    weights = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    weights[:, 2:] = 0
    _set(made.module, head__weight=weights, layer1__linear__bias=[1.0] * 4)
    assert measures.idle_units(made) == pytest.approx(0.5)
    loss, without = measures._losses_without_units(made)
    assert without[2:].tolist() == pytest.approx([loss, loss])
    bias = weights[:, :1].clone()
    weights[:, 0] = 0
    _set(made.module, head__weight=weights)
    removed = measures._losses_without_units(made)[0]
    assert float(without[0]) == pytest.approx(removed) and float(bias.norm()) > 0
    assert measures.unit_dependence(made) == pytest.approx(
        float((measures._losses_without_units(made)[1] / removed - 1).mean())
    )


def test_input_sensitivity_of_a_linear_model_is_the_norm_of_its_weights() -> None:
    made = workload("model.norm=none", "model.widths=[]")
    weight = dict(made.module.named_parameters())["head.weight"]
    assert measures.input_sensitivity(made) == pytest.approx(float(weight.detach().norm()), rel=1e-5)


def test_memory_gradient_is_the_product_of_the_recurrent_weights() -> None:
    data = ("data=copying", "data.length=6", "data.noise=0", "normalize=none")
    made = workload(*data, model=("model=rnn", "model.hidden=4"))
    names = dict(made.module.named_parameters())
    with torch.no_grad():
        for name, parameter in names.items():
            if "input" in name:
                parameter.zero_()
            elif name.endswith("hidden.weight"):
                parameter.copy_(0.5 * torch.eye(4))
    assert measures.memory_gradient(made) == pytest.approx(0.5**4, rel=1e-4)  # tanh'(0) = 1; five states, four steps


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("memory_gradient", ("model=mlp",)),
        ("unit_dependence", ("model=mlp", "model.widths=[]")),
        ("idle_units", ("model=vit", "model.depth=1", "model.width=8", "model.heads=2")),
    ],
)
def test_models_without_the_measured_quantity_are_refused(name: str, model: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"comparison.metrics: .*{name}.* need"):
        getattr(measures, name)(workload(model=model))


def test_texts_have_no_input_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measures, "spread_samples", lambda workload: (torch.ones(2, 3, dtype=torch.long), torch.ones(2))
    )
    with pytest.raises(UserError, match=r"comparison\.metrics: input_sensitivity needs data of real numbers"):
        measures.input_sensitivity(workload())


def test_dependence_of_few_samples() -> None:
    data = ("data=linear", "data.train_size=5", "data.batch_size=16", "loss=mse", "normalize=none", "threads=1")
    few = build_workload(run_config(*data, "model=mlp", "model.widths=[6]", "model.norm=batch"))
    assert measures.sample_dependence(few) < 1e-4  # all samples are in every batch


def _set_identities(made: Workload, gain: float) -> None:
    """Sets every weight matrix to `gain` times the identity (cut to its shape), and every bias to 0."""
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.copy_(gain * torch.eye(*parameter.shape) if parameter.ndim == 2 else torch.zeros_like(parameter))


def test_saturated_values_are_those_beyond_the_bound_of_the_sigmoid() -> None:
    made = workload("model.activation=sigmoid", "model.norm=none", model=("model=mlp", "model.widths=[64,64]"))
    _set_identities(made, 3.0)
    first = 3 * measures.spread_samples(made)[0].flatten(1)
    second = 3 * first.sigmoid()  # at most 3
    bound = math.log((1 + 0.95**0.5) / (1 - 0.95**0.5))  # 4 s (1 - s) = 0.05
    assert 0.05 < measures.saturated(made, 1, "saturated_1") < 0.95
    assert measures.saturated(made, 1, "saturated_1") == pytest.approx(float((first.abs() > bound).double().mean()))
    assert measures.saturated(made, 2, "saturated_2") == measures.saturated(made, -1, "saturated_last") == 0
    assert measures.activation_std(made) == pytest.approx(float(second.sigmoid().std(correction=0)), rel=1e-5)
    for number, name in ((3, "saturated_3"), (1, "saturated_1")):
        with pytest.raises(UserError, match=rf"comparison\.metrics: {name} needs"):
            measures.saturated(made if number == 3 else workload(), number, name)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_largest_eigenvalue_is_that_of_the_whole_hessian(norm: str) -> None:
    made = workload(f"model.norm={norm}", "precision=fp64", model=("model=mlp", "model.widths=[3]"))
    module = made.module.double().train()
    inputs, targets = measures.spread_samples(made)
    inputs = inputs.double()
    names, values = zip(*module.named_parameters(), strict=True)
    sizes, shapes = [value.numel() for value in values], [value.shape for value in values]

    def loss(flat: Tensor) -> Tensor:
        slices = zip(names, flat.split(sizes), shapes, strict=True)
        parameters = {name: each.view(shape) for name, each, shape in slices}
        value: Tensor = made.loss(functional_call(module, parameters, (inputs,)), targets)
        return value

    with frozen_statistics(module):
        point = torch.cat([value.detach().flatten() for value in values])
        hessian = torch.autograd.functional.hessian(loss, point)
        gradient = torch.autograd.functional.jacobian(loss, point)
        rate = made.run_config.optimizer.arguments["lr"]
        change = float(loss(point - rate * gradient) - loss(point))
    first = rate * float(gradient @ gradient)
    assert measures.largest_eigenvalue(made) == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    assert measures.higher_order_effect(made) == pytest.approx(abs(change + first) / first, rel=1e-4)
    small = workload(
        f"model.norm={norm}", "precision=fp64", "optimizer.lr=1e-5", model=("model=mlp", "model.widths=[3]")
    )
    small.module.double()
    quadratic = 1e-5 * abs(float(gradient @ hessian @ gradient)) / (2 * float(gradient @ gradient))
    assert measures.higher_order_effect(small) == pytest.approx(quadratic, rel=1e-2)
