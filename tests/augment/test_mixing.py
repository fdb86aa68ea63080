from itertools import pairwise

import scipy.stats
import torch
from torch import Tensor

from dlopt.augment import CutMix, Draws, Mixup, Operation, Pipeline
from dlopt.basics.random import generator


def mixed(
    operations: list[Operation], images: Tensor, targets: Tensor, total: int | None = None, start: int = 0
) -> tuple[Tensor, Tensor]:
    pipeline = Pipeline(operations=operations, border="zero", input_shape=tuple(images.shape[1:]))
    return pipeline(
        images,
        targets,
        generator=generator("cpu", 0),
        total=total or len(images),
        shard=slice(start, start + len(images)),
    )


def numbered(n: int, height: int = 8, width: int = 8) -> Tensor:
    """Returns images whose pixels all equal the image's index."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, height, width).contiguous()


def test_mixup_weights_labels_as_images() -> None:
    labels = torch.arange(100)
    images, targets = mixed([Mixup(alpha=1.0, p=1.0, classes=100)], numbered(100), labels)
    assert targets.shape == (100, 100) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(100))
    partners = labels ^ 1
    share = targets.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(targets.gather(1, partners[:, None])[:, 0], 1 - share)
    want = share * labels + (1 - share) * partners
    assert torch.allclose(images, want.view(-1, 1, 1, 1).expand_as(images), atol=1e-4)


def test_cutmix_weights_labels_by_area_and_copies_pixels() -> None:
    labels = torch.arange(200)
    images, targets = mixed([CutMix(alpha=1.0, p=1.0, classes=200)], numbered(200, 9, 14), labels)
    assert images.dtype == torch.uint8
    own = (images == labels.view(-1, 1, 1, 1)).float().mean((1, 2, 3))
    others = (images == (labels ^ 1).view(-1, 1, 1, 1)).float().mean((1, 2, 3))
    assert torch.allclose(own + others, torch.ones(200))
    assert torch.allclose(targets.gather(1, labels[:, None])[:, 0], own, atol=1e-6)
    assert torch.allclose(targets.gather(1, labels[:, None] ^ 1)[:, 0], others, atol=1e-6)
    assert 0.5 < own.mean() < 0.9 and own.unique().numel() > 30


def test_cutmix_pastes_one_box_at_the_same_position() -> None:
    canvas = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    canvas[1::2] += 100
    images, _ = mixed([CutMix(alpha=1.0, p=1.0, classes=2)], canvas, torch.zeros(40, dtype=torch.long))
    pasted = (images != canvas)[:, 0]
    assert torch.equal(images, torch.where(pasted[:, None], canvas[torch.arange(40) ^ 1], canvas))
    for box in pasted:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # without a gap


def test_regression_targets_are_mixed_as_numbers() -> None:
    numbers = torch.rand(10, 3)
    images, targets = mixed([Mixup(alpha=1.0, p=1.0, classes=None)], numbered(10), numbers)
    odd = torch.arange(10) ^ 1
    share = ((images[:, 0, 0, 0] - odd) / (torch.arange(10) - odd))[:, None]
    assert torch.allclose(targets, share * numbers + (1 - share) * numbers[odd], atol=1e-4)


def test_mixing_weights_are_beta_distributed() -> None:
    for alpha in (0.2, 1.0, 3.0):
        shares = Draws(generator("cpu", 0), 4000).beta(alpha)
        assert scipy.stats.kstest(shares.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_p_is_the_fraction_of_mixed_samples() -> None:
    for operation in (Mixup(alpha=1.0, p=0.25, classes=2), CutMix(alpha=1.0, p=0.25, classes=2)):
        _, targets = mixed([operation], numbered(4000, 32, 32), torch.arange(4000) % 2)
        assert abs((targets.amax(1) < 1).float().mean() - 0.25) < 0.04


def test_even_shards_mix_the_same_and_odd_ones_skip_the_edges() -> None:
    operations: list[Operation] = [Mixup(alpha=1.0, p=1.0, classes=10), CutMix(alpha=1.0, p=1.0, classes=10)]
    images, labels = numbered(10), torch.arange(10)
    whole = mixed(operations, images, labels)
    for edges in ((0, 4, 10), (0, 2, 2, 8, 10)):
        parts = [mixed(operations, images[a:b], labels[a:b], 10, a) for a, b in pairwise(edges)]
        for got, want in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(got), want)
    first = mixed(operations, images[:5], labels[:5], 10, 0)
    assert torch.equal(first[0][:4], whole[0][:4]) and torch.equal(first[1][:4], whole[1][:4])
    assert (first[0][4] == 4).all() and first[1][4, 4] == 1


def test_last_sample_of_an_odd_batch_is_not_mixed() -> None:
    images, targets = mixed([Mixup(alpha=1.0, p=1.0, classes=5)], numbered(5), torch.arange(5))
    assert (images[4] == 4).all() and targets[4, 4] == 1
