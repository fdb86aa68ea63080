"""Batches for the training loop: on the device, augmented and normalized."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NotRequired, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator, stream
from dlopt.data.loading import CudaTransferStream, Loader, on_device, prefetch, worker_count
from dlopt.data.samplers import LossAwareSampler, Sampler, Sequential
from dlopt.data.samples import Reader, Samples
from dlopt.machine.cuda_graphs import GraphedFunction, Recorder
from dlopt.tasks.task import Task

STAND_IN = slice(0, 1)
"""The shard of a training batch for a rank without samples: the first one of the batch, with weight 0.

The other ranks wait in collectives for this one to run something: a real sample, which gives finite values.
"""


class Position(TypedDict):
    """Which samples of a global batch one rank augments, and with which random numbers.

    `generator`: on the inputs' device, seeded for this step, identically on all ranks.
    `total`: samples in the global batch.
    `shard`: positions of the samples in the global batch, as returned by the `shard` argument of `Batches`.
    `indices`: their positions in the training set (required by `AlternatingFlip`).
    `epoch`: from 0 (required by `AlternatingFlip`).
    """

    generator: torch.Generator
    total: int
    shard: Any
    indices: NotRequired[Tensor]
    epoch: NotRequired[int | Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This process's samples of a training batch, or of a micro-batch. Unpacks into inputs and targets.

    Attributes:
        inputs: [B, ...], on the device.
        targets: [B, ...], on the device.
        total: samples of the batch on all processes.
        shard: the positions of this process's samples among them; None for all of them, or for several slices.
        start: position of its first sample, of all processes, in the batch of the update.
        weight: of its mean loss in the loss of the update; 0: this process has no samples, and one of the batch is
            their placeholder.
        teacher_inputs: `inputs` in the normalization of a teacher; None if it is the same, or there is no teacher.
        is_last: whether it is the last micro-batch of its update.
        joined: totals of the batches of data.batch_size that a larger one consists of; empty if it is a single one.
        further: other tensors [B, ...] of the samples that the loss reads, by name.
    """

    inputs: Tensor
    targets: Tensor
    total: int
    shard: slice | None = None
    start: int = 0
    weight: float = 1.0
    is_last: bool = True
    teacher_inputs: Tensor | None = None
    joined: tuple[int, ...] = ()
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.inputs, self.targets))

    @property
    def count(self) -> int:
        """Batches of data.batch_size: 1, unless the batch has grown (`dlopt.training.batch_growth`)."""
        return len(self.joined) or 1

    @property
    def positions(self) -> slice:
        """Positions of this process's samples of a micro-batch in the batch of the update."""
        if self.shard is None:
            return slice(self.start, self.start + self.total)
        return slice(self.start + self.shard.start, self.start + self.shard.stop)


class Augment(Protocol):
    def __call__(self, inputs: Tensor, targets: Tensor, **position: Unpack[Position]) -> tuple[Tensor, Tensor]:
        """Augments one rank's samples of a global batch."""
        ...


@dataclass(frozen=True)
class Delivery:
    """Where the samples are kept and how batches are delivered.

    Args:
        in_memory: keep all samples on the device (`Dataset.in_memory`); samples still in files are decoded first.
        workers: processes that read files; 0: none.
        task: splits samples into inputs and targets; None: inputs and labels.
        normalize: module on the device; None to only convert to `dtype`.
        teacher_normalize: of a teacher, for `Batch.teacher_inputs`; None if there are none.
        memory_format: of image batches.
        dtype: of the inputs.
        compiled: compile indexing, augmentation and normalization as one function. Needs samples in memory and an
            augmentation with separate `plan` and `render` steps.
        recorder: records CUDA graphs; None for none. With a graph every full batch reuses the memory of the previous
            one. Needs samples in memory and a single rank.
        processes: ranks on this machine, which share its cores (workers=auto).
    """

    device: torch.device
    in_memory: bool
    workers: int | Literal["auto"]
    task: Task | None = None
    normalize: nn.Module | None = None
    teacher_normalize: nn.Module | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    recorder: Recorder | None = None
    processes: int = 1


class Batches:
    """Iterates the batches of an epoch; batches are the same from memory and from worker processes.

    In memory, the samples are one tensor on the device and a batch is an index. Otherwise workers prefetch batches.
    Augmentation and normalization run on the device either way.

    Args:
        batch_size: samples in a global batch; `full`: all of them.
        sampler: order of the samples in each epoch; None for dataset order, each once (for evaluation).
        drop_last: skip a last batch that is smaller than the others.
        augment: see `Augment`; None for no augmentation.
        seed: of the augmentation's random numbers.
        shard: maps the size of a global batch to this rank's positions in it; None for the whole batch.
        reader: reads the inputs in place of `samples`, in worker processes, for requests [B, 3] of index, update and
            position in the global batch.
        further: other tensors [N, ...] of the samples, which `Batch.further` has; floating-point ones in the data's
            precision, at least fp32.

    Attributes:
        batch_size: samples in a global batch; the last one may have fewer.
        local_size: those of this rank.

    Raises:
        UserError: `drop_last` leaves no batch, or a sample cannot be read.
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
        shard: Callable[[int], slice | Tensor] | None = None,
        reader: Reader | None = None,
        further: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._device = device = delivery.device
        self.sampler = sampler if sampler is not None else Sequential(targets=samples.targets)
        samples_per_epoch = len(self.sampler)
        self.batch_size = samples_per_epoch if batch_size == "full" else min(batch_size, samples_per_epoch)
        if drop_last and batch_size != "full" and batch_size > samples_per_epoch:
            raise UserError(
                f"data.drop_last=true: the {samples_per_epoch} training samples do not fill one batch of "
                f"data.batch_size={batch_size}; use drop_last=false or a smaller batch"
            )
        self.count = samples_per_epoch // self.batch_size * self.batch_size if drop_last else samples_per_epoch
        self._shard = shard
        positions = torch.arange(self.batch_size)
        self.local_size = len(positions if shard is None else positions[shard(self.batch_size)])
        self._augment = augment
        self._seed = seed
        self._normalize, self._teacher_normalize = delivery.normalize, delivery.teacher_normalize
        self._memory_format = delivery.memory_format if len(samples.shape) == 3 else torch.contiguous_format
        self._dtype = delivery.dtype
        self._task = delivery.task
        reads_labels = self._task is None or self._task.reads_labels
        nothing = torch.zeros((), device=device).expand(len(samples))
        self._labels = samples.targets.to(device) if reads_labels else nothing
        wide = torch.promote_types(delivery.dtype, torch.float32)
        self._further = {
            name: each.to(device, wide if each.is_floating_point() else None) for name, each in further.items()
        }
        self._inputs: Tensor | None = None
        self._loader: Loader | None = None
        self._reader = reader
        if delivery.in_memory and reader is None:
            self._inputs = on_device(samples, delivery.workers, device)
        else:
            workers = worker_count(delivery.workers, samples, delivery.processes)
            self._loader = Loader(samples if reader is None else reader, workers, pin=device.type == "cuda")
        self._compiled_render: Callable[..., tuple[Tensor, ...]] | None = None
        self._views = 1 if delivery.task is None else delivery.task.views
        can_render = self._views == 1 and (augment is None or hasattr(augment, "render"))
        if delivery.compiled and delivery.in_memory and can_render:
            self._compiled_render = torch.compile(self._render, dynamic=False)
        self._graph: Callable[[Tensor, int, int], tuple[Tensor, ...]] | None = None
        if delivery.recorder is not None and delivery.in_memory and shard is None:
            self._graph = _graphed(self._build, self.batch_size, device, delivery.recorder)

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return -(-self.count // self.batch_size)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        """Yields this rank's samples of each batch of epoch `epoch`, from batch number `start`.

        `step` is the global update number of the first yielded batch. Each batch is augmented with random numbers
        seeded by (seed, update number), so that a resumed run draws the same ones.
        """
        loss_aware = self.sampler if isinstance(self.sampler, LossAwareSampler) else None
        if loss_aware is not None:
            loss_aware.begin()
        order = self.sampler.order(epoch)[start * self.batch_size : self.count]
        if not isinstance(order, Tensor) or order.is_floating_point():
            raise UserError(f"sampler: {type(self.sampler).__name__}.order must return indices, a tensor of integers")
        if not len(order):
            return
        totals = [len(batch) for batch in order.split(self.batch_size)]
        shards = [slice(0, total) if self._shard is None else self._shard(total) for total in totals]
        # The whole epoch's indices go to the device in one copy: one copy per batch would synchronize each step.
        all_indices = self._split(order.to(self._device), shards)
        fetched = [None] * len(shards) if self._loader is None else self._stream(self._requests(order, shards, step))
        for number, (inputs, indices, shard, total) in enumerate(
            zip(fetched, all_indices, shards, totals, strict=True)
        ):
            if self._graph is not None and total == self.batch_size:
                samples = self._graph(indices, stream(self._seed, step + number), epoch)
            else:
                rng = None if self._augment is None else generator(self._device, self._seed, step + number)
                samples = self._build(inputs, indices, rng, total, shard, epoch)
            weight = float(shard is not STAND_IN)
            if loss_aware is not None and weight:
                loss_aware.serve(step + number, order[number * self.batch_size :][shard])
            local_inputs, targets, *others = samples
            yield Batch(
                local_inputs,
                targets,
                total,
                weight=weight,
                teacher_inputs=others[0] if others else None,
                further={name: each.index_select(0, indices) for name, each in self._further.items()},
            )

    def _build(
        self,
        inputs: Tensor | None,
        indices: Tensor,
        rng: torch.Generator | None,
        total: int,
        shard: slice | Tensor,
        epoch: int | Tensor,
    ) -> tuple[Tensor, ...]:
        """Builds the batch of the samples `indices`; takes the inputs from memory if `inputs` is None."""
        if self._compiled_render is not None:
            assert self._inputs is not None
            steps: Any = None
            if self._augment is not None:
                steps = self._augment.plan(  # type: ignore[attr-defined]
                    self._inputs.shape[1:], generator=rng, total=total, shard=shard, indices=indices, epoch=epoch
                )
            # A smaller last batch runs eagerly: compiling a second shape costs more than it saves.
            render = self._compiled_render if total == self.batch_size else self._render
            return render(self._inputs, self._labels, indices, steps)
        if inputs is None:
            assert self._inputs is not None
            inputs = self._inputs.index_select(0, indices)
        labels = self._labels.index_select(0, indices)
        if self._augment is None:
            views = [(inputs, labels)] * self._views
        else:
            assert rng is not None
            where: Any = {"total": total, "shard": shard, "indices": indices, "epoch": epoch}
            views = [self._augment(inputs, labels, generator=view, **where) for view in _streams(rng, self._views)]
        if self._views == 1:
            return self._finish(*views[0])
        return torch.stack([self._normalized(view, self._normalize) for view, _ in views], 1), views[0][1]

    def _render(self, inputs: Tensor, labels: Tensor, indices: Tensor, steps: Any) -> tuple[Tensor, ...]:
        """Builds a batch from all inputs and labels and the drawn `steps`; only tensors, so it can be compiled."""
        inputs, labels = inputs.index_select(0, indices), labels.index_select(0, indices)
        if steps:
            inputs, labels = self._augment.render(inputs, labels, steps)  # type: ignore[union-attr]
        return self._finish(inputs, labels)

    def _finish(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Splits off the targets of the task, and normalizes the inputs; tokens remain integers.

        With a teacher that has another normalization, also returns its inputs.
        """
        if self._task is not None:
            inputs, targets = self._task.split(inputs, targets)
        result = self._normalized(inputs, self._normalize), targets
        if self._teacher_normalize is None:
            return result
        return *result, self._normalized(inputs, self._teacher_normalize)

    def _normalized(self, inputs: Tensor, normalize: nn.Module | None) -> Tensor:
        if self._task is None:
            inputs = inputs if normalize is None else normalize(inputs)
            return inputs.to(dtype=self._dtype, memory_format=self._memory_format)
        return self._task.normalized(inputs, normalize, self._dtype, self._memory_format)

    def close(self) -> None:
        """Stops the worker processes, if any."""
        if self._loader is not None:
            self._loader.close()

    def _split(self, order: Tensor, shards: Sequence[slice | Tensor]) -> list[Tensor]:
        batches = order.split(self.batch_size)
        if self._shard is None:
            return list(batches)
        return [batch[shard] for batch, shard in zip(batches, shards, strict=True)]

    def _requests(self, order: Tensor, shards: Sequence[slice | Tensor], step: int) -> list[Tensor]:
        if self._reader is None:
            return self._split(order, shards)
        numbers = torch.arange(len(order))
        updates, positions = step + numbers // self.batch_size, numbers % self.batch_size
        return self._split(torch.stack([order, updates, positions], 1), shards)

    def _stream(self, requests: list[Tensor]) -> Iterator[Tensor]:
        assert self._loader is not None
        fetched = self._loader.run(requests)
        if self._device.type == "cuda":
            return prefetch(fetched, CudaTransferStream(self._device))
        return (inputs.to(self._device, non_blocking=True) for inputs in fetched)


def _graphed(
    build: Callable[..., tuple[Tensor, ...]], size: int, device: torch.device, recorder: Recorder
) -> Callable[[Tensor, int, int], tuple[Tensor, ...]]:
    """Returns a function of indices, seed and epoch that builds a full batch from a CUDA graph.

    The recorded kernels read fixed memory, so these inputs, which change, are copied into it before each replay.
    """
    static_indices = torch.zeros(size, dtype=torch.int64, device=device)
    static_epoch = torch.zeros((), dtype=torch.int64, device=device)
    rng = torch.Generator(device)

    def work() -> tuple[Tensor, ...]:
        return build(None, static_indices, rng, size, slice(0, size), static_epoch)

    replayed = GraphedFunction("the data path", work, recorder, [rng])

    def replay(indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, ...]:
        static_indices.copy_(indices)
        static_epoch.fill_(epoch)
        rng.manual_seed(seed)
        # The next replay overwrites its results, and metrics keep the targets of many batches.
        return tuple(each.clone() for each in replayed())

    return replay


def _streams(rng: torch.Generator, count: int) -> Iterator[torch.Generator]:
    """Yields generators for independent views of a batch: first `rng` itself."""
    yield rng
    for number in range(1, count):
        yield generator(rng.device, rng.initial_seed(), number)
