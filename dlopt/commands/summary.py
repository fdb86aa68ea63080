"""`dlopt summary`: prints the layers of a model with shapes, parameters, MACs and memory."""

import math
from typing import TYPE_CHECKING

from dlopt.commands.command import Line, on_experiment, read_dataset
from dlopt.errors import DONE, UserError
from dlopt.ranges import Count
from dlopt.tracking.layout import format_bytes

if TYPE_CHECKING:
    from dlopt.analysis.model_summary import ModelSummary
    from dlopt.config.experiment import Experiment

USAGE = """\
Print the layers of a model

Usage: dlopt summary model=CHOICE [key=value]

Examples:
  dlopt summary model=resnet56
  dlopt summary model=resnet50 model.stem=imagenet input_shape=[3,224,224] classes=1000

Counts multiply-accumulates (MACs, two FLOPs each) of convolutions, matrix products and attention per sample. Uses meta
tensors, without computation or memory: models may have any size.

  input_shape=[C,H,W]   shape of a sample; requires classes=N (default: null, from the data set)
  classes=N             number of outputs; requires input_shape (default: null, from the data set)
  and the keys of `dlopt train`
"""


@on_experiment(USAGE, several="summary shows one model at a time", one=True)
def summary(line: Line, *, input_shape: list[Count] | None = None, classes: Count | None = None) -> int:
    """Prints the table. Raises `UserError`."""
    experiment, choices = line.experiment()
    if (input_shape is None) != (classes is None):
        missing = "classes=N" if classes is None else "input_shape=[C,H,W]"
        raise UserError(f"input_shape, classes: need each other; add {missing}, or omit both to use the data set")
    if input_shape is None or classes is None:
        shape, outputs = _sizes(experiment)
    else:
        shape, outputs = tuple(input_shape), classes
    _print(choices.get("model", "model"), shape, _summarize(experiment, shape, outputs))
    return DONE


def _sizes(experiment: "Experiment") -> tuple[tuple[int, ...], int]:
    """Reads the shape of an augmented sample and the number of outputs from the data set."""
    dataset = read_dataset(experiment)
    if experiment.augmentation.arguments.get("operations") == []:
        return dataset.train.shape, dataset.outputs
    classes = None if dataset.classes is None else len(dataset.classes)
    pipeline = experiment.augmentation.build(input_shape=dataset.train.shape, classes=classes, train=dataset.train)
    return pipeline.output_shape, dataset.outputs


def _summarize(experiment: "Experiment", shape: tuple[int, ...], classes: int) -> "ModelSummary":
    import torch

    from dlopt.analysis.model_summary import summarize
    from dlopt.training.model_check import check_memory

    batch_size = experiment.data_settings.batch_size
    batch = batch_size if isinstance(batch_size, int) else 1
    dtype = torch.float64 if experiment.settings.precision == "fp64" else torch.float32
    check_memory(experiment.model, {"input_shape": shape, "classes": classes}, has_gradients=False)
    module = experiment.model.build(input_shape=shape, classes=classes)
    try:
        return summarize(module.to("meta", dtype), torch.empty(batch, *shape, device="meta", dtype=dtype))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"input_shape={list(shape)}: the model does not support this shape: {reason}") from None


def _print(name: str, shape: tuple[int, ...], summary: "ModelSummary") -> None:
    from dlopt.tracking.layout import FittedTable, plain_table, standard_output

    table = plain_table()
    for column in ("layer", "kind"):
        table.add_column(column)
    for column in ("output", "parameters", "MACs"):
        table.add_column(column, justify="right")
    for layer in summary.layers:
        if layer.kind not in ("Identity", "Dropout") or layer.parameters:
            output = "x".join(map(str, layer.output))
            numbers = (f"{number:,}" if number else "" for number in (layer.parameters, layer.macs))
            table.add_row(layer.name, layer.kind, output, *numbers)
    console = standard_output()
    console.print(FittedTable(table))
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
        console.print(f"{key}: {value}", soft_wrap=True)


def _scaled(number: float) -> str:
    if number < 1000:
        return f"{number:g} "
    power = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
