"""Affine maps with per-sample (tensor) and constant (number) entries."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlopt.augment.warp import Affine, warp

SAMPLES = 3
NAMES = ("xx", "xy", "dx", "yx", "yy", "dy")
CPU = torch.device("cpu")


def matrix(step: Affine) -> Tensor:
    """Returns the homogeneous matrices [3, 3, 3], float64."""
    last = torch.tensor([0.0, 0.0, 1.0]).expand(SAMPLES, 1, 3)
    return torch.cat([step.matrix(SAMPLES, CPU), last], 1).double()


@st.composite
def maps(draw: st.DrawFn) -> Affine:
    """Draws maps with some entries per sample; the others are the identity's or one number for all samples."""
    numbers = st.floats(-4, 4, width=32)
    entries: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        each = draw(st.lists(numbers, min_size=SAMPLES, max_size=SAMPLES))
        entries[name] = torch.tensor(each) if draw(st.booleans()) else each[0]
    return Affine((5, 7), **entries)


@given(maps(), maps(), maps())
def test_composed_maps_are_matrix_products(a: Affine, b: Affine, c: Affine) -> None:
    torch.testing.assert_close(matrix(a.compose(b)), matrix(a) @ matrix(b), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matrix(a.compose(b.compose(c))), matrix(a.compose(b).compose(c)), rtol=1e-5, atol=1e-3)


@given(maps())
def test_composing_with_the_identity_keeps_entries(step: Affine) -> None:
    identity = Affine((5, 7))
    for composed in (identity.compose(step), step.compose(identity)):
        for name in NAMES:
            mine, its = getattr(composed, name), getattr(step, name)
            assert mine is its or (not isinstance(its, Tensor) and mine == its)


@given(maps(), st.lists(st.booleans(), min_size=SAMPLES, max_size=SAMPLES))
def test_masked_maps_change_only_some_samples(step: Affine, chosen: list[bool]) -> None:
    mask = torch.tensor(chosen)
    got = step.masked(mask)
    assert torch.equal(matrix(got)[mask], matrix(step)[mask])
    assert torch.equal(matrix(got)[~mask], matrix(Affine((5, 7)))[~mask])
    for name in NAMES:  # what is the identity's stays a number
        if not isinstance(its := getattr(step, name), Tensor) and its == getattr(Affine((5, 7)), name):
            assert getattr(got, name) == its


@given(maps())
def test_shard_of_the_samples(step: Affine) -> None:
    assert torch.equal(step.shard(slice(1, 3)).matrix(2, CPU), step.matrix(SAMPLES, CPU)[1:3])


def test_identity_maps_do_not_change_the_images() -> None:
    images = torch.randint(256, (4, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(warp(images, [Affine((5, 7), exact=True)], "zero"), images)
    assert torch.equal(warp(images, [Affine((5, 7), exact=True)], "reflect"), images)
    torch.testing.assert_close(warp(images, [Affine((5, 7))], "reflect"), images.float(), rtol=0, atol=1e-3)
    moved = warp(images, [Affine((5, 7), dx=2.0, exact=True)], "zero")
    assert torch.equal(moved[..., :5], images[..., 2:]) and not moved[..., 5:].any()
