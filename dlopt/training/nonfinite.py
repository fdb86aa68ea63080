"""Detection of non-finite losses, gradients and weights, the layer they come from, and recovery from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dlopt.basics.errors import RunError
from dlopt.models.layers import evaluation_mode, without_fused_layers
from dlopt.optim.parameters import real_views
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import Sharding, local

_MAX_PENDING = 128  # updates
_MIN_LOSS_SCALE = 2.0**-20  # fp16: with a smaller scale, gradients will not become finite again
_ADVICE = "try a smaller optimizer.lr, a warmup (schedule.warmup_epochs) or clip=norm"


class Diverged(RunError):
    """A loss, a gradient or a weight is not finite at update `step` (from 1); found before the update, or later."""

    def __init__(self, message: str, step: int, *, before_update: bool) -> None:
        super().__init__(message)
        self.step = step
        self.before_update = before_update


@dataclass(eq=False, repr=False)
class NonFiniteCheck:
    """Checks the loss and the reduced gradients of every update for NaN and infinity.

    An immediate check is before each update, which is cheap on a CPU and synchronizes on a GPU. A deferred one keeps a
    flag per update on the device until `flush`. If ranks have shards of the gradients, it `needs_norm`: only the norm
    is the same on all of them.
    """

    parameters: Sequence[Tensor]  # whose gradients are checked
    _: KW_ONLY
    immediate: bool
    locate: Callable[[bool], str]  # describes the first non-finite tensor, given whether the loss is finite
    sharding: Sharding = field(default_factory=Sharding)
    clips_by_norm: bool = False  # it sets gradients whose norm overflows to zero, which deferred checks report

    def __post_init__(self) -> None:
        parameters = self.parameters
        self.needs_norm = bool(parameters) and self.sharding.kind != "replicated"
        self._defers_norm = self.needs_norm or (bool(parameters) and self.clips_by_norm)
        device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
        self._one = torch.ones((), device=device)
        self._flag = torch.zeros((), device=device)  # for immediate checks
        self.latest = 0  # latest update, from 1
        self.preallocates = True  # one kernel launch for many flags
        self._free_flags: list[Tensor] = []
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []  # update, learning rate, loss, flag
        self._stacked: list[tuple[list[tuple[int, float]], Tensor]] = []

    def examine(self, loss: Tensor, step: int, rate: float, norm: Tensor | None = None) -> Tensor | None:
        """Checks update `step` (from 0). Raises `Diverged`; a deferred check returns the flag for `defer` instead.

        `norm`: of all gradients, if it is known. It may overflow (above 1.8e19 in fp32) although they are finite.
        Deferred checks ignore a norm that only some updates have, for the same result in all.
        """
        if not self.immediate:
            if norm is not None and self._defers_norm and norm.device == self._one.device:
                return norm - norm  # 0, or NaN: one kernel
            self.flag_nonfinite(flag := self._new_flag())  # also without gradients, whose norm is on the CPU
            return flag
        self.latest = step + 1
        if self.parameters and (norm is None or not math.isfinite(norm.item())):
            self._flag.fill_(1.0) if self.needs_norm else self.flag_nonfinite(self._flag)
        # Reads both on the host, before the optimizer runs: the current weights still explain the value.
        value = loss.item()
        if not math.isfinite(value) or self._flag.item():
            self._flag.zero_()
            raise _diverged(value, step, rate, self.locate(math.isfinite(value)), before_update=True)
        return None

    def _new_flag(self) -> Tensor:
        if not self.preallocates:
            return torch.zeros_like(self._one)
        if not self._free_flags:
            self._free_flags = list(torch.zeros(_MAX_PENDING, device=self._one.device).unbind())
        return self._free_flags.pop()

    def flag_nonfinite(self, flag: Tensor) -> None:
        """Sets `flag` to 1 if a gradient of this process is not finite; leaves the gradients unchanged."""
        gradients = [gradient for p in self.parameters if (gradient := p.grad) is not None]
        if any(gradient.dtype == torch.bfloat16 and gradient.is_cuda for gradient in gradients):
            # The kernel below has no bf16 on a GPU. Another norm than the maximum could overflow.
            largest = torch._foreach_norm(real_views(gradients), math.inf)
            flag.copy_(~torch.stack([norm.float() for norm in largest]).isfinite().all())
        elif gradients:
            # torch's gradient scaler has the one kernel for all gradients and a single flag; it also divides by 1.
            torch._amp_foreach_non_finite_check_and_unscale_(real_views(gradients), flag, self._one)

    def defer(self, loss: Tensor, step: int, rate: float, flag: Tensor) -> None:
        """Keeps the loss of update `step` (from 0), and the flag for its gradients, until `flush`."""
        self.latest = step + 1
        self._pending.append((step, rate, loss, flag))
        # Stacked on the device, many flags are one tensor, and one transfer at the logging point.
        if len(self._pending) == _MAX_PENDING:
            self._stack_pending()

    def _stack_pending(self) -> None:
        if not self._pending:
            return
        steps, rates, losses, flags = zip(*self._pending, strict=True)
        values = torch.stack([loss.float() for loss in losses])
        # The flags are on the CPU if the parameters are offloaded.
        values = torch.stack([values, torch.stack(flags).to(values.device)])
        self._stacked.append((list(zip(steps, rates, strict=True)), values))
        self._pending = []

    def flush(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Raises `Diverged` for the first non-finite update since the last call. Synchronizes with the device."""
        self._stack_pending()
        stacked, self._stacked = self._stacked, []
        for updates, losses_and_flags in stacked:
            for (step, rate), value, flag in zip(updates, *losses_and_flags.tolist(), strict=True):
                if flag or not math.isfinite(value):
                    raise _diverged(value, step, rate, "check=step names the layer", before_update=False)
        if scaler is not None and scaler.get_scale() < _MIN_LOSS_SCALE:
            message = "precision=fp16: gradients are not finite even with the smallest loss scale; use precision=bf16"
            raise Diverged(message, self.latest, before_update=False)

    def check_weights(self, module: nn.Module, rate: float) -> None:
        """Raises `Diverged` if a weight is not finite, as after the overflow of an update. Synchronizes."""
        parameters = [p.detach() for p in module.parameters()]
        is_replicated = self.sharding.kind == "replicated"
        if not (is_finite(parameters) if is_replicated else self.sharding.norm(parameters).isfinite()):
            raise Diverged(
                f"the weights are not finite after update {self.latest} with a learning rate of {rate:g} "
                f"(first: {first_nonfinite_weight(module) or 'on another rank'}); {_ADVICE}",
                self.latest,
                before_update=False,
            )


def _diverged(loss: float, step: int, rate: float, location: str, *, before_update: bool) -> Diverged:
    what = "the gradient is not finite" if math.isfinite(loss) else f"the loss became {loss}"
    message = f"{what} at update {step + 1} with a learning rate of {rate:g} ({location}); {_ADVICE}"
    return Diverged(message, step + 1, before_update=before_update)


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all entries in this process's shards of the tensors are finite; integers (tokens) are."""
    shards = [each for each in map(local, tensors) if each.numel() and not each.is_meta]
    shards = [each for each in shards if each.is_floating_point() or each.is_complex()]
    if not shards:
        return True
    maxima = torch._foreach_norm(shards, ord=math.inf)  # propagates NaN, and does not overflow as a sum would
    return bool(torch.stack([maximum.isfinite() for maximum in maxima]).all())  # the host waits once


def first_nonfinite_weight(module: nn.Module) -> str | None:
    return next((name for name, p in module.named_parameters() if not is_finite([p.detach()])), None)


def describe(name: str, layer: nn.Module) -> str:
    return f"{name or 'the model'} ({type(layer).__name__})"


def locate(
    module: nn.Module, inputs: Tensor, mode: Mode, forward: Callable[[], object], loss: str, loss_is_finite: bool
) -> str:
    """Describes the first non-finite tensor after a non-finite loss or gradient. All ranks must call this.

    The first of all ranks by its place in the model: a NaN in one shard of a layer spreads to all shards of others.
    `forward` repeats the forward pass, on several ranks without communication but that of the layers. `loss`: its name.
    """
    is_alone = mode.ranks.processes == 1

    def first(kind: str, name: str | None, order: Sequence[str]) -> str | None:
        found = mode.ranks.gather([None if name is None else (order.index(name), kind + name)])
        ranked = [(each, rank) for rank, each in enumerate(found) if each is not None]
        if not ranked:
            return None
        (_, text), rank = min(ranked)
        return f"first: {text}" if is_alone else f"first on rank {rank}: {text}"

    # 1. A weight.
    names = [name for name, _ in module.named_parameters()]
    if text := first("the weights ", first_nonfinite_weight(module), names):
        return text

    # 2. A gradient, in the order of the backward pass.
    if loss_is_finite:
        backward = [(name, p.grad) for name, p in reversed([*module.named_parameters()])]
        gradient = next((name for name, grad in backward if grad is not None and not is_finite([grad])), None)
        if is_alone:
            return f"first in the backward pass: {gradient}"
        return first("the gradient of ", gradient, names[::-1]) or "first: the gradient"

    # 3. The inputs.
    if text := first("the inputs", "" if len(inputs) and not is_finite([inputs]) else None, [""]):
        return "the inputs are not finite" if is_alone else text

    # 4. The output of a layer. All gradients are NaN then: only a forward pass tells, in which the layers of FSDP
    #    communicate. Those of other modes would need the step around them, which divides the inputs.
    is_replicated, has_samples = mode.sharding.kind == "replicated", all(mode.ranks.gather([len(inputs) > 0]))
    output = None
    if (is_replicated and len(inputs)) or (mode.name == "fsdp" and has_samples):
        # In training mode, layers may communicate with ranks that might not call them.
        with nullcontext() if is_alone else evaluation_mode(module):
            output = first_nonfinite_output(module, forward)
    layers = [describe(name, layer) for name, layer in module.named_modules()]
    unknown = f"{loss} itself" if is_replicated or mode.name == "fsdp" else f"an activation or {loss} itself"
    return first("the output of ", output, layers) or f"first: {unknown}"


@torch.no_grad()
def first_nonfinite_output(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """Returns the first layer of `module`, in execution order, with a non-finite output; `forward` calls `module`."""
    names = {layer: describe(name, layer) for name, layer in module.named_modules()}
    nonfinite: list[str] = []

    def check(layer: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [each.detach() for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
        if layer in names and not nonfinite and not is_finite(tensors):
            nonfinite.append(names[layer])

    with without_fused_layers(), register_module_forward_hook(check):
        forward()
    return nonfinite[0] if nonfinite else None


@dataclass
class Recovery:
    """Decides which non-finite updates are skipped (`on_divergence=skip`), and counts them."""

    attempts: int  # most skipped updates in a row
    log: Callable[[str], None]  # shows a line to the user
    skipped: int = 0
    in_a_row: int = 0
    last_skipped: int = 0

    def skip(self, error: Diverged) -> bool:
        """Returns whether to skip the update, and counts it."""
        self.in_a_row = self.in_a_row + 1 if error.step == self.last_skipped + 1 else 1
        if self.in_a_row > self.attempts:
            return False
        self.skipped += 1
        self.last_skipped = error.step
        self.log(f"update {error.step} is skipped: {str(error).partition('; try ')[0]}")
        return True

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last_skipped": self.last_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row, self.last_skipped = (state[key] for key in self.state_dict())
