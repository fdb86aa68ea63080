"""Batch norm: exact statistics over the training set in place of running averages, and checks of the batch size."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batches
from dlopt.data.normalization import PooledMoments
from dlopt.models.layers import evaluation_mode
from dlopt.parallel.batch_shards import local_slice
from dlopt.parallel.shards import local
from dlopt.training.builders.batches import evaluation_batches
from dlopt.training.builders.workload import Workload, batch_size


@contextlib.contextmanager
def exact_statistics(
    module: nn.Module, model: Callable[[Tensor], Tensor], batches: Iterable[Iterable[Tensor]]
) -> Iterator[None]:
    """Context in which every batch norm holds the mean and variance of its inputs over all of `batches`.

    Each batch is normalized by its own statistics, and the moments are pooled over samples and positions (Ioffe &
    Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"). The variance is unbiased, as in the running average.
    """
    norms = _running_norms(module)
    saved = [tuple(tensor.clone() for tensor in _running_stats(norm)) for norm in norms]
    pools = [PooledMoments() for _ in norms]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(module))
        for norm, pool in zip(norms, pools, strict=True):
            stack.enter_context(norm.register_forward_pre_hook(partial(_pool_inputs, pool)))
            # Use the statistics of the batch, and update nothing: with running statistics instead, an error of the
            # first layer would shift the moments of all later ones.
            norm.training, norm.track_running_stats = True, False
            stack.callback(setattr, norm, "track_running_stats", True)
        for inputs, _ in batches:
            model(inputs)
    for norm, pool in zip(norms, pools, strict=True):
        if pool.count:
            _set_running_stats(norm, pool.mean, pool.squares / max(pool.count - 1, 1))
    try:
        yield
    finally:
        for norm, statistics in zip(norms, saved, strict=True):
            _set_running_stats(norm, *statistics)


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def _running_norms(module: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in _norms(module) if norm.track_running_stats]


def _running_stats(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Returns running mean and variance of this process's shard of the channels."""
    assert norm.running_mean is not None and norm.running_var is not None
    return local(norm.running_mean), local(norm.running_var)


@torch.no_grad()
def _set_running_stats(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    for running, value in zip(_running_stats(norm), (mean, variance), strict=True):
        running.copy_(value)


def _pool_inputs(pool: PooledMoments, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    # In fp32, sums over the whole training set would lose digits with the number of batches.
    values = inputs[0].double() if inputs[0].device.type != "mps" else inputs[0].float()
    moments: Any = getattr(norm, "moments", None)
    if moments is not None:  # a layer that normalizes over several processes
        # A collective, which all ranks reach in the same order, because each goes through all batches.
        mean, variance, global_count = moments(values)
        count = round(float(global_count))
    else:
        variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
        count = values.numel() // values.shape[1]
    pool.merge(count, mean, variance * count)


SMALL_NORM_BATCH = 8  # samples per device below which batch statistics are too noisy (Wu & He 2018, figure 1)


def _smallest_micro_batch(count: int, batch_size: int, accumulate: int) -> int:
    """Returns the size of the smallest micro-batch of an epoch of `count` samples, at least `batch_size`."""
    sizes = (batch_size, count % batch_size or batch_size)
    return min(size // min(accumulate, size) for size in sizes)


def check_norm_batches(workload: Workload, batches: Batches) -> None:
    """Raises `UserError` for batch norm over one value per channel: its output would not depend on the input.

    `batches`: the training batches, whose sampler may select some of the training samples.
    """
    module, mode, count = workload.module, workload.parallel, batches.count
    size = workload.run_config.data_settings.batch_size
    micro_batches = max(workload.run_config.settings.micro_batches, mode.traits.micro_batches)
    smallest = _smallest_micro_batch(count, batches.batch_size, micro_batches)
    # The loss of a task may call the model with the placeholder of no samples, which even a synchronized norm counts.
    calls_model = workload.task.calls_model
    shards = mode.split.ranks if calls_model else mode.traits.batch_norm_shards
    if shards > 1:
        slices = [local_slice(start, start + smallest, rank, shards) for rank in range(shards) for start in (0, 1)]
        smallest = min(each.stop - each.start for each in slices)
        if smallest == 0 and _norms(module):
            raise UserError(
                f"data.batch_size={size}: with {count} training samples, a (micro-)batch is too small for {shards} "
                "processes, and batch norm fails on an empty shard; use "
                f"{'' if calls_model else 'parallel.sync_batchnorm=true, '}larger batches, data.drop_last=true, or "
                "model.norm=group"
            )
    ghost = min((getattr(m, "ghost_batch", 2) for m in module.modules()), default=2)
    if min(smallest, ghost) > 1 or calls_model:
        return
    # A batch of one has one value per channel in a linear layer, and many in a convolution: try one sample.
    names = {m: name for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    single_value_layers: list[str] = []

    def record(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single_value_layers.append(names[norm])

    first = workload.dataset.train.select(torch.tensor([0]))
    inputs, _ = next(iter(evaluation_batches(workload, first, shared=False).epoch(0)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(torch.no_grad())
        for norm in names:
            stack.enter_context(norm.register_forward_pre_hook(record))
        workload.model(inputs)
    if layers := mode.ranks.gather(single_value_layers):  # a rank may have only some of the layers
        if smallest > 1:
            raise UserError(
                f"model.norm_ghost_batch=1: leaves batch norm {layers[0]} one value per channel; use 2 or more, or null"
            )
        synchronized = ", or parallel.sync_batchnorm=true" if mode.traits.batch_norm_shards > 1 else ""
        raise UserError(
            f"data.batch_size={size}: {count} training samples leave a (micro-)batch of one, and batch norm "
            f"{layers[0]} one value per channel; use larger batches, data.drop_last=true, model.norm=group"
            f"{synchronized}"
        )


def norm_statistics(workload: Workload, interruption: object = None) -> contextlib.AbstractContextManager[None]:
    """Context in which the model has the batch-norm statistics for evaluation: running, or exact over the training set.

    If interrupted, the statistics are incomplete: discard the evaluation.
    """
    if workload.run_config.settings.norm_statistics == "running":
        return contextlib.nullcontext()
    if workload.statistics_batches is None:
        samples, size = workload.dataset.train, workload.run_config.data_settings.batch_size
        while size != "full" and size < len(samples) and len(samples) % size == 1:
            size += 1  # a batch of one sample has no variance in a linear layer
        workload.statistics_batches = evaluation_batches(workload, samples, shared=False, batch_size=size)
    batches = itertools.takewhile(lambda _: not interruption, workload.statistics_batches.epoch(0))
    return exact_statistics(workload.module, workload.precision.autocast(workload.model), batches)


class LaggingStatistics:
    """Explains a validation loss that the running statistics of batch norm raise in the first updates.

    The statistics are averages over some 1 / momentum updates. While the weights change fast, they describe an earlier
    network: a ResNet-20 with a training accuracy of 69 % may have a validation loss far above that of a random guess.
    """

    def __init__(self, module: nn.Module) -> None:
        slowest = min((norm.momentum for norm in _running_norms(module) if norm.momentum), default=None)
        self._updates = 0.0 if slowest is None else 10 / slowest  # after which the statistics have forgotten the start
        self._highest = 0.0  # training loss so far

    def explain(self, metrics: Mapping[str, float], show: Callable[[str], None]) -> None:
        """Shows a note of two lines, once, if the validation loss is high beside all training losses so far."""
        train, val = metrics.get("train_loss"), metrics.get("val_loss")
        if metrics["step"] > self._updates or train is None or val is None:
            return
        self._highest = max(self._highest, train)
        if val > 2 * self._highest > 0:
            self._updates = 0
            show("val loss is high: early on, batch norm's running statistics fit older weights;")
            show("norm_statistics=exact evaluates with those of the current weights")


def norm_notes(workload: Workload) -> list[str]:
    """Returns lines about batch norm: what changes nothing, follows the data though frozen, or is noisy."""
    settings, mode, norms = workload.run_config.settings, workload.parallel, _norms(workload.module)
    lines = []
    if settings.norm_statistics != "running" and not _running_norms(workload.module):
        lines += ["norm_statistics=exact: changes nothing; the model has no batch norm with running statistics"]
    affine = [norm for norm in norms if norm.affine and norm.track_running_stats]
    if frozen := sum(not any(p.requires_grad for p in norm.parameters()) for norm in affine):
        layers = "batch norm" if frozen == 1 else "batch norms"
        lines += [f"{frozen} frozen {layers}: running statistics still follow the training data"]
    micro_batches = max(settings.micro_batches, mode.traits.micro_batches)
    size = batch_size(workload.run_config, workload.dataset.train) // mode.traits.batch_norm_shards // micro_batches
    if norms and size < SMALL_NORM_BATCH:
        lines += [
            f"warning: batch norm over {size} samples per device is noisy (fewer than {SMALL_NORM_BATCH}): use "
            "model.norm=group, a larger data.batch_size, or, with several devices, parallel.sync_batchnorm=true"
        ]
    return lines
