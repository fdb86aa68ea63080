"""Tests of test-time augmentation: crop positions against torchvision, weights by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional

from dlopt.basics.errors import UserError
from dlopt.data.samples import InMemory
from dlopt.training import tta
from dlopt.training.evaluate import _build_transform, mean_outputs
from dlopt.training.tta import Flip, MultiScaleTenCrop, ShiftFlip, Size, TenCrop, ten_crop


def images(height: int = 12, width: int = 15) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).mul(255)


@pytest.mark.parametrize(
    ("size", "crop"), [((12, 15), (8, 8)), ((13, 14), (8, 7)), ((9, 16), (8, 5)), ((10, 10), (7, 7))]
)
def test_ten_crop_equals_torchvision(size: tuple[int, int], crop: tuple[int, int]) -> None:
    source = images(*size)
    crops = list(ten_crop(source, crop))
    expected = functional.ten_crop(source, list(crop))
    assert [weight for weight, _ in crops] == [0.1] * 10
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in zip(crops, expected, strict=True))


def test_yields_equal_crops_once_with_their_total_weight() -> None:
    source = images(8, 8)
    (a, plain), (b, mirrored) = ten_crop(source, (8, 8))
    assert (a, b) == (0.5, 0.5)
    assert torch.equal(plain, source) and torch.equal(mirrored, functional.horizontal_flip(source))


def average(choice: Flip | ShiftFlip | TenCrop | MultiScaleTenCrop, window: tuple[int, int], source: Tensor) -> Tensor:
    transform = choice.build(window, (source.shape[2], source.shape[3]))
    crops = list(transform.crops(source))
    assert sum(weight for weight, _ in crops) == pytest.approx(1)
    assert all(crop.shape[2:] == transform.crop_size for _, crop in crops)
    return torch.stack([weight * crop for weight, crop in crops]).sum(0)


def test_flip_uses_the_centre_crop() -> None:
    source = images()
    centre = functional.center_crop(source, [8, 9])
    expected = (centre + functional.horizontal_flip(centre)) / 2
    torch.testing.assert_close(average(Flip(), (8, 9), source), expected)
    whole = (source + functional.horizontal_flip(source)) / 2
    torch.testing.assert_close(average(Flip(), (source.shape[2], source.shape[3]), source), whole)


@pytest.mark.parametrize("shift", [1, 3])
def test_shift_flip_equals_manual_average(shift: int) -> None:
    source = images()
    padded = pad(source, (shift,) * 4, mode="reflect")

    def mirrored(x: Tensor) -> Tensor:
        return (x + x.flip(3)) / 2

    first = functional.crop(padded, 0, 0, 12, 15)
    last = functional.crop(padded, 2 * shift, 2 * shift, 12, 15)
    expected = mirrored(source) / 2 + (mirrored(first) + mirrored(last)) / 4
    torch.testing.assert_close(average(ShiftFlip(shift=shift), (12, 15), source), expected)


def test_ten_crop_scales_up_images_no_larger_than_the_crop() -> None:
    assert TenCrop().build((224, 224), (224, 224)).image_size == (256, 256)
    assert TenCrop().build((224, 224), (256, 300)).image_size == (256, 300)
    assert TenCrop(scale=40).build((32, 32), (32, 64)).image_size == (40, 80)
    assert TenCrop(crop=28).build((32, 32), (32, 32)).crop_size == (28, 28)


def test_multi_scale_equals_manual_average() -> None:
    source = images(16, 16)
    choice = MultiScaleTenCrop(scales=(16, 24), crop=14)
    larger = interpolate(source, size=(24, 24), mode="bilinear", antialias=True)
    crops = [*functional.ten_crop(source, [14, 14]), *functional.ten_crop(larger, [14, 14])]
    torch.testing.assert_close(average(choice, (16, 16), source), torch.stack(crops).mean(0))


def test_default_scales_equal_those_of_the_paper() -> None:
    source = torch.zeros(1, 1, 256, 256)
    transform = MultiScaleTenCrop().build((224, 224), (256, 256))
    assert transform.image_size == (640, 640) and transform.crop_size == (224, 224)
    crops = list(transform.crops(source))
    weights = [weight for weight, _ in crops]
    assert weights[:2] == [0.1, 0.1]  # at scale 224 all positions are equal
    assert weights[2:] == pytest.approx([0.02] * 40)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (TenCrop(scale=20), "tta.scale=20"),
        (MultiScaleTenCrop(scales=(40, 31)), "tta.scales=31"),
        (ShiftFlip(shift=32), "tta.shift=32"),
    ],
)
def test_rejects_invalid_sizes(choice: TenCrop | MultiScaleTenCrop | ShiftFlip, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choice.build((32, 32), (32, 32))


def test_probabilities_are_averaged_by_unequal_weights() -> None:
    outputs = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    weights = (0.5, 0.25, 0.25)
    expected = sum(weight * each.softmax(1) for weight, each in zip(weights, outputs, strict=True))
    mean = mean_outputs(zip(weights, outputs, strict=True), "probabilities")
    torch.testing.assert_close(mean.exp(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("augmented", [None, (3, 6, 10)])
def test_transforms_get_height_and_width(augmented: tuple[int, ...] | None) -> None:
    seen: list[tuple[Size, Size]] = []

    class Choice(Flip):
        def build(self, window: Size, image: Size) -> tta.TestTransform:
            seen.append((window, image))
            return super().build(window, image)

    augment = None if augmented is None else SimpleNamespace(output_shape=augmented)
    workload: Any = SimpleNamespace(augment=augment)
    samples = InMemory(torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    transform = _build_transform(workload, Choice(), samples)
    window = (8, 12) if augmented is None else (6, 10)
    assert seen == [(window, (8, 12))] and transform.crop_size == window
