"""Geometric operations against torchvision's functional on single images.

Both resample with the same bilinear kernel: 0.02 of 255 is what float32 coordinates leave.
"""

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from dlopt.augment import (
    AlternatingFlip,
    Draws,
    HorizontalFlip,
    Lens,
    Operation,
    PadCrop,
    Rotate,
    Scale,
    ShearX,
    ShearY,
    Stretch,
    TranslateX,
    TranslateY,
)
from dlopt.augment.warp import Affine
from dlopt.basics.random import generator
from tests.augment.helpers import SIGNS, STRENGTHS, matrix, pictures, run, smooth_pictures

TOLERANCE = 0.02
BILINEAR = v2.InterpolationMode.BILINEAR


def affine(
    image: Tensor,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
    shear: tuple[float, float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    result: Tensor = vision.affine(image, angle, list(translate), scale, degrees, interpolation=BILINEAR, center=center)
    return result


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (TranslateX(limit=0.3), lambda image, s: affine(image, translate=(0.3 * 21 * s, 0))),
        (TranslateY(limit=0.3), lambda image, s: affine(image, translate=(0, 0.3 * 16 * s))),
        (Scale(factor=1.5), lambda image, s: affine(image, scale=1.5**s)),
        (Rotate(degrees=40.0), lambda image, s: affine(image, angle=40 * s)),
        (ShearX(limit=0.4, about="centre"), lambda image, s: affine(image, shear=(0.4 * s, 0))),
        (ShearY(limit=0.4, about="centre"), lambda image, s: affine(image, shear=(0, 0.4 * s))),
        (ShearX(limit=0.4, about="corner"), lambda image, s: affine(image, shear=(0.4 * s, 0), center=[0, 0])),
        (ShearY(limit=0.4, about="corner"), lambda image, s: affine(image, shear=(0, 0.4 * s), center=[0, 0])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Operation) else "",
)
def test_affine_operations_match_torchvision(operation: Operation, reference: Callable[..., Tensor]) -> None:
    images = pictures(6, 3, 16, 21)
    out = run([operation], images, strength=STRENGTHS, sign=SIGNS)
    for image, got, strength in zip(images, out, (STRENGTHS * SIGNS).tolist(), strict=True):
        want = reference(image.float(), strength)
        assert (got - want).abs().max() < TOLERANCE
        if strength:
            assert (got - image).abs().max() > 10


def test_a_stretch_is_the_perspective_transform_of_the_corners() -> None:
    images = pictures(2, 3, 20, 20)
    out = run([Stretch(factor=2.0)], images, strength=0.5)
    factor = math.sqrt(2.0)
    start = [[0, 0], [20, 0], [20, 20], [0, 20]]
    end = [[10 + (x - 10) * factor, 10 + (y - 10) / factor] for x, y in start]
    want = vision.perspective(images.float(), start, end, interpolation=BILINEAR)
    # the transform is estimated by least squares in float32, and pixel centres are half a pixel off the corners
    inner = (slice(None), slice(None), slice(4, 16), slice(2, 18))
    assert (out[inner] - want[inner]).abs().max() < 0.5
    assert (out[inner] - images[inner]).abs().mean() > 10


@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.6, 1.0])
def test_a_lens_displaces_by_the_cube_of_the_radius(strength: float) -> None:
    images = pictures(2, 3, 18, 24)
    out = run([Lens(limit=0.5)], images, strength=abs(strength), sign=1.0 if strength > 0 else -1.0)
    y, x = torch.meshgrid(torch.arange(18) - 8.5, torch.arange(24) - 11.5, indexing="ij")
    cubic = 0.5 * strength * (x**2 + y**2) / (9**2 + 12**2)
    displacement = torch.stack([x * cubic / 12, y * cubic / 9], -1)[None]
    want = vision.elastic(images.float(), displacement, interpolation=BILINEAR)
    assert (out - want).abs().max() < TOLERANCE


def test_a_barrel_bends_outwards_and_a_pincushion_inwards() -> None:
    line = torch.zeros(2, 1, 33, 33)
    line[:, :, 4] = 255.0  # above the centre
    out = run([Lens(limit=0.4)], line, strength=1.0, sign=torch.tensor([1.0, -1.0]))
    rows = torch.arange(33.0)[:, None]
    height = (out[:, 0] * rows).sum(1) / out[:, 0].sum(1)
    assert height[0, 16] < height[0, 24]  # the middle of the line is farther from the centre than its ends
    assert height[1, 16] > height[1, 24]


def test_reflection_matches_padding() -> None:
    images = pictures(3, 3, 16, 16)
    out = run([Rotate(degrees=30.0)], images, strength=1.0, border="reflect")
    padded = torch.nn.functional.pad(images.float(), (12,) * 4, mode="reflect")
    want = affine(padded, angle=30.0)[:, :, 12:-12, 12:-12]
    assert (out - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("border", ["zero", "reflect"])
def test_flips_and_crops_within_a_warp_stay_exact(border: str) -> None:
    images = pictures(64, 3, 12, 10)
    exact = run([PadCrop(padding=3), HorizontalFlip(p=0.5)], images, border=border)  # type: ignore[arg-type]
    warped = run(
        [PadCrop(padding=3), HorizontalFlip(p=0.5), Rotate(degrees=0.0)],
        images,
        border=border,  # type: ignore[arg-type]
    )
    assert (warped - exact).abs().max() < TOLERANCE


def test_one_warp_equals_sequential_warps_up_to_interpolation() -> None:
    images = smooth_pictures(8, 3, 48, 40)
    chain: list[Operation] = [
        TranslateX(limit=0.1),
        Rotate(degrees=20.0),
        Lens(limit=0.2),
        ShearX(limit=0.2, about="centre"),
        Stretch(factor=1.2),
        Scale(factor=1.2),
        Lens(limit=0.1),
    ]
    strength = torch.linspace(0.2, 1.0, 8)
    at_once = run(chain, images, strength=strength)
    after_another = images
    for operation in chain:
        after_another = run([operation], after_another, strength=strength)
    inner = (slice(None), slice(None), slice(16, 32), slice(14, 26))  # never black
    difference = (at_once - after_another)[inner].abs()
    assert difference.mean() < 0.7 and difference.max() < 4
    assert (at_once - images)[inner].abs().mean() > 10
    reverse = run(chain[::-1], images, strength=strength)
    assert (at_once - reverse)[inner].abs().mean() > 2  # the order counts


def test_drawn_parameters_have_their_distributions() -> None:
    shape = (3, 20, 30)
    angle = torch.rad2deg(torch.atan2(*matrix(Rotate(degrees=25.0), 4000, shape)[:, 0, :2].flip(1).unbind(1)))
    drawn = {
        "rotate": angle / 25,
        "translate_x": matrix(TranslateX(limit=0.2), 4000, shape)[:, 0, 2] / 6,
        "translate_y": matrix(TranslateY(limit=0.2), 4000, shape)[:, 1, 2] / 4,
        "scale": matrix(Scale(factor=1.5), 4000, shape)[:, 0, 0].log() / math.log(1.5),
        "stretch": matrix(Stretch(factor=1.5), 4000, shape)[:, 1, 1].log() / math.log(1.5),
        "shear": matrix(ShearX(limit=0.3, about="centre"), 4000, shape)[:, 0, 1] / 0.3,
    }
    for name, values in drawn.items():
        assert scipy.stats.kstest(values.numpy(), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3, name


# -- alternating flip


def test_alternating_flip_shows_both_orientations_in_two_epochs() -> None:
    def mirrored(indices: Tensor, epoch: int) -> Tensor:
        draws = Draws(generator("cpu", epoch), len(indices), indices=indices, epoch=epoch)
        (step,) = AlternatingFlip().plan(draws, (3, 8, 8))
        assert isinstance(step, Affine) and step.exact
        assert isinstance(step.xx, Tensor)
        return step.xx == -1

    indices = torch.arange(10000)
    first, second, third = (mirrored(indices, epoch) for epoch in range(3))
    assert torch.equal(first, ~second) and torch.equal(first, third)
    assert abs(first.float().mean() - 0.5) < 0.02
    assert abs((first[1:] == first[:-1]).float().mean() - 0.5) < 0.02  # neighbours are unrelated
    assert torch.equal(mirrored(indices.flip(0), 0), first.flip(0))  # the index decides, not the place in the batch


def test_alternating_flip_requires_indices() -> None:
    with pytest.raises(ValueError, match="indices and the epoch"):
        AlternatingFlip().plan(Draws(generator("cpu", 0), 4), (3, 8, 8))
