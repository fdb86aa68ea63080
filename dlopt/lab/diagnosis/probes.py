"""Hooks that record gradients against time lag in recurrent layers, and the entropy of attention."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dlopt.models.gpt import CausalAttention
from dlopt.models.vit import FullAttention

_MOST_WEIGHTS = 1 << 24  # attention weights in memory at a time


@dataclass(frozen=True)
class TimeLag:
    """Gradient norms of one recurrent layer; index i is the state i steps before the last one.

    Bengio, Simard & Frasconi 1994; Pascanu et al. 2013.

    `states[i]`: norm of the gradient of the loss with respect to the state, over the whole batch.
    `contributions[i]`: norm of the term that the step with this input state adds to the gradient of the recurrent
    weight, which sums over steps. Clipping by norm scales all terms by one factor.
    """

    name: str
    states: list[float]
    contributions: list[float]


class TimeLagProbe:
    """Records gradients of linear layers that run several times per forward pass, i.e. recurrent ones."""

    def __init__(self, module: nn.Module) -> None:
        self._names: dict[nn.Module, str] = {
            layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
        }
        # Of each time step: the input state, the gradients at it, and those at the output.
        self._steps: dict[str, list[tuple[Tensor, list[Tensor], list[Tensor]]]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator["TimeLagProbe"]:
        """Records one forward and one backward pass."""
        with register_module_forward_hook(self._record):
            yield self

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module not in self._names or not module.training or not output.requires_grad:
            return
        state, gradients, deltas = inputs[0], list[Tensor](), list[Tensor]()
        if state.requires_grad:
            state.register_hook(gradients.append)
        output.register_hook(deltas.append)
        self._steps[self._names[module]].append((state.detach(), gradients, deltas))

    def lags(self) -> list[TimeLag]:
        """Returns one `TimeLag` per recurrent layer."""
        return [_time_lag(name, steps) for name, steps in self._steps.items() if len(steps) > 1]


def _time_lag(name: str, steps: Sequence[tuple[Tensor, list[Tensor], list[Tensor]]]) -> TimeLag:
    states, contributions = [], []
    for state, gradients, deltas in steps:
        states.append(float(torch.stack(gradients).sum(0).norm().detach()) if gradients else 0.0)
        term = deltas[0].flatten(0, -2).T @ state.flatten(0, -2) if deltas else torch.zeros(())
        contributions.append(float(term.norm()))
    # The first state is a constant zero without a gradient.
    return TimeLag(name, states[:0:-1], contributions[::-1])


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy in nats of the attention weights of a layer: -sum_j a_ij log a_ij, mean over tokens i and samples.

    Zhai et al. 2023, "Preventing Attention Entropy Collapse".

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
