"""The accumulator for losses and accuracies of training and evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dlopt.metrics.declaration import predicted_classes
from dlopt.metrics.names import Split, by_column

Reduce = Callable[[Sequence[float]], Sequence[float]]
"""Sums each entry over ranks (a collective: all ranks call it)."""


# Bounds on the tensors that wait for a flush. Larger ones save little, and evict a small model from the cache.
_MAX_PENDING_STEPS = 128
_MAX_PENDING_OUTPUTS = 1 << 20  # elements: 4 MiB in fp32
_MAX_KEPT_OUTPUTS = 1 << 16  # per micro-batch; an update has many micro-batches, and outputs for text are large


class CountsPredictions(Protocol):
    """What `MetricSum` asks of a task; see `dlopt.tasks.task.Task`."""

    @property
    def accuracy(self) -> str | None: ...

    @property
    def predictions(self) -> int: ...

    def loss_metrics(self, loss: float) -> dict[str, float]: ...

    def predictions_in(self, outputs: Tensor) -> Tensor: ...


class Kept(NamedTuple):
    """What the metrics need of a micro-batch, on the device."""

    loss: Tensor  # mean over the samples
    samples: int
    outputs: Tensor | None = None  # None if not needed, or `correct` is known
    targets: Tensor | None = None
    correct: Tensor | None = None  # number of correct predictions
    parts: Tensor | None = None  # [P] of the loss, in the order of `MetricSum.parts`

    @staticmethod
    def of_no_samples(loss: Tensor) -> "Kept":
        """A micro-batch without samples on this rank: all ranks must reduce the same number of entries."""
        return Kept(torch.zeros_like(loss.detach()), 0)

    def clone(self) -> "Kept":
        others = (None if part is None else part.clone() for part in self[2:])
        return Kept(self.loss.clone(), self.samples, *others)


Keep = Callable[[Tensor, Tensor, Tensor], Kept]
"""(mean loss, outputs, targets) of a micro-batch, detached -> what the metrics need of it."""


class MetricSum:
    """Accumulates loss and correct predictions over samples, without a host-device synchronization per step.

    The tensors of a step pass through three stages:

    1. pending: kept as they are;
    2. flushed: concatenated and reduced on the device, many steps at once;
    3. synced: transferred to the host, summed over ranks, and added to `loss`, `correct` and `count`.

    The sums do not depend on when flushes and syncs happen: the host adds the losses step by step in float64. A resumed
    epoch therefore ends with exactly the metrics of an uninterrupted one.

    Args:
        task: defines the metrics, and the number of predictions per sample.
        on_flush: called with the outputs and targets of many steps, in order, at each flush.
        reduce: sums over ranks; None for one process. Each rank adds its own samples of every batch.
        accuracy: count the correct predictions of a task that has them; false: only the loss.
    """

    def __init__(
        self,
        task: CountsPredictions,
        on_flush: Callable[[Tensor, Tensor], None] | None = None,
        reduce: Reduce | None = None,
        *,
        accuracy: bool = True,
    ) -> None:
        self.task = task
        self.on_flush = on_flush
        self.reduce = reduce
        self._accuracy = task.accuracy if accuracy else None
        self._keeps_outputs = self._accuracy is not None or on_flush is not None
        self.clear()

    def clear(self) -> None:
        """Forgets all samples."""
        self.loss = 0.0
        self.correct = 0
        self.count = 0
        self._pending: list[Kept] = []
        self._max_pending = 0
        self.parts: dict[str, float] = {}  # sums of the parts of the loss, by name
        self._flushed: list[tuple[Tensor, list[int]]] = []  # (losses, parts, number correct; samples) of many steps
        self._reported: tuple[float, int, int, Mapping[str, float]] = (0.0, 0, 0, {})

    def start_epoch(self) -> None:
        """Forgets all samples, but `since_last` still counts those since its last call. Call after `means`."""
        loss, correct, count, before = self._reported
        parts = {name: before.get(name, 0.0) - total for name, total in self.parts.items()}
        unreported = (loss - self.loss, correct - self.correct, count - self.count, parts)
        self.clear()
        self._reported = unreported

    def keep(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> Kept:
        """Returns the batch's contribution, for `add`. Takes the mean loss (scalar), outputs [B, K], and targets [B]
        (or [B, K]: probabilities).

        With several predictions per sample: outputs [B, T, K], targets [B, T]. Adds nothing.
        """
        if not self._keeps_outputs:
            return Kept(loss, targets.shape[0])
        if self.on_flush is None and outputs.numel() > _MAX_KEPT_OUTPUTS:
            return Kept(loss, targets.shape[0], correct=self._count_correct(outputs, _labels(targets)))
        return Kept(loss, targets.shape[0], outputs, targets)

    def keep_parts(self, loss: Tensor, parts: Mapping[str, Tensor], samples: int) -> Kept:
        """Returns the contribution, for `add`, of a batch whose mean loss is the sum of named `parts`; {} for none."""
        names = sorted(parts)
        if names and not self.parts:
            self.parts = dict.fromkeys(names, 0.0)
        return Kept(loss, samples, parts=torch.stack([parts[name] for name in names]) if names else None)

    def add(self, *parts: Kept) -> None:
        """Adds the results of `keep` for a batch, or for each micro-batch of an update."""
        pending = self._pending
        if not pending:
            kept = sum(each.outputs.numel() for each in parts if each.outputs is not None)
            self._max_pending = max(min(_MAX_PENDING_STEPS, _MAX_PENDING_OUTPUTS // max(kept, 1)), 1)
        pending += parts
        if len(pending) >= self._max_pending:
            self._flush()

    def sync(self) -> None:
        """Adds all pending steps to the totals: one device-to-host transfer, and one all-reduce with several ranks."""
        self._flush()
        if not self._flushed:
            return
        flushed, self._flushed = self._flushed, []
        numbers = iter(torch.cat([tensor for tensor, _ in flushed]).tolist())
        width = 1 + len(self.parts)
        losses: list[float] = []  # per step: loss times samples, and each part of it
        correct = count = 0
        for _, counts in flushed:
            losses += [next(numbers) * samples for samples in counts for _ in range(width)]
            correct += round(next(numbers))
            count += sum(counts)
        if self.reduce is not None:
            # Step by step: ranks have the same number of steps, but different numbers of samples in a step.
            *losses, all_correct, all_count = self.reduce([*losses, correct, count])
            correct, count = round(all_correct), round(all_count)
        # A float64 sum in the order of the updates, whatever the interval of logging and checkpoints.
        for loss in losses[::width]:  # one by one: a sum of partial sums would depend on when `sync` was called
            self.loss += loss
        for number, name in enumerate(self.parts, 1):
            for part in losses[number::width]:
                self.parts[name] += part
        self.correct += correct
        self.count += count

    def _flush(self) -> None:
        """Reduces the pending tensors on the device, without synchronization."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        # Concatenating many steps replaces several small kernels per step by several per flush.
        width = 1 + len(self.parts)
        losses = torch.stack([each.loss for each in pending])
        if self.parts:
            none = losses.new_zeros(len(self.parts))  # of a micro-batch without samples
            parts = torch.stack([none if each.parts is None else each.parts for each in pending])
            losses = torch.cat([losses.unsqueeze(1), parts.to(losses.dtype)], 1).reshape(len(pending) * width)
        losses = losses.double() if losses.device.type != "mps" else losses  # MPS has no float64
        correct = [each.correct for each in pending if each.correct is not None]
        kept = [(e.outputs, e.targets) for e in pending if e.outputs is not None and e.targets is not None]
        if kept:
            outputs = _concatenated([outputs for outputs, _ in kept])
            if self._accuracy is not None:
                correct.append(self._count_correct(outputs, _concatenated([_labels(targets) for _, targets in kept])))
            if self.on_flush is not None:
                self.on_flush(outputs, _concatenated([targets for _, targets in kept]))
        number = torch.stack(correct).sum() if correct else losses.new_zeros(())
        values = torch.cat([losses, number.to(losses.dtype).reshape(1)])
        self._flushed.append((values, [each.samples for each in pending]))

    def _count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (predicted_classes(self.task.predictions_in(outputs)) == labels).sum()

    def means(self, split: Split) -> dict[str, float]:
        """Returns by column the loss and, for a classifier, the accuracy (a fraction) over all samples so far.

        Of a text: token_accuracy, and bits_per_byte or perplexity.
        """
        self.sync()
        means = self._means(self.loss, self.correct, self.count, self.parts)
        return by_column(split, means | self.task.loss_metrics(means["loss"]))

    def warn_if_not_finite(self, metrics: Mapping[str, Any], name: str, show: Callable[[str], None]) -> None:
        """Reports a NaN or infinite loss, because the accuracy beside it may look like a usable model's."""
        loss = metrics.get(name)
        if loss is not None and not math.isfinite(loss):
            wrong = "" if self.task.accuracy is None else "; those with NaN count as wrong predictions"
            show(f"warning: {name} is {loss}: the model has outputs that are not finite{wrong}")

    def since_last(self) -> dict[str, float]:
        """Returns the loss and, for a classifier, the accuracy over the samples since the last call, by name."""
        self.sync()
        loss, correct, count, before = self._reported
        self._reported = self.loss, self.correct, self.count, dict(self.parts)
        parts = {name: total - before.get(name, 0.0) for name, total in self.parts.items()}
        return self._means(self.loss - loss, self.correct - correct, self.count - count, parts)

    def _means(self, loss: float, correct: int, count: int, parts: Mapping[str, float]) -> dict[str, float]:
        metrics = {"loss": loss / count if count else math.nan}  # nan: all updates were skipped
        if self._accuracy is not None:
            metrics[self._accuracy] = correct / (count * self.task.predictions) if count else math.nan
        return metrics | {name: total / count if count else math.nan for name, total in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        self.sync()
        loss, correct, count, parts = self._reported
        state = {"loss": self.loss, "correct": self.correct, "count": self.count, "parts": dict(self.parts)}
        return {**state, "reported": [loss, correct, count], "reported_parts": dict(parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.correct, self.count = state["loss"], state["correct"], state["count"]
        self.parts = dict(state["parts"])
        loss, correct, count = state["reported"]
        self._reported = loss, correct, count, dict(state["reported_parts"])


def _labels(targets: Tensor) -> Tensor:
    """Returns the labels [B] of targets [B], or [B, K] with probabilities."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def _concatenated(tensors: list[Tensor]) -> Tensor:
    """Returns the tensors as one; a single one (the outputs of a text are large) without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@torch.no_grad()
def sample_losses(loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the loss of each sample [N], as a batch of one. `targets`: see `MetricSum.add`.

    Uses float64 where the device has it: the result must not depend on how many samples are computed at once.
    """
    outputs = outputs.float() if outputs.device.type == "mps" else outputs.double()
    return torch.vmap(lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)))(outputs, targets)
