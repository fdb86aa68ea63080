"""Parts of a model as DTensors for optimizers, checkpoints and norms, and as plain tensors for the layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dlopt.parallel.collectives import Cut


def distribute(model: nn.Module, mesh: Any, cuts: Mapping[str, Cut]) -> None:
    """Makes a DTensor on the one-dimensional `mesh` of every parameter, and of every buffer that is cut.

    `cuts` names the tensors of which each rank has an equal part; the others are the same on all ranks, and so are
    their gradients (or are made so behind the backward). The layers see what this rank has.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def placement(cut: Cut | None) -> Any:
        if cut is None:
            return Replicate()
        return Shard(cut.dim) if cut.pieces == 1 else _StridedShard(cut.dim, split_factor=cut.pieces)

    def spread(name: str, tensor: Tensor) -> Any:
        return DTensor.from_local(tensor.detach(), mesh, [placement(cuts.get(name))], run_check=False)

    for prefix, module in model.named_modules():
        found = False
        for key, parameter in module.named_parameters(prefix, recurse=False):
            name, found = key.rpartition(".")[2], True
            setattr(module, name, nn.Parameter(spread(key, parameter), requires_grad=parameter.requires_grad))
        for key, buffer in module.named_buffers(prefix, recurse=False):
            if key in cuts:
                module._buffers[key.rpartition(".")[2]], found = spread(key, buffer), True
        if found:
            module.register_forward_pre_hook(_show_own)
            module.register_forward_hook(_hide_own, always_call=True)


def here(tensor: Tensor) -> Tensor:
    """What this rank has, as a part of the graph."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _show_own(module: nn.Module, inputs: object) -> None:
    """Puts plain tensors in the DTensors' place for one forward."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and hasattr(tensor, "to_local"):
                kept.append((tensors, name, tensor))
                tensors[name] = here(tensor)  # type: ignore[assignment]
    module.__dict__["_spread"] = kept


def _hide_own(module: nn.Module, inputs: object, output: object) -> None:
    for tensors, name, tensor in module.__dict__.pop("_spread", ()):
        tensors[name] = tensor
