"""Exact batch-norm statistics: over the whole training set instead of a running average."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def exact_statistics(
    module: nn.Module, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within, every batch norm holds the mean and the variance of its inputs over all of `batches`.

    The weights stay as they are. Each batch is normalized by its own statistics on the way, and the moments are pooled
    over samples and positions (Ioffe & Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"); the variance is the
    unbiased one, as in the running average. Afterwards the running averages are back.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]  # type: ignore[union-attr]
    _set_exact(module, model, batches, norms)
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(variance)  # type: ignore[union-attr]


@torch.no_grad()
def _set_exact(
    module: nn.Module,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    norms: list[_BatchNorm],
) -> None:
    pools = [_Pool() for _ in norms]
    handles = [norm.register_forward_pre_hook(pool) for norm, pool in zip(norms, pools, strict=True)]
    modes = {m: m.training for m in module.modules()}
    module.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False  # normalize by the batch, and leave no trace
    try:
        for inputs, _ in batches:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.track_running_stats = True
        for each, mode in modes.items():
            each.training = mode
    for norm, pool in zip(norms, pools, strict=True):
        if pool.count:
            norm.running_mean.copy_(pool.mean)  # type: ignore[union-attr]
            norm.running_var.copy_(pool.squares / max(pool.count - 1, 1))  # type: ignore[union-attr]


class _Pool:
    """Count, mean and sum of squared deviations per channel, merged batch by batch (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double() if inputs[0].device.type != "mps" else inputs[0].float()
        axes = [0, *range(2, values.ndim)]
        count = values.numel() // values.shape[1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        delta, total = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
