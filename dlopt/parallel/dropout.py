"""Dropout whose mask is a function of the position in the global batch, so that ranks drop what one process drops."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dlopt.errors import UserError
from dlopt.parallel.collectives import Cut
from dlopt.parallel.shares import Portion


class Place:
    """Where the samples that go through the model now stand among those of all ranks; None: they are all there are."""

    def __init__(self) -> None:
        self.portion: Portion | None = None

    def __deepcopy__(self, memo: object) -> "Place":
        return self


class GlobalDropout(nn.Module):
    """Any of torch's dropout modules, drawn for the samples of all ranks, of which this one keeps its own.

    The generator has to be in the same state on all ranks, and is so afterwards: the draws do not depend on the share.
    The leading dimension of the input is the sample. `cut`: which of the features an
    input is, where ranks have different ones.
    """

    def __init__(self, dropout: _DropoutNd, place: Place, cut: Callable[[Tensor], Cut] | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.place = place
        self.cut = cut

    def forward(self, inputs: Tensor) -> Tensor:
        portion = self.place.portion
        if (portion is None and self.cut is None) or not self.training or self.dropout.p == 0:
            outputs: Tensor = self.dropout(inputs)
            return outputs
        if portion is None:
            portion = Portion(len(inputs), slice(0, len(inputs)))
        if len(inputs) != portion.samples:
            raise RuntimeError(
                f"dropout sees {len(inputs)} samples where the rank has {portion.samples}: the leading dimension must "
                "be the sample under data parallelism"
            )
        # Around the own samples the others' places are filled with zeros: kinds of dropout need not be told apart.
        # The order of dimensions in memory is kept, since draws may follow it.
        shape, cut = [portion.total, *inputs.shape[1:]], self.cut and self.cut(inputs)
        if cut is not None:
            shape[cut.dim] = cut.size
            if _has_one_order(inputs.shape) and not _has_one_order(shape):
                raise UserError(
                    "model.dropout: with one channel or one pixel for each process its masks cannot be those of one "
                    "process; use fewer processes, a wider model, or model.dropout=0"
                )
        full = inputs.new_zeros(shape)
        if not inputs.is_contiguous():
            strides = inputs.stride()
            order = sorted(range(inputs.ndim), key=lambda axis: -strides[axis])
            back = sorted(range(inputs.ndim), key=lambda axis: order[axis])
            full = full.permute(order).contiguous().permute(back)
        if cut is None:
            full[portion.own] = inputs
            kept: Tensor = self.dropout(full)[portion.own]
            return kept
        full[portion.own] = cut.put(full[portion.own], inputs)
        return cut.of(self.dropout(full)[portion.own])


def _has_one_order(shape: Sequence[int]) -> bool:
    """Whether maps (or features) of this shape lie the same way in memory channels first and channels last."""
    return len(shape) > 2 and (shape[1] == 1 or math.prod(shape[2:]) == 1)


def make_global(
    module: nn.Module, place: Place, cuts: Mapping[nn.Module, Callable[[Tensor], Cut]] | None = None
) -> None:
    """Replaces the dropout modules within `module`, each wherever it is used. `cuts`: see `GlobalDropout`."""
    replaced: dict[nn.Module, GlobalDropout] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _DropoutNd) and not isinstance(parent, GlobalDropout):
                parent._modules[name] = replaced.setdefault(child, GlobalDropout(child, place, (cuts or {}).get(child)))
