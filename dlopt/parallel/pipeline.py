"""Pipeline parallelism: the layers are cut into stages, one per process; a batch goes through them in micro-batches.

Schedules: GPipe (Huang et al. 2019), all forward and then all backward; 1F1B (Narayanan et al. 2019, "PipeDream"),
which holds no more activations than there are stages. Both are torch.distributed.pipelining's.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.errors import UserError
from dlopt.parallel import chain as chains
from dlopt.parallel.chain import Form, Link
from dlopt.parallel.mode import BatchShard, MetricRecord, MicroSteps, Mode
from dlopt.parallel.process_group import Group, GroupMode, ProcessKeys, join
from dlopt.parallel.shares import PiecewiseAugment, micro_batches
from dlopt.ranges import Count

Schedule = Literal["1f1b", "gpipe"]
MicroLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of a micro-batch -> its mean loss."""

_PROBED = 64  # samples with which layers are timed, at most


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
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    if precision == "fp16":
        raise UserError("precision=fp16: not with parallel=pipeline, whose stages would scale losses apart; use bf16")
    if micro_batches is not None and accumulate not in (1, micro_batches):
        raise UserError(
            f"parallel.micro_batches={micro_batches}: accumulate={accumulate} cuts the batch, too; set one of the two"
        )
    in_flight = accumulate if micro_batches is None else micro_batches
    if isinstance(batch_size, int) and in_flight > batch_size:
        raise UserError(
            f"parallel.micro_batches={in_flight}: a batch of data.batch_size={batch_size} has fewer samples to cut"
        )
    joined = join("pipeline", device, **keys)
    if joined is None:
        return Mode(device, "pipeline")
    group, device = joined
    probed = _PROBED if isinstance(batch_size, str) else min(max(batch_size // in_flight, 2), _PROBED)
    return Pipeline(
        group,
        device,
        in_flight=in_flight,
        schedule=schedule,
        split=split,
        probed=probed,
        low_precision=precision == "bf16",
        threads=threads,
    )


class Pipeline(GroupMode):
    """Rank r holds the r-th stage; the layers of other stages are on the meta device, so that every rank knows all
    parameters by name and order.

    Batch norm sees one micro-batch at a time: the same as one process with accumulate = micro-batches.
    """

    sharding: Literal["replicated", "tensors", "layers"] = "layers"
    compiles = False
    supports_loss_aware_samplers = False

    def __init__(
        self,
        group: Group,
        device: torch.device,
        *,
        in_flight: int,
        schedule: Schedule,
        split: list[str] | None,
        probed: int,
        low_precision: bool,
        threads: int | str,
    ) -> None:
        super().__init__(group, device, "pipeline")
        self.micro_batches_in_flight = in_flight
        self.schedule = schedule
        self.split = split
        self.probed = probed
        self.low_precision = low_precision
        self.threads = threads
        self.is_last = self.rank == self.processes - 1
        self._schedules: dict[tuple[int, int], Any] = {}
        self._micro_loss: MicroLoss = lambda outputs, targets: outputs.sum()

    # -- sharing a batch: the first rank needs the inputs, the last one the targets, and those between need neither

    @property
    def batch_shard(self) -> BatchShard | None:
        return None if self.rank == 0 or self.is_last else lambda total: slice(0, 0)

    def shard_augmentation(self, augment: Any) -> Any:
        return augment if self.batch_shard is None else augment and PiecewiseAugment(augment, 1, 0, 1)

    # -- the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        chain = chains.links(model, self.processes)
        inputs = self._samples(model, input_shape)
        chains.look(chain, inputs[:2], self._calling)
        own = self._cut(chain, inputs)
        for number, span in enumerate(own):
            if number != self.rank:
                for link in chain[span]:
                    link.layer.to("meta")
        self.stage = Stage(chain, own[self.rank], Form.of(inputs), self._calling)
        self._output = chain[-1].output
        self._dtype = inputs.dtype
        self._model = model
        return self._evaluate

    def _samples(self, model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
        """Something to put through the layers: zeros would be faster than what comes in training."""
        like = next(model.parameters())
        draws = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.probed, *input_shape, generator=draws).to(device=like.device, dtype=like.dtype)
        channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in model.parameters())
        return inputs.contiguous(memory_format=torch.channels_last) if channels_last and inputs.ndim == 4 else inputs

    def _calling(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.low_precision else nullcontext()

    def _cut(self, chain: list[Link], inputs: Tensor) -> list[slice]:
        """The layers of each stage. Rank 0 measures, so that all cut alike."""
        stages = self.processes
        times = []
        if self.is_main:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                times = chains.measure(chain, inputs, self._calling)
        times = self.broadcast(times)
        split = self.split
        starts = chains.balanced(times, stages) if split is None else chains.by_hand(split, chain, stages)
        own = chains.spans(starts, len(chain))
        chains.check_owners([chain[span] for span in own])
        seconds = [sum(times[span]) for span in own]
        total = max(sum(seconds), 1e-9)
        self._use_cores([each / total for each in seconds])
        parts = [
            f"{chain[s.start].name} .. {chain[s.stop - 1].name} ({t / total:.0%})"
            for s, t in zip(own, seconds, strict=True)
        ]
        self.notes = (f"stages, with their share of the layers' time: {'; '.join(parts)}",)
        if self.micro_batches_in_flight < stages:
            self.notes += (
                f"warning: with accumulate={self.micro_batches_in_flight} the {stages} stages wait for each other; "
                f"accumulate={4 * stages} would keep them busy (batch norm sees one micro-batch at a time)",
            )
        return own

    def _use_cores(self, shares: list[float]) -> None:
        """Each process of this machine gets so many threads as its stage needs of the time."""
        if self.threads != "auto" or self.device.type != "cpu":
            return
        place = self.group.world.local_rank
        here = shares[self.rank - place :][: self.local_processes]
        torch.set_num_threads(chains.divided(len(os.sched_getaffinity(0)), here)[place])

    # -- one update

    def forward_backward(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None
    ) -> Tensor:
        """The schedule interleaves forward and backward of the micro-batches. The last rank has the outputs, and with
        them losses and metrics; the others contribute zeros.
        """
        bounds = micro_batches(self.batch_total, self.micro_batches_in_flight)
        losses: list[Tensor] = []
        # torch's schedules need equal micro-batches: there are one or two sizes, the larger first.
        for size in sorted({stop - start for start, stop in bounds}, reverse=True):
            same = [(start, stop) for start, stop in bounds if stop - start == size]
            span = slice(same[0][0], same[-1][1])
            loss = partial(step.micro_loss, record=record)
            losses += self._run_equal(size, len(same), inputs[span], targets[span], loss)
        if record is not None and not self.is_last:
            for _ in bounds:
                record.add_nothing(self.device)
        total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=self._dtype, device=self.device)
        return self.sum_loss(total)

    def _run_equal(self, size: int, count: int, inputs: Tensor, targets: Tensor, loss: MicroLoss) -> list[Tensor]:
        """Micro-batches of one size: torch's schedules keep to the shapes of the first."""
        share = size / self.batch_total

        def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
            return loss(outputs, targets) * share

        self._micro_loss = weighted
        losses: list[Tensor] = []
        schedule = self._schedule(size, count)
        given = (inputs.contiguous(),) if self.rank == 0 else ()
        if self.is_last:
            schedule.step(*given, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*given, return_outputs=False)
        return [each.detach() for each in losses]

    def _schedule(self, size: int, count: int) -> Any:
        if (size, count) not in self._schedules:
            from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

            stage = PipelineStage(
                self.stage,
                self.rank,
                self.processes,
                self.device,
                input_args=self.stage.received.empty(size, self.device).requires_grad_(self.rank > 0),
                output_args=self.stage.sent.empty(size, self.device).requires_grad_(),
            )
            kind = Schedule1F1B if self.schedule == "1f1b" and count >= self.processes else ScheduleGPipe
            self._schedules[size, count] = kind(
                stage, count, loss_fn=lambda outputs, targets: self._micro_loss(outputs, targets), scale_grads=False
            )
        return self._schedules[size, count]

    # -- evaluation

    def _evaluate(self, inputs: Tensor) -> Tensor:
        """The model's outputs, on all ranks; no graph."""
        whole = any(isinstance(m, _BatchNorm) and m.training for m in self._model.modules())  # statistics of the batch
        number = 1 if whole else min(self.micro_batches_in_flight, len(inputs))
        outputs, sent = [], []
        with torch.no_grad():
            for part in inputs.tensor_split(number):
                values = part
                if self.rank > 0:
                    values = self.stage.received.empty(len(part), self.device)
                    distributed.recv(values, self.rank - 1)
                values = self.stage(values)
                if self.is_last:
                    outputs.append(values)
                else:
                    sent.append((distributed.isend(values, self.rank + 1), values))
            for work, _ in sent:
                assert work is not None  # this rank is in the group
                work.wait()
            assert self._output is not None
            found = torch.cat(outputs) if outputs else self._output.empty(len(inputs), self.device)
            distributed.broadcast(found, self.processes - 1)
        return found

    def sum_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        return self.group.sum(values if self.is_last else [0.0] * len(values))


class Stage(nn.Module):
    """The layers of one stage, called as one. It takes and gives tensors that are contiguous, as they travel.

    Dropout draws what one process draws: what other stages draw for a micro-batch is drawn here, too, and left unused.
    """

    def __init__(
        self, chain: Sequence[Link], own: slice, inputs: Form, calling: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([link.layer for link in chain[own]])
        self.calling = calling
        received = chain[own.start - 1].output if own.start else inputs
        sent = chain[own.stop - 1].output
        assert received is not None and sent is not None
        self.received, self.sent = received, sent
        self._before = [draw for link in chain[: own.start] for draw in link.draws]
        self._behind = [draw for link in chain[own.stop :] for draw in link.draws]

    def forward(self, inputs: Tensor) -> Tensor:
        self._draw(self._before, inputs)
        with self.calling():
            values = self.received.arranged(inputs)
            for layer in self.layers:
                values = layer(values)
        self._draw(self._behind, inputs)
        return values.contiguous()

    @torch.no_grad()
    def _draw(self, draws: Sequence[tuple[nn.Module, Form]], inputs: Tensor) -> None:
        for dropout, form in draws:
            if dropout.training:
                dropout(form.arranged(torch.zeros_like(form.empty(len(inputs), inputs.device))))
