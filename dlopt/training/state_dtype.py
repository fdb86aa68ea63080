"""Optimizer state in bf16 (`optimizer.state_dtype=bf16`), rounded stochastically: half the memory of moments.

Parameters, gradients and the arithmetic of an update keep their dtype. An update widens the state of some parameters,
runs the optimizer on them, and rounds the new state.

bf16 has 8 significant bits, and rounding to nearest loses changes below half a unit in the last place, 2^-9 to 2^-8 of
a value. With beta2 = 0.999, the second moment v changes by 0.001 * (g^2 - v): after the gradients have grown or shrunk,
it would stop far from their square. A value is therefore rounded up with a probability equal to the discarded fraction,
and down otherwise (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"). Its expectation is exact, and
an average with decay beta forgets the errors as it forgets gradients.

Random numbers are a hash of seed, update, parameter and element: resumed runs, and runs on any number of processes,
round alike. The noise of a parameter costs no memory after its update.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlopt.errors import UserError
from dlopt.optim.common import evaluate
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.shards import element_numbers, local
from dlopt.random import stream

ALLOWED = ("adam", "adamw", "lion", "momentum", "sgd", "sgdw", "signum")
_UPDATES = "rounded_updates"  # key of a parameter group: updates so far, saved with the state
_CHUNK = {"cpu": 1 << 18}  # elements whose state is widened at once: on a CPU as many as fit into the cache
_CHUNK_ON_ACCELERATORS = 1 << 24


class RoundedState(Optimizer):
    """Mixed into the class of an optimizer whose state is kept in bf16."""

    rounding_seed: int

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = evaluate(closure)
        update = super().step
        # Without the hooks of a step, which run once, around this one, and see all groups.
        update = getattr(update, "__wrapped__", update).__get__(self) if hasattr(update, "hooked") else update
        groups, number = self.param_groups, 0
        try:
            for group in groups:
                group[_UPDATES] = group.get(_UPDATES, 0) + 1
                for chunk in _chunks(group["params"]):
                    self.param_groups = [{**group, "params": [group["params"][index] for index in chunk]}]
                    with self._widened({group["params"][index]: (group[_UPDATES], number + index) for index in chunk}):
                        update()
                number += len(group["params"])
        finally:
            self.param_groups = groups
        return loss

    @contextmanager
    def _widened(self, counters: dict[Tensor, tuple[int, int]]) -> Iterator[None]:
        """Context in which the state of these parameters has their dtype; rounds it afterwards.

        `counters`: of the random numbers of each parameter.
        """
        narrow: dict[Tensor, dict[str, Tensor]] = {}
        for p in counters:
            narrow[p] = {name: value for name, value in _moments(self, p) if value.dtype == torch.bfloat16}
            self.state[p].update({name: value.to(p.dtype) for name, value in narrow[p].items()})
        try:
            yield
            for p, numbers in counters.items():
                indices = element_numbers(p)
                for place, (name, value) in enumerate(_moments(self, p)):
                    if place % 2 == 0:
                        noise = random_bits(indices, stream(self.rounding_seed, *numbers, place // 2))
                    if name not in narrow[p]:
                        narrow[p][name] = torch.empty_like(value, dtype=torch.bfloat16)
                    bits = noise if place % 2 == 0 else noise >> 16  # 16 bits for each of two moments
                    local(narrow[p][name]).copy_(round_stochastically(local(value), bits))
        finally:
            for p, values in narrow.items():
                self.state[p].update(values)


def keep_state_in_bf16(optimizer: Optimizer, seed: int) -> None:
    """Makes an optimizer keep its moments in bf16, in place. Raises `UserError` if its state does not allow it."""
    key, kind, groups = "optimizer.state_dtype=bf16", type(optimizer), optimizer.param_groups
    traits = optimizer_traits(optimizer)
    if not traits.rounds_state or traits.scope == "model":  # tensors are updated in several chunks
        raise UserError(
            f"{key}: {kind.__name__} needs its state in the dtype of the weights; use optimizer.state_dtype=null, or "
            f"optimizer={'|'.join(ALLOWED)}"
        )
    if any(group.get("amsgrad") for group in groups):
        raise UserError(f"{key}: the maxima of amsgrad=true would add up the rounding errors; use amsgrad=false")
    if not any(group.get("momentum", True) for group in groups):
        raise UserError(f"{key}: {kind.__name__} with momentum=0 has no state; use optimizer.state_dtype=null")
    dtypes = {p.dtype for group in groups for p in group["params"]}
    for dtype in dtypes - {torch.float32, torch.float64}:
        raise UserError(
            f"{key}: requires weights in fp32 or fp64, not {str(dtype).removeprefix('torch.')}; use precision=fp32 or "
            "bf16, or optimizer.state_dtype=null"
        )
    # The module of the class stays: dlopt knows torch's optimizers by it.
    optimizer.__class__ = type(kind.__name__, (RoundedState, kind), {"__module__": kind.__module__})
    assert isinstance(optimizer, RoundedState)
    optimizer.rounding_seed = seed
    optimizer._patch_step_function()  # hooks of a step, which torch adds to each class
    _narrow(optimizer)
    optimizer.register_load_state_dict_post_hook(_narrow)  # torch loads a state in the dtype of the parameters


def _narrow(optimizer: Optimizer) -> None:
    """Converts moments to bf16; a loaded state does not change, since its values are those of bf16 numbers."""
    for p in list(optimizer.state):
        optimizer.state[p].update({name: value.to(torch.bfloat16) for name, value in _moments(optimizer, p)})


def _moments(optimizer: Optimizer, p: Tensor) -> list[tuple[str, Tensor]]:
    """Returns the state tensors with an entry per entry of the parameter, by name; scalars may be counts."""
    values = sorted(optimizer.state.get(p, {}).items())
    return [(k, v) for k, v in values if isinstance(v, Tensor) and v.ndim and v.shape == p.shape]


def _chunks(params: list[Tensor]) -> Iterator[list[int]]:
    """Yields the indices of the parameters with a gradient, in lists of limited size and of one device."""
    chunk: list[int] = []
    size = 0
    for index, p in enumerate(params):
        if p.grad is None:
            continue
        count, limit = local(p).numel(), _CHUNK.get(p.device.type, _CHUNK_ON_ACCELERATORS)
        if chunk and (size + count > limit or p.device != params[chunk[0]].device):
            yield chunk
            chunk, size = [], 0
        chunk.append(index)
        size += count
    if chunk:
        yield chunk


def random_bits(indices: Tensor, seed: int) -> Tensor:
    """Hashes int32 indices, with a seed of any size, to 32 random bits each (lowbias32 of Wellons 2018)."""
    bits = indices ^ ((seed & 0xFFFFFFFF) - (1 << 31))
    # Masks, since a shift of a negative number copies its sign. Products wrap.
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in bf16, so that the expectation is the value.

    The lower 16 of the random `bits` are added to the 16 bits that bf16 lacks, whose carry rounds away from zero. bf16
    numbers, and non-finite values, stay as they are.
    """
    exact = values.float()
    upper = exact.view(torch.int32).add(bits & 0xFFFF).bitwise_right_shift_(16)
    return upper.to(torch.int16).view(torch.bfloat16).masked_fill_(exact.isnan(), math.nan)  # a carry may change NaN
