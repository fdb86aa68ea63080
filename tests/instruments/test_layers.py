"""Layer statistics against manually derived gradients."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from dlopt.instruments.layers import LayerProbe, Moments, layer_parameters, norms, weight_layers
from dlopt.models.layers import Norm
from dlopt.models.recurrent import RecurrentLayer
from dlopt.models.resnet import BasicBlock


def _three_layers() -> nn.Sequential:
    torch.manual_seed(3)
    parts = OrderedDict(
        first=nn.Linear(4, 6), tanh=nn.Tanh(), second=nn.Linear(6, 5), relu=nn.ReLU(), head=nn.Linear(5, 3)
    )
    return nn.Sequential(parts).double()


def _by_hand(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Applies the chain rule layer by layer for the mean cross-entropy of the batch."""
    (w1, b1, w2, b2, w3, b3) = [p.detach() for p in net.parameters()]
    s1 = x @ w1.T + b1
    a1 = s1.tanh()
    s2 = a1 @ w2.T + b2
    a2 = s2.clamp(min=0)
    s3 = a2 @ w3.T + b3
    d3 = (s3.softmax(1) - nn.functional.one_hot(y, 3)) / len(x)
    d2 = (d3 @ w3) * (s2 > 0)
    d1 = (d2 @ w2) * (1 - a1**2)
    return {"s1": s1, "a1": a1, "s2": s2, "a2": a2, "s3": s3, "d1": d1, "d2": d2, "d3": d3}


def test_statistics_match_manual_chain_rule() -> None:
    net = _three_layers()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    with LayerProbe(net, keep=20_000).recording() as probe:
        nn.functional.cross_entropy(net(x), y).backward()
    hand = _by_hand(net, x, y)
    assert [layer.name for layer in probe.layers] == ["first", "second", "head"]
    assert [layer.activation for layer in probe.layers] == ["Tanh", "ReLU", None]
    for number, layer in enumerate(probe.layers, 1):
        for moments, name in ((layer.inputs, "s"), (layer.gradients, "d"), (layer.outputs, "a" if number < 3 else "s")):
            true = hand[f"{name}{number}"]
            assert moments.mean == pytest.approx(float(true.mean()), rel=1e-12)
            assert moments.variance == pytest.approx(float(true.var(correction=0)), rel=1e-12)
            assert moments.norm == pytest.approx(float(true.norm()), rel=1e-12)
            assert torch.equal(moments.values.sort().values, true.flatten().sort().values) or torch.allclose(
                moments.values.sort().values, true.flatten().sort().values, rtol=1e-12
            )
    weights = norms([p and [q.grad for q in p] for p in layer_parameters(net).values()])  # type: ignore[misc]
    first = torch.cat([(hand["d1"].T @ x).flatten(), hand["d1"].sum(0)])
    assert float(weights[0]) == pytest.approx(float(first.norm()), rel=1e-5)


def test_saturated_and_dead_fractions() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([0.0, 5.0, -5.0]))  # slopes 0.25, 0.0066, 0.0066
        net[2].weight.copy_(torch.ones(4, 3))
        net[2].bias.copy_(torch.tensor([-9.0, 0.0, -9.0, -9.0]))
    with LayerProbe(net).recording() as probe:
        net(torch.randn(5, 3)).sum().backward()
    sigmoid, relu, head = probe.layers
    assert sigmoid.saturated == pytest.approx(2 / 3) and sigmoid.dead is None
    assert relu.dead == 0.75 and relu.saturated is None
    assert head.dead is head.saturated is None


def test_unit_active_once_is_not_dead() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    with LayerProbe(net).recording() as probe:
        net(torch.tensor([[-1.0], [-2.0]]))
        assert probe.layers[0].dead == 0.5
        net(torch.tensor([[-1.0], [3.0]]))
    assert probe.layers[0].dead == 0.0


def test_relu_after_residual_sum_belongs_to_last_convolution() -> None:
    norm = Norm(norm="batch", norm_affine=True, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1)
    block = BasicBlock(3, 3, 1, shortcut=nn.Identity(), norm=norm)
    maps = torch.randn(4, 3, 5, 5)
    seen = []
    block.act2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with LayerProbe(block).recording() as probe:
        block(maps).sum().backward()
    assert [layer.name for layer in probe.layers] == ["conv1", "conv2"]
    assert probe.layers[1].inputs.std == pytest.approx(float(seen[0].std(correction=0)), rel=1e-5)


def test_merges_calls_of_a_recurrent_layer() -> None:
    layer = RecurrentLayer(
        2,
        3,
        Norm(norm="none", norm_affine=False, norm_groups=1, norm_ghost_batch=None, norm_eps=1e-5, norm_momentum=0.1),
    )
    sequence = torch.randn(4, 6, 2)
    with LayerProbe(layer).recording() as probe:
        states = layer(sequence)
        states.sum().backward()
    hidden = next(each for each in probe.layers if each.name == "hidden")
    assert hidden.calls == 6 and hidden.outputs.count == states.numel()
    assert hidden.outputs.rms == pytest.approx(float(states.detach().square().mean().sqrt()), rel=1e-5)


def test_recording_does_not_change_gradients_and_removes_hooks() -> None:
    net = _three_layers()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))

    def gradients() -> list[Tensor]:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    before = gradients()
    state = torch.get_rng_state()
    with LayerProbe(net, keep=20_000).recording() as probe:
        recorded = gradients()
        net.eval()
        net(x)
    assert all(map(torch.equal, before, recorded)) and torch.equal(state, torch.get_rng_state())
    assert [layer.calls for layer in probe.layers] == [1, 1, 1]  # evaluation is not recorded
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_weight_layers_exclude_norms_and_embeddings() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert [name for name, _ in weight_layers(net)] == ["2"]


def test_moments_merge_tensors() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, dtype=torch.float64) * 3 + 100 for n in (1, 50, 7)]
    moments, merged = Moments(keep=20_000), torch.cat(parts)
    assert math.isnan(moments.mean)
    for part in parts:
        moments.add(part)
    assert moments.mean == pytest.approx(float(merged.mean()), rel=1e-13)
    assert moments.variance == pytest.approx(float(merged.var(correction=0)), rel=1e-11)
    assert moments.rms == pytest.approx(float(merged.square().mean().sqrt()), rel=1e-13)
    assert torch.equal(moments.values, merged)
    many = Moments(keep=20_000)
    many.add(torch.arange(100_000.0))
    assert len(many.values) == 20_000 and abs(float(many.values.mean()) - 50_000) < 1000


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_float32_neither_vanish_nor_overflow(scale: float) -> None:
    values = torch.tensor([3.0, -4.0]) * scale
    moments = Moments()
    moments.add(values)
    assert moments.norm == pytest.approx(5 * scale) and moments.std == pytest.approx(3.5 * scale)
    assert norms([[values, values]]).tolist() == pytest.approx([math.sqrt(50) * scale])
