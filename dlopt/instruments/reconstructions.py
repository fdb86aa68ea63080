"""Draws test samples above their reconstructions by an autoencoder."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlopt.basics.files import write_atomically
from dlopt.results import drawing
from dlopt.training.batch_norm import norm_statistics
from dlopt.training.builders.batches import evaluation_batches
from dlopt.training.builders.workload import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "reconstructions.png"
_COUNT = 20  # samples, in two rows


def write(workload: Workload, folder: Path) -> Path | None:
    """Draws reconstructions by the present weights into `PICTURE`, and returns its path.

    None if there are none: for other tasks, vectors, and models whose weights are distributed.
    """
    is_image = len(workload.shape) == 3 and workload.shape[0] in (1, 3)
    if not workload.task.draws_outputs or not is_image or workload.parallel.ranks.processes > 1:
        return None
    figure = draw(*reconstruct(workload))
    write_atomically(folder / PICTURE, drawing.encoded(figure, "png", dpi=120))
    return folder / PICTURE


@torch.inference_mode()
def reconstruct(workload: Workload) -> tuple[Tensor, Tensor]:
    """Returns samples, evenly spaced over the test set (or else the training set), and their reconstructions.

    Both [N, *shape] with pixels in 0..1, which reconstructions may exceed.
    """
    samples = workload.dataset.train if workload.dataset.test is None else workload.dataset.test
    chosen = samples.select(torch.linspace(0, len(samples) - 1, min(_COUNT, len(samples))).long())
    model = workload.precision.autocast(workload.model)
    batches = evaluation_batches(workload, chosen, shared=False)
    with norm_statistics(workload):
        workload.module.eval()
        outputs, targets = zip(*((model(inputs), targets) for inputs, targets in batches.epoch(0)), strict=True)
    batches.close()
    values = workload.task.values(torch.cat(outputs).float(), workload.loss)
    return torch.cat(targets).float().unflatten(1, workload.shape), values.unflatten(1, workload.shape)


def draw(samples: Tensor, reconstructed: Tensor) -> "Figure":
    """Draws samples [N, C, H, W] above their reconstructions, in two blocks."""
    columns = -(-len(samples) // 2)
    figure = drawing.figure(0.8 * columns, 0.8 * 4 + 0.5, "test images, each above its reconstruction")
    panels = figure.subplots(4, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number in range(len(samples)):
        block, column = divmod(number, columns)
        for row, images in enumerate((samples, reconstructed)):
            pixels = images[number].clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
            panels[2 * block + row, column].imshow(pixels)
    return figure
