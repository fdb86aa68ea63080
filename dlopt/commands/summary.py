"""`dlopt summary`: prints the layers of a model with shapes, parameters, MACs and memory."""

from typing import TYPE_CHECKING, Annotated

from dlopt.basics.errors import DONE
from dlopt.basics.ranges import Count
from dlopt.commands.shared.command_line import Line, on_config
from dlopt.config.reads import RECIPE

if TYPE_CHECKING:
    from dlopt.config.run_config import RunConfig
    from dlopt.tasks.task import Task

_READS = ("task", "data", "augmentation", "model", "precision", *RECIPE)
USAGE = """\
Print the layers of a model: shapes, parameters, MACs, memory

Usage: dlopt summary model=CHOICE [key=value]
       dlopt summary RUN [key=value]              # the model of a run

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


@on_config("summary", _READS, several="summary shows one model at a time", one=True)
def summary(
    line: Line,
    *,
    input_shape: Annotated[
        list[Count] | None,
        "[C,H,W]: shape of the input, of a text [TOKENS] (default: of the data set)",
        "needs classes or vocabulary",
    ] = None,
    classes: Annotated[
        Count | None, "N: number of outputs (default: of the data set)", "needs input_shape", "not with vocabulary"
    ] = None,
    vocabulary: Annotated[
        Count | None, "N: number of tokens of a text (default: of the data set)", "needs input_shape"
    ] = None,
) -> int:
    """Prints the table. Raises `UserError`."""
    run_config, choices = line.run_config()  # before torch is imported: it checks the values of the line
    from dlopt.instruments.model_summary import show_summary, summarize_run
    from dlopt.tasks.classification import Classification
    from dlopt.tasks.text import NextToken

    outputs = classes if vocabulary is None else vocabulary
    if input_shape is None or outputs is None:
        shape, task, samples = _sizes(run_config)
    else:
        shape, samples = tuple(input_shape), None
        task = Classification(outputs) if vocabulary is None else NextToken(outputs)
    show_summary(choices.get("model", "model"), shape, summarize_run(run_config, shape, task, samples))
    return DONE


def _sizes(run_config: "RunConfig") -> tuple[tuple[int, ...], "Task", int]:
    """Reads the shape of the model's input, the task, and the number of training samples from the data set."""
    from dlopt.training.builders.dataset import read_dataset, with_task

    dataset = read_dataset(run_config)
    shape = dataset.train.shape
    if run_config.augmentation.arguments.get("operations") != []:
        own = dataset.task.target_arguments
        pipeline = run_config.augmentation.build(input_shape=shape, train=dataset.train, **own)
        shape = pipeline.output_shape
    task = with_task(run_config, dataset, shape).task
    return task.input_shape(shape), task, len(dataset.train)
