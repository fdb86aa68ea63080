"""What the training loop iterates: batches on the device, augmented and normalized."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dlopt.data.loading import CudaLane, Loader, ahead, materialize, worker_count
from dlopt.data.samplers import LossAwareSampler, Sampler, Sequential
from dlopt.data.samples import Samples
from dlopt.errors import UserError
from dlopt.graphs import Recorder, Replayed
from dlopt.random import generator, stream


class Augment(Protocol):
    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        generator: torch.Generator,
        total: int,
        part: Any,
        indices: Tensor,
        epoch: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Augments the samples `part` (what `share` gave) of a global batch of `total`.

        `indices` are their positions in the data.
        """
        ...


@dataclass(frozen=True)
class Delivery:
    """Where samples live and in which form batches are given out.

    Args:
        in_memory: whether the samples live on the device (`Dataset.in_memory`); those still in files are read.
        workers: processes that read files; 0: none.
        normalize: module on the device; None: conversion to `dtype` alone.
        memory_format: of image batches.
        dtype: of the inputs.
        compiled: whether index, augmentation and normalization are compiled as one function (in memory, with a pipeline
            whose drawing and rendering are two steps).
        recorder: of CUDA graphs; None: no graph. With one, full batches are in the same memory, each in the place of
            the one before (in memory, all samples).
    """

    device: torch.device
    in_memory: bool
    workers: int | Literal["auto"]
    normalize: nn.Module | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    recorder: Recorder | None = None


class Batches:
    """Batches of an epoch, the same whether samples lie in memory or are streamed from worker processes.

    In memory, the samples are one tensor on the device and a batch is an index. Streamed, workers fetch batches ahead.
    Augmentation and normalization run on the device either way.

    Args:
        batch_size: samples in a global batch; `full`: all of them.
        sampler: order of the samples in each epoch; None: as they stand, each once (for evaluation).
        drop_last: leave out a last batch that is smaller than the others.
        augment: see `Augment`; None: nothing.
        seed: of the augmentation draws.
        share: this rank's part of a global batch of n samples, as positions; None: everything.

    Raises:
        UserError: no batch is left, or a sample cannot be read.
    """

    def __init__(
        self,
        samples: Samples,
        delivery: Delivery,
        *,
        batch_size: int | Literal["full"],
        sampler: Sampler | None = None,
        drop_last: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        share: Callable[[int], slice | Tensor] | None = None,
    ) -> None:
        self._device = device = delivery.device
        self.sampler = sampler if sampler is not None else Sequential(targets=samples.targets)
        drawn = len(self.sampler)
        self.batch_size = drawn if batch_size == "full" else min(batch_size, drawn)
        if drop_last and batch_size != "full" and batch_size > drawn:
            raise UserError(
                f"data.drop_last=true: the {drawn} training samples do not fill one batch of "
                f"data.batch_size={batch_size}; use drop_last=false or a smaller batch"
            )
        self.count = drawn // self.batch_size * self.batch_size if drop_last else drawn
        self._share = share
        self._augment = augment
        self._seed = seed
        self._normalize = delivery.normalize
        self._memory_format = delivery.memory_format if len(samples.shape) == 3 else torch.contiguous_format
        self._dtype = delivery.dtype
        self._targets = samples.targets.to(device)
        self._inputs: Tensor | None = None
        self._loader: Loader | None = None
        if delivery.in_memory:
            self._inputs = materialize(samples, delivery.workers).inputs.to(device)
        else:
            self._loader = Loader(samples, worker_count(delivery.workers, samples), pin=device.type == "cuda")
        self._rendered: Callable[..., tuple[Tensor, Tensor]] | None = None
        if delivery.compiled and delivery.in_memory and (augment is None or hasattr(augment, "render")):
            self._rendered = torch.compile(self._render, dynamic=False)
        self._recorded: _Recorded | None = None
        if delivery.recorder is not None and delivery.in_memory and share is None:
            self._recorded = _Recorded(self._make, self.batch_size, device, delivery.recorder)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self.count // self.batch_size)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (inputs, targets) of this rank for the batches of epoch `epoch` from number `start` on.

        `step` is the global number of the update that the first batch given out serves: the augmentation of each
        batch is drawn from (seed, number of its update).
        """
        loss_aware = self.sampler if isinstance(self.sampler, LossAwareSampler) else None
        if loss_aware is not None:
            loss_aware.begin()
        order = self.sampler.order(epoch)[start * self.batch_size : self.count]
        totals = [len(part) for part in order.split(self.batch_size)] if len(order) else []
        shares = [slice(0, total) if self._share is None else self._share(total) for total in totals]
        indices = self._cut(order.to(self._device), shares)
        fetched = [None] * len(indices) if self._loader is None else self._stream(self._cut(order, shares))
        for number, (inputs, own, part, total) in enumerate(zip(fetched, indices, shares, totals, strict=True)):
            if self._recorded is not None and total == self.batch_size:
                batch = self._recorded(own, stream(self._seed, step + number), epoch)
            else:
                draws = None if self._augment is None else generator(self._device, self._seed, step + number)
                batch = self._make(inputs, own, draws, total, part, epoch)
            if loss_aware is not None:
                loss_aware.serve(step + number, order[number * self.batch_size :][part])
            yield batch

    def _make(
        self,
        inputs: Tensor | None,
        own: Tensor,
        draws: torch.Generator | None,
        total: int,
        part: slice | Tensor,
        epoch: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The batch of the samples `own`; `inputs` None: those in memory."""
        if self._rendered is not None:
            assert self._inputs is not None
            steps: Any = None
            if self._augment is not None:
                steps = self._augment.plan(  # type: ignore[attr-defined]
                    self._inputs.shape[1:], generator=draws, total=total, part=part, indices=own, epoch=epoch
                )
            render = self._rendered if total == self.batch_size else self._render  # not compiled for one batch
            return render(self._inputs, self._targets, own, steps)
        if inputs is None:
            assert self._inputs is not None
            inputs = self._inputs.index_select(0, own)
        targets = self._targets.index_select(0, own)
        if self._augment is not None:
            assert draws is not None
            inputs, targets = self._augment(
                inputs, targets, generator=draws, total=total, part=part, indices=own, epoch=epoch
            )
        return self._finish(inputs), targets

    def _render(self, inputs: Tensor, targets: Tensor, own: Tensor, steps: Any) -> tuple[Tensor, Tensor]:
        """The same from all inputs and targets and what was drawn: tensors alone, so that it can be compiled."""
        inputs, targets = inputs.index_select(0, own), targets.index_select(0, own)
        if steps:
            inputs, targets = self._augment.render(inputs, targets, steps)  # type: ignore[union-attr]
        return self._finish(inputs), targets

    def _finish(self, inputs: Tensor) -> Tensor:
        if self._normalize is not None:
            inputs = self._normalize(inputs)
        return inputs.to(dtype=self._dtype, memory_format=self._memory_format)

    def close(self) -> None:
        """Ends the worker processes, if there are any."""
        if self._loader is not None:
            self._loader.close()

    def _cut(self, order: Tensor, shares: Sequence[slice | Tensor]) -> list[Tensor]:
        parts = order.split(self.batch_size) if shares else ()
        if self._share is None:
            return list(parts)
        return [part[own] for part, own in zip(parts, shares, strict=True)]

    def _stream(self, indices: list[Tensor]) -> Iterator[Tensor]:
        assert self._loader is not None
        fetched = self._loader.run(indices)
        if self._device.type == "cuda":
            return ahead(fetched, CudaLane(self._device))
        return (inputs.to(self._device, non_blocking=True) for inputs in fetched)


class _Recorded:
    """Full batches by replay. What changes between them: the samples' indices, the epoch, the seed of the draws."""

    def __init__(
        self, make: Callable[..., tuple[Tensor, Tensor]], size: int, device: torch.device, recorder: Recorder
    ) -> None:
        self._own = torch.zeros(size, dtype=torch.int64, device=device)
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)
        self._draws = torch.Generator(device)

        def work() -> tuple[Tensor, Tensor]:
            return make(None, self._own, self._draws, size, slice(0, size), self._epoch)

        self._replayed = Replayed("the data path", work, recorder, [self._draws])

    def __call__(self, own: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        self._own.copy_(own)
        self._epoch.fill_(epoch)
        self._draws.manual_seed(seed)
        return self._replayed()
