"""Chooses a decision on the validation set: the temperature of the probabilities, and the threshold of two classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.folders import FORMAT
from dlopt.basics.formats import format_number, format_percent
from dlopt.losses import MSE
from dlopt.metrics.accumulators import Sums
from dlopt.metrics.classes import BY_CLASS, METRICS
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.thresholds import Thresholds
from dlopt.tasks.classification import Classification
from dlopt.tasks.task import Task
from dlopt.trained.decision import MOST_PROBABLE, Decision, Metrics, least_recall
from dlopt.training.builders.workload import Workload

_POSITIVE: Literal[1] = 1  # of two classes the second, as in scikit-learn


def obstacle(task: Task, loss: nn.Module, *, has_threshold: bool) -> str | None:
    """Returns why a model has no decision, a temperature or also a threshold; None if it may have one."""
    if not isinstance(task, Classification):
        return f"only a classification has a decision, not a task of the kind {task.name}"
    if isinstance(loss, MSE):
        return "the model was trained with a squared error, whose outputs are no logits; train with loss=cross_entropy"
    if has_threshold and (classes := task.outputs) != 2:
        return f"needs two classes, the data have {classes}; use threshold={MOST_PROBABLE}, which fits a temperature"
    return None


def refuse(rule: str, workload: Workload) -> None:
    """Raises `UserError` if no decision can be chosen for a model, or reported, on its data."""
    dataset, data = workload.dataset, workload.run_config.data.choice
    reason = obstacle(workload.task, workload.loss, has_threshold=rule != MOST_PROBABLE)
    if reason is None and dataset.val is None:
        reason = f"is chosen on the validation set, which {data} lacks; train with data.val_split=0.1"
    if reason is None and dataset.test is None:
        reason = f"needs a test set to report on, which {data} lacks; train with data.test_split=0.2"
    if reason is None and workload.run_config.settings.norm_statistics != "running":
        reason = "`predict` and `export` use the running statistics of batch norm; add norm_statistics=running"
    if reason is not None:
        raise UserError(f"threshold={rule}: {reason}")


def choose(
    rule: str, checkpoint: Path, sha256: str, validation: Evaluated, test: Evaluated, classes: Sequence[str]
) -> Decision:
    """Chooses a decision for the checkpoint on the validation set, and measures it on the test set.

    `validation`, `test`: all samples, on the CPU. Raises `UserError` if the validation set permits no choice.
    """
    outputs, targets = validation.outputs.double(), validation.targets
    if not outputs.isfinite().all():
        raise UserError(f"threshold={rule}: the model has NaN or infinite outputs on the validation set")
    divisor = temperature(outputs, targets) or 1.0
    found = Decision(FORMAT, checkpoint.name, sha256, rule, divisor, len(targets))
    if rule != MOST_PROBABLE:
        found = replace(found, positive=_POSITIVE, positive_class=classes[_POSITIVE])
        is_positive = targets == _POSITIVE
        if not is_positive.any():
            raise UserError(f"threshold={rule}: the validation set has no sample of the class {classes[_POSITIVE]}")
        scores = found.positive_probability(outputs)
        found = replace(found, threshold=threshold(scores, is_positive, least_recall(rule)))
    return replace(
        found,
        validation=_metrics(validation, found, found.positive),
        test_before=_metrics(test, None, found.positive),
        test_after=_metrics(test, found, found.positive),
    )


def temperature(outputs: Tensor, targets: Tensor) -> float | None:
    """Returns the T that minimizes the mean of -log softmax(outputs / T)_y: Guo et al. 2017, section 4.2.

    outputs: float64 [N, K], finite; targets: int64 [N]. None without a finite minimum above 0: if the classes of all
    samples have the largest outputs, or on average none larger than others.
    """
    from scipy.optimize import brentq  # which predictions do not need

    true = outputs.gather(1, targets.unsqueeze(1)).squeeze(1)

    def slope(scale: float) -> float:
        """The derivative by 1/T, of which the loss is a convex function: the derivative increases."""
        return ((outputs * scale).softmax(1).mul(outputs).sum(1) - true).mean().item()

    if slope(0.0) >= 0 or bool((true == outputs.amax(1)).all()):
        return None
    low = high = 1.0
    while slope(low) > 0:
        low /= 2
    while slope(high) < 0:
        high *= 2
    return 1 / float(brentq(slope, low, high, xtol=1e-12 * low, rtol=1e-12))


def threshold(scores: Tensor, truth: Tensor, recall: float | None) -> float:
    """Returns the threshold of the largest F1, or the largest one with at least this recall.

    scores: probabilities [N]; truth: bool [N], some true. Returns the middle between the least score that counts as
    positive and the next one below: another batch size or machine rounds scores otherwise, which changes no prediction
    as long as none is at the threshold.
    """
    found = Thresholds.of(scores, truth)
    # The first one of several: the largest.
    index = int(found.f1.argmax() if recall is None else (found.recall >= recall).nonzero()[0])
    least, below = [*found.scores[index : index + 2].tolist(), 0.0][:2]
    middle = (least + below) / 2
    return middle if middle > below else least  # adjacent floats have none between them


def _metrics(part: Evaluated, decision: Decision | None, positive: int | None) -> Metrics:
    """Returns the metrics by which a decision is judged; those of the positive class if there is one."""
    calibrated = decided = part
    if decision is not None:
        calibrated = replace(part, outputs=decision.scaled(part.outputs), results={})
        decided = replace(part, predicted=decision.predicted, results={})
    found: Metrics = {"accuracy": (decided.predictions == part.targets).double().mean().item()}
    if positive is not None:
        by_class = BY_CLASS.on(decided)
        columns = {"precision": by_class.precision, "recall": by_class.recall, "f1": by_class.f1}
        found |= {name: column[positive].item() for name, column in columns.items()}
    # The calibration compares the probability of the most probable class, whatever the threshold is.
    scores = [each for each in METRICS if each.name in ("log_loss", "calibration_error")]
    sums = Sums(scores, lambda outputs, targets: calibrated, part.size)
    sums.add(part.outputs, part.targets)
    return found | sums.means(None)


def lines(decision: Decision) -> list[str]:
    """Describes a decision, and what it changes on the test set."""
    of = "" if decision.positive is None else f" of {decision.positive_class}"
    titles = {"precision": f"precision{of}", "recall": f"recall{of}", "f1": f"F1{of}"}
    found = [f"decision: {decision.text}"]
    if decision.temperature == 1:
        found.append("temperature 1: the log loss of the validation set has no minimum at a finite one above 0")
    found.append("on the test set, before -> after:")
    for name, after in decision.test_after.items():
        show = format_percent if name in ("accuracy", "precision", "recall") else format_number
        title = titles.get(name, name.replace("_", " "))
        found.append(f"  {title}: {show(decision.test_before[name])} -> {show(after)}")
    return found
