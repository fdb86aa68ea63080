"""How far back in time a recurrent net's gradient reaches (Bengio, Simard & Frasconi 1994; Pascanu et al. 2013)."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TimeLag:
    """One recurrent layer. Index i stands for the state i steps before the last one.

    `states[i]`: norm of the gradient of the loss with respect to the state, over the whole batch.
    `contributions[i]`: norm of what the step that reads this state adds to the gradient of the recurrent weight, which
    is the sum over steps. A clip by norm multiplies all of them by one factor.
    """

    name: str
    states: list[float]
    contributions: list[float]


class TimeLagProbe:
    """Watches linear layers that run several times in one forward pass: the recurrent ones."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._states: dict[str, list[list[Tensor]]] = defaultdict(list)
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._deltas: dict[str, list[list[Tensor]]] = defaultdict(list)

    @contextmanager
    def watching(self) -> Iterator["TimeLagProbe"]:
        """Within, one forward and one backward pass."""
        linear = [(name, each) for name, each in self.module.named_modules() if isinstance(each, nn.Linear)]
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in linear]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            state = inputs[0]
            if not module.training or not output.requires_grad:
                return
            seen: tuple[list[Tensor], list[Tensor]] = ([], [])
            if state.requires_grad:
                state.register_hook(seen[0].append)
            output.register_hook(seen[1].append)
            self._states[name].append(seen[0])
            self._inputs[name].append(state.detach())
            self._deltas[name].append(seen[1])

        return hook

    def lags(self) -> list[TimeLag]:
        """One per recurrent layer; none where every layer ran once."""
        return [self._lag(name) for name, inputs in self._inputs.items() if len(inputs) > 1]

    def _lag(self, name: str) -> TimeLag:
        states = [_norm(each) for each in self._states[name]]
        contributions = []
        for delta, state in zip(self._deltas[name], self._inputs[name], strict=True):
            step = delta[0].flatten(0, -2).T @ state.flatten(0, -2) if delta else torch.zeros(())
            contributions.append(float(step.norm()))
        # The first state is a constant zero, to which no gradient goes.
        return TimeLag(name, states[:0:-1], contributions[::-1])


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack(gradients).sum(0).norm()) if gradients else 0.0
