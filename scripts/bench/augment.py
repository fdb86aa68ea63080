"""Benchmarks augmentation on in-memory batches of 128 x 3 x 32 x 32.

    python scripts/bench/augment.py [--threads 2] [--rounds 15] [--json FILE]

1. Ten operations against flip and crop: the pipelines alone, and end to end from indices to standardized float32 input.
2. The same ten operations against torchvision v2, image by image, in a DataLoader with two workers.

The candidates take turns in each round. Reports medians over the rounds, and medians of the ratios within a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dlopt.augment import (
    Brightness,
    Contrast,
    GaussianNoise,
    HorizontalFlip,
    PadCrop,
    Pipeline,
    Rotate,
    Saturation,
    Scale,
    ShearX,
    TranslateX,
)
from dlopt.basics.random import generator
from dlopt.machine.memory import keep_freed_memory

BATCH, SHAPE, IMAGES = 128, (3, 32, 32), 4096
MEAN, STD = torch.full((3, 1, 1), 121.0), torch.full((3, 1, 1), 64.0)


def crop_and_flip() -> Pipeline:
    return Pipeline(operations=[PadCrop(padding=4), HorizontalFlip(p=0.5)], border="zero", input_shape=SHAPE)


def ten_operations() -> Pipeline:
    return Pipeline(
        operations=[
            PadCrop(padding=4),
            HorizontalFlip(p=0.5),
            TranslateX(limit=0.1),
            Scale(factor=1.2),
            Rotate(degrees=15.0),
            ShearX(limit=0.15, about="centre"),
            Brightness(limit=0.4),
            Contrast(limit=0.4),
            Saturation(limit=0.4),
            GaussianNoise(std=10.0),
        ],
        border="zero",
        input_shape=SHAPE,
    )


class ImageByImage(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(
                    15,
                    translate=(0.1, 0.0),
                    scale=(1 / 1.2, 1.2),
                    shear=(-8.5, 8.5),
                    interpolation=v2.InterpolationMode.BILINEAR,
                ),
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
                v2.ToDtype(torch.float32, scale=True),
                v2.GaussianNoise(sigma=10 / 255),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        result: Tensor = self.transform(self.images[index])
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=32, help="per candidate and round")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `dlopt train` does
    images = torch.randint(0, 256, (IMAGES, *SHAPE), dtype=torch.uint8)
    targets = torch.zeros(BATCH, dtype=torch.long)
    order = torch.randperm(IMAGES)
    batch = images[:BATCH]

    def augment(pipeline: Pipeline, inputs: Tensor, step: int) -> Tensor:
        return pipeline(inputs, targets, generator=generator("cpu", 0, step), total=BATCH, shard=slice(0, BATCH))[0]

    def pipeline_only(pipeline: Pipeline) -> Callable[[], None]:
        def once() -> None:
            for step in range(arguments.batches):
                augment(pipeline, batch, step)

        return once

    def end_to_end(pipeline: Pipeline) -> Callable[[], None]:
        def once() -> None:
            for step in range(arguments.batches):
                indices = order[step * BATCH % IMAGES :][:BATCH]
                (augment(pipeline, images.index_select(0, indices), step).float() - MEAN).div_(STD)

        return once

    loader = DataLoader(
        ImageByImage(images[: arguments.batches * BATCH]),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )

    def torchvision() -> None:
        for _ in loader:
            pass

    candidates = {
        "crop and flip": pipeline_only(crop_and_flip()),
        "ten operations": pipeline_only(ten_operations()),
        "end to end, crop and flip": end_to_end(crop_and_flip()),
        "end to end, ten operations": end_to_end(ten_operations()),
        "torchvision, ten operations": torchvision,
    }
    for once in candidates.values():
        once()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, once in candidates.items():
            start = time.perf_counter()
            once()
            seconds[name].append((time.perf_counter() - start) / arguments.batches)
    medians: dict[str, float] = {}
    for name, values in seconds.items():
        median = medians[name] = statistics.median(values)
        print(f"{name:30s} {1e3 * median:8.3f} ms/batch {BATCH / median:10.0f} images/s")
    for name, baseline in (
        ("ten operations", "crop and flip"),
        ("end to end, ten operations", "end to end, crop and flip"),
        ("torchvision, ten operations", "end to end, ten operations"),
    ):
        ratios = [a / b for a, b in zip(seconds[name], seconds[baseline], strict=True)]
        ratio = medians[f"{name} / {baseline}"] = statistics.median(ratios)
        print(f"{name} / {baseline}: {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
