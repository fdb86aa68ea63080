"""Anti-aliased bilinear resampling of a box, against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.data.images.resampling import resize_box


@pytest.mark.parametrize("size", [(5, 4), (23, 31), (7, 40), (13, 17)])
@pytest.mark.parametrize("box", [(0, 0, 17, 13), (2, 3, 16, 9), (16, 12, 17, 13), (0.4, 1.3, 15.9, 8.75)])
def test_boxes_are_resized_as_in_pillow(box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    """Of floating-point images without the rounding of Pillow after each axis."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box))
    found = resize_box(torch.from_numpy(pixels).permute(2, 0, 1), box, size)
    assert found.dtype == torch.uint8 and found.shape == (3, *size)
    assert np.array_equal(found.permute(1, 2, 0), expected)
    found = resize_box(torch.from_numpy(pixels).permute(2, 0, 1).float(), box, size)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("shape, size", [((600, 900), (7, 11)), ((5, 6), (64, 48))])
@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_a_uniform_image_keeps_its_value(shape: tuple[int, int], size: tuple[int, int], value: int) -> None:
    image = torch.full((1, *shape), value, dtype=torch.uint8)
    assert resize_box(image, (0, 0, shape[1], shape[0]), size).unique().tolist() == [value]


def test_floats_are_neither_rounded_nor_bounded() -> None:
    image = torch.tensor([[[-0.5, 300.25]]], dtype=torch.float64)
    found = resize_box(image, (0, 0, 2, 1), (1, 1))
    assert found.dtype == torch.float64 and found.item() == pytest.approx(149.875)
