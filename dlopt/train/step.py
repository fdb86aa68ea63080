"""One optimizer update: forward and backward over the batch's micro-batches, clipping, the update itself.

Every optimizer is driven through `optimizer.step(closure)`, so that gradient descent, L-BFGS, SAM and Newton with a
line search share one loop. An optimizer that evaluates once per update is given its gradients first and then steps
without the closure: a bad number is seen before it reaches the weights, and the gradient scaler can do the step.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from dlopt.errors import UserError
from dlopt.random import stream
from dlopt.train.clipping import Clip, Norm, gradient_norm, plain_norm
from dlopt.train.metrics import Sums
from dlopt.train.nonfinite import (
    Diverged,
    Watch,
    check_weights,
    describe,
    first_bad_gradient,
    first_bad_output,
    first_bad_weight,
    is_finite,
)

log = logging.getLogger(__name__)


class Closure:
    """Loss and gradients of the current batch, as often as an optimizer asks.

    Within a step the random draws of the model are frozen, and batch-norm statistics move with the first evaluation.
    """

    total_norm: Norm = staticmethod(plain_norm)
    is_spread = False  # whether other ranks have parts of the model

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
        self.watch: Watch | None = None  # sees each update's first evaluation
        self.halves = False  # micro-batches that do not fit into memory
        self.buffers: Buffers | None = None  # as they were before the update, where it may be taken back
        self._model = autocast(model)
        self._loss = autocast(loss)
        self.generators = _generators(self.parameters) if may_draw(module) else []  # seeded in every update

    def begin(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        """Sets the batch of update `step`; its first evaluation is added to `sums`."""
        self.batch = inputs, targets
        self.step = step
        if self.buffers is not None:
            sums.begin()
            self.buffers.keep()
        if self.generators:
            self.draws = stream(self.seed, step)
        self.sums: Sums | None = sums

    def __call__(self) -> Tensor:
        """Leaves the clipped gradients of the batch's mean loss in the parameters; returns that loss, detached."""
        self.optimizer.zero_grad()
        is_first = self.sums is not None
        if is_first:
            loss = self._fitting()
            self.sums = None
        else:
            with frozen_statistics(self.module):
                loss = self._fitting()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if is_first and self.watch is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.watch(loss, self.step, rate, gradients=self.scaler is None)
        norm = gradient_norm(self.parameters, self.total_norm) if self.norm_wanted else None
        clipped = self.clip(self.parameters, self.total_norm)
        self.norm = norm if clipped is None else clipped
        return loss

    def loss(self) -> Tensor:
        """The batch's mean loss with its graph and without backward: for Hessian-vector products."""
        with torch.enable_grad(), frozen_statistics(self.module):
            return self._evaluate(backward=False)

    def locate(self, loss_is_finite: bool) -> str:
        """Which layer is the first that is not finite, in words: after an evaluation that found something."""
        if weight := first_bad_weight(self.module):
            return f"first: the weights {weight}"
        if loss_is_finite:
            return f"first in the backward pass: {first_bad_gradient(self.module)}"
        if not is_finite([self.batch[0]]):
            return "the inputs are not finite"
        with frozen_statistics(self.module):
            output = first_bad_output(self.module, lambda: self._evaluate(backward=False))
        return "first: the loss itself" if output is None else f"first: the output of {output}"

    def _fitting(self) -> Tensor:
        """An evaluation with backward; where memory does not suffice for it, in smaller micro-batches if these are
        allowed, which stay."""
        while True:
            try:
                return self._evaluate(backward=True)
            except torch.OutOfMemoryError:
                if not self.halves or self.accumulate >= len(self.batch[1]):
                    raise
            self._halve()  # out of the exception's reach, which holds on to what is to be freed

    def _halve(self) -> None:
        self.optimizer.zero_grad()
        if self.sums is not None:
            self.sums.withdraw()
            if self.buffers is not None:
                self.buffers.take_back()
        if self.batch[1].is_cuda:
            torch.cuda.empty_cache()
        self.accumulate *= 2
        size = -(-len(self.batch[1]) // self.accumulate)
        log.warning("out of memory at update %d: micro-batches of %d samples from here on", self.step + 1, size)

    def _evaluate(self, backward: bool) -> Tensor:
        for generator in self.generators:
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
        skip: Callable[[Diverged], bool] | None = None,
    ) -> None:
        """`after` follows every update (weight averaging, stopping rules).

        `check_now` looks for NaN and infinity in every step, before the update: cheap on a CPU, a synchronization on a
        GPU. `skip`: whether an update that cannot be made is to be left out.
        """
        self.closure = closure
        self.optimizer = closure.optimizer
        self.schedule = schedule
        self.once = evaluations == "once"
        self.after = after
        self.skip = skip
        self.watch = closure.watch = Watch(
            closure.parameters,
            at_once=check_now,
            where=closure.locate,
            norm=closure.total_norm if closure.is_spread else None,
        )
        if skip is not None or closure.halves:
            closure.buffers = Buffers(closure.module)
        self.rate = self.optimizer.param_groups[0]["lr"]  # of the latest update

    def __call__(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        closure = self.closure
        closure.begin(inputs, targets, step, sums)
        self.rate = self.optimizer.param_groups[0]["lr"]
        try:
            self._move()
        except Diverged as error:
            if self.skip is None or not error.before_update or not self.skip(error):
                raise
            sums.withdraw()
            if closure.buffers is not None:
                closure.buffers.take_back()
        self.schedule.step()
        for follow in self.after:
            follow()

    def _move(self) -> None:
        closure = self.closure
        if not self.once:
            self.optimizer.step(closure)  # type: ignore[arg-type]
            return
        closure()
        if closure.scaler is None:
            self.optimizer.step()
        else:
            closure.scaler.step(self.optimizer)
            closure.scaler.update()

    def check(self) -> None:
        """Raises `Diverged` when an update since the last check was not finite. Waits for the device."""
        self.watch.look(self.closure.scaler)

    def check_weights(self) -> None:
        """The same for the weights as they are now, which a finite gradient may have taken too far."""
        self.check()
        check_weights(self.closure.module, self.watch.latest, float(self.rate), self.watch.norm)


class Buffers:
    """Running statistics, which an update that is taken back must not have moved."""

    def __init__(self, module: nn.Module) -> None:
        self._now = [each for each in module.buffers() if not each.is_meta]
        self._before = [each.clone() for each in self._now]

    def keep(self) -> None:
        if self._now:
            torch._foreach_copy_(self._before, self._now)

    def take_back(self) -> None:
        if self._now:
            torch._foreach_copy_(self._now, self._before)


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


class Observer(Protocol):
    def around(self, inputs: Tensor, targets: Tensor, step: int) -> AbstractContextManager[None] | None:
        """What encloses update `step` (from 0) on this batch; None: this update is not looked at."""
        ...


class ObservedUpdate(Update):
    """An update with `observers`, which must not change what it computes."""

    observers: Sequence[Observer] = ()

    def __call__(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        contexts = [context for each in self.observers if (context := each.around(inputs, targets, step)) is not None]
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            super().__call__(inputs, targets, step, sums)
