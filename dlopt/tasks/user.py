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
from dlopt.tasks.task import Task

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
    """A `UserTask` in the place of the task of the data.

    Args:
        user: the task; None for that of a checkpoint, which only has its name.
        path: its dotted name.
        arguments: of the model: see `UserTask.model_arguments`.
        layout: of samples of several tensors; None for inputs and targets.
    """

    user: UserTask | None = field(default=None, repr=False, compare=False)
    path: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)
    layout: Layout | None = field(default=None, compare=False)

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
        try:
            arguments = user.model_arguments(shape if layout is None else layout.shapes, classes)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"task={path}: model_arguments raised {type(error).__name__}: {error}") from error
        if not isinstance(arguments, Mapping):
            raise UserError(f"task={path}: model_arguments must return a dict, not {type(arguments).__name__}")
        arguments = {"vocabulary": None, **arguments}
        missing = [name for name in ("input_shape", "classes") if name not in arguments]
        if missing:
            raise UserError(f"task={path}: model_arguments must return input_shape and classes; lacks {missing[0]}")
        sizes = arguments["input_shape"]
        if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
            raise UserError(
                f"task={path}: model_arguments must return input_shape, the shape of what the model reads, as a tuple "
                f"of integers, not {sizes}"
            )
        return cls(int(arguments["classes"]), task.white, user, path, arguments, layout)

    @classmethod
    def of_fields(cls, values: Mapping[str, Any]) -> "OwnTask":
        return cls(values["outputs"], values["white"], path=values["path"])

    @property
    def name(self) -> str:
        return self.path

    @property
    def views(self) -> int:
        return 1 if self.user is None else self.user.views

    @property
    def saved(self) -> dict[str, Any]:
        return {"kind": self.kind, "outputs": self.outputs, "white": self.white, "path": self.path}

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

    def normalized(
        self,
        inputs: Tensor,
        normalize: nn.Module | None,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        if self.layout is not None:  # rows of bytes
            return inputs
        return super().normalized(inputs, normalize, dtype, memory_format)

    def model_arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        if self.user is None:
            raise UserError(
                f"checkpoint: its task is {self.path}, which does not say how to predict; `dlopt eval` tests it, and "
                "its weights load with torch"
            )
        return dict(self.arguments)

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Sequence[str] | None) -> str:
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
        self.task = task
        self.where = where
        self.advice = advice

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, UserError | RunError | torch.OutOfMemoryError):
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
        self.model = model
        self.task = task
        self._names: tuple[str, ...] | None = None  # of the parts; ("",) for a loss without parts

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Returns the parts of the loss by name; {"": loss} without parts. Raises `RunError` for anything else."""
        assert self.task.user is not None
        loss = self.task.user.loss(self.model, batch, draws)
        parts = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        if isinstance(loss, Mapping):
            check_names(f"task={self.task.path}: its loss", parts)
        for name, value in parts.items():
            self._check(name, value, draws.device)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if trains and not any(value.requires_grad for value in parts.values()):
            raise RunError(f"task={self.task.path}: its loss has no gradient; do not detach it")
        names = tuple(sorted(parts))
        if self._names is None:
            self._names = names
        elif self._names != names:
            raise RunError(
                f"task={self.task.path}: its loss returned the parts {_listed(names)}, and {_listed(self._names)} "
                "before; return the same parts each time"
            )
        return parts

    def _check(self, name: str, value: Any, device: torch.device) -> None:
        where = f"task={self.task.path}: its loss" + (f", part {name}," if name else "")
        if not isinstance(value, Tensor) or value.ndim:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RunError(f"{where} is {found}; must be a number, as a tensor without dimensions")
        if not value.is_floating_point():
            raise RunError(f"{where} has the type {str(value.dtype).removeprefix('torch.')}; must be floating-point")
        if value.device.type != device.type:
            raise RunError(f"{where} is on {value.device.type}, the model on {device.type}")


def check_names(where: str, names: Iterable[Any]) -> None:
    """Raises `RunError` for parts of a loss without names that can be logged beside the loss."""
    names = list(names)
    if not names:
        raise RunError(f"{where} has no parts; return a number, or at least one part")
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name == "loss":
            raise RunError(f"{where}: {name!r} cannot name a part; use a word of letters, digits and _, except loss")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "(one number)" for name in names)
