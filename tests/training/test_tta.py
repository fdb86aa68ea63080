"""Crops of images: positions against torchvision, weights by hand."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional

from dlopt.errors import UserError
from dlopt.training.tta import Flip, MultiScaleTenCrop, ShiftFlip, TenCrop, ten_crop


def images(height: int = 12, width: int = 15) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).mul(255)


@pytest.mark.parametrize(
    ("size", "crop"), [((12, 15), (8, 8)), ((13, 14), (8, 7)), ((9, 16), (8, 5)), ((10, 10), (7, 7))]
)
def test_ten_crop_is_torchvisions(size: tuple[int, int], crop: tuple[int, int]) -> None:
    source = images(*size)
    found = list(ten_crop(source, crop))
    expected = functional.ten_crop(source, list(crop))
    assert [weight for weight, _ in found] == [0.1] * 10
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in zip(found, expected, strict=True))


def test_equal_crops_come_once_with_their_weight() -> None:
    source = images(8, 8)
    (a, plain), (b, mirrored) = ten_crop(source, (8, 8))
    assert (a, b) == (0.5, 0.5)
    assert torch.equal(plain, source) and torch.equal(mirrored, functional.horizontal_flip(source))


def average(choice: Flip | ShiftFlip | TenCrop | MultiScaleTenCrop, window: tuple[int, int], source: Tensor) -> Tensor:
    plan = choice.views(window, (source.shape[2], source.shape[3]))
    views = list(plan.views(source))
    assert sum(weight for weight, _ in views) == pytest.approx(1)
    assert all(view.shape[2:] == plan.size for _, view in views)
    return torch.stack([weight * view for weight, view in views]).sum(0)


def test_flip_takes_the_centre_that_the_model_was_trained_on() -> None:
    source = images()
    centre = functional.center_crop(source, [8, 9])
    expected = (centre + functional.horizontal_flip(centre)) / 2
    torch.testing.assert_close(average(Flip(), (8, 9), source), expected)


@pytest.mark.parametrize("shift", [1, 3])
def test_shift_flip_by_hand(shift: int) -> None:
    source = images()
    padded = pad(source, (shift,) * 4, mode="reflect")

    def mirrored(x: Tensor) -> Tensor:
        return (x + x.flip(3)) / 2

    first = functional.crop(padded, 0, 0, 12, 15)
    last = functional.crop(padded, 2 * shift, 2 * shift, 12, 15)
    expected = mirrored(source) / 2 + (mirrored(first) + mirrored(last)) / 4
    torch.testing.assert_close(average(ShiftFlip(shift=shift), (12, 15), source), expected)


def test_ten_crop_scales_up_what_is_no_larger_than_the_crop() -> None:
    assert TenCrop().views((224, 224), (224, 224)).image == (256, 256)
    assert TenCrop().views((224, 224), (256, 300)).image == (256, 300)
    assert TenCrop(scale=40).views((32, 32), (32, 64)).image == (40, 80)
    assert TenCrop(crop=28).views((32, 32), (32, 32)).size == (28, 28)


def test_multi_scale_by_hand() -> None:
    source = images(16, 16)
    choice = MultiScaleTenCrop(scales=(16, 24), crop=14)
    larger = interpolate(source, size=(24, 24), mode="bilinear", antialias=True)
    crops = [*functional.ten_crop(source, [14, 14]), *functional.ten_crop(larger, [14, 14])]
    torch.testing.assert_close(average(choice, (16, 16), source), torch.stack(crops).mean(0))


def test_default_scales_are_those_of_the_paper() -> None:
    source = torch.zeros(1, 1, 256, 256)
    plan = MultiScaleTenCrop().views((224, 224), (256, 256))
    assert plan.image == (640, 640) and plan.size == (224, 224)
    views = list(plan.views(source))
    weights = [weight for weight, _ in views]
    assert weights[:2] == [0.1, 0.1]  # at scale 224 all positions are one
    assert weights[2:] == pytest.approx([0.02] * 40)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (TenCrop(scale=20), "tta.scale=20"),
        (MultiScaleTenCrop(scales=(40, 31)), "tta.scales=31"),
        (MultiScaleTenCrop(scales=()), "tta.scales"),
        (ShiftFlip(shift=32), "tta.shift=32"),
    ],
)
def test_refused(choice: TenCrop | MultiScaleTenCrop | ShiftFlip, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choice.views((32, 32), (32, 32))
