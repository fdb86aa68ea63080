import pytest
import torch

from dlopt.augment import Erase
from tests.augment.helpers import Whole, pictures, run


@pytest.mark.parametrize(("size", "side"), [(0.5, 6), (0.25, 3), (1.0, 12)])
def test_a_square_about_a_random_pixel_is_erased(size: float, side: int) -> None:
    images = torch.full((3000, 1, 12, 16), 9, dtype=torch.uint8)
    out = run([Erase(p=1.0, size=size, fill="zero", train=Whole(images))], images)
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


def test_the_mean_colour_is_the_training_sets_and_p_a_probability() -> None:
    train = Whole(pictures(40, 3, 6, 6))
    images = torch.zeros(4000, 3, 6, 6)
    out = run([Erase(p=0.3, size=1.0, fill="mean", train=train)], images)
    erased = out.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.3) < 5 * (0.21 / 4000) ** 0.5
    colours = out[erased].amax((2, 3))
    assert torch.allclose(colours, train.images.float().mean((0, 2, 3)).expand_as(colours), atol=1e-3)
