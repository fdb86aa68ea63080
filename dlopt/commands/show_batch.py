"""`dlopt show-batch`: plots augmented images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.files import temporary_sibling
from dlopt.basics.folders import short_path
from dlopt.basics.interruption import print_note
from dlopt.commands.shared.command_line import Line, on_config, output_folder, refuse_folder, writing
from dlopt.config.reads import RECIPE

if TYPE_CHECKING:
    from dlopt.config.run_config import RunConfig

_READS = ("data", "augmentation", "seed", "order_seed", "augmentation_seed", *RECIPE)
USAGE = """\
Plot augmented images

Usage: dlopt show-batch [RUN] [group=choice] [key=value]    # RUN: with the data of a run

Examples:
  dlopt show-batch data=cifar10 augmentation=randaugment
  dlopt show-batch augmentation=affine seed=3 output=affine.png
  dlopt show-batch augmentation=crop_flip,randaugment,cutmix tile=224    # columns per pipeline, large for a projector

Saves NAME.png: a row per image with its class, the original, and six augmented versions. With one augmentation also
NAME_operations.png: a row per operation at low, medium and high strength.

  {show_batch}
and these keys of `dlopt train`:
    {_READS}
"""

_PIPELINES = 6


@on_config("show-batch", _READS, several="show-batch plots one batch; only augmentation takes several values")
def show_batch(
    line: Line,
    *,
    output: Annotated[str | None, "FILE: plot of the batch (default: outputs/show-batch/DATE_TIME/batch.png)"] = None,
    tile: Annotated[
        int, Interval(ge=32, le=1024), "N: size of an image in pixels, 32 to 1024; the text grows with it"
    ] = 112,
) -> int:
    """Saves the plots and prints their paths. Raises `UserError`."""
    target = None if output is None else _target(output)
    run_configs = _run_configs(line)
    from PIL import Image

    from dlopt.data.checks import problems
    from dlopt.instruments.augmentations import draw
    from dlopt.training.builders.dataset import read_dataset

    dataset = read_dataset(next(iter(run_configs.values())))
    batch, operations = draw(run_configs, dataset, tile)
    if target is None:
        target = output_folder(None, "show-batch") / "batch.png"
    pictures = {target: batch}
    if operations is not None:
        pictures[target.with_stem(f"{target.stem}_operations")] = operations
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, picture in pictures.items():
            with temporary_sibling(path) as temporary:
                picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
                temporary.replace(path)
    for problem in problems(dataset.notes):
        print_note(problem)
    print(*map(short_path, pictures), sep="\n")
    return DONE


def _run_configs(line: Line) -> dict[str, "RunConfig"]:
    """Returns the configs by the name of their augmentation. Raises `UserError` for other varied keys."""
    for override in line.composer.parse(line.overrides):
        key = override.get_key_element()
        if override.is_sweep_override() and key.partition(".")[0] != "augmentation":
            raise UserError(f"{override.input_line}: one value is needed; only augmentation takes several")
    run_configs = {}
    for job in line.jobs(("augmentation",), max_jobs=_PIPELINES, what="augmentations"):
        run_config, choices = line.run_config(job.overrides)
        run_configs[job.label({"augmentation": choices["augmentation"]}, "augmentation")] = run_config
    return run_configs


def _target(output: str) -> Path:
    from PIL import Image

    path = refuse_folder(Path(output), f" such as {Path(output) / 'batch.png'}")
    if not path.suffix:
        path = path.with_suffix(".png")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"output={output}: unknown image format {path.suffix}; use .png")
    return path
