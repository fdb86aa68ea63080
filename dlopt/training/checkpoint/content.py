"""The content of a checkpoint, by name. Only this module and `Trainer`, which writes the file, know its keys."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NotRequired, cast

import torch
from pydantic import AfterValidator, ConfigDict, Field, StrictInt, StrictStr, TypeAdapter, ValidationError, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from dlopt.adapt import merged
from dlopt.basics.errors import UserError
from dlopt.basics.formats import printable
from dlopt.basics.length import BatchCount, EpochCount, Length, SampleCount, UpdateCount
from dlopt.basics.plain_values import check_plain, join
from dlopt.data.tables.columns import FeatureColumns
from dlopt.metrics.names import Direction
from dlopt.tasks.kinds import restored
from dlopt.tasks.task import Task
from dlopt.tracking.metrics import read_metrics


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint. `state`: the content of its file, as returned by `Trainer.state_dict`."""

    state: Mapping[str, Any]

    @property
    def _content(self) -> "_Whole":
        return cast("_Whole", self.state)

    @property
    def config(self) -> Mapping[str, Any]:
        """The saved config of the run."""
        return self._content["config"]

    @property
    def run_id(self) -> str | None:
        """See `RunFolder.run_id`; None for a trainer that is in no run."""
        return self.config.get("run_id")

    def with_run_id(
        self, run_id: str | None, config: Mapping[str, Any] | None = None, horizon: int | None = None
    ) -> dict[str, Any]:
        """Returns the state as one of another run. `config` and `horizon` are those of that run; None: the same."""
        saved = self.config if config is None else config
        length = {**self._progress["length"], "horizon": horizon} if horizon is not None else None
        progress = self._progress if length is None else {**self._progress, "length": length}
        return {**self.state, "config": {**saved, "run_id": run_id}, "progress": progress}

    # -- weights, and state dicts by their owner

    @property
    def model(self) -> dict[str, Tensor]:
        """The trained weights and buffers."""
        return self._content["model"]

    @property
    def evaluated_weights(self) -> dict[str, Tensor]:
        """The weights that the run evaluated (the average, if there is one), for a model with adapters."""
        return self._content["ema"] or self.model

    @property
    def merged_weights(self) -> dict[str, Tensor]:
        """The evaluated weights with adapters merged into their layers, for a model without adapters.

        Merged weights are at least float32, even if the checkpoint's are bf16.
        """
        return merged(self.evaluated_weights)

    @property
    def optimizer(self) -> dict[str, Any]:
        return self._content["optimizer"]

    @property
    def schedule(self) -> dict[str, Any]:
        return self._content["schedule"]

    @property
    def normalize(self) -> Mapping[str, Any]:
        return self._content["normalize"]

    # -- progress

    @property
    def _progress(self) -> "_Progress":
        return self._content["progress"]

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return int(self._progress["epoch"])

    @property
    def position(self) -> BatchCount:
        """Completed batches of the current epoch."""
        return BatchCount(self._progress["position"])

    @property
    def step(self) -> UpdateCount:
        """Completed updates."""
        return UpdateCount(self._progress["step"])

    @property
    def seconds(self) -> float:
        """Training time."""
        return float(self._progress["seconds"])

    @property
    def length(self) -> Length:
        """The length of the run; of one of an earlier version, what `with_length` knows."""
        return Length.restored(self._progress["length"])

    @property
    def found_lr(self) -> float | None:
        """The learning rate of a range test; None if there was none."""
        return self._progress["found_lr"]

    @property
    def evaluated_epoch(self) -> EpochCount:
        """The latest evaluated epoch, a fraction within an epoch."""
        return EpochCount(self._progress["evaluated"])

    @property
    def best_epoch(self) -> float | None:
        """The epoch of the best evaluation; None if there was none."""
        return self._progress["best"]["epoch"]

    # -- data

    @property
    def data(self) -> Mapping[str, Any]:
        """The result of `data_spec` (builders/workload.py)."""
        return self._progress["data"]

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """The identity of the data, see `dlopt.data.identity`; None if not known."""
        return self._progress["data"]["identity"]

    @property
    def task(self) -> Task:
        return restored(self.data["task"])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels; None if the task has none."""
        classes = self.data["classes"]
        return None if classes is None else tuple(classes)

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return tuple(self.data["sample"])

    @property
    def window(self) -> tuple[int, ...]:
        """Shape of the model's input: a centre crop of the sample."""
        return tuple(self.data["window"])

    @property
    def tokenizer(self) -> str | None:
        """The content of tokenizer.json; None without text, and for text that is read byte by byte."""
        return self.data.get("tokenizer")

    @property
    def columns(self) -> FeatureColumns | None:
        """The columns of the table whose rows are the samples; None for other data."""
        saved = self.data.get("columns")
        return None if saved is None else FeatureColumns.restored(saved)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ValueError("is not a dense tensor")
    return tensor


def _plain(value: Any) -> Any:
    check_plain(value)
    return value


def _columns(value: Any) -> Any:
    try:
        FeatureColumns.restored(_plain(value))
    except (KeyError, TypeError) as error:
        raise ValueError(f"describes no columns: {error}") from None
    return value


def _length(value: Any) -> Any:
    try:
        Length.restored(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"describes no length: {error}") from None
    return value


_Count = Annotated[StrictInt, Field(ge=0, le=2**53)]
_Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Float = Annotated[float, Field(strict=True)]
_Tensors = dict[StrictStr, Annotated[Tensor, AfterValidator(_dense)]]
_Shape = list[Annotated[StrictInt, Field(ge=1, le=2**31)]]
_State = dict[Any, Any]  # checked by its owner on loading


class _Data(TypedDict):
    classes: list[StrictStr] | None
    task: Task
    sample: _Shape
    window: _Shape
    tokenizer: NotRequired[StrictStr]
    columns: NotRequired[Annotated[dict[StrictStr, Any], AfterValidator(_columns)]]
    identity: Annotated[dict[StrictStr, Any], AfterValidator(_plain)] | None


class _Best(TypedDict):
    epoch: _Number | None
    monitor: StrictStr
    value: _Float
    val_loss: _Float | None
    val_accuracy: _Float | None
    direction: Direction | None
    others: NotRequired[dict[StrictStr, _Float]]
    on_sets: NotRequired[dict[StrictStr, _Float]]  # of earlier versions


class _Progress(TypedDict):
    epoch: _Count
    position: _Count
    step: _Count
    seconds: _Number
    samples: NotRequired[_Count | None]
    evaluated_samples: NotRequired[_Count | None]
    peak_memory: NotRequired[_Count]
    length: NotRequired[Annotated[dict[StrictStr, _Count | list[_Count]], AfterValidator(_length)]]
    horizon: NotRequired[_Count]  # these two instead of `length`: of earlier versions
    steps_per_epoch: NotRequired[_Count]
    resumed_from: list[_Count]
    found_lr: _Number | None
    evaluated: _Number
    best: _Best
    data: _Data


class _Outline(TypedDict):
    progress: _Progress
    config: Annotated[dict[StrictStr, Any], AfterValidator(_plain)]


@with_config(ConfigDict(arbitrary_types_allowed=True))
class _Whole(_Outline):
    model: _Tensors
    optimizer: _State
    schedule: _State
    ema: _Tensors | None
    rng: _State
    normalize: _Tensors


KEYS = {"format", *_Whole.__required_keys__}  # a sharded checkpoint also has the key "shards"
_outline, _whole = TypeAdapter(_Outline), TypeAdapter(_Whole)


def damage(state: Mapping[str, Any], *, whole: bool = True) -> str | None:
    """Returns the first type error in the content of a checkpoint file; None if there is none.

    A matching checksum shows that the file has not changed, not who wrote it. With `whole` false, checks only the
    progress and the config, as needed before the shards are loaded.
    """
    try:
        (_whole if whole else _outline).validate_python(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = printable(".".join(map(str, first["loc"])))
        return f"{key[:80]}: {first['msg'].removeprefix('Value error, ')}"
    return None if state["progress"].keys() & {"length", "horizon"} else "progress.length: Field required"


def with_length(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the content of the checkpoint `path` with the length of its run, which earlier versions do not say.

    Of their samples nothing is known (0), nor how a batch grew, and without a whole epoch in metrics.jsonl nothing of
    the batches of an epoch (0).
    """
    progress = state["progress"]
    if "length" in progress:
        return dict(state)
    per_epoch, has_steps = progress.get("steps_per_epoch", 0), state["config"].get("steps") is not None
    for line in read_metrics(path.parent.parent):
        epoch, step = line.get("epoch"), line.get("step")
        is_whole = not has_steps or (type(step) is int and step < progress["step"])  # steps=N may have ended an epoch
        if not per_epoch and is_whole and type(epoch) is type(step) is int and epoch > 0 and step % epoch == 0:
            per_epoch = step // epoch
    updates, horizon, unknown = UpdateCount(progress["step"]), BatchCount(progress["horizon"]), SampleCount(0)
    length = Length(updates, horizon, BatchCount(per_epoch), unknown, unknown)
    return {**state, "progress": {**progress, "length": length.state_dict()}}


_READABLE = {
    Tensor, nn.Parameter, NoneType, bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype,
    torch.device,
}  # fmt: skip


def unreadable(value: Any, key: str = "") -> str | None:
    """Returns which value in the content of a checkpoint `torch.load(weights_only=True)` would refuse, or None.

    Call before writing: a user's component may have any state, such as quantized tensors of a class of its own, and a
    value that cannot be read again is lost.
    """
    if type(value) in _READABLE:
        return None
    if type(value) in (dict, OrderedDict):
        items = [(join(key, str(name)), item) for name, item in value.items()]
    elif type(value) in (list, tuple, set):
        items = [(join(key, str(i)), item) for i, item in enumerate(value)]
    else:
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return f"{key} has the type {path}, which cannot be read again; use plain tensors, numbers and lists of Python"
    return next((found for name, item in items if (found := unreadable(item, name))), None)


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Turns an error in the block, which loads parts of the checkpoint `name`, into a `UserError` about it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = printable(": ".join(lines[:2]))[:300]
        raise UserError(f"{name}: its content does not fit its config: {type(error).__name__}: {reason}") from error


def is_checkpoint(content: object) -> bool:
    """Returns whether the content of a file of torch.save is a checkpoint of dlopt."""
    return isinstance(content, Mapping) and {"format", "model", "progress"} <= content.keys()
