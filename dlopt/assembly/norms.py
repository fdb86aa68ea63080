"""What batch normalization needs: enough samples to average over, and the statistics of an evaluation."""

import contextlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.assembly.batches import evaluation_batches
from dlopt.assembly.setup import Setup
from dlopt.engine.statistics import exact_statistics
from dlopt.errors import UserError
from dlopt.parallel.shares import cut

SMALL_NORM_BATCH = 8  # samples per device below which batch statistics are too noisy (Wu & He 2018, figure 1)


def _smallest_part(count: int, batch_size: int, accumulate: int, drop_last: bool) -> int:
    """Samples of the smallest micro-batch of an epoch."""
    full, rest = divmod(count, batch_size)
    sizes = ([batch_size] if full else []) + ([rest] if rest and not (drop_last and full) else [])
    return min(size // min(accumulate, size) for size in sizes)


def check_single_values(setup: Setup) -> None:
    """Refuses batch norm over one value per channel: its output would be the shift, whatever the input."""
    data = setup.experiment.data_settings
    count = len(setup.dataset.train)
    batch_size = count if data.batch_size == "full" else min(data.batch_size, count)
    cuts = max(setup.experiment.settings.accumulate, setup.parallel.in_flight)
    smallest = _smallest_part(count, batch_size, cuts, data.drop_last)
    shares = setup.parallel.norm_shares
    if shares > 1:
        parts = [cut(start, start + smallest, rank, shares) for rank in range(shares) for start in (0, 1)]
        smallest = min(part.stop - part.start for part in parts)
        if smallest == 0 and any(isinstance(m, _BatchNorm) for m in setup.module.modules()):
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

    norms = [(n, m) for n, m in setup.module.named_modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(look(n)) for n, m in norms]
    first = setup.dataset.train.select(torch.tensor([0]))
    inputs, _ = next(iter(evaluation_batches(setup, first, shared=False).epoch(0)))
    was_training = setup.module.training
    setup.module.eval()
    with torch.no_grad():
        setup.model(inputs)
    setup.module.train(was_training)
    for handle in handles:
        handle.remove()
    if single := setup.parallel.everyones(single):  # a rank may have some of the layers
        raise UserError(
            f"data.batch_size={data.batch_size}: {count} training samples leave a (micro-)batch of one, "
            f"which gives the batch norm {single[0]} one value per channel; "
            "use larger batches, data.drop_last=true, model.norm=group"
            + (", or parallel.sync_batchnorm=true" if setup.parallel.norm_shares > 1 else "")
        )


def norm_statistics(
    setup: Setup, module: nn.Module, model: Callable[[Tensor], Tensor], interruption: object = None
) -> contextlib.AbstractContextManager[None]:
    """The batch-norm statistics with which `module` is evaluated: running ones, or exact ones over the training set.

    What is evaluated after an `interruption` on the way is worth nothing.
    """
    if setup.experiment.settings.norm_statistics == "running":
        return contextlib.nullcontext()
    if setup.statistics_batches is None:
        setup.statistics_batches = evaluation_batches(setup, setup.dataset.train, shared=False)  # of whole batches
    batches = itertools.takewhile(lambda _: not interruption, setup.statistics_batches.epoch(0))
    return exact_statistics(module, model, batches)


def small_batches(setup: Setup) -> list[str]:
    """A line for the user where batch norm averages over few samples of a device: allowed, and seldom wanted."""
    data, settings = setup.experiment.data_settings, setup.experiment.settings
    count = len(setup.dataset.train)
    size = count if data.batch_size == "full" else min(data.batch_size, count)
    device_batch = size // setup.parallel.norm_shares // max(settings.accumulate, setup.parallel.in_flight)
    if device_batch >= SMALL_NORM_BATCH or not any(isinstance(m, _BatchNorm) for m in setup.module.modules()):
        return []
    return [
        f"warning: batch norm over {device_batch} samples per device is noisy (fewer than {SMALL_NORM_BATCH}): "
        "use model.norm=group, a larger data.batch_size, or, with several devices, parallel.sync_batchnorm=true"
    ]
