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
from dlopt.augment.show import COLUMNS, _caption, batch_picture, operations_picture
from tests.augment.helpers import pictures

CELL = 116


def tile(picture: Image.Image, row: int, column: int, rows: int, columns: int, height: int = CELL) -> np.ndarray:
    """Counts from the lower right corner: titles, headings and labels are above and on the left."""
    x, y = picture.width - CELL * (columns - column), picture.height - height * (rows - row)
    return np.asarray(picture)[y : y + 112, x : x + 112]


def test_a_row_per_operation_with_rising_strength() -> None:
    images = pictures(3, 3, 16, 16)
    operations: list[Operation] = [
        TranslateX(limit=0.75),
        RandomMix(n=1, operations=[HorizontalFlip(p=0.1), Brightness(limit=0.9)]),
        Mixup(alpha=1.0, p=0.5, classes=2),
    ]
    picture = operations_picture(Pipeline(operations=operations, border="zero", input_shape=(3, 16, 16)), images)

    def at(row: int, column: int) -> np.ndarray:
        return tile(picture, row, column, 4, 1 + len(COLUMNS))

    enlarged = images.repeat_interleave(7, 2).repeat_interleave(7, 3).permute(0, 2, 3, 1).numpy()
    for row, image in enumerate((0, 1, 2, 0)):
        np.testing.assert_array_equal(at(row, 0), enlarged[image])
    for column, shift in ((1, 4), (2, 8), (3, 12)):
        np.testing.assert_array_equal(at(0, column)[:, shift * 7 :], enlarged[0][:, : -shift * 7])
        assert not at(0, column)[:, : shift * 7].any()
        np.testing.assert_array_equal(at(1, column), enlarged[1][:, ::-1])
    np.testing.assert_array_equal(at(0, 4)[:, : -12 * 7], enlarged[0][:, 12 * 7 :])
    means = [at(2, column).mean() for column in (4, 0, 1, 2, 3)]
    assert means == sorted(means) and means[4] > means[0] + 100


def test_all_operations_of_randaugment_have_a_row() -> None:
    pipeline = Pipeline(operations=[RandAugment(n=2, magnitude=9)], border="zero", input_shape=(1, 16, 16))
    assert 13 * CELL < operations_picture(pipeline, pictures(2, 1, 16, 16)).height < 14 * CELL


def test_results_are_next_to_the_originals() -> None:
    images = pictures(4, 3, 16, 16)
    pipeline = Pipeline(operations=[HorizontalFlip(p=0.5)], border="zero", input_shape=(3, 16, 16))
    picture = batch_picture({"flip": pipeline}, images, torch.zeros(4), seed=0, draws=5)
    mirrored = []
    for row in range(4):
        original = tile(picture, row, 0, 4, 6)
        for column in range(1, 6):
            result = tile(picture, row, column, 4, 6)
            mirrored.append(bool((result == original[:, ::-1]).all()))
            assert mirrored[-1] or (result == original).all()
    assert 3 < sum(mirrored) < 17
    assert picture.tobytes() == batch_picture({"flip": pipeline}, images, torch.zeros(4), seed=0, draws=5).tobytes()


def test_results_of_another_size_and_number_of_channels_fit() -> None:
    pipeline = Pipeline(
        operations=[RandomScaleCrop(short_side=(20, 30), size=18)], border="reflect", input_shape=(2, 16, 40)
    )
    images = pictures(2, 2, 16, 40)
    assert batch_picture({"": pipeline}, images, torch.zeros(2), seed=0, draws=2).width == 4 + CELL * 3
    assert 2 * CELL > operations_picture(pipeline, images).height > CELL


def test_pipelines_have_columns_of_their_own_and_a_size() -> None:
    images, targets = pictures(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    none, flip, mixed = (
        Pipeline(operations=list[Operation](operations), border="zero", input_shape=(3, 16, 16))
        for operations in ([], [HorizontalFlip(p=1.0)], [Mixup(alpha=1.0, p=1.0, classes=3)])
    )
    pipelines = {"none": none, "flip": flip}
    picture = batch_picture(pipelines, images, targets, seed=0, classes=["a", "b", "c"], draws=4)
    for row in range(4):
        shown = [tile(picture, row, column, 4, 5) for column in range(5)]
        assert (shown[1] == shown[0]).all() and (shown[2] == shown[0]).all()
        assert (shown[3] == shown[0][:, ::-1]).all() and (shown[4] == shown[0][:, ::-1]).all()
    large = batch_picture(pipelines, images, targets, seed=0, classes=["a", "b", "c"], draws=4, tile=224)
    assert large.width > 1.8 * picture.width and large.height > 1.8 * picture.height
    captions = batch_picture({"mixup": mixed}, images, targets, seed=0, classes=["a", "b", "c"], draws=4)
    assert captions.height > picture.height, "a line per row"
    long = batch_picture({"mixup": mixed}, images, targets, seed=0, classes=["automobile"] * 3, draws=4)
    assert long.width > captions.width + 100, "captions do not overlap"


def test_values_of_a_regression_are_no_shares_of_classes() -> None:
    pipeline = Pipeline(operations=[HorizontalFlip(p=1.0)], border="zero", input_shape=(1, 8, 8))
    images = pictures(2, 1, 8, 8)
    one, several = (batch_picture({"": pipeline}, images, torch.full(shape, 0.4), seed=0) for shape in ((2,), (2, 2)))
    assert several.tobytes() == one.tobytes()


def test_images_in_0_to_1_are_not_black() -> None:
    pipeline = Pipeline(operations=[HorizontalFlip(p=1.0)], border="zero", input_shape=(1, 8, 8))
    images = pictures(2, 1, 8, 8)
    targets = torch.zeros(2)
    expected = batch_picture({"": pipeline}, images, targets, seed=0)
    assert batch_picture({"": pipeline}, images / 255, targets, seed=0, white=1).tobytes() == expected.tobytes()
    expected = operations_picture(pipeline, images)
    assert operations_picture(pipeline, images / 255, white=1).tobytes() == expected.tobytes()


def test_captions_show_the_shares_of_mixed_classes() -> None:
    assert _caption(torch.tensor([0.0, 0.3, 0.7]), ["a", "b", "c"]) == "70 % c + 30 % b"
    assert _caption(torch.tensor([0.25, 0.0, 0.75]), []) == "75 % 2 + 25 % 0"
    assert _caption(torch.tensor([0.0, 1.0]), ["a", "b"]) == _caption(torch.tensor(3), ["a"]) == ""
