from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from dlopt.augment import AutoContrast, Draws, Equalize, Operation, Posterize, Sharpness, Solarize
from dlopt.augment.operation import FixedStrengthDraws, PixelStep
from dlopt.basics.random import generator
from tests.augment.helpers import SIGNS, STRENGTHS, pictures, run, smooth_pictures


@pytest.mark.parametrize("kind", ["noise", "smooth", "flat"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("operation", "reference", "tolerance"),
    [
        (Posterize(bits=4), lambda image, s, sign: vision.posterize(image, 8 - round(4 * s)), 0),
        (Solarize(limit=1.0), lambda image, s, sign: vision.solarize(image, 255 * (1 - s)), 0),
        (AutoContrast(), lambda image, s, sign: vision.autocontrast(image), 1),  # torchvision truncates
        (Equalize(), lambda image, s, sign: vision.equalize(image), 0),
        (Sharpness(limit=0.9), lambda image, s, sign: vision.adjust_sharpness(image, 1 + 0.9 * s * sign), 1),
    ],
    ids=["posterize", "solarize", "autocontrast", "equalize", "sharpness"],
)
def test_each_matches_torchvision(
    operation: Operation, reference: Callable[..., Tensor], tolerance: int, channels: int, kind: str
) -> None:
    if kind == "noise":
        images = pictures(6, channels, 24, 18)
    elif kind == "smooth":
        images = smooth_pictures(6, channels, 24, 18).to(torch.uint8)
    else:
        images = torch.full((6, channels, 24, 18), 77, dtype=torch.uint8)
    out = run([operation], images, strength=STRENGTHS, sign=SIGNS)
    for image, got, strength, sign in zip(images, out, STRENGTHS.tolist(), SIGNS.tolist(), strict=True):
        assert (got - reference(image, strength, sign).float()).abs().max() <= tolerance


def test_masked_samples_are_not_changed() -> None:
    images = smooth_pictures(4, 3, 8, 8)
    mask = torch.tensor([True, False, True, False])
    for operation in (Posterize(bits=8), Solarize(limit=1.0), AutoContrast(), Equalize(), Sharpness(limit=1.0)):
        (step,) = operation.plan(FixedStrengthDraws(Draws(generator("cpu", 0), 4), 0.9), (3, 8, 8))
        before = images.clone()
        chosen = step.masked(mask)
        assert isinstance(chosen, PixelStep)
        out = chosen.apply(images)
        assert torch.equal(images, before)
        assert torch.equal(out[~mask], images[~mask])
        assert not torch.isclose(out[mask], images[mask]).all()
