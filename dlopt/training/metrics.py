"""Metrics: the accumulator for losses and accuracies, and further metrics of classification and regression."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.config.experiment import Experiment
from dlopt.config.own_metrics import BUILT_IN
from dlopt.config.rules import check_mode
from dlopt.config.settings_rules import CLASS, MONITORS
from dlopt.data.samples import Dataset
from dlopt.data.task import Task
from dlopt.losses import probabilities
from dlopt.metric_names import lower_is_better
from dlopt.training.multilabel import LABEL_METRICS
from dlopt.training.stopping import Target

Reduce = Callable[[Sequence[float]], Sequence[float]]
"""Sums each entry over ranks (a collective: all ranks call it)."""


# Bounds on the tensors that wait for a flush. Larger ones save little, and evict a small model from the cache.
_MAX_PENDING_STEPS = 128
_MAX_PENDING_OUTPUTS = 1 << 20  # elements: 4 MiB in fp32
_MAX_KEPT_OUTPUTS = 1 << 16  # of a micro-batch; an update has many, and those of a text are large


class Measured(NamedTuple):
    """What the metrics need of a micro-batch, on the device."""

    loss: Tensor  # mean over the samples
    samples: int
    outputs: Tensor | None = None  # None: not needed, or `correct` is known
    targets: Tensor | None = None
    correct: Tensor | None = None  # number of correct predictions

    @staticmethod
    def of_no_samples(loss: Tensor) -> "Measured":
        """A micro-batch of which this rank has no samples: all ranks must reduce the same number of entries."""
        return Measured(torch.zeros_like(loss.detach()), 0)

    def clone(self) -> "Measured":
        outputs, targets, correct = (None if part is None else part.clone() for part in self[2:])
        return Measured(self.loss.clone(), self.samples, outputs, targets, correct)


Measure = Callable[[Tensor, Tensor, Tensor], Measured]
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
        reduce: sums over ranks; None: one process. Each rank adds its own samples of every batch.
    """

    def __init__(
        self, task: Task, on_flush: Callable[[Tensor, Tensor], None] | None = None, reduce: Reduce | None = None
    ) -> None:
        self.task = task
        self.on_flush = on_flush
        self.reduce = reduce
        self._keeps_outputs = task.classes is not None or on_flush is not None
        self.clear()

    def clear(self) -> None:
        """Forgets all samples."""
        self.loss = 0.0
        self.correct = 0
        self.count = 0
        self._pending: list[Measured] = []
        self._max_pending = 0
        self._flushed: list[tuple[Tensor, list[int]]] = []  # (losses and number correct, samples) of many steps
        self._reported = (0.0, 0, 0)

    def measure(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> Measured:
        """Returns what has to be added of a batch: mean loss (scalar), outputs [B, K], targets [B] (or [B, K]:
        probabilities).

        With several predictions per sample: outputs [B, T, K], targets [B, T]. Adds nothing.
        """
        if not self._keeps_outputs:
            return Measured(loss, targets.shape[0])
        if self.on_flush is None and outputs.numel() > _MAX_KEPT_OUTPUTS:
            return Measured(loss, targets.shape[0], correct=_count_correct(outputs, _labels(targets)))
        return Measured(loss, targets.shape[0], outputs, targets)

    def add(self, *measured: Measured) -> None:
        """Adds what `measure` has returned: of a batch, or of each micro-batch of an update."""
        pending = self._pending
        if not pending:
            kept = sum(each.outputs.numel() for each in measured if each.outputs is not None)
            self._max_pending = max(min(_MAX_PENDING_STEPS, _MAX_PENDING_OUTPUTS // max(kept, 1)), 1)
        pending += measured
        if len(pending) >= self._max_pending:
            self._flush()

    def sync(self) -> None:
        """Adds all pending steps to the totals: one device-to-host transfer, and one all-reduce with several ranks."""
        self._flush()
        if not self._flushed:
            return
        flushed, self._flushed = self._flushed, []
        numbers = iter(torch.cat([tensor for tensor, _ in flushed]).tolist())
        losses: list[float] = []  # per step: loss times samples
        correct = count = 0
        for _, counts in flushed:
            losses += [next(numbers) * samples for samples in counts]
            correct += round(next(numbers))
            count += sum(counts)
        if self.reduce is not None:
            # Step by step, since ranks have different numbers of samples in a step; all have the same number of steps.
            *losses, all_correct, all_count = self.reduce([*losses, correct, count])
            correct, count = round(all_correct), round(all_count)
        # A float64 sum in the order of the updates, whatever the interval of logging and checkpoints.
        for loss in losses:  # one by one: a sum of partial sums would depend on when `sync` was called
            self.loss += loss
        self.correct += correct
        self.count += count

    def _flush(self) -> None:
        """Reduces the pending tensors on the device, without synchronization."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        # Concatenating many steps replaces several small kernels per step by several per flush.
        losses = torch.stack([each.loss for each in pending])
        losses = losses.double() if losses.device.type != "mps" else losses  # MPS has no float64
        correct = [each.correct for each in pending if each.correct is not None]
        kept = [(e.outputs, e.targets) for e in pending if e.outputs is not None and e.targets is not None]
        if kept:
            outputs = _concatenated([outputs for outputs, _ in kept])
            if self.task.classes is not None:
                correct.append(_count_correct(outputs, _concatenated([_labels(targets) for _, targets in kept])))
            if self.on_flush is not None:
                self.on_flush(outputs, _concatenated([targets for _, targets in kept]))
        number = torch.stack(correct).sum() if correct else losses.new_zeros(())
        values = torch.cat([losses, number.to(losses.dtype).reshape(1)])
        self._flushed.append((values, [each.samples for each in pending]))

    def means(self, prefix: str) -> dict[str, float]:
        """Returns {prefix}_loss and, for a classifier, {prefix}_accuracy (a fraction) over all samples so far.

        Of a text: {prefix}_token_accuracy, and {prefix}_bits_per_byte or {prefix}_perplexity.
        """
        self.sync()
        metrics = self._means(f"{prefix}_", self.loss, self.correct, self.count)
        derived = self.task.loss_metrics(metrics[f"{prefix}_loss"])
        return metrics | {f"{prefix}_{name}": value for name, value in derived.items()}

    def warn_if_not_finite(self, metrics: Mapping[str, Any], name: str, show: Callable[[str], None]) -> None:
        """Reports a loss that is NaN or infinite, beside which an accuracy looks like that of a usable model."""
        loss = metrics.get(name)
        if loss is not None and not math.isfinite(loss):
            wrong = "" if self.task.classes is None else "; those with NaN count as wrong predictions"
            show(f"warning: {name} is {loss}: the model has outputs that are not finite{wrong}")

    def since_last(self, prefix: str) -> dict[str, float]:
        """Returns {prefix}loss and {prefix}accuracy over the samples since the last call."""
        self.sync()
        loss, correct, count = self._reported
        self._reported = self.loss, self.correct, self.count
        return self._means(prefix, self.loss - loss, self.correct - correct, self.count - count)

    def _means(self, prefix: str, loss: float, correct: int, count: int) -> dict[str, float]:
        metrics = {f"{prefix}loss": loss / count if count else math.nan}  # nan: all updates were skipped
        if self.task.classes is not None:
            metrics[f"{prefix}{self.task.accuracy}"] = correct / (count * self.task.predictions) if count else math.nan
        return metrics

    def state_dict(self) -> dict[str, Any]:
        self.sync()
        loss, correct, count = self._reported
        reported = {"reported_loss": loss, "reported_right": correct, "reported_count": count}
        return {"loss": self.loss, "right": self.correct, "count": self.count, **reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.correct, self.count = state["loss"], state["right"], state["count"]
        # Without these keys, in an older checkpoint, the first report covers only the updates after the resume.
        totals = ("loss", self.loss), ("right", self.correct), ("count", self.count)
        loss, correct, count = (state.get(f"reported_{name}", value) for name, value in totals)
        self._reported = loss, correct, count


def _labels(targets: Tensor) -> Tensor:
    """Returns the labels [B] of targets [B], or [B, K] with probabilities."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def _count_correct(outputs: Tensor, labels: Tensor) -> Tensor:
    return (predicted_classes(outputs) == labels).sum()


def predicted_classes(outputs: Tensor) -> Tensor:
    """Returns the class with the largest of the outputs [..., K]: int64 [...]; -1, no class, where one is NaN."""
    largest, classes = outputs.max(-1)  # NaN where there is one
    return classes.masked_fill(largest.isnan(), -1)


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


BINS = 15  # confidence bins, as in Guo et al. 2017


def confusion_matrix(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts samples by true class (row) and predicted class (column): int64 [classes, classes].

    targets, predictions: int64 [N]; samples without a prediction (-1) are left out.
    """
    pairs = (targets * classes + predictions)[predictions >= 0]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: Tensor, samples: Tensor | None = None) -> Tensor:
    """Returns the accuracy (recall) of each class: float64 [K]; nan for a class without samples.

    `samples`: of each class, if some have no prediction.
    """
    return confusion.diagonal().double() / (confusion.sum(1) if samples is None else samples)


def f1_scores(confusion: Tensor, samples: Tensor | None = None) -> Tensor:
    """Returns 2 TP / (2 TP + FP + FN) of each class: float64 [K]; nan if it neither occurs nor is predicted."""
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + (confusion.sum(1) if samples is None else samples))


def calibration_gaps(
    probabilities: Tensor, targets: Tensor, bins: int = BINS, predictions: Tensor | None = None
) -> Tensor:
    """Returns correct predictions minus the sum of confidences in each bin: float64 [bins].

    probabilities: [N, K]; targets: int64 [N]. `predictions`: int64 [N], of outputs whose probabilities are clamped to
    0..1 and may be equal; None: the most probable classes. NaN probabilities make the error NaN.

    The sum of their absolute values, divided by N, is the expected calibration error (Guo et al. 2017, equation 5): the
    sum over `bins` bins of equal width, by confidence (the largest probability), of the bin's fraction of samples times
    |accuracy - mean confidence|. A bin includes its upper edge.
    """
    predictions = predicted_classes(probabilities) if predictions is None else predictions
    confidence = probabilities.double().amax(1)
    correct = (predictions == targets).double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=correct.device).index_add_(0, bin_of, correct - confidence)


def _columns(values: Tensor) -> Tensor:
    """Returns outputs or targets [N, K], or [N] for K = 1, as float64 [N, K]."""
    return values.reshape(len(values), -1).double()


TOP = 5
_CLASS_METRICS = ("top5_accuracy", "macro_f1", "calibration_error", "class_accuracy")
_VALUE_METRICS = ("r2", "mae")
_METRICS_OF = {"classification": _CLASS_METRICS, "multi-label": LABEL_METRICS, "regression": _VALUE_METRICS}


def extra_metric(monitor: str) -> str | None:
    """Returns the entry of `evaluate.metrics` that the monitored metric requires; None if every run has the metric."""
    if monitor in MONITORS:
        return None
    name = monitor.removeprefix("val_")
    return "class_accuracy" if name == "worst_class_accuracy" or monitor.startswith(CLASS) else name


def extra_metrics(experiment: Experiment, dataset: Dataset, loss: nn.Module) -> "Callable[[], ExtraMetrics] | None":
    """Returns a factory of accumulators for `evaluate.metrics` and the monitored metrics; None if there are none.

    Raises `UserError` for a metric that this run cannot compute.
    """
    classes, task = dataset.classes, dataset.task
    monitors = {"monitor": experiment.settings.monitor}
    own = [f"val_{name}" for name in experiment.own_metrics]
    for key, component in (("stopping", experiment.stopping), ("schedule", experiment.schedule)):
        if "monitor" in component.arguments:
            monitors[f"{key}.monitor"] = component.arguments["monitor"]
    _check_target(experiment, task)
    if monitors["monitor"] == "auto" and not any(monitor in own for monitor in monitors.values()):
        check_mode(_auto(task), experiment.settings.monitor_mode)
    requested: dict[str, str] = {
        name: f"evaluate.metrics={name}" for name in experiment.settings.evaluate.metrics if name in BUILT_IN
    }
    of_loss = [f"val_{name}" for name in task.loss_metrics(0.0)]
    logged = ["auto", "val_loss", *of_loss, *own, *([] if task.classes is None else [f"val_{task.accuracy}"])]
    logged += [] if task.labels is None else [f"val_{name}" for name in LABEL_METRICS]
    for key, monitor in monitors.items():
        if monitor in logged:
            continue
        name = extra_metric(monitor)
        if name is None:
            of_task = (*_VALUE_METRICS,) if task.kind == "regression" else LABEL_METRICS if task.labels else ()
            others = "".join(f", val_{each}" for each in of_task)
            raise UserError(f"{key}={monitor}: a {task.shown_kind} task allows auto, val_loss{others}")
        requested.setdefault(name, f"{key}={monitor}")
    _check_names(requested, task)
    _check_classes(monitors, dataset)
    if not requested or task.labels is not None:  # `LabelMetrics` are those of every evaluation
        return None
    names = list(requested)
    if classes is None:
        origin = None if dataset.val is None else dataset.val.targets[:1]
        return lambda: RegressionMetrics(names, task.outputs, origin)
    return lambda: ClassMetrics(names, classes, lambda outputs: probabilities(outputs, loss))


def _check_target(experiment: Experiment, task: Task) -> None:
    """Raises `UserError` for a target above 1 of an accuracy or another metric with this maximum: a percentage."""
    if experiment.stopping.target is not Target:
        return
    target, monitor = experiment.stopping.arguments["value"], experiment.stopping.arguments["monitor"]
    if monitor == "auto":
        monitor = _auto(task)
    is_own = monitor.removeprefix("val_") in experiment.own_metrics
    if target > 1 and not is_own and not lower_is_better(monitor):
        raise UserError(f"stopping.value={target:g}: {monitor} is at most 1; for {target:g} % set {target / 100:g}")


def _auto(task: Task) -> str:
    return "val_accuracy" if task.kind == "classification" else "val_loss"


def _check_names(requested: Mapping[str, str], task: Task) -> None:
    available = _METRICS_OF.get(task.kind, ())
    for name, setting in requested.items():
        if name not in available:
            raise UserError(f"{setting}: a {task.shown_kind} task has no such metric")
        if name == "top5_accuracy" and task.outputs <= TOP:
            raise UserError(f"{setting}: needs more than {TOP} classes; the data have {task.outputs}")


def _check_classes(monitors: Mapping[str, str], dataset: Dataset) -> None:
    classes, val = dataset.classes, dataset.val
    for key, monitor in monitors.items():
        _, is_class, name = monitor.partition("class_accuracy/")
        if not is_class or classes is None:
            continue
        if name not in classes:
            shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise UserError(f"{key}={monitor}: no class {name}; the classes are {shown}")
        if val is not None and not (val.targets == classes.index(name)).any():
            raise UserError(f"{key}={monitor}: the validation set has no sample of this class")


@dataclass
class ClassMetrics:
    """Accumulates metrics of a classifier: top5_accuracy, macro_f1, calibration_error and class_accuracy.

    class_accuracy expands to class_accuracy/NAME of every class that occurs, and worst_class_accuracy.
    `probabilities` maps outputs [N, K] to class probabilities.
    """

    names: Sequence[str]
    classes: Sequence[str]
    probabilities: Callable[[Tensor], Tensor]
    _sums: Tensor | None = field(default=None, init=False)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds outputs [N, K] and targets int64 [N]."""
        count = len(self.classes)
        predictions = predicted_classes(outputs)
        is_valid = predictions >= 0
        columns = [
            torch.bincount(labels, minlength=count)
            for labels in (targets[predictions == targets], targets, predictions[is_valid])
        ]
        if "top5_accuracy" in self.names:
            hits = (outputs.topk(TOP, dim=1).indices == targets.unsqueeze(1)).any(1) & is_valid
            columns.append(hits.sum().view(1))
        if "calibration_error" in self.names:
            columns.append(calibration_gaps(self.probabilities(outputs), targets, predictions=predictions))
        sums = torch.cat([column.to(columns[-1].dtype) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """Returns the metrics of all samples so far, on all ranks, by name; `reduce`: see `MetricSum`."""
        size = 3 * len(self.classes) + ("top5_accuracy" in self.names)
        size += BINS if "calibration_error" in self.names else 0
        local = [0.0] * size if self._sums is None else self._sums.tolist()  # zeros: this rank had no samples
        sums = torch.tensor(local if reduce is None else list(reduce(local)), dtype=torch.float64)
        correct, true, predicted, rest = sums.split([*[len(self.classes)] * 3, size - 3 * len(self.classes)])
        result = {}
        if "top5_accuracy" in self.names:
            result["top5_accuracy"] = (rest[0] / true.sum()).item()
        if "calibration_error" in self.names:
            result["calibration_error"] = (rest[-BINS:].abs().sum() / true.sum()).item()
        if "macro_f1" in self.names:
            result["macro_f1"] = (2 * correct / (true + predicted)).nanmean().item()
        if "class_accuracy" in self.names:
            accuracies = {
                name: c / n for name, c, n in zip(self.classes, correct.tolist(), true.tolist(), strict=True) if n
            }
            result |= {f"class_accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
            result["worst_class_accuracy"] = min(accuracies.values())
        return result


class RegressionMetrics:
    """Accumulates r2 (-inf for constant targets) and mae of a regression, averaged over its columns.

    `origin`: one of the targets [1, K], the same on all ranks. The variance is computed from the distances to it:
    without it, rounding may leave constant targets a variance of either sign.
    """

    def __init__(self, names: Sequence[str], outputs: int, origin: Tensor | None = None) -> None:
        self.names = names
        self._outputs = outputs
        self._origin = torch.zeros(1, outputs, dtype=torch.float64) if origin is None else _columns(origin).cpu()
        self._sums = torch.zeros(2 + 3 * outputs, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds outputs and targets, each [N, K] or [N]."""
        targets = _columns(targets)
        residual = _columns(outputs) - targets
        targets = targets - self._origin.to(targets.device)
        count = residual.new_full((1,), len(outputs))
        self._sums = self._sums.to(residual.device) + torch.cat(
            [count, residual.abs().sum().view(1), residual.square().sum(0), targets.sum(0), targets.square().sum(0)]
        )

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """See `ClassMetrics.means`."""
        local = self._sums.tolist()
        count, absolute, *rest = local if reduce is None else reduce(local)
        residual, total, squares = torch.tensor(rest, dtype=torch.float64).view(3, self._outputs)
        values = {
            "r2": (1 - residual / (squares - total.square() / count)).mean().item(),
            "mae": absolute / (count * self._outputs),
        }
        return {name: values[name] for name in self.names}


ExtraMetrics = ClassMetrics | RegressionMetrics
"""Accumulates further metrics, which are functions of sums over samples."""
