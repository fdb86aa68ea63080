"""The step of one rank among several that share each batch: loss and gradients are those of the global batch."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dlopt.engine.divergence import describe, first_bad_gradient, first_bad_output, first_bad_weight, is_finite
from dlopt.engine.step import Closure
from dlopt.errors import UserError


class Sharing(Protocol):
    """What the step asks of a mode that shares batches (see `dlopt.parallel.ddp.DataParallel`)."""

    name: str
    rank: int
    processes: int
    splits: Literal["nothing", "tensors", "layers"]

    def total(self, values: Sequence[float]) -> Sequence[float]: ...

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
        self.is_spread = parallel.splits != "nothing"

    def loss(self) -> Tensor:
        raise UserError(
            f"parallel={self.parallel.name}: {type(self.optimizer).__name__} needs Hessian-vector products, which are "
            "not averaged over processes; use parallel=single or another optimizer"
        )

    def locate(self, loss_is_finite: bool) -> str:
        """Every rank looks at its own part, and all are told of the first one that found something."""
        if self.is_spread:
            own = first_bad_weight(self.module) or first_bad_gradient(self.module)
            return f"first on rank {self.parallel.rank}: {own}"
        weights = [name for name, _ in self.module.named_parameters()]
        layers = [describe(name, layer) for name, layer in self.module.named_modules()]
        texts = [*(f"the weights {each}" for each in weights), *(f"the gradient of {each}" for each in weights)]
        texts += ["the inputs", *(f"the output of {each}" for each in layers)]
        found = self._find(loss_is_finite)
        codes = [0.0] * self.parallel.processes
        codes[self.parallel.rank] = 0.0 if found is None else 1.0 + texts.index(found)
        rank, code = next(((r, c) for r, c in enumerate(self.parallel.total(codes)) if c), (0, 0.0))
        return f"first on rank {rank}: {texts[round(code) - 1]}" if code else "first: the loss itself"

    def _find(self, loss_is_finite: bool) -> str | None:
        if weight := first_bad_weight(self.module):
            return f"the weights {weight}"
        if loss_is_finite:
            return f"the gradient of {first_bad_gradient(self.module)}"
        inputs = self.batch[0]
        if not len(inputs) or not is_finite([inputs]):
            return "the inputs" if len(inputs) else None
        was_training = self.module.training
        self.module.eval()  # in training, layers may talk to other ranks
        output = first_bad_output(self.module, lambda: self.module(inputs))
        self.module.train(was_training)
        return None if output is None else f"the output of {output}"

    def _evaluate(self, backward: bool) -> Tensor:
        for generator in self.generators:
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
