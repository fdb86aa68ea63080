"""Sample-weighted means over an epoch, without a host-device synchronization per step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Reduce = Callable[[Sequence[float]], Sequence[float]]
"""Sums over ranks, entry by entry; every rank has to join."""

# What is held back before it is counted. More would save little, and would push a small model out of the cache.
_HELD_STEPS = 128
_HELD_NUMBERS = 1 << 20  # outputs: 4 MiB in fp32


class Sums:
    """Sums of loss and of right answers over samples.

    What a step hands in is held back, and counted for many steps at once.
    The sums do not depend on when they are counted, so a resumed epoch ends with the uninterrupted one's figures.
    With several ranks each hands in its own samples of every batch, and the figures are those of all ranks.
    """

    def __init__(
        self,
        classify: bool,
        watch: Callable[[Tensor, Tensor], None] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """`watch` is shown the outputs and targets of many steps at once, in their order, whenever they are counted."""
        self.classify = classify
        self.watch = watch
        self.reduce = reduce
        self.loss = 0.0
        self.right = 0
        self.count = 0
        self._looks = classify or watch is not None
        self._held: list[tuple[Tensor, Tensor | None, Tensor | None]] = []  # losses, outputs, targets
        self._most = 0  # of them that are held back
        self._mark: int | None = None  # of them that came before the current update
        self._folded: list[
            tuple[Tensor, list[int]]
        ] = []  # per so many steps: their losses and right answers, their sizes
        self._read: list[float] = []  # per step: the loss times its samples
        self._read_right = self._read_count = 0
        self._reported = (0.0, 0, 0)

    def fresh(self) -> "Sums":
        """Empty sums of the same kind."""
        return Sums(self.classify, self.watch, self.reduce)

    def begin(self) -> None:
        """What is added from here on, until the next call, may be withdrawn."""
        if len(self._held) >= self._most:
            self._fold()
        self._mark = len(self._held)

    def withdraw(self) -> None:
        """Forgets what was added since `begin`."""
        assert self._mark is not None
        del self._held[self._mark :]

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Takes a batch's mean loss (scalar), outputs [B, K] and targets [B] (or [B, K]: probabilities)."""
        held = self._held
        if not held:
            self._most = max(min(_HELD_STEPS, _HELD_NUMBERS // max(outputs.numel(), 1)), 1)
        held.append((loss, outputs if self._looks else None, targets))
        if len(held) >= self._most and self._mark is None:
            self._fold()

    def add_nothing(self, device: torch.device) -> None:
        """A batch of which this rank has no samples."""
        self._held.append((torch.zeros((), device=device), None, None))

    def settle(self) -> None:
        """Counts what was held back: one transfer from the device, and with several ranks one exchange."""
        self._settle_own()
        if not self._read:
            return
        losses, right, count = self._read, self._read_right, self._read_count
        if self.reduce is not None:
            *losses, rights, counts = self.reduce([*losses, right, count])
            right, count = round(rights), round(counts)
        for loss in losses:
            self.loss += loss
        self.right += right
        self.count += count
        self._read, self._read_right, self._read_count = [], 0, 0

    def _fold(self) -> None:
        """Counts what was held back where it lies: nothing waits for the device."""
        held, self._held, self._mark = self._held, [], None
        if not held:
            return
        losses = torch.stack([loss for loss, _, _ in held])
        losses = losses.double() if losses.device.type != "mps" else losses  # which has no float64
        right = losses.new_zeros(1)
        shown = [(outputs, targets) for _, outputs, targets in held if outputs is not None and targets is not None]
        if shown:
            outputs = torch.cat([outputs for outputs, _ in shown])
            if self.classify:
                labels = torch.cat([t.argmax(1) if t.ndim > 1 else t for _, t in shown])
                right = (outputs.argmax(1) == labels).sum().to(losses.dtype).reshape(1)
            if self.watch is not None:
                self.watch(outputs, torch.cat([targets for _, targets in shown]))
        counts = [0 if targets is None else len(targets) for _, _, targets in held]
        self._folded.append((torch.cat([losses, right]), counts))

    def _settle_own(self) -> None:
        self._fold()
        if not self._folded:
            return
        numbers = iter(torch.cat([folded for folded, _ in self._folded]).tolist())
        for _, counts in self._folded:
            self._read += [next(numbers) * count for count in counts]
            self._read_right += round(next(numbers))
            self._read_count += sum(counts)
        self._folded = []

    def means(self, prefix: str) -> dict[str, float]:
        """{prefix}_loss and, in a classification, {prefix}_accuracy (a fraction), over all samples so far."""
        self.settle()
        return self._figures(f"{prefix}_", self.loss, self.right, self.count)

    def since_last(self, prefix: str) -> dict[str, float]:
        """{prefix}loss and {prefix}accuracy over the samples since the last call."""
        self.settle()
        loss, right, count = self._reported
        self._reported = self.loss, self.right, self.count
        return self._figures(prefix, self.loss - loss, self.right - right, self.count - count)

    def _figures(self, prefix: str, loss: float, right: int, count: int) -> dict[str, float]:
        figures = {f"{prefix}loss": loss / max(count, 1)}
        if self.classify:
            figures[f"{prefix}accuracy"] = right / max(count, 1)
        return figures

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"loss": self.loss, "right": self.right, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.right, self.count = state["loss"], state["right"], state["count"]
        self._reported = self.loss, self.right, self.count


@torch.no_grad()
def sample_losses(loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample [N]: what `loss` gives for it as a batch of one. `targets` as `Sums.add` takes them.

    In float64 where the device has it, so that the figures do not show how many samples are computed at once.
    """
    outputs = outputs.float() if outputs.device.type == "mps" else outputs.double()
    return torch.vmap(lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)))(outputs, targets)
