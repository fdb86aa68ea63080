import numpy as np
import torch
from PIL import Image

from dlopt.augment import (
    Brightness,
    HorizontalFlip,
    Mixup,
    Operation,
    Pipeline,
    RandAugment,
    RandomMix,
    RandomScaleCrop,
    TranslateX,
)
from dlopt.augment.show import COLUMNS, batch_picture, operations_picture
from tests.augment.helpers import pictures

CELL, LEFT, TOP = 116, 130, 18


def tile(picture: Image.Image, row: int, column: int, left: int = LEFT) -> np.ndarray:
    x, y = left + column * CELL, TOP + row * CELL
    return np.asarray(picture)[y : y + 112, x : x + 112]


def test_a_row_per_operation_with_rising_strength() -> None:
    images = pictures(3, 3, 16, 16)
    operations: list[Operation] = [
        TranslateX(limit=0.75),
        RandomMix(n=1, operations=[HorizontalFlip(p=0.1), Brightness(limit=0.9)]),
        Mixup(alpha=1.0, p=0.5, classes=2),
    ]
    picture = operations_picture(Pipeline(operations=operations, border="zero", input_shape=(3, 16, 16)), images)
    assert picture.size == (LEFT + CELL * (1 + len(COLUMNS)), TOP + CELL * 4)
    enlarged = images.repeat_interleave(7, 2).repeat_interleave(7, 3).permute(0, 2, 3, 1).numpy()
    for row, image in enumerate((0, 1, 2, 0)):
        np.testing.assert_array_equal(tile(picture, row, 0), enlarged[image])
    for column, shift in ((1, 4), (2, 8), (3, 12)):
        np.testing.assert_array_equal(tile(picture, 0, column)[:, shift * 7 :], enlarged[0][:, : -shift * 7])
        assert not tile(picture, 0, column)[:, : shift * 7].any()
        np.testing.assert_array_equal(tile(picture, 1, column), enlarged[1][:, ::-1])
    np.testing.assert_array_equal(tile(picture, 0, 4)[:, : -12 * 7], enlarged[0][:, 12 * 7 :])
    means = [tile(picture, 2, column).mean() for column in (4, 0, 1, 2, 3)]
    assert means == sorted(means) and means[4] > means[0] + 100


def test_all_operations_of_randaugment_have_a_row() -> None:
    pipeline = Pipeline(operations=[RandAugment(n=2, magnitude=9)], border="zero", input_shape=(1, 16, 16))
    assert operations_picture(pipeline, pictures(2, 1, 16, 16)).size[1] == TOP + CELL * 13


def test_results_are_next_to_the_originals() -> None:
    images = pictures(4, 3, 16, 16)
    pipeline = Pipeline(operations=[HorizontalFlip(p=0.5)], border="zero", input_shape=(3, 16, 16))
    picture = batch_picture(pipeline, images, torch.zeros(4), seed=0, draws=5)
    assert picture.size == (4 + CELL * 6, TOP + CELL * 4)
    mirrored = []
    for row in range(4):
        original = tile(picture, row, 0, left=4)
        for column in range(1, 6):
            result = tile(picture, row, column, left=4)
            mirrored.append(bool((result == original[:, ::-1]).all()))
            assert mirrored[-1] or (result == original).all()
    assert 3 < sum(mirrored) < 17
    assert picture.tobytes() == batch_picture(pipeline, images, torch.zeros(4), seed=0, draws=5).tobytes()


def test_results_of_another_size_and_number_of_channels_fit() -> None:
    pipeline = Pipeline(
        operations=[RandomScaleCrop(short_side=(20, 30), size=18)], border="reflect", input_shape=(2, 16, 40)
    )
    images = pictures(2, 2, 16, 40)
    assert batch_picture(pipeline, images, torch.zeros(2), seed=0, draws=2).size == (4 + CELL * 3, TOP + CELL * 2)
    assert operations_picture(pipeline, images).size == (LEFT + CELL * 5, TOP + CELL)
