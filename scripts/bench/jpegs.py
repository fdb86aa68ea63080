"""Generates a folder of JPEGs for the benchmarks that read image files."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 100


def generate(folder: Path, images: int, *, distinct: int = 300) -> None:
    """Writes textured JPEGs with sides of 200 to 700 pixels, about 90 KB each, like photographs.

    Of the `images` files train/CLASS/NAME, only `distinct` ones differ: the others are hard links.
    """
    draw = np.random.default_rng(0)
    real = [folder / "real" / f"{number}.jpg" for number in range(distinct)]
    real[0].parent.mkdir(parents=True)
    for path in real:
        height, width = (int(side) for side in draw.integers(200, 700, 2))
        coarse = Image.fromarray(draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + draw.normal(0, 8, (height, width, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    for label in range(CLASSES):
        (folder / "train" / f"class{label:03d}").mkdir(parents=True)
    for number in range(images):
        name = folder / "train" / f"class{number % CLASSES:03d}" / f"{number:07d}.JPEG"
        os.link(real[number % distinct], name)
