"""Layers of which each rank has a part of the inputs, and blocks that need one sum over ranks for two paths."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.models.preact import PreActBlock, PreActBottleneck
from dlopt.models.resnet import BasicBlock, Bottleneck
from dlopt.parallel.collectives import Cut, Ranks


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


class SplitInputs(nn.Module):
    """What `InputSplitConv2d` and `InputSplitLinear` share: the ranks' products are summed, then comes the bias.

    `cuts`: the input is whole, and the rank takes its part of it first.
    """

    ranks: Ranks
    cuts: bool
    bias: Any

    def forward(self, inputs: Tensor) -> Tensor:
        own = self.ranks.part(inputs) if self.cuts else inputs
        return self.finished(self.ranks.summed(self.partial(own)))

    def partial(self, part: Tensor) -> Tensor:
        """The rank's summand: without the others' inputs, and without the bias."""
        raise NotImplementedError

    def finished(self, total: Tensor) -> Tensor:
        return total if self.bias is None else total + here(self.bias).view(-1, *(1 for _ in total.shape[2:]))


class InputSplitConv2d(SplitInputs, nn.Conv2d):
    def partial(self, part: Tensor) -> Tensor:
        return self._conv_forward(part, here(self.weight), None)


class InputSplitLinear(SplitInputs, nn.Linear):
    def partial(self, part: Tensor) -> Tensor:
        return nn.functional.linear(part, here(self.weight))


# -- blocks whose shortcut is a convolution: split by inputs, too, it is summed together with the branch


class ProjectedBasicBlock(BasicBlock):
    ranks: Ranks

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.ranks.copied(maps)
        branch = self.act1(self.norm1(self.conv1(shared)))
        branch, skip = _summed_together(self.ranks, self.conv2, branch, self.shortcut, shared)
        return self.act2(self.norm2(branch) + skip)


class ProjectedBottleneck(Bottleneck):
    ranks: Ranks

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.ranks.copied(maps)
        branch = self.act1(self.norm1(self.conv1(shared)))
        branch = self.act2(self.norm2(self.conv2(branch)))
        branch, skip = _summed_together(self.ranks, self.conv3, branch, self.shortcut, shared)
        return self.act3(self.norm3(branch) + skip)


class ProjectedPreActBlock(PreActBlock):
    ranks: Ranks

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.ranks.copied(self.act1(self.norm1(maps)))
        branch = self.dropout(self.act2(self.norm2(self.conv1(shared))))
        return _sum_of_both(self.ranks, self.conv2, branch, self.shortcut, shared)


class ProjectedPreActBottleneck(PreActBottleneck):
    ranks: Ranks

    def forward(self, maps: Tensor) -> Tensor:
        shared = self.ranks.copied(self.act1(self.norm1(maps)))
        branch = self.act2(self.norm2(self.conv1(shared)))
        branch = self.dropout(self.act3(self.norm3(self.conv2(branch))))
        return _sum_of_both(self.ranks, self.conv3, branch, self.shortcut, shared)


def _summed_together(
    ranks: Ranks, conv: nn.Module, branch: Tensor, shortcut: nn.Module | None, shared: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of `conv` and of the shortcut (a convolution and its norm), by one sum over ranks."""
    assert shortcut is not None
    projection, norm = shortcut.children()
    assert isinstance(conv, InputSplitConv2d) and isinstance(projection, InputSplitConv2d)
    both = [_own_product(conv, branch, ranks), projection.partial(_own(shared, ranks))]
    total, skip = ranks.summed(torch.cat(both, dim=1)).chunk(2, dim=1)
    return conv.finished(total), norm(projection.finished(skip))


def _sum_of_both(ranks: Ranks, conv: nn.Module, branch: Tensor, projection: nn.Module, shared: Tensor) -> Tensor:
    assert isinstance(conv, InputSplitConv2d) and isinstance(projection, InputSplitConv2d)
    total = ranks.summed(_own_product(conv, branch, ranks) + projection.partial(_own(shared, ranks)))
    return projection.finished(conv.finished(total))


def _own_product(conv: InputSplitConv2d, branch: Tensor, ranks: Ranks) -> Tensor:
    return conv.partial(ranks.part(branch) if conv.cuts else branch)


def _own(shared: Tensor, ranks: Ranks) -> Tensor:
    """The rank's part of what `Ranks.copied` gave: the gradients of the parts are added up there."""
    return shared[:, ranks.own(shared.shape[1])]


PROJECTED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: ProjectedBasicBlock,
    Bottleneck: ProjectedBottleneck,
    PreActBlock: ProjectedPreActBlock,
    PreActBottleneck: ProjectedPreActBottleneck,
}


def become(module: nn.Module, kind: type[nn.Module], **attributes: object) -> None:
    """Makes `module` one of a subclass in place: its tensors, names and hooks stay."""
    for name, value in attributes.items():
        setattr(module, name, value)
    module.__class__ = kind


def before(module: nn.Module, action: Callable[[Tensor], Tensor]) -> None:
    """Has the input of `module` go through `action` first."""
    module.register_forward_pre_hook(lambda _, inputs: (action(inputs[0]),))


def behind(module: nn.Module, action: Callable[[Tensor], Tensor]) -> None:
    """Has the output of `module` go through `action`."""
    module.register_forward_hook(lambda _, __, output: action(output))
