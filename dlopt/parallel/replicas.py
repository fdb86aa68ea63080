"""Compares what the ranks hold of a model: where two hold the same, `Mode` promises the same numbers."""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import is_sharded_tensor, local


def refuse_other_replicas(mode: Mode, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `UserError` on all ranks if two of them hold other bits of a tensor, or of the same shard of it.

    `tensors`: by name; those on the meta device are not held. All ranks call this together; it waits for the device.
    """
    held = {(name, _shard(each)): _digest(each) for name, each in tensors.items() if not each.is_meta}
    replicas: dict[tuple[str, object], dict[int, bytes]] = {}
    for rank, of_rank in enumerate(mode.ranks.gather([held])):
        for place, digest in of_rank.items():
            replicas.setdefault(place, {})[rank] = digest
    for (name, _), digests in replicas.items():
        first, expected = next(iter(digests.items()))
        if others := [str(rank) for rank, digest in digests.items() if digest != expected]:
            raise UserError(
                f"parallel={mode.name}: {what} {name} on rank {', '.join(others)} differs from that on rank {first}; "
                "a parallel mode must make gradients and weights equal (see dlopt.parallel.mode)"
            )


def _shard(tensor: Tensor) -> tuple[int, ...]:
    """Returns which shard this rank holds: its position along the dimensions of the mesh that shard the tensor."""
    if not is_sharded_tensor(tensor):
        return ()
    coordinate, placements = tensor.device_mesh.get_coordinate(), tensor.placements  # type: ignore[attr-defined]
    return tuple(at for at, each in zip(coordinate, placements, strict=True) if not each.is_replicate())


def _digest(tensor: Tensor) -> bytes:
    values = local(tensor).detach().cpu().contiguous().flatten()
    return blake2b(values.view(torch.uint8).numpy().data, digest_size=16).digest()
