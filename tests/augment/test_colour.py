import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from dlopt.augment import Brightness, Contrast, Draws, Operation, PCAColour, Saturation
from dlopt.augment.colour import Colour, colour_statistics
from dlopt.basics.random import generator
from tests.augment.helpers import SIGNS, STRENGTHS, in_memory, pictures, run, smooth_pictures

FACTORS = (1 + 0.8 * STRENGTHS * SIGNS).tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (Brightness(limit=0.8), vision.adjust_brightness),
        (Contrast(limit=0.8), vision.adjust_contrast),
        (Saturation(limit=0.8), vision.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_each_matches_torchvision(operation: Operation, reference, channels: int) -> None:  # type: ignore[no-untyped-def]
    """On float images within 0.02 of 255; on uint8 within 2, as torchvision rounds in between."""
    images = pictures(6, channels, 9, 11)
    out = run([operation], images, strength=STRENGTHS, sign=SIGNS)
    for image, got, factor in zip(images, out, FACTORS, strict=True):
        assert (got - 255 * reference(image / 255, factor)).abs().max() < 0.02
        assert (got - reference(image, factor).float()).abs().max() <= 2


def test_composed_transform_equals_sequential_transforms() -> None:
    images = smooth_pictures(6, 3, 12, 12) * 0.5 + 64  # no intermediate result leaves 0..255
    chain: list[Operation] = [Contrast(limit=0.3), Brightness(limit=0.2), Saturation(limit=0.4), Contrast(limit=0.2)]
    out = run(chain, images, strength=STRENGTHS, sign=SIGNS)
    factors = [1 + limit * STRENGTHS * SIGNS for limit in (0.3, 0.2, 0.4, 0.2)]
    for i, image in enumerate(images):
        want = vision.adjust_contrast(image / 255, factors[0][i].item())
        want = vision.adjust_brightness(want, factors[1][i].item())
        want = vision.adjust_saturation(want, factors[2][i].item())
        want = vision.adjust_contrast(want, factors[3][i].item())
        assert (out[i] - 255 * want).abs().max() < 0.05


@pytest.mark.parametrize("with_mean", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("with_offset", [(True, True), (True, False), (False, True), (False, False)])
def test_any_two_transforms_compose(with_mean: tuple[bool, bool], with_offset: tuple[bool, bool]) -> None:
    numbers = torch.Generator().manual_seed(0)

    def transform(mean: bool, offset: bool) -> Colour:
        def random(columns: int, size: float) -> Tensor:
            return (torch.rand(5, 3, columns, generator=numbers) - 0.5) * size

        return Colour(
            torch.eye(3) * 0.9 + random(3, 0.1), random(3, 0.2) if mean else None, random(1, 20) if offset else None
        )

    first, second = (transform(*kinds) for kinds in zip(with_mean, with_offset, strict=True))
    images = torch.rand(5, 3, 4, 6, generator=numbers) * 50 + 100
    composed = first.compose(second).apply(images)
    assert composed.min() > 1 and composed.max() < 254
    assert (composed - second.apply(first.apply(images))).abs().max() < 1e-3
    assert (composed - first.apply(second.apply(images))).abs().max() > 0.1


def test_all_colour_operations_are_one_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = []
    original = Colour.apply

    def counting(self: Colour, images: Tensor) -> Tensor:
        applied.append(self)
        return original(self, images)

    monkeypatch.setattr(Colour, "apply", counting)
    images = pictures(4, 3, 8, 8)
    pca = PCAColour(std=0.1, train=in_memory(images))
    run([Contrast(limit=0.3), Brightness(limit=0.2), Saturation(limit=0.4), pca], images)
    assert len(applied) == 1


def test_factors_are_uniform() -> None:
    grey = torch.full((4000, 1, 1, 1), 100.0)
    out = run([Brightness(limit=0.4)], grey)[:, 0, 0, 0].numpy()
    assert scipy.stats.kstest(out, scipy.stats.uniform(60, 80).cdf).pvalue > 1e-3


def test_statistics_match_numpy_over_several_chunks() -> None:
    images = smooth_pictures(1100, 3, 6, 5).to(torch.uint8)
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    mean, covariance = colour_statistics(in_memory(images))
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(pixels, bias=True), rtol=1e-9, atol=1e-12)


class OneComponent(Draws):
    """Draws that give sample i the i-th component only."""

    def normal(self, *shape: int) -> Tensor:
        return torch.eye(self.total)


def test_pca_offsets_match_numpys_eigenvectors_times_eigenvalues() -> None:
    images = smooth_pictures(50, 3, 8, 8) * torch.tensor([1.0, 0.7, 0.3])[:, None, None]
    pixels = (images / 255).double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    values, vectors = np.linalg.eigh(np.cov(pixels, bias=True))
    operation = PCAColour(std=0.1, train=in_memory(images))
    (step,) = operation.plan(OneComponent(generator("cpu", 0), 3), (3, 8, 8))
    assert isinstance(step, Colour)
    grey = torch.full((3, 3, 2, 2), 128.0)
    offsets = (step.apply(grey) - grey)[:, :, 0, 0].numpy()
    for i in range(3):
        want = 255 * 0.1 * values[i] * vectors[:, i]
        assert abs(want).max() > 1e-3
        sign = np.sign(want @ offsets[i])  # an eigenvector's sign is free
        np.testing.assert_allclose(offsets[i], sign * want, atol=1e-4)


def test_pca_offsets_have_their_covariance() -> None:
    train = in_memory(smooth_pictures(50, 3, 8, 8))
    grey = torch.full((20000, 3, 1, 1), 128.0)
    offsets = run([PCAColour(std=0.1, train=train)], grey)[:, :, 0, 0] - 128
    covariance = colour_statistics(train)[1].numpy()
    want = (0.1 * 255) ** 2 * covariance @ covariance  # P L (P L)' for a covariance P L P'
    np.testing.assert_allclose(np.cov(offsets.numpy().T), want, atol=0.05 * abs(want).max())


def test_pca_works_on_one_channel() -> None:
    images = smooth_pictures(20, 1, 8, 8)
    out = run([PCAColour(std=0.5, train=in_memory(images))], images)
    difference = (out - images)[:, 0].flatten(1)
    assert difference.std(1).max() < 0.01 and difference.mean(1).std() > 0.1
