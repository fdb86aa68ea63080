"""Sample-weighted means over an epoch, without a host-device synchronization per step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlopt.config.experiment import Experiment
from dlopt.config.rules import extra_metric
from dlopt.data.samples import Dataset
from dlopt.errors import UserError
from dlopt.losses import probabilities

Reduce = Callable[[Sequence[float]], Sequence[float]]
"""MetricSum over ranks, entry by entry; every rank has to join."""


class ExtraMetrics(Protocol):
    """Further metrics, which are sums over samples."""

    def add(self, outputs: Tensor, targets: Tensor) -> None: ...

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """By name, over all samples so far and all ranks."""
        ...


# What is held back before it is counted. More would save little, and would push a small model out of the cache.
_HELD_STEPS = 128
_HELD_NUMBERS = 1 << 20  # outputs: 4 MiB in fp32


class MetricSum:
    """MetricSum of loss and of right answers over samples.

    What a step hands in is held back, and counted for many steps at once.
    The sums do not depend on when they are counted, so a resumed epoch ends with the uninterrupted one's metrics.
    With several ranks each hands in its own samples of every batch, and the metrics are those of all ranks.
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

    def fresh(self) -> "MetricSum":
        """Empty sums of the same kind."""
        return MetricSum(self.classify, self.watch, self.reduce)

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
        metrics = {f"{prefix}loss": loss / max(count, 1)}
        if self.classify:
            metrics[f"{prefix}accuracy"] = right / max(count, 1)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"loss": self.loss, "right": self.right, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.right, self.count = state["loss"], state["right"], state["count"]
        self._reported = self.loss, self.right, self.count


@torch.no_grad()
def sample_losses(loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample [N]: what `loss` gives for it as a batch of one. `targets` as `MetricSum.add` takes them.

    In float64 where the device has it, so that the metrics do not show how many samples are computed at once.
    """
    outputs = outputs.float() if outputs.device.type == "mps" else outputs.double()
    return torch.vmap(lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)))(outputs, targets)


BINS = 15  # of confidence, as in Guo et al. 2017


def confusion_matrix(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: how many samples of the row's class were labelled with the column's.

    targets, predictions: int64 [N].
    """
    return torch.bincount(targets * classes + predictions, minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: Tensor) -> Tensor:
    """float64 [K]: the share of each class's samples that were labelled right; nan for a class without samples."""
    return confusion.diagonal().double() / confusion.sum(1)


def f1_scores(confusion: Tensor) -> Tensor:
    """float64 [K]: 2 TP / (2 TP + FP + FN) of each class; nan for a class that neither occurs nor is predicted."""
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + confusion.sum(1))


def top_accuracy(outputs: Tensor, targets: Tensor, k: int) -> float:
    """The share of samples whose class is among the `k` largest of their outputs [N, K]."""
    found = outputs.topk(k, dim=1).indices == targets.unsqueeze(1)
    return found.any(1).double().mean().item()


def calibration_error(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 5): sum over `bins` equal bins of confidence (the largest
    probability) of the bin's share of samples times |accuracy - mean confidence| within it.

    probabilities: [N, K]; a bin holds its upper border, not its lower one.
    """
    return (calibration_gaps(probabilities, targets, bins).abs().sum() / len(targets)).item()


def calibration_gaps(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """float64 [bins]: of each bin of confidence its right answers minus the sum of confidences."""
    confidence, predictions = probabilities.double().max(1)
    right = (predictions == targets).double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=right.device).index_add_(0, bin_of, right - confidence)


def determination(outputs: Tensor, targets: Tensor) -> float:
    """R^2 of outputs [N, K] for targets [N, K] or [N], a mean over the K numbers; nan where a target is constant."""
    targets = targets.view(len(outputs), -1).double()
    residual = (outputs.double() - targets).square().sum(0)
    return (1 - residual / (targets - targets.mean(0)).square().sum(0)).mean().item()


def absolute_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean absolute error over samples and numbers."""
    return (outputs.double() - targets.view(len(outputs), -1).double()).abs().mean().item()


TOP = 5
_OF_CLASSES = ("top5_accuracy", "macro_f1", "calibration_error", "class_accuracy")


def extra_metrics(experiment: Experiment, dataset: Dataset, loss: nn.Module) -> Callable[[], ExtraMetrics] | None:
    """Makes the counter of one validation for what `evaluate.metrics` lists and what is monitored; None: nothing more.

    Raises `UserError` for a metric that this run does not have.
    """
    classes = dataset.classes
    monitors = {"monitor": experiment.settings.monitor}
    for key, component in (("stopping", experiment.stopping), ("schedule", experiment.schedule)):
        if "monitor" in component.arguments:
            monitors[f"{key}.monitor"] = component.arguments["monitor"]
    wanted: dict[str, str] = {name: f"evaluate.metrics={name}" for name in experiment.settings.evaluate.metrics}
    for key, monitor in monitors.items():
        name = extra_metric(monitor)
        if name is not None:
            wanted.setdefault(name, f"{key}={monitor}")
        elif monitor == "val_accuracy" and classes is None:
            raise UserError(f"{key}={monitor}: allowed in a regression: auto, val_loss, val_r2, val_mae")
    _check_names(wanted, classes)
    _check_classes(monitors, classes)
    if not wanted:
        return None
    names = list(wanted)
    if classes is None:
        return lambda: RegressionMetrics(names, dataset.outputs)
    return lambda: ClassMetrics(names, classes, lambda outputs: probabilities(outputs, loss))


def _check_names(wanted: Mapping[str, str], classes: Sequence[str] | None) -> None:
    for name, typed in wanted.items():
        if (name in _OF_CLASSES) != (classes is not None):
            kind = "regression" if classes is None else "classification"
            raise UserError(f"{typed}: a {kind} has no such metric")
        if name == "top5_accuracy" and classes is not None and len(classes) <= TOP:
            raise UserError(f"{typed}: with {len(classes)} classes the right one is always among the first {TOP}")


def _check_classes(monitors: Mapping[str, str], classes: Sequence[str] | None) -> None:
    for key, monitor in monitors.items():
        _, is_class, name = monitor.partition("class_accuracy/")
        if is_class and classes is not None and name not in classes:
            shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise UserError(f"{key}={monitor}: there is no class {name}; the classes are {shown}")


class ClassMetrics:
    """Metrics of a classification by name: top5_accuracy, macro_f1, calibration_error and class_accuracy, which
    expands to class_accuracy/NAME of every class that occurs and worst_class_accuracy.
    """

    def __init__(self, names: Sequence[str], classes: Sequence[str], probabilities: Callable[[Tensor], Tensor]) -> None:
        """`probabilities`: from outputs [N, K] to what they say of the classes."""
        self.names = names
        self.classes = classes
        self._probabilities = probabilities
        self._sums: Tensor | None = None

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Counts outputs [N, K] and targets int64 [N]."""
        count = len(self.classes)
        predictions = outputs.argmax(1)
        columns = [
            torch.bincount(labels, minlength=count)
            for labels in (targets[predictions == targets], targets, predictions)
        ]
        if "top5_accuracy" in self.names:
            columns.append((outputs.topk(TOP, dim=1).indices == targets.unsqueeze(1)).any(1).sum().view(1))
        if "calibration_error" in self.names:
            columns.append(calibration_gaps(self._probabilities(outputs), targets))
        sums = torch.cat([column.to(columns[-1].dtype) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """The metrics of all samples so far; `reduce`: see `dlopt.training.metrics.MetricSum`."""
        size = 3 * len(self.classes) + ("top5_accuracy" in self.names)
        size += BINS if "calibration_error" in self.names else 0
        own = [0.0] * size if self._sums is None else self._sums.tolist()
        numbers = torch.tensor(own if reduce is None else list(reduce(own)), dtype=torch.float64)
        right, true, predicted, rest = numbers.split([*[len(self.classes)] * 3, size - 3 * len(self.classes)])
        result = {}
        if "top5_accuracy" in self.names:
            result["top5_accuracy"] = (rest[0] / true.sum()).item()
        if "calibration_error" in self.names:
            result["calibration_error"] = (rest[-BINS:].abs().sum() / true.sum()).item()
        if "macro_f1" in self.names:
            result["macro_f1"] = (2 * right / (true + predicted)).nanmean().item()
        if "class_accuracy" in self.names:
            accuracies = {
                name: r / n for name, r, n in zip(self.classes, right.tolist(), true.tolist(), strict=True) if n
            }
            result |= {f"class_accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
            result["worst_class_accuracy"] = min(accuracies.values())
        return result


class RegressionMetrics:
    """r2 and mae of a regression (`dlopt.training.metrics`) with so many `outputs`, by name."""

    def __init__(self, names: Sequence[str], outputs: int) -> None:
        self.names = names
        self._outputs = outputs
        self._sums = torch.zeros(2 + 3 * outputs, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Counts outputs [N, K] and targets [N, K] or [N]."""
        wanted = targets.view(len(outputs), -1).double()
        residual = outputs.double() - wanted
        count = residual.new_full((1,), len(outputs))
        self._sums = self._sums.to(residual.device) + torch.cat(
            [count, residual.abs().sum().view(1), residual.square().sum(0), wanted.sum(0), wanted.square().sum(0)]
        )

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """See `ClassMetrics.means`."""
        own = self._sums.tolist()
        count, absolute, *rest = own if reduce is None else reduce(own)
        residual, total, squares = torch.tensor(rest, dtype=torch.float64).view(3, self._outputs)
        every = {
            "r2": (1 - residual / (squares - total.square() / count)).mean().item(),
            "mae": absolute / (count * self._outputs),
        }
        return {name: every[name] for name in self.names}
