"""`dlopt summary`: prints the layers of a model with shapes, parameters, MACs and memory."""

import math
from typing import TYPE_CHECKING, Annotated

from dlopt.command_line.line import Line, on_experiment, read_dataset
from dlopt.command_line.reads import RECIPE
from dlopt.errors import DONE, UserError
from dlopt.formats import format_bytes
from dlopt.ranges import Count
from dlopt.tracking.layout import plain_table, show_table

if TYPE_CHECKING:
    from dlopt.config.experiment import Experiment
    from dlopt.data.task import Task
    from dlopt.instruments.model_summary import ModelSummary

_READS = ("model", "data", "augmentation", "precision", *RECIPE)
USAGE = """\
Print the layers of a model

Usage: dlopt summary model=CHOICE [key=value]

Examples:
  dlopt summary model=resnet56
  dlopt summary model=resnet50 model.stem=imagenet input_shape=[3,224,224] classes=1000
  dlopt summary model=gpt2_small input_shape=[1024] vocabulary=50257

Counts multiply-accumulates (MACs, two FLOPs each) of convolutions, matrix products and attention per sample. Uses meta
tensors, without computation or memory: models may have any size.

  {summary}
and these keys of `dlopt train`:
    {_READS}
"""

_UNKNOWN_BATCH = 2  # data.batch_size=full without data; batch norm does not support a batch of one


@on_experiment("summary", _READS, several="summary shows one model at a time", one=True)
def summary(
    line: Line,
    *,
    input_shape: Annotated[
        list[Count] | None, "[C,H,W]: shape of the input; requires classes or vocabulary (default: of the data set)"
    ] = None,
    classes: Annotated[Count | None, "N: number of outputs; requires input_shape (default: of the data set)"] = None,
    vocabulary: Annotated[
        Count | None, "N: number of tokens of a text; requires input_shape=[TOKENS] (default: of the data set)"
    ] = None,
) -> int:
    """Prints the table. Raises `UserError`."""
    experiment, choices = line.experiment()  # before torch is imported: it checks the values of the line
    from dlopt.data.task import Task

    if classes is not None and vocabulary is not None:
        raise UserError(f"classes={classes}, vocabulary={vocabulary}: set one of them")
    outputs = classes if vocabulary is None else vocabulary
    if (input_shape is None) != (outputs is None):
        missing = "classes=N or vocabulary=N" if outputs is None else "input_shape=[C,H,W]"
        raise UserError(f"input_shape, classes: need each other; add {missing}, or omit both to use the data set")
    if input_shape is None or outputs is None:
        shape, task, samples = _sizes(experiment)
    else:
        shape, task = tuple(input_shape), Task("classification" if vocabulary is None else "next_token", outputs)
        samples = None
    _print(choices.get("model", "model"), shape, _summarize(experiment, shape, task, samples))
    return DONE


def _sizes(experiment: "Experiment") -> tuple[tuple[int, ...], "Task", int]:
    """Reads the shape of the model's input, the task, and the number of training samples from the data set."""
    from dlopt.training.build import with_task

    dataset = read_dataset(experiment)
    shape = dataset.train.shape
    if experiment.augmentation.arguments.get("operations") != []:
        classes = dataset.task.classes
        pipeline = experiment.augmentation.build(input_shape=shape, classes=classes, train=dataset.train)
        shape = pipeline.output_shape
    task = with_task(experiment, dataset, shape).task
    return task.input_shape(shape), task, len(dataset.train)


def _summarize(experiment: "Experiment", shape: tuple[int, ...], task: "Task", samples: int | None) -> "ModelSummary":
    import torch

    from dlopt.instruments.model_summary import summarize
    from dlopt.training.build import model_arguments
    from dlopt.training.model_check import model_on_meta
    from dlopt.training.precision import Precision

    batch_size = experiment.data_settings.batch_size
    batch = _UNKNOWN_BATCH if samples is None else samples
    if batch_size != "full":
        batch = batch_size if samples is None else min(batch_size, samples)
    dtype = Precision(experiment.settings.precision, torch.device("meta")).dtype
    module = model_on_meta(experiment.model, model_arguments(task, shape)).to(dtype)
    input_dtype = dtype if task.vocabulary is None else torch.int64
    try:
        return summarize(module, torch.empty(batch, *shape, device="meta", dtype=input_dtype))
    except ValueError as error:
        raise UserError(f"data.batch_size={batch}: the model does not support this size: {error}") from None
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"input_shape={list(shape)}: the model does not support this shape: {reason}") from None


def _print(name: str, shape: tuple[int, ...], summary: "ModelSummary") -> None:
    table = plain_table(left=["layer", "kind"], right=["output", "parameters", "MACs"])
    for layer in summary.layers:
        if layer.kind not in ("Identity", "Dropout") or layer.parameters:
            output = "x".join(map(str, layer.output))
            numbers = (f"{number:,}" if number else "" for number in (layer.parameters, layer.macs))
            table.add_row(layer.name, layer.kind, output, *numbers)
    show_table(table)
    frozen = summary.parameters - summary.trainable
    lines = {
        "model": f"{name}, input {'x'.join(map(str, shape))}",
        "parameters": f"{summary.parameters:,}" + (f" ({frozen:,} frozen)" if frozen else ""),
        "forward": f"{_scaled(summary.forward_macs)}MACs per sample",
        "forward and backward": f"{_scaled(summary.update_flops)}FLOPs per sample",
        "weights": f"{format_bytes(summary.parameter_bytes)}, buffers {format_bytes(summary.buffer_bytes)}",
        "activations for backward": f"{format_bytes(summary.activation_bytes)}, batch size {summary.batch}",
    }
    for key, value in lines.items():
        print(f"{key}: {value}")


def _scaled(number: float) -> str:
    if number < 1000:
        return f"{number:g} "
    power = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
