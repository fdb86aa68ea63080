"""Exact batch-norm statistics: over the whole training set instead of a running average."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.parallel.shards import local


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
    kept = [tuple(each.clone() for each in _running(norm)) for norm in norms]
    _set_exact(module, model, batches, norms)
    try:
        yield
    finally:
        for norm, statistics in zip(norms, kept, strict=True):
            _set_running(norm, *statistics)


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
            _set_running(norm, pool.mean, pool.squares / max(pool.count - 1, 1))


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of the channels that this process has."""
    assert norm.running_mean is not None and norm.running_var is not None
    return local(norm.running_mean), local(norm.running_var)


def _set_running(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    for own, value in zip(_running(norm), (mean, variance), strict=True):
        own.copy_(value)


class _Pool:
    """Count, mean and sum of squared deviations per channel, merged batch by batch (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double() if inputs[0].device.type != "mps" else inputs[0].float()
        moments: Any = getattr(module, "moments", None)
        if moments is not None:  # the values are a part of what it normalizes by
            mean, variance, counted = moments(values)
            count = round(float(counted))
        else:
            variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
            count = values.numel() // values.shape[1]
        delta, total = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
