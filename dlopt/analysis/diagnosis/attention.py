"""Entropy of the attention weights, head by head (Zhai et al. 2023, "Preventing Attention Entropy Collapse")."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dlopt.models.gpt import CausalAttention
from dlopt.models.vit import FullAttention

_MOST_WEIGHTS = 1 << 24  # attention weights in memory at a time


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy in nats of the attention weights of a layer: -sum_j a_ij log a_ij, mean over tokens i and samples.

    `heads`: one value per head. `largest`: with equal weights, the mean over tokens of log(tokens attended to); log T
    for T tokens, less if attention is causal.
    """

    name: str
    heads: list[float]
    largest: float


class AttentionProbe:
    """Records the entropies of every forward pass in training mode within `recording()`.

    Fused attention does not store the weights; they are computed again from the queries and keys.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names: dict[nn.Module, str] = {
            layer: name.removesuffix(".attend")
            for name, layer in module.named_modules()
            if isinstance(layer, CausalAttention | FullAttention)
        }
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))  # [heads], over tokens and samples
        self._tokens: dict[str, int] = defaultdict(int)
        self._largest: dict[str, float] = {}

    @contextmanager
    def recording(self) -> Iterator["AttentionProbe"]:
        with register_module_forward_pre_hook(self._record):
            yield self

    @torch.no_grad()
    def _record(self, attend: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if attend not in self._names or not attend.training:
            return
        assert isinstance(attend, CausalAttention | FullAttention)
        name = self._names[attend]
        q, k = (each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in inputs[:2])
        batch, heads, tokens, _ = q.shape
        samples = max(1, _MOST_WEIGHTS // (heads * tokens**2))
        for part, keys in zip(q.split(samples), k.split(samples), strict=True):
            self._sums[name] = self._sums[name] + torch.special.entr(attend.weights(part, keys)).sum((0, 2, 3))
        self._tokens[name] += batch * tokens
        attended = range(1, tokens + 1) if isinstance(attend, CausalAttention) else [tokens]
        self._largest[name] = sum(map(math.log, attended)) / len(attended)

    def entropies(self) -> list[AttentionEntropy]:
        """Returns one entry per attention layer, in the order of the forward pass."""
        return [
            AttentionEntropy(name, (total / self._tokens[name]).tolist(), self._largest[name])
            for name, total in self._sums.items()
        ]
