"""One optimizer update: forward and backward over the batch's micro-batches, clipping, the update itself.

Every optimizer is driven through `optimizer.step(closure)`, so that gradient descent, L-BFGS, SAM and Newton with a
line search share one loop. An optimizer that evaluates once per update is given its gradients first and then steps
without the closure: a bad number is seen before it reaches the weights, and the gradient scaler can do the step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from dlopt.engine.clipping import Clip, Norm, gradient_norm, plain_norm
from dlopt.engine.metrics import Sums
from dlopt.errors import RunError
from dlopt.random import stream


class Closure:
    """Loss and gradients of the current batch, as often as an optimizer asks.

    Within a step the random draws of the model are frozen, and batch-norm statistics move with the first evaluation.
    """

    total_norm: Norm = staticmethod(plain_norm)

    def __init__(
        self,
        *,
        model: Callable[[Tensor], Tensor],
        module: nn.Module,
        loss: nn.Module,
        optimizer: Optimizer,
        clip: Clip,
        autocast: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
        scaler: torch.amp.GradScaler | None,
        accumulate: int,
        seed: int,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.clip = clip
        self.scaler = scaler
        self.accumulate = accumulate
        self.seed = seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm_wanted = False
        self.norm: Tensor | None = None
        self._model = autocast(model)
        self._loss = autocast(loss)
        self._generators = _generators(self.parameters) if may_draw(module) else []

    def begin(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        """Sets the batch of update `step`; its first evaluation is added to `sums`."""
        self.batch = inputs, targets
        if self._generators:
            self.draws = stream(self.seed, step)
        self.sums: Sums | None = sums

    def __call__(self) -> Tensor:
        """Leaves the clipped gradients of the batch's mean loss in the parameters; returns that loss, detached."""
        self.optimizer.zero_grad()
        if self.sums is None:
            with frozen_statistics(self.module):
                loss = self._evaluate(backward=True)
        else:
            loss = self._evaluate(backward=True)
            self.sums = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters, self.total_norm) if self.norm_wanted else None
        clipped = self.clip(self.parameters, self.total_norm)
        self.norm = norm if clipped is None else clipped
        return loss

    def loss(self) -> Tensor:
        """The batch's mean loss with its graph and without backward: for Hessian-vector products."""
        with torch.enable_grad(), frozen_statistics(self.module):
            return self._evaluate(backward=False)

    def _evaluate(self, backward: bool) -> Tensor:
        for generator in self._generators:
            generator.manual_seed(self.draws)
        inputs, targets = self.batch
        if self.accumulate == 1:
            return self._part(inputs, targets, 1.0, backward)
        count = len(targets)
        number = min(self.accumulate, count)
        parts = zip(inputs.tensor_split(number), targets.tensor_split(number), strict=True)
        return torch.stack([self._part(x, y, len(y) / count, backward) for x, y in parts]).sum()

    def _part(self, inputs: Tensor, targets: Tensor, share: float, backward: bool) -> Tensor:
        """The loss of one micro-batch times its share of the batch's samples."""
        outputs = self._model(inputs)
        loss = self._loss(outputs, targets)
        if not backward:
            return loss if share == 1.0 else loss * share
        value = loss.detach()
        if self.sums is not None:
            self.sums.add(value, outputs.detach(), targets)
        if share != 1.0:
            loss, value = loss * share, value * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return value


class Update:
    """`update(inputs, targets, step, sums)` moves the weights once."""

    def __init__(
        self,
        closure: Closure,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        evaluations: str,
        after: Sequence[Callable[[], None]],
        check_now: bool,
    ) -> None:
        """`after` follows every update (weight averaging, stopping rules).

        `check_now` looks at the loss in every step, before the update: free on a CPU, a synchronization on a GPU.
        """
        self.closure = closure
        self.optimizer = closure.optimizer
        self.schedule = schedule
        self.once = evaluations == "once"
        self.after = after
        self.check_now = check_now
        self.rate = self.optimizer.param_groups[0]["lr"]  # of the latest update
        self._loss, self._step = torch.zeros(()), 0

    def __call__(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        closure = self.closure
        closure.begin(inputs, targets, step, sums)
        self.rate, self._step = self.optimizer.param_groups[0]["lr"], step
        if self.once:
            self._loss = closure()
            if self.check_now:
                self.check()
            if closure.scaler is None:
                self.optimizer.step()
            else:
                closure.scaler.step(self.optimizer)
                closure.scaler.update()
        else:
            self._loss = self.optimizer.step(closure)  # type: ignore[arg-type, assignment]
            if self.check_now:
                self.check()
        self.schedule.step()
        for follow in self.after:
            follow()

    def check(self) -> None:
        """Raises `RunError` when the latest loss is not finite. Waits for the device."""
        value = float(self._loss)
        if not math.isfinite(value):
            raise RunError(
                f"the loss became {value} at update {self._step + 1} with a learning rate of {float(self.rate):g}; "
                "try a smaller optimizer.lr, a warmup (schedule.warmup_epochs) or clip=norm"
            )


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm normalizes with the batch's statistics within, and leaves its running ones alone."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.momentum = 0.0  # instance norm moves its statistics whatever track_running_stats says
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.track_running_stats = True
            norm.momentum = momentum


_DRAWING = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def may_draw(module: nn.Module) -> bool:
    """Whether the model's forward may draw random numbers: torch's layers that do, and whatever is not known.

    Setting a generator is cheap, and yet it pushes a tiny model out of the processor's cache: a tenth of its step.
    """
    return any(_draws(each) for each in module.modules())


def _draws(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    share = getattr(layer, "dropout", 0)  # of recurrent and attention layers
    known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
    return not known or isinstance(layer, _DRAWING) or (isinstance(share, float) and share > 0)


def _generators(parameters: Sequence[Tensor]) -> list[torch.Generator]:
    """The generators from which dropout draws on the devices of the parameters."""
    generators = [torch.default_generator]
    device = next((p.device for p in parameters if p.is_cuda), None)
    if device is not None:
        index = device.index or 0
        generators.append(torch.cuda.default_generators[index])
    return generators
