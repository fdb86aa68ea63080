"""Pipeline parallelism: each process holds a stage of consecutive layers; micro-batches pass through the stages.

Schedules (torch.distributed.pipelining): GPipe (Huang et al. 2019) runs all forwards and then all backwards; 1F1B
(Narayanan et al. 2019, "PipeDream") alternates them and holds activations of at most as many micro-batches as stages.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.data.batches import Augment, Batch
from dlopt.machine.threads import usable_cores
from dlopt.parallel.batch_shards import BatchShard, BatchSplit, ShardedAugment, micro_batch_bounds
from dlopt.parallel.dropout import GlobalDropout, convert_dropout
from dlopt.parallel.mode import GroupMode, MicroLoss, Mode, ModeTraits, Placed, join_mode
from dlopt.parallel.modes import chain as chains
from dlopt.parallel.modes.chain import ActivationSpec, ChainLayer, ForwardContext
from dlopt.parallel.processes.process_group import ProcessGroup, ProcessKeys
from dlopt.parallel.shards import LayerShards
from dlopt.parallel.step_timing import StepTiming

Schedule = Literal["1f1b", "gpipe"]

_PROBE_SAMPLES = 64  # largest batch for timing layers


def pipeline(
    *,
    device: torch.device,
    accumulate: int,
    batch_size: int | str,
    precision: str,
    threads: int | str,
    micro_batches: Count | None,
    schedule: Schedule,
    split: list[str] | None,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Joins the process group and builds the mode. Raises `UserError` for keys that contradict each other."""
    if micro_batches is not None and accumulate not in (1, micro_batches):
        raise UserError(
            f"parallel.micro_batches={micro_batches}: conflicts with accumulate={accumulate}, which also splits the "
            "batch; set only one of them"
        )
    in_flight = accumulate if micro_batches is None else micro_batches
    if isinstance(batch_size, int) and in_flight > batch_size:
        raise UserError(f"parallel.micro_batches={in_flight}: must be at most data.batch_size={batch_size}")
    largest = _PROBE_SAMPLES if isinstance(batch_size, str) else max(batch_size // in_flight, 2)
    build = partial(
        PipelineMode,
        in_flight=in_flight,
        schedule=schedule,
        split=split,
        probe_samples=min(largest, _PROBE_SAMPLES),
        low_precision=precision == "bf16",
        threads=threads,
    )
    return join_mode("pipeline", device, build, keys)


class PipelineMode(GroupMode):
    """Rank r holds stage r; the layers of other stages are on the meta device.

    Batch norm sees one micro-batch at a time, as in a single process with accumulate = micro-batches.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        *,
        in_flight: int,
        schedule: Schedule,
        split: list[str] | None,
        probe_samples: int,
        low_precision: bool,
        threads: int | str,
    ) -> None:
        super().__init__(group, device, "pipeline")
        self.is_last = self.ranks.is_counted = group.rank == group.size - 1  # it computes the losses
        self.split = StageSplit(needs_samples=group.rank == 0 or self.is_last)
        self.sharding = LayerShards(group, device)
        self.traits = ModeTraits(micro_batches=in_flight)
        self.schedule = schedule
        self.first_layers = split
        self.probe_samples = probe_samples
        self.low_precision = low_precision
        self.threads = threads
        self._schedules: dict[tuple[int, int], Any] = {}
        self._micro_loss: MicroLoss = lambda outputs, targets: outputs.sum()

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        convert_dropout(model, self.dropout)
        chain = chains.flatten(model, self.group.size)
        inputs = self._probe_inputs(model, input_shape)
        chains.trace(chain, inputs[:2], self._forward_context)
        stages, notes = self._partition(chain, inputs)
        for number, layers in enumerate(stages):
            if number != self.group.rank:
                for layer in chain[layers]:
                    layer.module.to("meta")
        self.stage = Stage(chain, stages[self.group.rank], ActivationSpec.of(inputs), self._forward_context)
        self._output = chain[-1].output
        self._dtype = next(model.parameters()).dtype
        self._model = model
        return Placed(self._evaluate, notes=notes, timing=StepTiming(self.group, self.device))

    def _probe_inputs(self, model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
        """Returns random inputs for timing; kernels can be faster on zeros than on training data."""
        like = next(model.parameters())
        draws = torch.Generator().manual_seed(0)
        vocabulary = getattr(model, "vocabulary", None)
        if vocabulary is not None:
            return torch.randint(vocabulary, (self.probe_samples, *input_shape), generator=draws).to(like.device)
        inputs = torch.randn(self.probe_samples, *input_shape, generator=draws).to(device=like.device, dtype=like.dtype)
        channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in model.parameters())
        return inputs.contiguous(memory_format=torch.channels_last) if channels_last and inputs.ndim == 4 else inputs

    def _forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.low_precision else nullcontext()

    def _partition(self, chain: list[ChainLayer], inputs: Tensor) -> tuple[list[slice], tuple[str, ...]]:
        """Returns the layers of each stage, and notes for the user."""
        stages = self.group.size
        times = []
        if self.ranks.is_main:  # measured times differ; all ranks must arrive at the same partition
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                times = chains.time_layers(chain, inputs, self._forward_context)
        times = self.ranks.broadcast(times)
        named = self.first_layers
        starts = chains.balance(times, stages) if named is None else chains.named_starts(named, chain, stages)
        slices = [slice(start, stop) for start, stop in pairwise([*starts, len(chain)])]
        chains.check_tied_weights([chain[layers] for layers in slices])
        seconds = [sum(times[layers]) for layers in slices]
        total = max(sum(seconds), 1e-9)
        self._set_threads([time / total for time in seconds])
        names = [
            f"{chain[s.start].name} .. {chain[s.stop - 1].name} ({t / total:.0%})"
            for s, t in zip(slices, seconds, strict=True)
        ]
        notes = [f"pipeline stages (fraction of the time): {'; '.join(names)}"]
        if self.traits.micro_batches < stages:
            notes.append(
                f"warning: accumulate={self.traits.micro_batches} leaves some of the {stages} stages idle; "
                f"accumulate={4 * stages} would keep them busy (batch norm sees one micro-batch at a time)"
            )
        return slices, tuple(notes)

    def _set_threads(self, fractions: list[float]) -> None:
        """Divides this machine's cores among its stages in proportion to their work."""
        if self.threads != "auto" or self.device.type != "cpu":
            return
        local_rank = self.group.world.local_rank
        on_this_machine = fractions[self.group.rank - local_rank :][: self.ranks.local_processes]
        torch.set_num_threads(chains.divide_cores(usable_cores(), on_this_machine)[local_rank])

    # -- one update

    def run_stages(self, batch: Batch, loss: MicroLoss) -> tuple[list[Tensor], int]:
        # Only the last rank has outputs, losses and metrics; the other ranks contribute zeros to the sums.
        bounds = micro_batch_bounds(batch.total, self.traits.micro_batches)
        losses: list[Tensor] = []
        # torch's schedule interleaves forward and backward of micro-batches, and so owns the loop over them. All have
        # one size: there are at most two sizes, and the larger micro-batches come first.
        for size in sorted({stop - start for start, stop in bounds}, reverse=True):
            same = [(start, stop) for start, stop in bounds if stop - start == size]
            samples = slice(same[0][0], same[-1][1])
            part = Batch(batch.inputs[samples], batch.targets[samples], size, weight=size / batch.total)
            losses += self._run_schedule(part, len(same), loss)
        return losses or [torch.zeros((), dtype=self._dtype, device=self.device)], len(bounds)

    def finish_backward(self, loss: Tensor) -> Tensor:
        return self.ranks.sum_loss(loss)  # every gradient is complete on the rank that holds its layer

    def _run_schedule(self, part: Batch, count: int, loss: MicroLoss) -> list[Tensor]:
        """Runs forward and backward of `count` micro-batches of `part.total` samples; returns their weighted losses."""
        self._micro_loss = lambda outputs, targets: loss(outputs, targets) * part.weight
        losses: list[Tensor] = []
        schedule = self._schedule(part.total, count)
        arguments = (as_message(part.inputs),) if self.group.rank == 0 else ()
        of_last_rank = {"target": part.targets, "losses": losses} if self.is_last else {}
        schedule.step(*arguments, **of_last_rank, return_outputs=False)
        return [loss.detach() for loss in losses]

    def _schedule(self, size: int, count: int) -> Any:
        # torch's schedules fix the shapes of messages and the number of micro-batches: one per pair. The loss function,
        # which they call through a lambda, changes with every update.
        if (size, count) not in self._schedules:
            from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

            stage = PipelineStage(
                self.stage,
                self.group.rank,
                self.group.size,
                self.device,
                input_args=self.stage.input_spec.empty(size, self.device).requires_grad_(self.group.rank > 0),
                output_args=self.stage.output_spec.empty(size, self.device).requires_grad_(),
            )
            kind = Schedule1F1B if self.schedule == "1f1b" and count >= self.group.size else ScheduleGPipe
            self._schedules[size, count] = kind(
                stage, count, loss_fn=lambda outputs, targets: self._micro_loss(outputs, targets), scale_grads=False
            )
        return self._schedules[size, count]

    # -- evaluation

    def _evaluate(self, inputs: Tensor) -> Tensor:
        """Returns the model's outputs on all ranks, without a graph."""
        # A batch norm in training mode (exact statistics) must see the whole batch at once.
        undivided = any(isinstance(m, _BatchNorm) and m.training for m in self._model.modules())
        number = 1 if undivided else min(self.traits.micro_batches, len(inputs))
        outputs, sends = [], []
        with torch.no_grad():
            for micro_batch in inputs.tensor_split(number):
                values = micro_batch
                if self.group.rank > 0:
                    values = self.stage.input_spec.empty(len(micro_batch), self.device)
                    # Blocking: without the activations of the previous stage this one has nothing to compute.
                    distributed.recv(values, self.group.rank - 1)
                values = self.stage(values)
                if self.is_last:
                    outputs.append(values)
                else:
                    # Asynchronous: this stage starts the next micro-batch at once. The list keeps buffers alive.
                    sends.append((distributed.isend(values, self.group.rank + 1), values))
            for work, _ in sends:
                assert work is not None  # this rank is in the group
                work.wait()
            assert self._output is not None
            result = torch.cat(outputs) if outputs else self._output.empty(len(inputs), self.device)
            # All ranks continue with the outputs: every rank runs the same evaluation, and only the last one counts.
            distributed.broadcast(result, self.group.size - 1)
        return result


@dataclass(frozen=True)
class StageSplit(BatchSplit):
    """The first rank needs the inputs of a batch and the last one the targets; the others load no samples."""

    needs_samples: bool = True

    @property
    def shard(self) -> BatchShard | None:
        return None if self.needs_samples else lambda total: slice(0, 0)

    def augmentation(self, augment: Augment | None) -> Augment | None:
        return augment if self.needs_samples or augment is None else ShardedAugment(augment, 1, 0, 1)


def as_message(values: Tensor) -> Tensor:
    """Returns contiguous values with the strides of a new tensor, as `PipelineStage` in torch 2.11 requires.

    `contiguous` keeps any strides along dimensions of size 1.
    """
    return values.flatten().view(values.shape)


class Stage(nn.Module):
    """The layers of one stage as one module. Inputs and outputs are contiguous, as pipeline messages must be.

    Random generators advance as in a single process: it also draws for the dropouts of the other stages, in order.
    """

    def __init__(
        self, chain: Sequence[ChainLayer], layers: slice, inputs: ActivationSpec, context: ForwardContext
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer.module for layer in chain[layers]])
        self.context = context
        input_spec = chain[layers.start - 1].output if layers.start else inputs
        output_spec = chain[layers.stop - 1].output
        assert input_spec is not None and output_spec is not None
        self.input_spec, self.output_spec = input_spec, output_spec
        self._earlier = [dropout for layer in chain[: layers.start] for dropout in layer.dropouts]
        self._later = [dropout for layer in chain[layers.stop :] for dropout in layer.dropouts]

    def forward(self, inputs: Tensor) -> Tensor:
        self._discard_draws(self._earlier, inputs)
        with self.context():
            values = self.input_spec.restore_order(inputs)
            for layer in self.layers:
                values = layer(values)
        self._discard_draws(self._later, inputs)
        return as_message(values)

    def _discard_draws(self, dropouts: Sequence[tuple[GlobalDropout, tuple[int, ...]]], inputs: Tensor) -> None:
        for dropout, sample in dropouts:
            dropout.discard(torch.Size((len(inputs), *sample)), inputs.device)
