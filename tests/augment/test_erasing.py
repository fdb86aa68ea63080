import pytest
import torch

from dlopt.augment import Erase, RandomErase
from tests.augment.helpers import in_memory, pictures, run


@pytest.mark.parametrize(("size", "side"), [(0.5, 6), (0.25, 3), (1.0, 12)])
def test_a_square_about_a_random_pixel_is_erased(size: float, side: int) -> None:
    images = torch.full((3000, 1, 12, 16), 9, dtype=torch.uint8)
    out = run([Erase(p=1.0, size=size, fill="zero", train=in_memory(images))], images)
    assert out.dtype == torch.uint8
    squares = set()
    for y in range(12):
        for x in range(16):
            want = images[0].clone()
            top, left = y - side // 2, x - side // 2
            want[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
            squares.add(want.numpy().tobytes())
    seen = {image.numpy().tobytes() for image in out}
    assert seen == squares


def test_fills_with_the_training_sets_mean_colour_with_probability_p() -> None:
    train = in_memory(pictures(40, 3, 6, 6))
    images = torch.zeros(4000, 3, 6, 6)
    out = run([Erase(p=0.3, size=1.0, fill="mean", train=train)], images)
    erased = out.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.3) < 5 * (0.21 / 4000) ** 0.5
    colours = out[erased].amax((2, 3))
    assert torch.allclose(colours, train.inputs.float().mean((0, 2, 3)).expand_as(colours), atol=1e-3)


def boxes(images: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Returns (top, left, height, width) of the zeros in images of ones; fails if they are not a box."""
    found = []
    for image in images:
        y, x = (image[0] == 0).nonzero(as_tuple=True)
        if len(y):
            top, left, height, width = int(y[0]), int(x.min()), int(y[-1] - y[0] + 1), int(x.max() - x.min() + 1)
            assert len(y) == height * width
            found.append((top, left, height, width))
    return found


def test_random_boxes_are_within_the_image_with_the_drawn_area_and_shape() -> None:
    images = torch.ones(4000, 1, 28, 32, dtype=torch.uint8)
    erase = RandomErase(p=0.5, area=(0.02, 0.4), ratio=(0.3, 1 / 0.3), fill="zero", train=in_memory(images))
    found = boxes(run([erase], images))
    assert abs(len(found) / 4000 - 0.5) < 5 * (0.25 / 4000) ** 0.5
    areas = torch.tensor([h * w / (28 * 32) for _, _, h, w in found])
    ratios = torch.tensor([h / w for _, _, h, w in found])
    assert 0.01 < areas.min() < 0.03 and 0.38 < areas.max() < 0.42
    assert 0.2 < ratios.min() < 0.4 and 2.7 < ratios.max() < 4.5
    reached = {(top == 0, left == 0, top + h == 28, left + w == 32) for top, left, h, w in found}
    assert all(any(where[side] for where in reached) for side in range(4))  # every edge, and nothing beyond
    largest = [f for f in found if f[2] * f[3] > 0.3 * 28 * 32]
    tops = torch.tensor([top / (28 - h) for top, _, h, _ in largest if h < 27])
    assert abs(tops.mean() - 0.5) < 0.06  # anywhere


def test_box_that_does_not_fit_erases_nothing() -> None:
    images = torch.ones(50, 1, 8, 8)
    erase = RandomErase(p=1.0, area=(1.0, 1.0), ratio=(1.0, 1.0), fill="zero", train=in_memory(images))
    assert boxes(run([erase], images)) == []


def test_random_values_fill_the_box() -> None:
    images = torch.zeros(400, 3, 16, 16)
    erase = RandomErase(p=1.0, area=(0.3, 0.3), ratio=(1.0, 1.0), fill="random", train=in_memory(images))
    values = run([erase], images)
    values = values[values > 0]
    assert abs(values.mean() - 127.5) < 1 and abs(values.std() - 255 / 12**0.5) < 1
