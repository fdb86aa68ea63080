"""Figures of a validation besides loss and accuracy: which are wanted, and their sums over samples.

What several processes counted of their parts adds up.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dlopt.config.experiment import Experiment
from dlopt.config.rules import further_figure
from dlopt.data.samples import Dataset
from dlopt.engine.evaluate import Figures
from dlopt.engine.metrics import Reduce
from dlopt.errors import UserError
from dlopt.evaluation import figures
from dlopt.losses import probabilities

TOP = 5
_OF_CLASSES = ("top5_accuracy", "macro_f1", "calibration_error", "class_accuracy")


def further_figures(experiment: Experiment, dataset: Dataset, loss: nn.Module) -> Callable[[], Figures] | None:
    """Makes the counter of one validation for what `evaluate.figures` lists and what is monitored; None: nothing more.

    Raises `UserError` for a figure that this run does not have.
    """
    classes = dataset.classes
    monitors = {"monitor": experiment.settings.monitor}
    for key, component in (("stopping", experiment.stopping), ("schedule", experiment.schedule)):
        if "monitor" in component.arguments:
            monitors[f"{key}.monitor"] = component.arguments["monitor"]
    wanted: dict[str, str] = {name: f"evaluate.figures={name}" for name in experiment.settings.evaluate.figures}
    for key, monitor in monitors.items():
        name = further_figure(monitor)
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
        return lambda: RegressionFigures(names, dataset.outputs)
    return lambda: ClassFigures(names, classes, lambda outputs: probabilities(outputs, loss))


def _check_names(wanted: Mapping[str, str], classes: Sequence[str] | None) -> None:
    for name, typed in wanted.items():
        if (name in _OF_CLASSES) != (classes is not None):
            kind = "regression" if classes is None else "classification"
            raise UserError(f"{typed}: a {kind} has no such figure")
        if name == "top5_accuracy" and classes is not None and len(classes) <= TOP:
            raise UserError(f"{typed}: with {len(classes)} classes the right one is always among the first {TOP}")


def _check_classes(monitors: Mapping[str, str], classes: Sequence[str] | None) -> None:
    for key, monitor in monitors.items():
        _, is_class, name = monitor.partition("class_accuracy/")
        if is_class and classes is not None and name not in classes:
            shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise UserError(f"{key}={monitor}: there is no class {name}; the classes are {shown}")


class ClassFigures:
    """Figures of a classification by name: top5_accuracy, macro_f1, calibration_error, and class_accuracy, which stands
    for class_accuracy/NAME of every class that occurs and worst_class_accuracy.
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
            columns.append(figures.calibration_gaps(self._probabilities(outputs), targets))
        sums = torch.cat([column.to(columns[-1].dtype) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """The figures of all samples so far; `reduce`: see `dlopt.engine.metrics.Sums`."""
        size = 3 * len(self.classes) + ("top5_accuracy" in self.names)
        size += figures.BINS if "calibration_error" in self.names else 0
        own = [0.0] * size if self._sums is None else self._sums.tolist()
        numbers = torch.tensor(own if reduce is None else list(reduce(own)), dtype=torch.float64)
        right, true, predicted, rest = numbers.split([*[len(self.classes)] * 3, size - 3 * len(self.classes)])
        result = {}
        if "top5_accuracy" in self.names:
            result["top5_accuracy"] = (rest[0] / true.sum()).item()
        if "calibration_error" in self.names:
            result["calibration_error"] = (rest[-figures.BINS :].abs().sum() / true.sum()).item()
        if "macro_f1" in self.names:
            result["macro_f1"] = (2 * right / (true + predicted)).nanmean().item()
        if "class_accuracy" in self.names:
            accuracies = {
                name: r / n for name, r, n in zip(self.classes, right.tolist(), true.tolist(), strict=True) if n
            }
            result |= {f"class_accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
            result["worst_class_accuracy"] = min(accuracies.values())
        return result


class RegressionFigures:
    """r2 and mae of a regression (`dlopt.evaluation.figures`) with so many `outputs`, by name."""

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
        """See `ClassFigures.means`."""
        own = self._sums.tolist()
        count, absolute, *rest = own if reduce is None else reduce(own)
        residual, total, squares = torch.tensor(rest, dtype=torch.float64).view(3, self._outputs)
        every = {
            "r2": (1 - residual / (squares - total.square() / count)).mean().item(),
            "mae": absolute / (count * self._outputs),
        }
        return {name: every[name] for name in self.names}
