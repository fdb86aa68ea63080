"""Updates by replay of a CUDA graph: small models at small batches are bound by launching kernels one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.graphs import Recorder, Replayed
from dlopt.train.step import Closure, Update

Part = tuple[Tensor, Tensor, Tensor]  # of a (micro-)batch: loss, outputs, targets

_OPTIMIZERS = ("SGD", "Adam", "AdamW")  # of torch.optim, with one kernel for all (fused)
_RECURRENT = nn.RNNBase  # cuDNN keeps states of its own


def obstacle(module: nn.Module, update: Update, *, device: torch.device, processes: int) -> str | None:
    """Why an update cannot be recorded, in words; None: nothing stands against it.

    What is recorded must not depend on the numbers in it, must not wait for the device, and must not change from step
    to step but for tensors and seeds. torch's and dlopt's layers are like that; of others one cannot know.
    """
    closure, optimizer = update.closure, update.optimizer
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if processes > 1:
        return "several processes meet within an update"
    if type(closure) is not Closure or type(update) is not GraphedUpdate:
        return "diagnostics or a profile look into the updates"
    if not update.once or not _is_capturable(optimizer):
        return f"{type(optimizer).__name__} decides on the host"
    if closure.scaler is not None:
        return "the loss scale of precision=fp16 is decided on the host"
    if update.watch.at_once:
        return "check=step and on_divergence=skip look at every update before it is made"
    if closure.halves:
        return "on_out_of_memory=halve may change the micro-batches"
    if getattr(update.schedule, "cycles_momentum", False):
        return "the schedule changes the momentum"
    for layer in module.modules():
        known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
        if not known or isinstance(layer, _RECURRENT):
            return f"of {type(layer).__name__} it is not known whether it decides on the host"
    return None


def _is_capturable(optimizer: Optimizer) -> bool:
    if getattr(optimizer, "capturable", False):  # dlopt's own say so
        return True
    torchs = type(optimizer).__module__.startswith("torch.") and type(optimizer).__name__ in _OPTIMIZERS
    return torchs and all(group.get("fused") for group in optimizer.param_groups)


class GraphedUpdate(Update):
    """An update that, once `use` is called, is recorded after some runs and replayed from then on.

    Forward, backward, clipping, the optimizer's step and `inside` (weight averaging) are one graph for full batches;
    others, such as an epoch's smaller last one, are run as they are. Learning rates become tensors, which the schedule
    fills; dropout is seeded before each replay, so that its draws are what they are without a graph.
    """

    def __init__(self, *arguments: Any, inside: Sequence[Callable[[], None]] = (), **keys: Any) -> None:
        """`inside` come after the optimizer's step and before the schedule's; the rest as for `Update`."""
        super().__init__(*arguments, **keys)
        self.inside = inside
        self._replayed: Replayed[_Results] | None = None

    def use(self, recorder: Recorder, size: int, *, norm: bool) -> None:
        """Records updates of batches of `size` samples from here on; `norm`: with the gradients' norm, for logging."""
        optimizer, device = self.optimizer, self.closure.parameters[0].device
        self._replayed = Replayed("the update", self._work, recorder)
        self._size, self._norm = size, norm
        self._batch: tuple[Tensor, Tensor] | None = None  # where the recorded update reads its inputs and targets
        self._flag = torch.zeros((), device=device)  # whether a gradient was not finite
        self._frozen = 0
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._restore(optimizer)
        optimizer.register_state_dict_post_hook(_with_plain_rates)
        optimizer.register_load_state_dict_post_hook(self._restore)

    def _restore(self, optimizer: Optimizer) -> None:
        """The learning rates are tensors that stay where they are, also behind a loaded state, which has other tensors
        than were recorded."""
        assert self._replayed is not None
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"]))
            if "capturable" in group:
                group["capturable"] = True
        self._replayed.forget()

    def _move(self) -> None:
        closure, replayed = self.closure, self._replayed
        if replayed is None:
            self._move_plainly()
            return
        self.rate = rate = self.schedule.rate  # type: ignore[attr-defined]  # the tensor will hold the next one's
        if not self._take(*closure.batch):
            self._move_plainly()
            return
        frozen = self.schedule.frozen  # type: ignore[attr-defined]
        if frozen != self._frozen:  # other parameters than before ask for gradients
            self._frozen = frozen
            replayed.forget()
        for generator in closure.generators:
            generator.manual_seed(closure.draws)
        results = replayed()
        sums, closure.sums = closure.sums, None
        assert sums is not None
        for part in results.parts:
            sums.add(*(each.clone() for each in part))
        self.watch.hold(results.loss.clone(), closure.step, rate, results.flag.clone())
        closure.norm = results.norm

    def _move_plainly(self) -> None:
        super()._move()
        for follow in self.inside:
            follow()

    def _take(self, inputs: Tensor, targets: Tensor) -> bool:
        """Puts a batch where the recorded update reads it; False where it does not fit there."""
        if self._batch is None:
            if len(targets) != self._size:
                return False
            self._batch = torch.empty_like(inputs), torch.empty_like(targets)
        for place, value in zip(self._batch, (inputs, targets), strict=True):
            if place.shape != value.shape or place.dtype != value.dtype:
                return False
        self._batch[0].copy_(inputs)
        self._batch[1].copy_(targets)
        return True

    def _work(self) -> "_Results":
        """The update of the batch in its place. Its losses and outputs are caught instead of counted, and the draws are
        not seeded in it: both are for the host to do."""
        closure = self.closure
        assert self._batch is not None
        caught = _Caught()
        kept = {name: getattr(closure, name) for name in ("batch", "sums", "watch", "generators", "norm_wanted")}
        closure.batch, closure.generators, closure.norm_wanted = self._batch, [], self._norm
        closure.sums, closure.watch = caught, self._look  # type: ignore[assignment]
        try:
            loss = closure()
            norm = closure.norm
            self.optimizer.step()
            for follow in self.inside:
                follow()
        finally:
            for name, value in kept.items():
                setattr(closure, name, value)
        return _Results(caught.parts, loss, self._flag, norm)

    def _look(self, loss: Tensor, step: int, rate: object, *, gradients: bool) -> None:
        self._flag.zero_()
        self.watch.find(self._flag)


@dataclass(frozen=True)
class _Results:
    """Tensors that every replay writes anew."""

    parts: list[Part]
    loss: Tensor
    flag: Tensor
    norm: Tensor | None


class _Caught:
    """Stands where `Sums` stands."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.parts.append((loss, outputs, targets))


def _with_plain_rates(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """A saved state has numbers for learning rates, as any other run's has."""
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
