"""Entropies of attention heads against torch's attention weights and closed forms."""

import math

import pytest
import torch
from torch import nn

from dlopt.lab.diagnosis import probes
from dlopt.lab.diagnosis.probes import AttentionProbe
from dlopt.models.gpt import CausalAttention, CausalSelfAttention
from dlopt.models.vit import SelfAttention


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Weights [B, heads, T, T] -> [heads]."""
    return -(weights * weights.clamp_min(1e-300).log()).sum(3).mean((0, 2))


def test_full_attention_against_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(3 * ours.qkv.weight)  # scores far from uniform
    ours.qkv.weight.data.mul_(3)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    batches = torch.randn(2, 4, 7, 12, dtype=torch.float64)
    probe = AttentionProbe(ours)
    with probe.recording():
        for tokens in batches:
            ours(tokens)
    ours.eval()
    with probe.recording():  # evaluation is not recorded
        ours(batches[0])
    weights = torch.cat([theirs(t, t, t, average_attn_weights=False)[1] for t in batches])
    [layer] = probe.entropies()
    torch.testing.assert_close(torch.tensor(layer.heads, dtype=torch.float64), entropy(weights))
    assert layer.largest == math.log(7) and max(layer.heads) < layer.largest


def test_causal_attention_against_a_plain_softmax() -> None:
    torch.manual_seed(0)
    layer = CausalSelfAttention(8, 2, rotary=False, qk_norm=False, scale="sqrt", bias=True).double()
    layer.qkv.weight.data.mul_(4)
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    probe = AttentionProbe(nn.ModuleDict({"block": layer}))
    with probe.recording():
        layer(tokens)
    q, k, _ = layer.qkv(tokens).unflatten(2, (2, 3, 4)).permute(3, 0, 2, 1, 4)
    expected = torch.zeros(2, dtype=torch.float64)
    for sample in range(3):
        for head in range(2):
            for i in range(5):
                p = torch.softmax(k[sample, head, : i + 1] @ q[sample, head, i] / 2, 0)
                expected[head] += -(p * p.log()).sum().detach() / 15
    [found] = probe.entropies()
    assert found.name == "block"
    torch.testing.assert_close(torch.tensor(found.heads, dtype=torch.float64), expected)


def test_equal_scores_have_the_largest_entropy_and_large_scores_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_MOST_WEIGHTS", 1)  # one sample at a time
    attend, eye = CausalAttention(1.0), torch.eye(6).expand(2, 3, 6, 6)
    largest = sum(math.log(t) for t in range(1, 7)) / 6
    for queries, value in ((torch.zeros(2, 3, 6, 6), largest), (1e4 * eye, 0.0)):
        probe = AttentionProbe(attend)
        with probe.recording():
            attend(queries, eye, eye)
        [layer] = probe.entropies()
        assert math.isclose(layer.largest, largest)
        torch.testing.assert_close(torch.tensor(layer.heads), torch.full((3,), value))


def test_attention_weights_are_those_of_the_fused_kernel() -> None:
    attend = CausalAttention(0.3)
    q, k, v = torch.randn(3, 2, 4, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(attend.weights(q, k) @ v, attend(q, k, v))
