"""Tasks of the user's own: any loss of a model and a batch, under every optimizer."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dlopt.basics.errors import RunError, UserError
from dlopt.metrics.declaration import Direction
from dlopt.tasks.draws import Draws
from dlopt.tasks.layout import Layout
from dlopt.tasks.task import Names, Task

Model = Callable[..., Any]
"""Calls the model of the run with what the task passes."""
Batch = Any
"""Inputs [B, ...], augmented and normalized, and targets [B, ...], as the data give them; or, of data whose items are
dicts or tuples of tensors, a dict or a tuple of these, stacked [B, ...]."""
Shape = Any
"""Of a sample, a tuple[int, ...]; of data whose items are dicts or tuples of tensors, a dict or a tuple of shapes."""
Values = Mapping[str, float | Tensor]


class UserTask:
    """Base of a task of the user's own: `dlopt train task=mine.Denoise allow_packages=[mine]`.

    The annotated arguments of its constructor are the keys of the group `task`.

    Attributes:
        couples_batch: the loss is no mean over independent samples, for example because it compares the samples of a
            batch with each other. What would split a batch is then refused: accumulation, and several processes.
        values: what `evaluate` returns, with the direction of the better values: {"error": "min"}.
        views: of each sample, augmented independently: above 1, inputs are [B, views, ...].
    """

    couples_batch: ClassVar[bool] = False
    values: ClassVar[Mapping[str, Direction]] = {}
    views: ClassVar[int] = 1

    def model_arguments(self, shape: Shape, classes: int | None) -> dict[str, Any]:
        """Returns `input_shape` and `classes`, the number of outputs, for the model.

        `shape`: of an augmented sample; `classes`: of the data, None for numbers.
        """
        return {"input_shape": shape, "classes": classes or 1}

    def loss(self, model: Model, batch: Batch, draws: Draws) -> Tensor | Mapping[str, Tensor]:
        """Returns the loss of a batch, a number with its graph: the mean over the samples. Or its parts by name: their
        sum is minimized, and each is logged as train_<part>."""
        raise NotImplementedError

    def evaluate(self, model: Model, batches: Iterable[Batch], draws: Draws, split: Literal["val", "test"]) -> Values:
        """Returns `values` of a split; the mean loss is computed in addition.

        Every process calls it with all batches of the split, the model in evaluation mode, without gradients. The draws
        are those of a batch of all samples, equal in every evaluation.
        """
        return {}


@dataclass(frozen=True)
class OwnTask(Task):
    """A `UserTask` in the place of the task of the data."""

    user: UserTask | None = field(default=None, repr=False, compare=False)  # None: of a checkpoint, which has its name
    path: str = ""  # its dotted name
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)  # see `UserTask.model_arguments`
    layout: Layout | None = field(default=None, compare=False)  # of samples of several tensors

    kind: ClassVar = "own"
    title: ClassVar = "Tasks of your own"
    purpose: ClassVar = "outputs"
    calls_model: ClassVar = True
    keeps_outputs: ClassVar = False
    measures_train_accuracy: ClassVar = False

    @classmethod
    def of(
        cls, user: Any, path: str, task: Task, shape: tuple[int, ...], classes: int | None, layout: Layout | None
    ) -> "OwnTask":
        """Returns the task `user` for data with `task`. Raises `UserError` if it is no `UserTask`."""
        if not isinstance(user, UserTask) or type(user).loss is UserTask.loss:
            raise UserError(f"task={path}: must be a class derived from dlopt.extend.UserTask, with a method loss")
        where = f"task={path}: model_arguments"
        try:
            arguments = user.model_arguments(shape if layout is None else layout.shapes, classes)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where} must return a dict, not {type(arguments).__name__}")
        arguments = {"vocabulary": None, **arguments}
        for name in ("input_shape", "classes"):
            if name not in arguments:
                raise UserError(f"{where} must return input_shape and classes; lacks {name}")
        sizes = arguments["input_shape"]
        if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
            what = "input_shape, the shape of what the model reads, as a tuple of integers"
            raise UserError(f"{where} must return {what}, not {sizes}")
        return cls(int(arguments["classes"]), task.white, user, path, arguments, layout)

    @property
    def name(self) -> str:
        return self.path

    @property
    def views(self) -> int:
        return 1 if self.user is None else self.user.views

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.arguments["input_shape"])

    def batch(self, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Batch:
        return (inputs, targets) if self.layout is None else self.layout.unpack(inputs, dtype)

    def own_loss(self, model: Model) -> "TaskLoss":
        return TaskLoss(model, self)

    def own_values(
        self, model: Model, batches: Iterable[Batch], draws: Draws, split: Literal["val", "test"]
    ) -> dict[str, float]:
        assert self.user is not None
        with TaskErrors(self, "evaluate"), torch.no_grad():
            values: Any = self.user.evaluate(model, batches, draws, split)
        where, names = f"task={self.path}: evaluate", [*self.user.values]
        if not isinstance(values, Mapping) or sorted(map(str, values)) != sorted(names):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            expected = ", ".join(names) or "nothing"
            raise RunError(f"{where} returned {found or 'nothing'}; must return {expected} (`values`)")
        checked = {}
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if isinstance(number, bool) or not isinstance(number, numbers.Real):
                shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
                raise RunError(f"{where}: {name} must be a number, not {type(value).__name__}{shape}")
            checked[name] = float(number)
        return checked

    @property
    def normalizes(self) -> bool:
        return self.layout is None  # else rows of bytes

    def model_arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        if self.user is None:
            raise UserError(
                f"checkpoint: its task is {self.path}, which does not say how to predict; `dlopt eval` tests it, and "
                "its weights load with torch"
            )
        return dict(self.arguments)

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        inputs = super().describe(window, targets, classes) if self.layout is None else self.layout
        return f"{inputs}, {self.path}"

    def check_measured(self, init: str) -> None:
        raise UserError(f"{init}: measures the inputs of the model, which task={self.path} makes itself; use another")

    def check_predicts(self, key: str, path: object) -> None:
        raise UserError(f"{key}={path}: its task is {self.path}, which does not say how to predict")

    def accepts(self, shape: tuple[int, ...], window: tuple[int, ...]) -> bool:
        return True


class TaskErrors:
    """Context that turns what the code of a task raises into one line with its name.

    Args:
        where: "its loss", or "evaluate".
        advice: what to do instead, if a setting is the likely cause: ("parallel=fsdp", "use parallel=ddp").
    """

    def __init__(self, task: Task, where: str, advice: tuple[str, str] | None = None) -> None:
        self.task, self.where, self.advice = task, where, advice

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError | RunError | torch.OutOfMemoryError):
            return
        lines = str(error).strip().splitlines()
        raised = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if self.advice is not None:
            key, instead = self.advice
            raise RunError(f"{key}: fails for {self.where} of task={self.task.name} ({raised}); {instead}") from error
        raise RunError(f"task={self.task.name}: {self.where} raised {raised}") from error


class TaskLoss(nn.Module):
    """The loss of a task of the user's own as a module, which a mode wraps and a compiler sees as a whole."""

    def __init__(self, model: Model, task: OwnTask) -> None:
        super().__init__()
        self.model, self.task = model, task
        self._names: tuple[str, ...] | None = None  # of the parts; ("",) for a loss without parts

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Returns the parts of the loss by name; {"": loss} without parts. Raises `RunError` for anything else."""
        assert self.task.user is not None
        loss, of_loss = self.task.user.loss(self.model, batch, draws), f"task={self.task.path}: its loss"
        parts = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        if not parts:
            raise RunError(f"{of_loss} has no parts; return a number, or at least one part")
        for name in parts if isinstance(loss, Mapping) else ():
            if not isinstance(name, str) or not name.isidentifier() or name == "loss":  # logged beside the loss
                what = "use a word of letters, digits and _, except loss"
                raise RunError(f"{of_loss}: {name!r} cannot name a part; {what}")
        for name, value in parts.items():
            where = f"{of_loss}, part {name}," if name else of_loss
            if not isinstance(value, Tensor) or value.ndim:
                found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise RunError(f"{where} is {found}; must be a number, as a tensor without dimensions")
            if not value.is_floating_point():
                dtype = str(value.dtype).removeprefix("torch.")
                raise RunError(f"{where} has the type {dtype}; must be floating-point")
            if value.device.type != draws.device.type:
                raise RunError(f"{where} is on {value.device.type}, the model on {draws.device.type}")
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if trains and not any(value.requires_grad for value in parts.values()):
            raise RunError(f"{of_loss} has no gradient; do not detach it")
        names = tuple(sorted(parts))
        if self._names is None:
            self._names = names
        elif self._names != names:
            now, before = (", ".join(name or "(one number)" for name in each) for each in (names, self._names))
            raise RunError(f"{of_loss} returned the parts {now}, and {before} before; return the same parts each time")
        return parts
