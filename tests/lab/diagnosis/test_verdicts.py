"""Verdicts follow the statistics, and advice omits what is already set."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from dlopt.instruments.layers import LayerProbe, LayerStatistics, Moments
from dlopt.lab.diagnosis.probes import TimeLag
from dlopt.lab.diagnosis.verdicts import Facts, Verdict, advice, clipping_norm, healthy, verdicts


def _probed(activation: type[nn.Module], std: float, layers: int = 6, width: int = 64) -> list[LayerStatistics]:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=std / math.sqrt(width))
        parts += [linear, activation()]
    net = nn.Sequential(*parts, nn.Linear(width, 3))
    with LayerProbe(net).recording() as probe:
        net(torch.randn(256, width)).square().mean().backward()
    return probe.layers


@pytest.mark.parametrize(
    ("activation", "std", "label"),
    [
        (nn.Tanh, 1.0, "healthy"),
        (nn.Tanh, 30.0, "saturated"),
        (nn.Tanh, 0.1, "vanishing"),
        (nn.ReLU, math.sqrt(2), "healthy"),
        (nn.ReLU, 8.0, "exploding"),
        (nn.ReLU, 0.1, "vanishing"),
    ],
)
def test_returns_a_verdict_per_layer(activation: type[nn.Module], std: float, label: str) -> None:
    result = verdicts(_probed(activation, std))
    assert len(result) == 7
    assert label in {verdict.label for verdict in result}
    if label == "healthy":
        assert {verdict.label for verdict in result} == {"healthy"}


def test_names_the_layer_of_the_reference() -> None:
    """Of the gradient the last layer with an activation, not the head; of the signal the first one."""
    layers = _probed(nn.Tanh, 0.1)
    vanishing = next(each for each in verdicts(layers) if each.label == "vanishing")
    found = re.fullmatch(r"gradient (\S+)x that of (\S+)", vanishing.reason)
    assert found is not None and found[2] == layers[-2].name != layers[-1].name
    expected = layers[0].gradients.norm / layers[-2].gradients.norm
    assert float(found[1]) == pytest.approx(expected, rel=0.05)
    layers = _probed(nn.Tanh, 1.0)
    layers[3].inputs = Moments()
    layers[3].inputs.add(torch.full((4,), 1e-6))
    assert re.fullmatch(rf"signal \S+x that of {layers[0].name}", verdicts(layers)[3].reason)


def test_dead_units() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].bias[:6] = -100.0
    with LayerProbe(net).recording() as probe:
        net(torch.randn(50, 4)).sum().backward()
    assert verdicts(probe.layers)[0] == Verdict("dead", "75 % of the units")


def test_compares_with_the_last_layer_that_is_not_frozen() -> None:
    """In fine-tuning of the head, no layer with an activation receives a gradient."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    with LayerProbe(net).recording() as probe:
        net(torch.randn(50, 4)).square().sum().backward()
    assert [verdict.label for verdict in verdicts(probe.layers)] == ["healthy", "healthy"]


@pytest.mark.parametrize(("signal", "label"), [(1.0, "healthy"), (1e-4, "vanishing"), (0.0, "healthy")])
def test_signal_of_a_layer_without_activation(signal: float, label: str) -> None:
    """Judged as its gradient is; a layer that starts at exactly 0 does so on purpose."""
    layers = _probed(nn.Tanh, 1.0)
    assert layers[-1].activation is None
    layers[-1].inputs = Moments()
    layers[-1].inputs.add(torch.full((4,), signal))
    assert verdicts(layers)[-1].label == label


def test_non_finite_values_are_exploding() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
    with torch.no_grad():
        net[2].weight.fill_(math.inf)
    with LayerProbe(net).recording() as probe:
        net(torch.ones(2, 1)).sum().backward()
    assert verdicts(probe.layers)[1].label == "exploding"


def test_gradient_that_vanishes_over_time() -> None:
    layers = _probed(nn.Tanh, 1.0, layers=1)
    layers[0].name = "hidden"
    lag = TimeLag("hidden", [1.0, 0.1, 1e-5], [1.0, 1.0, 1.0, 0.0])
    result = verdicts(layers, [lag])[0]
    assert result.label == "vanishing" and "1e-05x over 2 steps back in time" in result.reason
    assert verdicts(layers, [TimeLag("hidden", [1.0, 10.0, 1e5], [])])[0].label == "exploding"


def _facts(**changes: Any) -> Facts:
    facts = {"init": "normal", "norm": "none", "activation": "Tanh", "has_skips": False, "is_recurrent": False}
    return Facts(**{**facts, "is_gated": False, "clip": "none", "gradient_norms": [3.0, 4.0, 1.0], **changes})


def test_advice_lists_overrides_not_already_set() -> None:
    bad = [Verdict("exploding", ""), Verdict("healthy", "")]
    [line] = advice(bad, _facts())
    assert line.startswith("exploding (1 of 2 layers): try init=xavier_normal, model.norm=batch, skip connections")
    assert line.endswith("clip=norm clip.max_norm=3")
    [line] = advice(bad, _facts(init="xavier_uniform", norm="batch", has_skips=True, clip="norm"))
    assert line.endswith("try a smaller optimizer.lr")
    [line] = advice([Verdict("dead", "")], _facts(activation="ReLU"))
    assert "init=kaiming_normal" in line and "leaky_relu" in line
    [line] = advice([Verdict("vanishing", "")], _facts(is_recurrent=True, init="xavier_normal"))
    assert line.endswith("try model.norm=layer, model=lstm")
    assert advice([Verdict("healthy", "")], _facts()) == ["healthy"]


def test_clipping_norm_is_the_median_of_finite_norms() -> None:
    assert clipping_norm([5.0, 1.0, math.nan, 3.0, math.inf]) == 3.0
    assert clipping_norm([5.0, 1.0, 3.0, 4.0]) == 3.5
    assert clipping_norm([math.nan]) is None


def test_clipping_norm_comes_from_updates_before_an_explosion() -> None:
    assert healthy([2.0, 3.0, 1.0, 150.0, 1.0]) == [2.0, 3.0, 1.0]
    assert healthy([2.0, 0.0, math.nan]) == [2.0, 0.0] and healthy([6.4e9, 1.0]) == []
    bad = [Verdict("exploding", "")]
    [line] = advice(bad, _facts(gradient_norms=[6.4e9, 6.4e9]))
    assert "max_norm=" not in line and line.index("init=xavier_normal") < line.index("then clip=norm")
    [line] = advice(bad, _facts(gradient_norms=[2.0, 3.0, 1.0, 6.4e9, 6.4e9]))
    assert line.endswith("clip=norm clip.max_norm=2")


def test_layer_between_vanishing_ones_is_not_healthy() -> None:
    def labels(*gradients: float) -> list[str]:
        layers = _probed(nn.Tanh, 1.0)
        for layer, norm in zip(layers, gradients, strict=True):
            layer.gradients = Moments()
            layer.gradients.add(torch.full((1,), norm))
        return [str(verdict).partition(":")[0] for verdict in verdicts(layers)]

    assert labels(0.001, 0.02, 0.005, 0.2, 0.5, 1.0, 1.0) == ["vanishing"] * 3 + ["healthy"] * 4
    assert labels(0.001, 0.3, 0.005, 0.2, 0.5, 1.0, 1.0)[1] == "healthy"  # far from the threshold
    assert labels(0.02, 0.02, 0.02, 0.2, 0.5, 1.0, 1.0) == ["healthy"] * 7
