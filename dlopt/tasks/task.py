"""The interface of all tasks, with defaults that suit most of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_count
from dlopt.losses import MSE, probabilities
from dlopt.metrics.declaration import Declaration, Evaluated
from dlopt.metrics.names import VAL_ACCURACY, resolve_monitor
from dlopt.tasks.draws import Draws
from dlopt.tasks.report import TestReport

Average = Literal["probabilities", "logits"]
Names = Sequence[str] | None
"""Of the classes or labels of the data; None for data without."""


@dataclass(frozen=True)
class Task:
    """Base of the tasks: the inputs are normalized samples, and the targets are the labels of the data.

    Args:
        outputs: size of a prediction: the number of classes, labels or values, or of tokens in the vocabulary.
        white: value of a white pixel; 1 for floating-point images whose values are not in 0..255.
    """

    outputs: int
    white: float = 255.0

    kind: ClassVar[str]  # its name in checkpoints and messages
    title: ClassVar[str]  # of its section in the reference
    purpose: ClassVar[str]  # meaning of the model's outputs, for messages
    metrics: ClassVar[Sequence[Declaration]] = ()  # of an evaluation, beside the loss
    accuracy: ClassVar[str | None] = None  # name of the fraction of correct predictions, which every update adds up
    reads_labels: ClassVar[bool] = True  # else the targets are taken from the samples
    calls_model: ClassVar[bool] = False  # the loss calls the model itself, instead of comparing outputs with targets
    keeps_outputs: ClassVar[bool] = True  # a test may hold all outputs, and average those of crops and models
    draws_outputs: ClassVar[bool] = False  # outputs are images, of which a test draws some
    measures_train_accuracy: ClassVar[bool] = True  # default of `evaluate.train_accuracy`

    @property
    def predictions(self) -> int:
        """Of a sample."""
        return 1

    @property
    def tokens(self) -> int | None:
        """Of a sample, in which throughput is measured; None for other samples."""
        return None

    @property
    def views(self) -> int:
        """Independently augmented views of each sample: above 1, inputs are [B, views, ...]."""
        return 1

    @property
    def normalizes(self) -> bool:
        """Whether inputs are numbers to be normalized."""
        return True

    @property
    def monitor(self) -> str:
        """Column that `monitor=auto` follows."""
        return resolve_monitor("auto", {VAL_ACCURACY.column: 1.0} if self.accuracy == VAL_ACCURACY.name else {})

    @property
    def name(self) -> str:
        """The kind in words."""
        return self.kind.replace("_", " ")

    @property
    def saved(self) -> dict[str, Any]:
        """The plain values from which `dlopt.tasks.kinds.restored` rebuilds the task."""
        return {"kind": self.kind, **{each.name: getattr(self, each.name) for each in fields(self) if each.compare}}

    @classmethod
    def of_fields(cls, values: Mapping[str, Any]) -> Self:
        """Returns the task of `saved`."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.compare})

    @classmethod
    def instead_of(cls, task: "Task", shape: tuple[int, ...], choice: str) -> "Task":
        """Returns the task that the component `choice` sets instead of that of the data. Raises `UserError`."""
        return cls(task.outputs, task.white)

    # -- inputs and predictions of the model

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the model's input for samples of `shape`."""
        return shape

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the outputs for an input of `shape`."""
        return (self.outputs,)

    def model_arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns what a model must be given, for inputs of `shape`."""
        return {"input_shape": shape, "classes": self.outputs, "vocabulary": None}

    def check_model(self, choice: str, module: nn.Module) -> None:
        """Raises `UserError` if one of dlopt's models does not read the inputs."""

    def check_inputs(self, *, normalize: str | None, augments: bool) -> None:
        """Raises `UserError` for components that do not fit the inputs: `normalize`, a choice, and an augmentation."""

    def check_measured(self, init: str) -> None:
        """Raises `UserError` if the choice `init`, which measures the inputs, cannot."""

    def split(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (inputs, targets) of samples [B, *shape], augmented but not normalized, and their labels."""
        return samples, labels

    def normalized(
        self,
        inputs: Tensor,
        normalize: nn.Module | None,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        """Returns inputs for the model, normalized, of `dtype`."""
        if not self.normalizes:
            return inputs
        inputs = inputs if normalize is None else normalize(inputs)
        return inputs.to(dtype=dtype, memory_format=memory_format)

    def normalization(self, normalize: nn.Module) -> nn.Module:
        """Returns what `normalized` applies to inputs, without the conversion."""
        return normalize if self.normalizes else nn.Identity()

    def accepts(self, shape: tuple[int, ...], window: tuple[int, ...]) -> bool:
        """Returns whether inputs of `shape` are usual for a model that was trained on inputs of the shape `window`."""
        return shape == window

    def random_inputs(self, size: Sequence[int]) -> Tensor:
        """Draws inputs of the model [B, *shape] on the default device."""
        return torch.randn(*size)

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the data type of the inputs of a model of `dtype`."""
        return dtype

    def random_samples(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws samples [B, *shape] as a data set holds them: bytes of images, else numbers in 0..1."""
        values = torch.randint(256, tuple(size), generator=generator)
        return values.to(torch.uint8) if len(size) == 4 and self.white == 255 else values / 255

    def counted_as(self, shape: tuple[int, ...]) -> str:
        """Returns what a header counts, of samples of `shape`."""
        return "images" if len(shape) == 3 else "samples"

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        """Describes inputs of the shape `window` and the training targets: 15 features, 2 classes: no 70 %, yes 30 %.

        `targets`: as in `dlopt.data.samples.Samples`, values in their own unit.
        """
        return format_count("features", window[0]) if len(window) == 1 else "x".join(map(str, window))

    # -- the loss of a batch

    @property
    def target_arguments(self) -> dict[str, int | None]:
        """What a loss, or an augmentation that mixes targets, must be given."""
        return {"classes": None, "labels": None}

    def balance(self, loss: Mapping[str, Any], targets: Tensor) -> dict[str, Any]:
        """Returns what a loss with these arguments needs of the training `targets`. Raises `UserError`."""
        if loss.get("class_weights") == "balanced":
            raise UserError(f"loss.class_weights=balanced: needs labels, which a {self.name} task has not; use null")
        return {}

    # -- the loss of a task that calls the model itself

    def own_loss(self, model: Callable[..., Any]) -> nn.Module:
        """Returns the loss of (batch, draws), see `dlopt.tasks.user.TaskLoss`; it calls `model`."""
        raise NotImplementedError

    def batch(self, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Any:
        """Returns what the loss reads of a batch; `dtype`: of floating-point entries."""
        return inputs, targets

    def own_values(
        self, model: Callable[..., Any], batches: Iterable[Any], draws: Draws, split: Literal["val", "test"]
    ) -> dict[str, float]:
        """Returns the values of an evaluation, beside the loss, by name. Raises `RunError`."""
        raise NotImplementedError

    # -- evaluations

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """Returns metrics that are functions of the mean loss, by name."""
        return {}

    def values(self, outputs: Tensor, loss: nn.Module) -> Tensor:
        """Returns what outputs [..., K] mean, after training with `loss`: probabilities, or numbers."""
        return outputs

    def predictions_in(self, outputs: Tensor) -> Tensor:
        """Returns the first `outputs` of the outputs [..., K]: a loss of the user's own may need more."""
        return outputs[..., : self.outputs] if outputs.ndim > 1 else outputs

    def evaluated(self, outputs: Tensor, targets: Tensor, loss: nn.Module, origin: Tensor | None = None) -> Evaluated:
        outputs = self.predictions_in(outputs)
        return Evaluated(outputs, targets, self.outputs, lambda outputs: self.values(outputs, loss), origin=origin)

    def class_names(self, classes: Names) -> tuple[str, ...] | None:
        """Returns the names of the predictions; None if they have none."""
        return None if classes is None or not self.reads_labels else tuple(classes)

    def check_metric(self, setting: str, metric: Declaration) -> None:
        """Raises `UserError` if `metric`, one of its own, is not defined for its outputs."""
        if self.outputs < metric.least:
            raise UserError(f"{setting}: needs more than {metric.least - 1} classes; the data have {self.outputs}")

    def computed(self, requested: Sequence[Declaration], *, tests: bool = False) -> list[Declaration]:
        """Returns the metrics that an evaluation computes from its outputs; `tests`: a test."""
        when = ("always", "tested") if tests else ("always",)
        usual = [each for each in self.metrics if each.when in when and each.least <= self.outputs]
        return [each for each in self.metrics if each.needs and (each in usual or each in requested)]

    def report(self, metrics: dict[str, float], part: Evaluated) -> TestReport:
        """Returns the report of a test with these metrics of all samples, on the CPU."""
        return TestReport(metrics, part=part)

    def beside_guessing(
        self, split: Evaluated, training: Tensor, classes: Names, unit: tuple[float, float] = (1.0, 0.0)
    ) -> str:
        """Compares predictions with the usual constant one for the `training` targets; "" for tasks without one.

        `unit`: scale and offset of a target in the unit of the data.
        """
        return ""

    def choose_average(self, average: Average | None, loss: nn.Module, key: str) -> Average:
        """Returns what to average over crops and models, by default for None. Raises `UserError`."""
        if average == "probabilities":
            raise UserError(f"{key}=probabilities: a model trained with a squared error has none; use {key}=logits")
        return "logits"

    # -- predictions of a trained model

    def check_predicts(self, key: str, path: object) -> None:
        """Raises `UserError` if the outputs of the model at `path` are no predictions to be listed."""

    def columns(self, classes: Names) -> list[str]:
        """Returns the titles of the columns of `cells`."""
        return ["value"] if self.outputs == 1 else [f"value_{number}" for number in range(self.outputs)]

    def cells(self, values: Sequence[float], best: int, classes: Names) -> list[str | float]:
        """Returns a prediction, of `values` and the number of the largest output (-1 if one is NaN), as table cells."""
        return [*values]

    def label(self, best: int, classes: Names) -> str | None:
        """Returns the class of a prediction; None if it has none."""
        return None

    def labels_of(self, values: Sequence[float], classes: Names) -> tuple[str, ...]:
        """Returns the labels of a prediction; there may be several."""
        return ()

    # -- other models of the same task

    def mismatch(self, other: "Task") -> str | None:
        """Says how the model of `other` cannot teach one of this task; None if it can."""
        if other.kind != self.kind:
            return f"its task is {other.name}, that of this run is {self.name}"
        if other.outputs != self.outputs:
            return f"has {other.outputs} classes, the data {self.outputs}; use a teacher of the same classes"
        if other.white != self.white:
            return f"its images have values up to {other.white:g}, those of this run up to {self.white:g}"
        return None


class OfClasses(Task):
    """Base of the tasks whose outputs [..., K] are logits of classes."""

    @property
    def target_arguments(self) -> dict[str, int | None]:
        return {"classes": self.outputs, "labels": None}

    def values(self, outputs: Tensor, loss: nn.Module) -> Tensor:
        return probabilities(outputs, loss)

    def choose_average(self, average: Average | None, loss: nn.Module, key: str) -> Average:
        # After a squared error outputs are estimates of probabilities, not logits of them.
        return super().choose_average(average, loss, key) if isinstance(loss, MSE) else average or "probabilities"
