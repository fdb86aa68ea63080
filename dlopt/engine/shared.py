"""The step of one rank among several that share each batch: loss and gradients are those of the global batch."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from dlopt.engine.step import Closure
from dlopt.errors import UserError


class Sharing(Protocol):
    """What the step asks of a mode that shares batches (see `dlopt.parallel.ddp.DataParallel`)."""

    name: str

    def micro_batches(
        self, inputs: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float, AbstractContextManager[Any]]]:
        """Own inputs and targets of each micro-batch, the weight of their mean loss, and the context to be in."""
        ...

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The average over ranks."""
        ...

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of the whole tensors, of which this rank may have but parts."""
        ...


class SharedClosure(Closure):
    """A closure that gives all ranks the same loss and, with the mode's help, the same gradients."""

    def __init__(self, *, parallel: Sharing, **closure: Any) -> None:
        super().__init__(**closure)
        self.parallel = parallel
        self.total_norm = parallel.norm

    def loss(self) -> Tensor:
        raise UserError(
            f"parallel={self.parallel.name}: {type(self.optimizer).__name__} needs Hessian-vector products, which are "
            "not averaged over processes; use parallel=single or another optimizer"
        )

    def _evaluate(self, backward: bool) -> Tensor:
        for generator in self._generators:
            generator.manual_seed(self.draws)
        losses = []
        for inputs, targets, weight, context in self.parallel.micro_batches(*self.batch):
            with context:
                losses.append(self._part(inputs, targets, weight, backward))
        return self.parallel.mean_loss(torch.stack(losses).sum())

    def _part(self, inputs: Tensor, targets: Tensor, share: float, backward: bool) -> Tensor:
        """Without samples there is no loss, and yet the other ranks wait for this one's gradients."""
        if len(targets):
            return super()._part(inputs, targets, share, backward)
        if self.sums is not None:
            self.sums.add_nothing(inputs.device)
        loss = self._model(inputs).sum() * 0.0
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()
