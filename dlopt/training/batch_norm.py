"""Exact batch-norm statistics: over the whole training set instead of a running average."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.errors import UserError
from dlopt.parallel.shards import local
from dlopt.parallel.shares import cut
from dlopt.training.build import Workload, evaluation_batches


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


SMALL_NORM_BATCH = 8  # samples per device below which batch statistics are too noisy (Wu & He 2018, figure 1)


def _smallest_part(count: int, batch_size: int, accumulate: int, drop_last: bool) -> int:
    """Samples of the smallest micro-batch of an epoch."""
    full, rest = divmod(count, batch_size)
    sizes = ([batch_size] if full else []) + ([rest] if rest and not (drop_last and full) else [])
    return min(size // min(accumulate, size) for size in sizes)


def check_single_values(workload: Workload) -> None:
    """Refuses batch norm over one value per channel: its output would be the shift, whatever the input."""
    data = workload.experiment.data_settings
    count = len(workload.dataset.train)
    batch_size = count if data.batch_size == "full" else min(data.batch_size, count)
    cuts = max(workload.experiment.settings.accumulate, workload.parallel.micro_batches_in_flight)
    smallest = _smallest_part(count, batch_size, cuts, data.drop_last)
    shares = workload.parallel.batch_norm_shards
    if shares > 1:
        parts = [cut(start, start + smallest, rank, shares) for rank in range(shares) for start in (0, 1)]
        smallest = min(part.stop - part.start for part in parts)
        if smallest == 0 and any(isinstance(m, _BatchNorm) for m in workload.module.modules()):
            raise UserError(
                f"data.batch_size={data.batch_size}: {count} training samples leave a (micro-)batch of which one of "
                f"{shares} processes has no part, and its batch norm nothing to normalize; use "
                "parallel.sync_batchnorm=true, larger batches, data.drop_last=true, or model.norm=group"
            )
    if smallest > 1:
        return
    single: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                single.append(name)

        return hook

    norms = [(n, m) for n, m in workload.module.named_modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(look(n)) for n, m in norms]
    first = workload.dataset.train.select(torch.tensor([0]))
    inputs, _ = next(iter(evaluation_batches(workload, first, shared=False).epoch(0)))
    was_training = workload.module.training
    workload.module.eval()
    with torch.no_grad():
        workload.model(inputs)
    workload.module.train(was_training)
    for handle in handles:
        handle.remove()
    if single := workload.parallel.gather_lists(single):  # a rank may have some of the layers
        raise UserError(
            f"data.batch_size={data.batch_size}: {count} training samples leave a (micro-)batch of one, "
            f"which gives the batch norm {single[0]} one value per channel; "
            "use larger batches, data.drop_last=true, model.norm=group"
            + (", or parallel.sync_batchnorm=true" if workload.parallel.batch_norm_shards > 1 else "")
        )


def norm_statistics(
    workload: Workload, module: nn.Module, model: Callable[[Tensor], Tensor], interruption: object = None
) -> contextlib.AbstractContextManager[None]:
    """The batch-norm statistics with which `module` is evaluated: running ones, or exact ones over the training set.

    What is evaluated after an `interruption` on the way is worth nothing.
    """
    if workload.experiment.settings.norm_statistics == "running":
        return contextlib.nullcontext()
    if workload.statistics_batches is None:
        workload.statistics_batches = evaluation_batches(workload, workload.dataset.train, shared=False)
    batches = itertools.takewhile(lambda _: not interruption, workload.statistics_batches.epoch(0))
    return exact_statistics(module, model, batches)


def small_batches(workload: Workload) -> list[str]:
    """A line for the user where batch norm averages over few samples of a device: allowed, and seldom wanted."""
    data, settings = workload.experiment.data_settings, workload.experiment.settings
    count = len(workload.dataset.train)
    size = count if data.batch_size == "full" else min(data.batch_size, count)
    mode = workload.parallel
    device_batch = size // mode.batch_norm_shards // max(settings.accumulate, mode.micro_batches_in_flight)
    if device_batch >= SMALL_NORM_BATCH or not any(isinstance(m, _BatchNorm) for m in workload.module.modules()):
        return []
    return [
        f"warning: batch norm over {device_batch} samples per device is noisy (fewer than {SMALL_NORM_BATCH}): "
        "use model.norm=group, a larger data.batch_size, or, with several devices, parallel.sync_batchnorm=true"
    ]
