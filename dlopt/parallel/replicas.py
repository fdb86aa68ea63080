"""Compares what the ranks hold of a model: where two hold the same, `Mode` promises the same numbers."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import as_bytes, local, shard_axes


def refuse_other_replicas(mode: Mode, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `UserError` on all ranks if two of them hold other bits of a tensor, or of the same shard of it.

    `tensors`: by name; those on the meta device are not held. All ranks call this together; it waits for the device.
    """
    held = {
        (name, *(mesh.get_local_rank(axis) for mesh, axis, _ in shard_axes(each))): _digest(each)
        for name, each in tensors.items()
        if not each.is_meta
    }
    replicas: dict[Any, dict[int, bytes]] = {}
    for rank, of_rank in enumerate(mode.ranks.gather([held])):
        for place, digest in of_rank.items():
            replicas.setdefault(place, {})[rank] = digest
    for (name, *_), digests in replicas.items():
        first, expected = next(iter(digests.items()))
        if others := [str(rank) for rank, digest in digests.items() if digest != expected]:
            raise UserError(
                f"parallel={mode.name}: {what} {name} on rank {', '.join(others)} differs from that on rank {first}; "
                "a parallel mode must make gradients and weights equal (see dlopt.parallel.mode)"
            )


def _digest(tensor: Tensor) -> bytes:
    return blake2b(as_bytes(local(tensor).cpu()).numpy().data, digest_size=16).digest()
