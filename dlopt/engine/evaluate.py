"""Testing a model on a split: every sample exactly once."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from dlopt.engine.metrics import Reduce, Sums


class Figures(Protocol):
    """Further figures, which are sums over samples."""

    def add(self, outputs: Tensor, targets: Tensor) -> None: ...

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """By name, over all samples so far and all ranks."""
        ...


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: nn.Module,
    *,
    classify: bool,
    prefix: str,
    interruption: object = None,
    reduce: Reduce | None = None,
    more: Figures | None = None,
) -> dict[str, float] | None:
    """Sample-weighted means over `batches`: {prefix}_loss, {prefix}_accuracy (of a classification), what `more` counts.

    None when `interruption` became true on the way. `model` is how `module` is called (compiled, under autocast);
    both are in evaluation mode within, and back in their former mode afterwards. `reduce`: see `Sums`; a rank
    may have no samples in a batch.
    """
    sums = Sums(classify, reduce=reduce)
    modes = module.training, loss.training
    module.eval(), loss.eval()
    try:
        for inputs, targets in batches:
            outputs = model(inputs)  # also without samples: other ranks may wait within it
            if len(targets):
                outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # a loss needs more than bf16
                sums.add(loss(outputs, targets), outputs, targets)
                if more is not None:
                    more.add(outputs, targets)
            else:
                sums.add_nothing(inputs.device)
            if interruption:
                return None
    finally:
        module.train(modes[0]), loss.train(modes[1])
    further = {} if more is None else more.means(reduce)
    return sums.means(prefix) | {f"{prefix}_{name}": value for name, value in further.items()}
