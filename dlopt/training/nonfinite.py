"""Losses and gradients that are not finite: seen before they reach the weights, or on a GPU at the next look."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlopt.errors import RunError
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import local
from dlopt.training.clipping import Norm

_HELD_STEPS = 128
_SMALLEST_SCALE = 2.0**-20  # of fp16's losses: below, no gradient will ever be finite again


class Diverged(RunError):
    """A loss, a gradient or a weight is not finite at update `step` (from 1).

    `before_update`: the weights have not moved yet.
    """

    def __init__(self, message: str, step: int, *, before_update: bool) -> None:
        super().__init__(message)
        self.step = step
        self.before_update = before_update


class NonFiniteCheck:
    """Looks for NaN and infinity in the losses and in the reduced gradients of all updates.

    `at_once`: in each update, before the weights move: cheap on a CPU, a synchronization on a GPU. Otherwise one flag
    per update stays on the device until `look`.
    `where` says which layer is the first that is not finite, given whether the loss is. `norm`: of gradients of which
    this rank has but parts, so that all ranks see the same; None: it has them all.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, at_once: bool, where: Callable[[bool], str], norm: Norm | None = None
    ) -> None:
        self.parameters = parameters
        self.at_once = at_once
        self.where = where
        self.norm = norm
        device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
        self._one = torch.ones((), device=device)
        self._flag = torch.zeros((), device=device)  # of the update itself, where that is looked at
        self.latest = 0  # update, from 1
        self._held: list[tuple[int, float, Tensor]] = []  # update, learning rate, loss
        self._flags: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._folded: list[tuple[list[tuple[int, float]], Tensor]] = []

    def __call__(self, loss: Tensor, step: int, rate: float, *, gradients: bool) -> None:
        """Takes update `step` (from 0), whose gradients are in the parameters. Raises `Diverged`.

        Without `gradients` they are a loss scaler's to look at.
        """
        self.latest = step + 1
        if not self.at_once:
            self._hold(loss, step, rate, gradients)
            return
        if gradients:
            self.find(self._flag)
        value = loss.item()
        if not math.isfinite(value) or (gradients and self._flag.item()):
            self._flag.zero_()
            where = self.where(math.isfinite(value))
            raise Diverged(_told(value, step, rate, where), step + 1, before_update=True)

    def find(self, flag: Tensor) -> None:
        """Sets `flag` to 1 when a gradient is not finite: one operation over all, which leaves them as they are."""
        found = [gradient for p in self.parameters if (gradient := p.grad) is not None]
        if self.norm is not None:
            flag.copy_(~self.norm(found).isfinite())
        elif found:
            torch._amp_foreach_non_finite_check_and_unscale_(found, flag, self._one)

    def _hold(self, loss: Tensor, step: int, rate: float, gradients: bool) -> None:
        if not self._slots:
            self._slots = list(torch.zeros(_HELD_STEPS, device=self._one.device).unbind())
        flag = self._slots.pop()
        if gradients:
            self.find(flag)
        self.hold(loss, step, rate, flag)

    def hold(self, loss: Tensor, step: int, rate: float, flag: Tensor) -> None:
        """Takes update `step` (from 0) and the flag that says whether a gradient of it was not finite, for `look`."""
        self.latest = step + 1
        self._held.append((step, rate, loss))
        self._flags.append(flag)
        if len(self._held) == _HELD_STEPS:
            self._fold()

    def _fold(self) -> None:
        if self._held:
            losses, flags = torch.stack([loss.float() for _, _, loss in self._held]), torch.stack(self._flags)
            self._folded.append(([(step, rate) for step, rate, _ in self._held], torch.stack([losses, flags])))
            self._held, self._flags = [], []

    def look(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Raises `Diverged` for the first update since the last look that was not finite. Waits for the device."""
        self._fold()
        folded, self._folded = self._folded, []
        for updates, numbers in folded:
            for (step, rate), value, flag in zip(updates, *numbers.tolist(), strict=True):
                if flag or not math.isfinite(value):
                    told = _told(value, step, rate, "check=step names the layer")
                    raise Diverged(told, step + 1, before_update=False)
        if scaler is not None and scaler.get_scale() < _SMALLEST_SCALE:
            raise Diverged(
                "precision=fp16: the gradients are not finite, however small the loss scale; use precision=bf16",
                self.latest,
                before_update=False,
            )

    def forget(self) -> None:
        """Leaves out what was not looked at yet: the run goes back to before it."""
        self._held, self._flags, self._folded = [], [], []


def _told(value: float, step: int, rate: float, where: str) -> str:
    what = "the gradient is not finite" if math.isfinite(value) else f"the loss became {value}"
    return (
        f"{what} at update {step + 1} with a learning rate of {rate:g} ({where}); "
        "try a smaller optimizer.lr, a warmup (schedule.warmup_epochs) or clip=norm"
    )


def check_weights(module: nn.Module, step: int, rate: float, norm: Norm | None = None) -> None:
    """Raises `Diverged` when a weight is not finite, which no finite loss tells of. Waits for the device.

    `norm`: see `NonFiniteCheck`.
    """
    parameters = [p.detach() for p in module.parameters()]
    fine = is_finite(parameters) if norm is None else bool(norm(parameters).isfinite())
    if not fine:
        raise Diverged(
            f"the weights are not finite after update {step} with a learning rate of {rate:g} "
            f"(first: {first_bad_weight(module) or 'those of another rank'}); "
            "try a smaller optimizer.lr, a warmup (schedule.warmup_epochs) or clip=norm",
            step,
            before_update=False,
        )


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are that this process has of them."""
    own = [part for part in map(local, tensors) if part.numel() and not part.is_meta]
    if not own:
        return True
    largest = torch._foreach_norm(own, ord=math.inf)  # propagates NaN, and does not overflow
    return bool(torch.stack([each.isfinite() for each in largest]).all())


def first_bad_weight(module: nn.Module) -> str | None:
    return next((name for name, p in module.named_parameters() if not is_finite([p.detach()])), None)


def first_bad_gradient(module: nn.Module) -> str | None:
    """The parameter whose gradient the backward pass found first: the last one in the model's order."""
    names = [name for name, p in module.named_parameters() if p.grad is not None and not is_finite([p.grad])]
    return names[-1] if names else None


def describe(name: str, layer: nn.Module) -> str:
    return f"{name or 'the model'} ({type(layer).__name__})"


def locate(
    module: nn.Module, inputs: Tensor, mode: Mode, forward: Callable[[], object], *, loss_is_finite: bool
) -> str:
    """Names the first layer that is not finite, in words, after an evaluation that was not. All ranks call this.

    `forward` runs the evaluation's forward pass again.
    """
    if mode.sharding != "replicated":
        return f"first on rank {mode.rank}: {first_bad_weight(module) or first_bad_gradient(module)}"
    if mode.processes > 1:
        return _locate_on_ranks(module, inputs, mode, loss_is_finite)
    if weight := first_bad_weight(module):
        return f"first: the weights {weight}"
    if loss_is_finite:
        return f"first in the backward pass: {first_bad_gradient(module)}"
    if not is_finite([inputs]):
        return "the inputs are not finite"
    output = first_bad_output(module, forward)
    return "first: the loss itself" if output is None else f"first: the output of {output}"


def _locate_on_ranks(module: nn.Module, inputs: Tensor, mode: Mode, loss_is_finite: bool) -> str:
    """Every rank checks its own samples; the first rank with a finding is reported by all.

    Findings travel as numbers: positions in a list of texts that is the same on all ranks.
    """
    weights = [name for name, _ in module.named_parameters()]
    layers = [describe(name, layer) for name, layer in module.named_modules()]
    texts = [*(f"the weights {each}" for each in weights), *(f"the gradient of {each}" for each in weights)]
    texts += ["the inputs", *(f"the output of {each}" for each in layers)]
    finding = _find(module, inputs, loss_is_finite)
    codes = [0.0] * mode.processes
    codes[mode.rank] = 0.0 if finding is None else 1.0 + texts.index(finding)
    rank, code = next(((r, c) for r, c in enumerate(mode.sum_over_ranks(codes)) if c), (0, 0.0))
    return f"first on rank {rank}: {texts[round(code) - 1]}" if code else "first: the loss itself"


def _find(module: nn.Module, inputs: Tensor, loss_is_finite: bool) -> str | None:
    if weight := first_bad_weight(module):
        return f"the weights {weight}"
    if loss_is_finite:
        return f"the gradient of {first_bad_gradient(module)}"
    if not len(inputs) or not is_finite([inputs]):
        return "the inputs" if len(inputs) else None
    was_training = module.training
    module.eval()  # in training mode, layers may communicate with other ranks
    output = first_bad_output(module, lambda: module(inputs))
    module.train(was_training)
    return None if output is None else f"the output of {output}"


@torch.no_grad()
def first_bad_output(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first layer within `module`, in the order of execution, whose output is not finite; `forward` calls it."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            numbers = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
            if not found and not is_finite([each.detach() for each in numbers]):
                found.append(name)

        return look

    handles: list[RemovableHandle] = [
        each.register_forward_hook(hook(describe(name, each))) for name, each in module.named_modules()
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


Policy = Literal["stop", "skip", "rollback"]


class Recovery:
    """Counts and decides; its state belongs to the checkpoint.

    Args:
        attempts: rollbacks of a run, or updates left out in a row, after which it stops all the same.
        lr_factor: by which each rollback multiplies the learning rate.
        newest: the newest checkpoint, on all ranks; None: there is none.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        attempts: int,
        lr_factor: float,
        newest: Callable[[], Mapping[str, Any] | None],
        tell: Callable[[str], None],
    ) -> None:
        self.policy = policy
        self.attempts = attempts
        self.lr_factor = lr_factor
        self.newest = newest
        self.tell = tell
        self.rollbacks = 0
        self.skipped = 0
        self.lr_scale = 1.0  # by which the rollbacks have multiplied the learning rate
        self._in_a_row = self._last_skipped = 0

    def skip(self, error: Diverged) -> bool:
        """Whether the update is left out, which is then counted."""
        if self.policy != "skip":
            return False
        self._in_a_row = self._in_a_row + 1 if error.step == self._last_skipped + 1 else 1
        if self._in_a_row > self.attempts:
            return False
        self.skipped += 1
        self._last_skipped = error.step
        self.tell(f"update {error.step} is left out: {_found(error)}")
        return True

    def goal(self, error: Diverged) -> Mapping[str, Any]:
        """The checkpoint to go back to, which is counted, and the learning rate set to fall. Raises `error` again."""
        if self.policy != "rollback":
            raise error
        if self.rollbacks == self.attempts:
            raise Diverged(
                f"{error}; recovery.attempts={self.attempts} rollbacks did not help", error.step, before_update=False
            ) from error
        state = self.newest()
        if state is None:
            raise error
        self.rollbacks += 1
        self.lr_scale *= self.lr_factor
        self.tell(
            f"{_found(error)}; rollback {self.rollbacks} of {self.attempts}: back to update "
            f"{state['progress']['step']}, the learning rate is {self.lr_scale:g} times the configured one"
        )
        return state

    def summary(self) -> dict[str, int]:
        counts = {"rollback": {"rollbacks": self.rollbacks}, "skip": {"skipped_updates": self.skipped}}
        return counts.get(self.policy, {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "lr_scale": self.lr_scale,
            "in_a_row": self._in_a_row,
            "last_skipped": self._last_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollbacks, self.skipped, self.lr_scale = state["rollbacks"], state["skipped"], state["lr_scale"]
        self._in_a_row, self._last_skipped = state["in_a_row"], state["last_skipped"]


def _found(error: Diverged) -> str:
    """Without the advice, which is about to be taken."""
    return str(error).partition("; try ")[0]
