"""Activation checkpointing: keeps fewer activations for the backward pass, which computes the others again.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Uses `torch.utils.checkpoint`, non-reentrant. The
results do not change: a recomputation has the random numbers, the batch-norm mode and the buffers of the forward pass,
and leaves no trace in them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dlopt.basics.errors import UserError
from dlopt.basics.mixin import mix_in
from dlopt.config.settings import Recomputation
from dlopt.models.known import is_container, is_stochastic

_Buffers = dict[str, Tensor | None]

_running = 0  # recomputations in progress


def is_recomputing() -> bool:
    """Returns whether the current forward pass is a recomputation, in which hooks see the same values again."""
    return _running > 0


class _Recomputing:
    """Context of a recomputation, with the buffers and norm modes of the forward pass; restores the present ones.

    Batch norm would otherwise count a batch twice. An optimizer that differentiates twice recomputes twice, and may run
    the backward pass after the mode of the norms has changed. Its graph keeps buffers of the recomputation: these are
    copies, because writing to those of the model would make the graph invalid.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._modules = [m for layer in layers for m in layer.modules()]
        self._norms = [m for m in self._modules if isinstance(m, _NormBase)]
        buffers, modes = self._state()
        self._forward = self._present = _copies(buffers), modes

    def __enter__(self) -> None:
        global _running
        self._present = self._state()
        buffers, modes = self._forward
        self._set(_copies(buffers), modes)
        _running += 1

    def __exit__(self, *_: object) -> None:
        global _running
        _running -= 1
        self._set(*self._present)

    def _state(self) -> tuple[list[_Buffers], list[tuple[bool, float | None]]]:
        return [dict(m._buffers) for m in self._modules], [(n.track_running_stats, n.momentum) for n in self._norms]

    def _set(self, buffers: list[_Buffers], modes: list[tuple[bool, float | None]]) -> None:
        for module, own in zip(self._modules, buffers, strict=True):
            module._buffers.update(own)
        for norm, (tracks, momentum) in zip(self._norms, modes, strict=True):
            norm.track_running_stats, norm.momentum = tracks, momentum


def _copies(buffers: list[_Buffers]) -> list[_Buffers]:
    """Copies the buffers of modules; one that several modules have is copied once."""
    copies: dict[int, Tensor] = {}
    for each in itertools.chain.from_iterable(own.values() for own in buffers):
        if each is not None and id(each) not in copies:
            copies[id(each)] = each.detach().clone()
    return [{name: None if each is None else copies[id(each)] for name, each in own.items()} for own in buffers]


def _recomputed(call: Callable[..., Any], layers: list[nn.Module], *inputs: Any, **keys: Any) -> Any:
    """Calls the layers; keeps only their inputs for the backward pass."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # evaluation, or an export
        return call(*inputs, **keys)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Recomputing(layers)

    stochastic = any(is_stochastic(layer) for layer in layers)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=stochastic, context_fn=contexts, **keys)


class Recomputed(nn.Module):
    """Mixed into the class of a layer whose activations are recomputed: names and state stay the same."""


class _Block(Recomputed):
    def forward(self, *inputs: Any, **keys: Any) -> Any:
        return _recomputed(super().forward, [self], *inputs, **keys)


class _Chain(Recomputed, nn.Sequential):
    """A sequence of n layers in ceil(sqrt(n)) segments (section 4.1).

    The last one is not recomputed: that would directly follow its forward pass, and save nothing.
    """

    def forward(self, inputs: Any) -> Any:
        parts = _parts(self)
        count = math.ceil(math.sqrt(len(parts)))
        bounds = [len(parts) * index // count for index in range(count + 1)]
        *segments, last = (parts[start:end] for start, end in itertools.pairwise(bounds))
        for segment in segments:
            inputs = _recomputed(partial(_run, segment), segment, inputs)
        return _run(last, inputs)


def _run(layers: list[nn.Module], inputs: Any) -> Any:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def recompute(model: nn.Module, setting: Recomputation, *, choice: str) -> None:
    """Makes `model` recompute activations, in place. `choice`: the config choice of the model, for messages.

    Changes the classes of layers: wrapping them in modules would rename the weights in checkpoints. FSDP, which places
    the model afterwards, gathers the weights of a block around its recomputation. Raises `UserError` for a model
    without support.
    """
    if setting == "none":
        return
    key = f"activation_checkpointing={setting}"
    if setting == "all":
        is_sequence = type(model).forward is nn.Sequential.forward
        if not isinstance(model, nn.Sequential) or not is_sequence or len(_parts(model)) < 2:
            raise UserError(f"{key}: {choice} is not a sequence of layers; use activation_checkpointing=blocks")
        mix_in(_Chain, model)
        return
    if not (blocks := repeated_blocks(model)):
        raise UserError(f"{key}: {choice} has no repeated blocks; use activation_checkpointing=all or none")
    for block in blocks:
        mix_in(_Block, block)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model: the members of its attribute `blocks`, else its repeated modules.

    Repeated modules are the outermost modules with layers that are no containers and whose class occurs at least twice.
    """
    members = getattr(model, "blocks", None)
    if isinstance(members, nn.ModuleList | nn.Sequential):
        return list(dict.fromkeys(members))
    counts = Counter(type(module) for module in model.modules() if _has_layers(module))

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if _has_layers(child) and counts[type(child)] > 1:
                yield child
            else:
                yield from outermost(child)

    return list(dict.fromkeys(outermost(model)))


def _has_layers(module: nn.Module) -> bool:
    return not is_container(module) and any(True for _ in module.children())


def _parts(model: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the layers of a sequence in order, including the layers of nested plain sequences."""
    return [part for child in model for part in (_parts(child) if type(child) is nn.Sequential else [child])]
