"""Steps on whole tensors under fsdp: each tensor has an owner, the rank that updates it and holds its state.

Muon, Scion, SOAP, Shampoo and Kron orthogonalize or factor whole matrices, but each rank has only some rows. Every rank
sends its rows of weights and gradients to the owners, which update as a single process would, and send the rows of the
new weights back: 1/n of the weights three times, for each of n ranks, in two all-to-alls. The state stays. (Liu et al.
2025, "Muon is scalable for LLM training", algorithm 1, in which the owners gather the momenta.)

In a checkpoint the states are DTensors, sharded as the weights are: any mode can resume it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from dlopt.basics.mixin import mix_in
from dlopt.optim.common import Closure, loss_of, without_hooks
from dlopt.parallel.shards import as_bytes, full_tensor, local


@dataclass(frozen=True)
class Whole:
    """A tensor that is sharded by rows. `owner`: the rank that has all rows during a step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int

    def rows(self, rank: int, ranks: int) -> slice:
        """Returns the rows of a rank, split as by torch.chunk, like a DTensor that is sharded along dimension 0."""
        size = -(-self.shape[0] // ranks)
        return slice(min(rank * size, self.shape[0]), min((rank + 1) * size, self.shape[0]))

    def shape_on(self, rank: int, ranks: int) -> tuple[int, ...]:
        rows = self.rows(rank, ranks)
        return (rows.stop - rows.start, *self.shape[1:])


class RowExchange:
    """Moves rows between the ranks of a group and the owners. All ranks call it together, with equal `tensors`."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    def collect(self, tensors: Sequence[Whole], rows: Sequence[Tensor]) -> dict[int, Tensor]:
        """Returns, by index, the tensors that this rank owns. `rows`: this rank's of each tensor."""
        mine = self._owned(tensors)
        sent = [(tensor.owner, part) for tensor, part in zip(tensors, rows, strict=True)]
        received = [
            (rank, tensors[index].shape_on(rank, self.size), tensors[index].dtype)
            for rank in range(self.size)
            for index in mine
        ]
        parts = self._exchange(sent, received)
        return {index: torch.cat(parts[place :: len(mine)]) for place, index in enumerate(mine)}

    def distribute(self, tensors: Sequence[Whole], owned: Mapping[int, Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each tensor. `owned`: the tensors that it owns, by index."""
        sent = [
            (rank, owned[index][tensors[index].rows(rank, self.size)])
            for rank in range(self.size)
            for index in self._owned(tensors)
        ]
        received = [(each.owner, each.shape_on(self.rank, self.size), each.dtype) for each in tensors]
        return self._exchange(sent, received)

    def agree(self, mine: Mapping[int, Any]) -> dict[int, Any]:
        """Returns the entries of all ranks, by index."""
        gathered: list[Any] = [None] * self.size
        # Pickled: only shapes, dtypes and single numbers, and only when a state is saved or loaded, never in a step.
        distributed.all_gather_object(gathered, dict(mine), group=self._group)
        return dict(sorted(item for entries in gathered for item in entries.items()))

    def _owned(self, tensors: Sequence[Whole]) -> list[int]:
        return [index for index, tensor in enumerate(tensors) if tensor.owner == self.rank]

    def _exchange(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, tuple[int, ...], torch.dtype]]
    ) -> list[Tensor]:
        """Sends tensors to ranks, as bytes; returns those `received` from ranks, given as (rank, shape, dtype).

        The tensors from one rank to another are in the same order in both lists.
        """
        out = sorted(sent, key=lambda item: item[0])
        order = sorted(range(len(received)), key=lambda index: received[index][0])
        sizes = [prod(shape) * dtype.itemsize for _, shape, dtype in received]
        outgoing = torch.cat([torch.empty(0, dtype=torch.uint8, device=self._device), *(as_bytes(t) for _, t in out)])
        incoming = outgoing.new_empty(sum(sizes))
        send = [sum(t.nbytes for to, t in out if to == rank) for rank in range(self.size)]
        receive = [sum(sizes[index] for index in order if received[index][0] == rank) for rank in range(self.size)]
        # One message to each rank for all tensors: an all-to-all per tensor would wait for its latency each time.
        distributed.all_to_all_single(incoming, outgoing, receive, send, group=self._group)
        results: list[Tensor] = [incoming] * len(received)
        for index, part in zip(order, incoming.split([sizes[index] for index in order]), strict=True):
            _, shape, dtype = received[index]
            results[index] = part.clone().view(dtype).view(shape)  # a copy, which is aligned to its elements
        return results


class StepOfOwners(Optimizer):
    """Mixed into the class of an optimizer whose parameters are DTensors, sharded along dimension 0."""

    rows: RowExchange
    owner_of: dict[Tensor, int]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(closure)
        used = [p for p in self.owner_of if p.grad is not None]
        wholes = [Whole(tuple(p.shape), p.dtype, self.owner_of[p]) for p in used]
        gradients = [local(p.grad) for p in used if p.grad is not None]
        collected = self.rows.collect([*wholes, *wholes], [*map(local, used), *gradients])
        mine = {index: tensor.requires_grad_() for index, tensor in collected.items() if index < len(used)}
        for index, weight in mine.items():
            weight.grad = collected[len(used) + index]
        with self._instead_of({used[index]: weight for index, weight in mine.items()}):
            without_hooks(super().step)()  # they run once, around this step
        for p, part in zip(used, self.rows.distribute(wholes, mine), strict=True):
            local(p).copy_(part)
        return loss

    @contextmanager
    def _instead_of(self, whole: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Context in which whole tensors have the states of the sharded parameters, and their places in the groups.

        Kron's noise depends on the place.
        """
        originals = [group["params"] for group in self.param_groups]
        absent = torch.empty(0)
        for group in self.param_groups:
            group["params"] = [whole.get(p, absent) for p in group["params"]]
        for p, tensor in whole.items():
            if p in self.state:
                self.state[tensor] = self.state.pop(p)
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, originals, strict=True):
                group["params"] = params
            for p, tensor in whole.items():
                if tensor in self.state:
                    self.state[p] = self.state.pop(tensor)


def step_by_owners(optimizer: Optimizer) -> None:
    """Makes an optimizer update whole tensors, in place; see the module. All ranks call this, and `state_dict`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mesh: Any = params[0].device_mesh
    rows = RowExchange(mesh.get_group(mesh.ndim - 1), local(params[0]).device)  # replicas of fsdp repeat the updates
    sizes = [p.numel() for p in params]
    mix_in(StepOfOwners, optimizer, rows=rows, owner_of=dict(zip(params, _divide(sizes, rows.size), strict=True)))
    optimizer._patch_step_function()  # torch adds the hooks of a step to each class
    optimizer.register_state_dict_post_hook(_shard_states)
    optimizer.register_load_state_dict_post_hook(_take_states)


def _divide(sizes: Sequence[int], ranks: int) -> list[int]:
    """Returns the owner of each tensor, such that the ranks own about as many elements."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(ranks), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


def _shard_states(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Completes the states of a saved optimizer with the states of the other owners, as DTensors."""
    from torch.distributed.tensor import DTensor

    assert isinstance(optimizer, StepOfOwners)
    rows, params = optimizer.rows, [*optimizer.owner_of]
    own = {index: values for index, values in saved["state"].items() if optimizer.owner_of[params[index]] == rows.rank}
    states = rows.agree({index: {name: _described(v) for name, v in values.items()} for index, values in own.items()})
    keys: list[tuple[int, str]] = []
    wholes: list[Whole] = []
    owned: dict[int, Tensor] = {}
    for index, values in states.items():
        owner = optimizer.owner_of[params[index]]
        for name, value in values.items():
            if isinstance(value, _Described):
                if owner == rows.rank:
                    owned[len(keys)] = own[index][name]
                keys.append((index, name))
                wholes.append(Whole(value.shape, value.dtype, owner))
    for (index, name), tensor, part in zip(keys, wholes, rows.distribute(wholes, owned), strict=True):
        like: Any = params[index]
        strides = torch.empty(tensor.shape, device="meta").stride()
        states[index][name] = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(tensor.shape), stride=strides
        )
    saved["state"] = states


@dataclass(frozen=True)
class _Described:
    """A tensor that is sharded; scalars, such as counts, are not."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Described(tuple(value.shape), value.dtype) if value.ndim else value.cpu()


def _take_states(optimizer: Optimizer) -> None:
    """Keeps the loaded states of the tensors that this rank owns, whole."""
    assert isinstance(optimizer, StepOfOwners)
    for p, owner in optimizer.owner_of.items():
        whole = {k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in optimizer.state.pop(p, {}).items()}
        if whole and owner == optimizer.rows.rank:
            optimizer.state[p] = whole
