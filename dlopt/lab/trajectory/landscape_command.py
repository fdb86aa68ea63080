"""`dlopt trajectory checkpoint=...`: plots the loss on a plane through the weights of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from dlopt.basics.status_line import status_line
from dlopt.commands.shared.command_line import load_torch, saved_run_config
from dlopt.extend import DONE, Count, Positive, Seed, UserError, on_checkpoint, output_folder, writing
from dlopt.lab.trajectory.output import Output
from dlopt.results import drawing

if TYPE_CHECKING:
    from dlopt.extend import Workload
    from dlopt.lab.trajectory.landscape import Plane

READS = ("data", "device", "threads", "allow_packages")
_MIN_CHECKPOINTS = 3  # two differences span a plane


@on_checkpoint("trajectory", READS)
def draw_landscape(
    path: Path,
    changes: dict[str, Any],
    *,
    directions: Annotated[
        Literal["auto", "random", "path"],
        "NAME: path: plane of the largest variance of the training's checkpoints (PCA), with the optimizer path; "
        "random: two random directions with filter normalization (Li et al. 2018); auto: path if there are at least "
        "three checkpoints, else random (default: auto)",
    ] = "auto",
    points: Annotated[int, Interval(ge=3, le=501), "N: grid of N x N points"] = 21,
    samples: Annotated[Count, "N: training samples for the loss"] = 500,
    span: Annotated[Positive, "X: range of random directions, relative to the filter norms"] = 1.0,
    seed: Annotated[Seed, "N: seed of random directions"] = 0,
    output: Output = None,
) -> int:
    load_torch()
    from dlopt.basics.random import generator
    from dlopt.extend import build_workload, load_checkpoint
    from dlopt.lab.comparison.measures import spread_samples
    from dlopt.lab.trajectory.landscape import draw, random_plane, surface
    from dlopt.trained.restore import fitting

    checkpoint = load_checkpoint(path)
    run_config = saved_run_config(checkpoint.config, changes, path)
    with fitting(path):
        workload = build_workload(run_config, checkpoint)
        workload.load(checkpoint)
    found = None if directions == "random" else _path_plane(workload, path, is_required=directions == "path")
    if found is None:
        plane, epoch = random_plane(workload.module, span, generator("cpu", seed)), checkpoint.epoch
        title = f"Loss landscape of {path}, epoch {epoch}"
    else:
        plane, epoch = found
        title = f"Loss landscape of {path.parent.parent}, path to epoch {epoch}"
    folder = output_folder(output, "trajectory")
    inputs, targets = spread_samples(workload, samples)
    autocast = workload.precision.autocast
    model, loss = autocast(workload.model), autocast(workload.loss)
    with status_line() as show:
        heights = surface(
            workload.module,
            lambda: loss(model(inputs), targets),
            plane,
            points,
            lambda n: show(f"point {n}/{points**2}"),
        )
    subtitle = f"{len(targets)} training samples, {points} x {points} points"
    with writing(folder):
        written = drawing.save(draw(plane, heights, title=title, subtitle=subtitle), folder, "landscape")
    print(*written, sep="\n")
    return DONE


def _path_plane(workload: "Workload", path: Path, *, is_required: bool) -> "tuple[Plane, int] | None":
    """Returns the plane of the checkpoints in the folder of `path`, and the last one's epoch; None if they are too few.

    The path follows the weights, even if their average is evaluated.
    """
    from dlopt.lab.comparison.probes import checkpoints
    from dlopt.lab.trajectory.landscape import trajectory_plane

    found = list(checkpoints(path.parent.parent))
    if len(found) >= _MIN_CHECKPOINTS:
        names = [name for name, _ in workload.module.named_parameters()]
        weights = [[checkpoint.model[name].to(workload.device) for name in names] for checkpoint in found]
        plane = trajectory_plane(weights, [checkpoint.step for checkpoint in found])
        return plane, found[-1].epoch
    if is_required:
        raise UserError(
            f"directions=path: needs {_MIN_CHECKPOINTS} checkpoints, but {path.parent} contains {len(found)}; "
            "train with checkpoint.keep=100"
        )
    return None
