import pytest
import torch
import torchvision.transforms.v2 as v2
from torch import Tensor

from dlopt.augment import (
    Brightness,
    CutMix,
    Draws,
    GaussianNoise,
    HorizontalFlip,
    Lens,
    Operation,
    PadCrop,
    RandAugment,
    RandomMix,
    RandomScaleCrop,
    Rotate,
    TrivialAugment,
)
from dlopt.augment.operation import DrawnStep
from dlopt.augment.warp import Affine
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from tests.augment.helpers import pictures, run, smooth_pictures

NAMES = [
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "level"),
    [
        (RandAugment(n=2, magnitude=6), v2.RandAugment(2, 6, 31), 6),
        (RandAugment(n=2, magnitude=30), v2.RandAugment(2, 30, 31), 30),
        (TrivialAugment(), v2.TrivialAugmentWide(31), 30),
    ],
    ids=["randaugment", "randaugment-strongest", "trivialaugment"],
)
@pytest.mark.parametrize("name", NAMES)
def test_operations_and_ranges_match_torchvision(
    ours: RandAugment | TrivialAugment, theirs: v2.RandAugment | v2.TrivialAugmentWide, level: int, name: str
) -> None:
    """Within 2 of 255 (torchvision rounds in between, and spreads what it rounded)."""
    assert set(theirs._AUGMENTATION_SPACE) == {"Identity", *NAMES}
    image = smooth_pictures(1, 3, 331, 331).to(torch.uint8)  # translations are whole pixels at this size
    choices = {type(choice).__name__: choice for choice in ours.choices((3, 331, 331))}
    assert len(choices) == len(NAMES)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    values = magnitudes(31, 331, 331)
    magnitude = 0.0 if values is None else float(values[level])
    for sign in (1.0, -1.0) if signed else (1.0,):
        want = theirs._apply_image_or_video_transform(
            image[0], name, sign * magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill={torch.Tensor: None}
        )
        choice = choices["Saturation" if name == "Color" else name]
        mirrored = name == "Rotate"  # counter-clockwise there
        got = run([choice], image, strength=level / 30, sign=-sign if mirrored else sign)[0]
        assert (got - want.float()).abs().max() <= 2


def moves(step: DrawnStep) -> Tensor:
    """Returns [n]: the samples whose map is not the identity."""
    assert isinstance(step, Affine)
    drawn = next(each for each in (step.xx, step.xy, step.dx, step.yx, step.dy) if isinstance(each, Tensor))
    return (step.matrix(len(drawn), drawn.device) != torch.eye(3)[:2]).flatten(1).any(1)


def chosen(steps: list[DrawnStep]) -> Tensor:
    """Returns [operations, n]: the samples that each step changes."""
    masks = []
    for step in steps:
        if isinstance(step, Affine):
            masks.append(moves(step))
        elif hasattr(step, "mask"):
            masks.append(step.mask)
        else:
            masks.append((step.matrix != torch.eye(3)).flatten(1).any(1))  # type: ignore[attr-defined]
    return torch.stack(masks)


@pytest.mark.parametrize("operation", [RandAugment(n=2, magnitude=9), TrivialAugment()])
def test_every_operation_is_equally_likely(operation: RandAugment | TrivialAugment) -> None:
    steps = operation.plan(Draws(generator("cpu", 0), 7000), (3, 32, 32))
    counts = chosen(steps).view(operation.n, 13, 7000)
    assert counts.sum(1).max() <= 1  # one per slot
    share = counts.float().mean(2)
    tolerance = 5 * (1 / 14 / 7000) ** 0.5
    # of TrivialAugment's strengths one in 31 is zero, which changes nothing
    assert (share - 1 / 14).abs().max() < tolerance + 1 / 14 / 31
    if operation.n == 2:
        both = torch.einsum("in,jn->ij", counts[0].float(), counts[1].float()) / 7000
        assert (both - 1 / 196).abs().max() < 5 * (1 / 196 / 7000) ** 0.5


def test_signs_and_strengths_of_the_choices() -> None:
    trivial = TrivialAugment().plan(Draws(generator("cpu", 0), 20000), (3, 32, 32))[2]
    assert isinstance(trivial, Affine)
    shifts = trivial.dx
    assert isinstance(shifts, Tensor)
    moved = shifts[shifts != 0]
    assert set((moved.abs() * 30 / 32).round().int().tolist()) == set(range(1, 31))
    assert abs((moved > 0).float().mean() - 0.5) < 0.1
    rand = RandAugment(n=1, magnitude=15).plan(Draws(generator("cpu", 0), 2000), (3, 32, 32))[2]
    assert isinstance(rand, Affine)
    assert isinstance(rand.dx, Tensor)
    assert torch.allclose(rand.dx.abs().unique(), torch.tensor([0.0, 0.5 * 32 * 150 / 331]))


def test_a_random_mix_applies_n_of_them() -> None:
    operations: list[Operation] = [
        PadCrop(padding=2),
        Rotate(degrees=30.0),
        Brightness(limit=0.5),
        Lens(limit=0.3),
        GaussianNoise(std=20.0),
    ]
    steps = RandomMix(n=2, operations=operations).plan(Draws(generator("cpu", 0), 5000), (3, 16, 16))
    crop, turn, light, lens, noise = steps
    changes = torch.stack(
        [
            moves(crop),
            moves(turn),
            (light.matrix != torch.eye(3)).flatten(1).any(1),  # type: ignore[attr-defined]
            lens.strength != 0,  # type: ignore[attr-defined]
            noise.std != 0,  # type: ignore[attr-defined]
        ]
    )
    assert changes.sum(0).max() == 2
    assert (changes[1:].float().mean(1) - 0.4).abs().max() < 0.04
    assert abs(changes[0].float().mean() - 0.4 * 24 / 25) < 0.04  # one of the 25 shifts is none
    pairs = torch.einsum("in,jn->ij", changes[1:].float(), changes[1:].float()) / 5000
    assert (pairs[~torch.eye(4, dtype=torch.bool)] - 0.1).abs().max() < 0.025  # two of five: 2/5 * 1/4


def test_random_mix_of_all_applies_all() -> None:
    images = pictures(6, 3, 10, 10)
    operations: list[Operation] = [Rotate(degrees=30.0), Brightness(limit=0.5), CutMix(alpha=1.0, p=1.0, classes=3)]
    assert torch.equal(
        run([RandomMix(n=3, operations=operations)], images, strength=0.7), run(operations, images, strength=0.7)
    )


def test_flips_and_crops_in_a_random_mix_stay_exact() -> None:
    images = pictures(50, 3, 10, 10)
    out = run([RandomMix(n=1, operations=[PadCrop(padding=2), HorizontalFlip(p=1.0)])], images)
    assert out.dtype == torch.uint8
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    assert 10 < flipped.sum() < 40


def test_rejects_impossible_mixes() -> None:
    with pytest.raises(UserError, match="n=3: more than the 1"):
        RandomMix(n=3, operations=[HorizontalFlip(p=0.5)])
    with pytest.raises(UserError, match="RandomScaleCrop changes the image size"):
        run([RandomMix(n=1, operations=[RandomScaleCrop(short_side=(16, 20), size=8)])], pictures(2, 3, 10, 10))
