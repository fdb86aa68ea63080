import scipy.stats
import torch

from dlopt.augment import GaussianNoise
from dlopt.augment.tone import normals
from dlopt.basics.random import generator
from tests.augment.helpers import run


def test_normals_are_normal() -> None:
    values = normals((1000, 3, 70), generator("cpu", 0))
    assert values.shape == (1000, 3, 70)
    flat = values.double().flatten()
    assert scipy.stats.kstest(flat.numpy(), scipy.stats.norm.cdf).pvalue > 1e-3
    assert abs(flat.mean()) < 5 / len(flat) ** 0.5 and abs(flat.std() - 1) < 0.01
    assert abs(scipy.stats.kurtosis(flat.numpy())) < 0.05 and flat.abs().max() > 4
    for lag in (1, 2, 3, 4, 210):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / len(flat) ** 0.5
    far = flat.abs() > 2  # neighbours are not only uncorrelated: neither are they far out together
    for lag in (1, 2, 3, 4):
        together = (far[lag:] & far[:-lag]).double().mean()
        assert abs(together - far.double().mean() ** 2) < 5 * (0.0455**2 / len(flat)) ** 0.5
    assert torch.equal(values, normals((1000, 3, 70), generator("cpu", 0)))
    assert not torch.equal(values, normals((1000, 3, 70), generator("cpu", 1)))


def test_noise_strength_is_per_sample() -> None:
    grey = torch.full((2000, 3, 16, 16), 128.0)
    added = run([GaussianNoise(std=20.0)], grey) - grey
    assert scipy.stats.kstest(added.flatten(1).std(1).numpy(), scipy.stats.uniform(0, 20).cdf).statistic < 0.05
    assert abs(added.mean()) < 0.1


def test_noise_stays_in_range_and_does_not_change_the_input() -> None:
    images = torch.tensor([0.0, 255.0, 128.0]).view(3, 1, 1, 1).expand(3, 1, 20, 20).contiguous()
    before = images.clone()
    out = run([GaussianNoise(std=100.0)], images, strength=1.0)
    assert out.min() == 0 and out.max() == 255 and torch.equal(images, before)
