"""A model as a chain of layers: what goes from one to the next, how long each takes, and where to cut the chain."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dlopt.errors import UserError

_REPETITIONS = 3


@dataclass(frozen=True)
class Form:
    """What a tensor [B, ...] is like, whatever B is."""

    shape: tuple[int, ...]  # of one sample
    dtype: torch.dtype
    order: tuple[int, ...]  # dimensions from the outermost in memory to the innermost

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        strides = tensor.stride()
        order = range(tensor.ndim) if tensor.is_contiguous() else sorted(range(tensor.ndim), key=lambda d: -strides[d])
        return cls(tuple(tensor.shape[1:]), tensor.dtype, tuple(order))

    def arranged(self, tensor: Tensor) -> Tensor:
        """The tensor in this order in memory."""
        back = sorted(range(tensor.ndim), key=lambda d: self.order[d])
        return tensor.permute(self.order).contiguous().permute(back)

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """A contiguous tensor for so many samples: as they travel."""
        return torch.empty(samples, *self.shape, dtype=self.dtype, device=device)


@dataclass
class Link:
    """One layer of the chain."""

    name: str
    layer: nn.Module
    output: Form | None = None  # None: not looked at yet
    draws: list[tuple[nn.Module, Form]] = field(default_factory=list)  # its dropouts in their order, and their inputs
    seconds: float = 0.0  # forward and backward of a micro-batch


def links(model: nn.Module, stages: int) -> list[Link]:
    """The layers that `model` calls one after the other: nested `nn.Sequential`s, opened up.

    Raises `UserError` for a model that is none, or that has fewer layers than there are stages.
    """
    if not _is_sequence(model):
        raise UserError(
            f"parallel=pipeline: {type(model).__name__} is no sequence of layers that could be cut; use parallel=ddp, "
            "parallel=fsdp, or a model such as resnet20"
        )
    found = [Link(name, layer) for name, layer in _flat(model, "")]
    if stages > len(found):
        raise UserError(
            f"parallel=pipeline: {stages} processes, and the model has only {len(found)} layers; start fewer"
        )
    return found


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(sequence: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequence._modules.items():
        if child is None:
            continue
        if _is_sequence(child):
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


Calling = Callable[[], AbstractContextManager[Any]]
"""A context for calling layers in."""


def look(chain: Sequence[Link], inputs: Tensor, calling: Calling) -> None:
    """Notes what goes from layer to layer. `inputs`: some samples. Raises `UserError` where that is no tensor."""
    modes = {module: module.training for link in chain for module in link.layer.modules()}
    try:
        with torch.no_grad(), calling():
            values = inputs
            for link in chain:
                link.layer.eval()
                handles = [
                    module.register_forward_pre_hook(_noting(link.draws))
                    for module in link.layer.modules()
                    if isinstance(module, _DropoutNd) and module.p > 0
                ]
                values = link.layer(values)
                for handle in handles:
                    handle.remove()
                if not isinstance(values, Tensor):
                    raise UserError(f"parallel=pipeline: the layer {link.name} gives something else than one tensor")
                link.output = Form.of(values)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _noting(draws: list[tuple[nn.Module, Form]]) -> Callable[..., None]:
    return lambda module, inputs: draws.append((module, Form.of(inputs[0])))


def measure(chain: Sequence[Link], inputs: Tensor, calling: Calling) -> list[float]:
    """The seconds that forward and backward of each layer take on these inputs, copies of the layers doing the work."""
    values: Tensor = inputs
    times = []
    for link in chain:
        layer = copy.deepcopy(link.layer).train()
        with calling():
            found = [_timed(layer, values) for _ in range(1 + _REPETITIONS)]
        times.append(min(seconds for seconds, _ in found[1:]))  # what else the machine does only adds to it
        values = found[-1][1]
    return times


def _timed(layer: nn.Module, values: Tensor) -> tuple[float, Tensor]:
    inputs = values.detach().requires_grad_()
    start = _now(inputs)
    outputs: Tensor = layer(inputs)
    outputs.sum().backward()
    return _now(inputs) - start, outputs


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def balanced(seconds: Sequence[float], stages: int) -> list[int]:
    """With which layer each of the `stages` begins, so that the slowest is as fast as can be; none is empty."""
    until = [0.0, *accumulate(seconds)]
    # (slowest of the stages so far, which reach up to layer j; where the last of them begins)
    best = [(0.0, 0)] + [(math.inf, 0)] * len(seconds)
    history = []
    for _ in range(stages):
        best = [
            min(((max(best[i][0], until[j] - until[i]), i) for i in range(j)), default=(math.inf, 0))
            for j in range(len(until))
        ]
        history.append(best)
    starts, at = [], len(seconds)
    for column in reversed(history):
        at = column[at][1]
        starts.append(at)
    return starts[::-1]


def divided(cores: int, shares: Sequence[float]) -> list[int]:
    """The cores in proportion to the shares, at least one for each; no more than there are where that can be."""
    found = [1] * len(shares)
    for _ in range(cores - len(shares)):  # one after the other to whom it helps most
        needy = max(range(len(shares)), key=lambda i: shares[i] / found[i])
        found[needy] += 1
    return found


def by_hand(split: Sequence[str], chain: Sequence[Link], stages: int) -> list[int]:
    """The same where the layers are named with which the second and later stages begin. Raises `UserError`."""
    key = f"parallel.split=[{','.join(split)}]"
    if len(split) != stages - 1:
        raise UserError(f"{key}: {stages} processes need {stages - 1} names of layers with which a stage begins")
    starts = [0]
    for name in split:
        at = next((i for i, link in enumerate(chain) if f"{link.name}.".startswith(f"{name}.")), None)
        if at is None:
            raise UserError(f"{key}: there is no layer {name}; allowed: {', '.join(link.name for link in chain[1:])}")
        if at <= starts[-1]:
            raise UserError(f"{key}: {name} does not come behind what the stage before it begins with")
        starts.append(at)
    return starts


def check_owners(stages: Iterable[Sequence[Link]]) -> None:
    """Raises `UserError` for layers or parameters that two stages share."""
    owners: dict[object, int] = {}
    for number, stage in enumerate(stages):
        for link in stage:
            for parameter in [*link.layer.parameters(), *link.layer.buffers()]:
                if owners.setdefault(parameter, number) != number:
                    raise UserError(
                        f"parallel=pipeline: {link.name} shares weights with a layer of another stage; choose "
                        "parallel.split so that they are in one, or use parallel=ddp"
                    )


def spans(starts: Sequence[int], count: int) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise([*starts, count])]
