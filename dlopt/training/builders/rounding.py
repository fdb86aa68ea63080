"""Stochastic rounding of bf16 weights (`precision=bf16_pure`).

bf16 has 8 significant bits: rounding to nearest would lose every update below 2^-9 to 2^-8 of a weight. An update is
therefore computed in fp32: it widens some weights with their gradients, runs the optimizer on them, and rounds the new
values. A value is rounded up with a probability equal to the discarded fraction, and down otherwise (Gupta et al. 2015,
"Deep Learning with Limited Numerical Precision"). Its expectation is exact. The optimizer's state stays in fp32: it may
hold slow averages, sums, or matrices to invert.

Random numbers are a hash of seed, update, parameter and element: resumed runs round alike, and noise needs no memory
after its use. Updates are counted on the device, so that a CUDA graph can repeat them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.basics.errors import UserError
from dlopt.basics.mixin import mix_in
from dlopt.basics.random import hashed, stream
from dlopt.optim.common import gradients, is_dense, loss_of, without_hooks
from dlopt.optim.traits import optimizer_traits

_UPDATES = "rounded_updates"  # key of a parameter group: updates so far, saved with the state
_CHUNK = {"cpu": 1 << 18}  # elements that are widened at once: on a CPU as many as fit into the cache
_CHUNK_ON_ACCELERATORS = 1 << 24
_STREAM = 1 << 8  # the random stream, as in runs of earlier versions
_ALIGNMENT = 16  # elements; vectorized kernels need aligned tensors


class RoundedUpdate(Optimizer):
    """Mixed into the class of an optimizer of bf16 weights."""

    rounding_seed: int

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss, chunks = loss_of(closure), self._count_rounded()
        if not optimizer_traits(self).separable:
            self._update_rounded(chunks, [group["params"] for group in self.param_groups])
            return loss
        for chunk in chunks:  # the fp32 copies of one chunk exist at a time
            self._update_rounded([chunk], [chunk.params if g is chunk.group else [] for g in self.param_groups])
        return loss

    def _count_rounded(self) -> list["_Chunk"]:
        """Counts an update in each group; returns the parameters with gradients, in chunks of one group and device."""
        chunks: list[_Chunk] = []
        start = 0
        for group in self.param_groups:
            params = group["params"]
            if not isinstance(group.get(_UPDATES), Tensor):  # at first, and after a state is loaded
                device = next((p.device for p in params if not p.is_meta), None)
                group[_UPDATES] = torch.tensor(group.get(_UPDATES, 0), dtype=torch.int32, device=device)
            group[_UPDATES].add_(1)
            size = math.inf  # of the last chunk: the first parameter begins another one
            for number, p in enumerate(params, start):
                if p.grad is None:
                    continue
                if size + p.numel() > _limit(p.device) or p.device != chunks[-1].params[0].device:
                    chunks.append(_Chunk(group, [], number))
                    size = 0
                chunks[-1].params.append(p)
                size += p.numel()
            start += len(params)
        return chunks

    def _update_rounded(self, chunks: list["_Chunk"], members: list[list[Tensor]]) -> None:
        """Updates the parameters `members` of each group; the `chunks` hold their parameters with gradients."""
        update = without_hooks(super().step)  # they run once, around this step, and see all groups
        wide = {p: copy for chunk in chunks for p, copy in chunk.widened().items()}
        versions = [p._version for p in wide]
        with self._replacing(wide, members):
            update()
        if versions != [p._version for p in wide]:
            raise UserError(
                f"precision=bf16_pure: {type(self).__name__} updates tensors that are not in its param_groups; "
                "use precision=bf16 or another optimizer"
            )
        for chunk in chunks:
            chunk.write_back(self.rounding_seed)

    @contextmanager
    def _replacing(self, wide: dict[Tensor, nn.Parameter], members: list[list[Tensor]]) -> Iterator[None]:
        """Context in which the groups have `members`, and copies replace their parameters in groups and state."""
        originals = [group["params"] for group in self.param_groups]
        for group, params in zip(self.param_groups, members, strict=True):
            group["params"] = [wide.get(p, p) for p in params]
        for p, copy in wide.items():
            if p in self.state:
                self.state[copy] = self.state[p]
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, originals, strict=True):
                group["params"] = params
            for p, copy in wide.items():
                if copy in self.state:
                    self.state[p] = self.state.pop(copy)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state. torch converts it to the dtype of the parameters: here fp32 also for bf16 ones."""
        members = [group["params"] for group in self.param_groups]
        low = [p for params in members for p in params if p.dtype == torch.bfloat16]
        wide = {p: nn.Parameter(torch.empty_like(p, dtype=torch.float32), p.requires_grad) for p in low}
        with self._replacing(wide, members):
            super().load_state_dict(state_dict)


@dataclass
class _Chunk:
    """Some parameters of a group that have gradients, and fp32 copies of those in bf16, in one vector.

    `number`: the position of the first among all parameters.
    """

    group: dict[str, Any]
    params: list[Tensor]
    number: int

    def widened(self) -> dict[Tensor, nn.Parameter]:
        """Returns the copies by parameter, with gradients and the same strides."""
        self.low = low = [p for p in self.params if p.dtype == torch.bfloat16]
        if not low:
            return {}
        grads = gradients(low)  # refuses sparse ones
        size = sum(_aligned(p) for p in low)
        self.values, derivatives = torch.empty(2, size, dtype=torch.float32, device=low[0].device).unbind()
        views, wide_grads = _views(self.values, low), _views(derivatives, low)
        torch._foreach_copy_(views, low)
        torch._foreach_copy_(wide_grads, grads)
        self.copies = [nn.Parameter(view, p.requires_grad) for view, p in zip(views, low, strict=True)]
        for copy, grad in zip(self.copies, wide_grads, strict=True):
            copy.grad = grad
        return dict(zip(low, self.copies, strict=True))

    def write_back(self, seed: int) -> None:
        """Rounds the copies into the parameters."""
        if not self.low:
            return
        values, size = self.values, max(_limit(self.values.device), _ALIGNMENT)
        for copy, view in zip(self.copies, _views(values, self.low), strict=True):
            if copy.data_ptr() != view.data_ptr():  # the optimizer has replaced it: parameter.data = ...
                view.copy_(copy)
        key = random_bits(self.group[_UPDATES], stream(seed, self.number, _STREAM))
        rounded = torch.empty_like(values, dtype=torch.bfloat16)
        for start in range(0, len(values), size):
            block = values[start : start + size]
            # 16 bits for each element
            words = torch.arange(start // 2, (start + len(block)) // 2, dtype=torch.int32, device=values.device)
            bits = random_bits(words, key).view(torch.int16).to(torch.int32)
            rounded[start : start + size] = round_stochastically(block, bits)
        torch._foreach_copy_(self.low, _views(rounded, self.low))


def round_updates(optimizer: Optimizer, seed: int) -> None:
    """Makes an optimizer update bf16 weights in fp32 and round them, in place."""
    # In place, around the `step` of any class: optimizers have no hook between two parameters.
    mix_in(RoundedUpdate, optimizer, rounding_seed=seed)
    optimizer._patch_step_function()  # torch adds the hooks of a step to each class
    _widen_state(optimizer)
    optimizer.register_load_state_dict_post_hook(_widen_state)
    optimizer.register_state_dict_post_hook(_convert_counts)


def _widen_state(optimizer: Optimizer) -> None:
    """Converts the state of bf16 weights to fp32."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                values[name] = value.float()


def _convert_counts(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Makes a saved state independent of the device."""
    for group in state["param_groups"]:
        group[_UPDATES] = int(group.get(_UPDATES, 0))


def _limit(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK_ON_ACCELERATORS)


def _aligned(p: Tensor) -> int:
    return -(-p.numel() // _ALIGNMENT) * _ALIGNMENT


def _views(memory: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Returns parts of a vector in the shapes and, unless there are gaps in memory, the strides of parameters."""
    views, start = [], 0
    for p in params:
        part = memory[start : start + p.numel()]
        views.append(part.as_strided(p.shape, p.stride()) if is_dense(p) else part.view(p.shape))
        start += _aligned(p)
    return views


def random_bits(indices: Tensor, seed: int | Tensor) -> Tensor:
    """Hashes int32 indices and a seed (of any size, or 32 bits) to 32 random bits."""
    return hashed(indices ^ (seed if isinstance(seed, Tensor) else (seed & 0xFFFFFFFF) - (1 << 31)))


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in bf16, so that the expectation is the value; keeps non-finite ones.

    Adds the lower 16 of the random `bits` to the 16 bits that bf16 lacks, whose carry rounds away from zero.
    """
    exact = values.float()
    upper = exact.view(torch.int32).add(bits & 0xFFFF).bitwise_right_shift_(16)
    return upper.to(torch.int16).view(torch.bfloat16).masked_fill_(exact.isnan(), math.nan)  # a carry may change NaN
