"""The closure of optimizers that evaluate the loss several times per update: L-BFGS, SAM, Newton with a line search.

The step itself is the closure of `optimizer.step(closure)`. The optimizer must see the same function each time: a line
search compares losses of different weights, which must not differ by their dropout masks. Therefore every evaluation of
an update uses the same random numbers, and only the first one updates batch-norm statistics.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batch
from dlopt.losses import sampled_cross_entropy
from dlopt.models.layers import frozen_statistics
from dlopt.optim.traits import not_evaluated, optimizer_traits
from dlopt.training.step import Step, UpdateResult


class ClosureStep(Step):
    """A step that the optimizer evaluates: `step()` returns the loss and leaves clipped gradients in the parameters.

    `step.loss()` and `step.sampled_loss(seed)` return losses with their graph, for Hessian-vector products.
    """

    result: UpdateResult | None = None  # of the current update; None until its first evaluation has ended
    evaluations: int = 0  # of the loss, in all updates of the run

    def update(self, batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult:
        """See `Step.update`."""
        # 1. Begin.
        self.begin(batch, number, log_norm=log_norm)

        # 2. Change the weights. The optimizer calls `self()` as often as it needs.
        self.optimizer.step(self)  # type: ignore[arg-type]
        if self.result is None:
            raise not_evaluated(self.optimizer)

        # 3. Advance the learning rate, and end, as all updates do.
        self.advance()
        self.end(self.result, self.average)
        return self.result

    def begin(self, batch: Batch, number: int, *, log_norm: bool) -> None:
        super().begin(batch, number, log_norm=log_norm)
        self.result = None  # the next evaluation is the first one of an update
        self.passes = 0

    def __call__(self) -> Tensor:
        """Computes the mean loss of the batch, returned detached, and its clipped gradients, in the parameters."""
        if not torch.is_grad_enabled():  # called by a `step` under `no_grad` or `inference_mode`
            with torch.inference_mode(False), torch.enable_grad():
                return self()
        self.evaluations += 1
        self.passes = None if self.passes is None else self.passes + 1
        if self.result is None:
            evaluated = self.result = self.loss_and_gradients()
        else:  # the batch has counted in the metrics and in the statistics of batch norm
            with frozen_statistics(self.module):
                evaluated = self.loss_and_gradients(checks=self._checks_all)
            self.result.flags += evaluated.flags
        assert evaluated.loss is not None
        return evaluated.loss

    @cached_property
    def _checks_all(self) -> bool:
        """Whether every evaluation is checked, not only the first one: see `OptimizerTraits.uses_all_gradients`."""
        return optimizer_traits(self.optimizer).uses_all_gradients

    def loss(self) -> Tensor:
        """Returns the batch's mean loss with its autograd graph, without backward: for Hessian-vector products."""
        with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivatives
            return self._differentiable(self.current.batch, lambda part: self.micro_loss.eager(part, self.current))

    def sampled_loss(self, seed: int) -> tuple[Tensor, int]:
        """Returns the mean cross-entropy for classes drawn from the model's predictions, and the number of predictions.

        Each prediction has its own random number, so that the draw does not depend on the micro-batches.
        """
        batch, targets = self.current.batch, self.current.batch.targets
        shape = targets.shape[:1] if targets.is_floating_point() else targets.shape  # mixed labels: [B, K]
        draw = torch.Generator(targets.device).manual_seed(seed)
        noise = torch.rand(shape, generator=draw, device=targets.device)
        sampled = self.precision.autocast(sampled_cross_entropy)

        def loss_of(part: Batch) -> Tensor:
            drawn: Tensor = sampled(self.micro_loss.eager_model(part.inputs), part.targets)
            return drawn

        drawn_batch = Batch(batch.inputs, noise, batch.total, joined=batch.joined)
        return self._differentiable(drawn_batch, loss_of), noise.numel()

    def cost(self) -> dict[str, int]:
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.evaluations = state["evaluations"]

    def _differentiable(self, batch: Batch, loss_of: Callable[[Batch], Tensor]) -> Tensor:
        """Returns the mean of `loss_of` over the batch with its graph, at the random numbers of the update."""
        if self.mode.ranks.processes > 1:
            raise UserError(
                f"parallel={self.mode.name}: {type(self.optimizer).__name__} needs Hessian-vector products, which are "
                "not averaged over ranks; use parallel=single or another optimizer"
            )
        self.evaluations += 1
        self.passes = None  # products with the Hessian follow
        self.seed()
        with torch.enable_grad(), frozen_statistics(self.module):
            parts = self.mode.split.micro_batches(batch, self.accumulate)
            losses = [part.weight * loss_of(part) for part in parts]
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
