"""The step of one rank that has some of the model's layers."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from dlopt.engine.shared import SharedClosure, Sharing


class Pipelining(Sharing, Protocol):
    """What the step asks of a mode that gives each rank some layers (see `dlopt.parallel.pipeline.Pipeline`)."""

    is_last: bool

    def run_batch(self, inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Forward and backward of all micro-batches; their losses, weighted, where the outputs are, else zeros."""
        ...


class PipelinedClosure(SharedClosure):
    """A closure whose forward and backward are interleaved by the mode: it has but to say what the loss is."""

    parallel: Pipelining

    def __init__(self, *, parallel: Pipelining, **closure: Any) -> None:
        super().__init__(parallel=parallel, **closure)

    def _evaluate(self, backward: bool) -> Tensor:
        for generator in self.generators:
            generator.manual_seed(self.draws)
        losses = self.parallel.run_batch(*self.batch, self._micro_loss)
        if self.sums is not None and not self.parallel.is_last:
            for _ in losses:
                self.sums.add_nothing(losses.device)
        return self.parallel.mean_loss(losses.sum())

    def _micro_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss(outputs, targets)
        if self.sums is not None:
            self.sums.add(loss.detach(), outputs.detach(), targets)
        return loss
