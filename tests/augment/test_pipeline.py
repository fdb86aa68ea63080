from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.augment import (
    Draws,
    GaussianNoise,
    HorizontalFlip,
    Operation,
    PadCrop,
    PCAColour,
    Pipeline,
    RandAugment,
    RandomCrop,
    RandomErase,
    RandomMix,
)
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.config.schema import component
from dlopt.data.samples import InMemory
from tests.augment.helpers import apply, in_memory, pictures
from tests.support.choices import files


def call(pipeline: Pipeline, images: Tensor, seed: int = 0) -> Tensor:
    targets = torch.arange(len(images))
    out, same = apply(pipeline, images, targets, seed)
    assert torch.equal(same, targets)
    return out


def windows(image: Tensor, padding: int, border: str, flip: bool) -> list[Tensor]:
    """Returns all windows of a padded crop, by slicing."""
    mode = {"zero": "constant", "reflect": "reflect"}[border]
    padded = F.pad(image[None].float(), (padding,) * 4, mode=mode)[0].to(image.dtype)
    height, width = image.shape[1:]
    found = [padded[:, y : y + height, x : x + width] for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    return [window.flip(-1) if flip else window for window in found]


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 9, 12), (1, 8, 8)])
def test_crop_and_flip_copy_pixels_exactly(
    border: Literal["zero", "reflect"], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    images = pictures(200, *shape).to(dtype)
    pipeline = Pipeline(operations=[PadCrop(padding=3), HorizontalFlip(p=0.5)], border=border, input_shape=shape)
    out = call(pipeline, images)
    assert out.dtype == dtype and out.shape == images.shape
    seen = []
    for before, after in zip(images, out, strict=True):
        plain = [torch.equal(after, window) for window in windows(before, 3, border, flip=False)]
        mirrored = [torch.equal(after, window) for window in windows(before, 3, border, flip=True)]
        assert sum(plain) + sum(mirrored) >= 1
        seen.append((plain + mirrored).index(True))
    assert len(set(seen)) > 60  # of 98


def test_a_flip_is_torch_flip() -> None:
    images = pictures(4, 3, 5, 6)
    always = Pipeline(operations=[HorizontalFlip(p=1.0)], border="zero", input_shape=(3, 5, 6))
    never = Pipeline(operations=[HorizontalFlip(p=0.0)], border="zero", input_shape=(3, 5, 6))
    assert torch.equal(call(always, images), images.flip(-1))
    assert torch.equal(call(never, images), images)


def test_crops_and_flips_are_drawn_evenly() -> None:
    position = torch.zeros(20000, 1, 5, 5, dtype=torch.uint8)
    position[:, 0, 2, 1] = 1
    crops = call(Pipeline(operations=[PadCrop(padding=1)], border="zero", input_shape=(1, 5, 5)), position)
    counts = crops.sum((0, 1)).float()
    assert counts[1:4, 0:3].sum() == 20000
    assert (counts[1:4, 0:3] / 20000 - 1 / 9).abs().max() < 5 * (1 / 9 * 8 / 9 / 20000) ** 0.5
    flips = call(Pipeline(operations=[HorizontalFlip(p=0.3)], border="zero", input_shape=(1, 5, 5)), position)
    assert abs(flips[:, 0, 2, 3].float().mean() - 0.3) < 5 * (0.3 * 0.7 / 20000) ** 0.5


def test_without_operations_returns_the_batch_unchanged() -> None:
    images = torch.randn(4, 7)
    out = call(Pipeline(operations=[], border="zero", input_shape=(7,)), images)
    assert out is images


@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_sharding_gives_the_same_samples(cuts: list[int], seed: int) -> None:
    images = pictures(12, 3, 8, 8)
    pipeline = Pipeline(operations=[PadCrop(padding=4), HorizontalFlip(p=0.5)], border="zero", input_shape=(3, 8, 8))
    whole = call(pipeline, images, seed)
    edges = [0, *sorted(cuts), 12]
    parts = [apply(pipeline, images, torch.zeros(12), seed, slice(a, b))[0] for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_rejects_vectors_and_foreign_operations() -> None:
    with pytest.raises(UserError, match="use augmentation=none"):
        Pipeline(operations=[HorizontalFlip(p=0.5)], border="zero", input_shape=(64,))
    with pytest.raises(UserError, match="use augmentation=none"):
        PCAColour(std=0.1, train=in_memory(torch.zeros(5, 64)))
    strange: list[Operation] = [torch.nn.ReLU()]  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"augmentation\.operations\.0: ReLU"):
        Pipeline(operations=strange, border="zero", input_shape=(3, 8, 8))


@pytest.mark.parametrize(("low", "high", "fits"), [(0.0, 1.0, False), (-1.0, 2.0, False), (0.0, 200.0, True)])
def test_operations_in_grey_levels_need_images_in_0_to_255(low: float, high: float, fits: bool) -> None:
    """RandAugment rounds pixels: images in 0..1 would become black and white, or noise."""
    train = InMemory(torch.linspace(low, high, 64).view(1, 1, 8, 8), torch.zeros(1))
    flip, erase = HorizontalFlip(p=0.5), RandomErase(p=1.0, area=(0.1, 0.2), ratio=(1.0, 1.0), fill="mean", train=train)
    Pipeline(operations=[flip, erase], border="zero", input_shape=(1, 8, 8), train=train)
    noise = RandomErase(p=1.0, area=(0.1, 0.2), ratio=(1.0, 1.0), fill="random", train=train)
    nested = RandomMix(n=1, operations=[RandAugment(n=1, magnitude=9)])
    for operation in (noise, nested, PCAColour(std=0.1, train=train), GaussianNoise(std=1.0)):
        operations = [flip, operation]
        if fits:
            Pipeline(operations=operations, border="zero", input_shape=(1, 8, 8), train=train)
            continue
        with pytest.raises(UserError, match=r"operations\.1: \w+ needs images with values 0\.\.255"):
            Pipeline(operations=operations, border="zero", input_shape=(1, 8, 8), train=train)


def test_rejects_a_shard_of_another_length() -> None:
    pipeline = Pipeline(operations=[HorizontalFlip(p=0.5)], border="zero", input_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="4 samples"):
        pipeline(pictures(4, 3, 8, 8), torch.zeros(4), generator=generator("cpu", 0), total=8, shard=slice(0, 3))


# -- the ready pipelines

CHOICES = files("augmentation")


def ready(path: Path, images: Tensor) -> Pipeline:
    node: Any = yaml.safe_load(path.read_text())
    if path.stem == "alexnet":
        node["operations"][0]["size"] = 6  # the images are smaller than the paper's crops
    checked = component("augmentation", node, ("input_shape", "classes", "train"), ("dlopt",))
    pipeline = checked.build(input_shape=tuple(images.shape[1:]), classes=10, train=in_memory(images))
    assert isinstance(pipeline, Pipeline)
    return pipeline


def test_all_choices_are_there() -> None:
    assert {path.stem for path in CHOICES} >= {
        *("none", "flip", "crop_flip", "affine", "photometric", "noise", "lens", "imagenet", "inception", "random_mix"),
        *("randaugment", "trivialaugment", "erasing", "mixup", "cutmix", "alternating_flip"),
    }
    assert all(path.read_text().startswith("# ") for path in CHOICES)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 7)], ids=["colour", "grey"])
@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_each_choice_shards_repeats_and_keeps_the_range(path: Path, shape: tuple[int, int, int]) -> None:
    images, targets = pictures(12, *shape), torch.arange(12) % 10
    pipeline = ready(path, images)

    def part(a: int, b: int, seed: int) -> tuple[Tensor, Tensor]:
        return apply(pipeline, images, targets, seed, slice(a, b))

    inputs, labels = part(0, 12, 1)
    assert tuple(inputs.shape[1:]) == pipeline.output_shape and len(inputs) == len(labels) == 12
    assert inputs.dtype in (torch.uint8, torch.float32)
    assert inputs.min() >= 0 and inputs.max() <= 255 and inputs.float().std() > 1
    again = part(0, 12, 1)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], labels)
    if path.stem != "none":
        assert not torch.equal(part(0, 12, 2)[0], inputs)
    for edges in ((0, 6, 12), (0, 2, 4, 12), (0, 0, 10, 12)):
        parts = [part(a, b, 1) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat([each[0] for each in parts]), inputs)
        assert torch.equal(torch.cat([each[1] for each in parts]), labels)


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_autocast_changes_nothing(path: Path) -> None:
    images = pictures(4, 3, 32, 32)
    pipeline = ready(path, images)

    plain, _ = apply(pipeline, images, torch.zeros(4, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(pipeline, images, torch.zeros(4, dtype=torch.long))[0], plain)


class HostReads(TorchDispatchMode):
    """Counts operations that synchronize with a device: reading values, creating tensors from Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_no_host_transfers_after_the_first_step(path: Path) -> None:
    images = pictures(4, 3, 32, 32)
    pipeline = ready(path, images)
    for step in range(2):
        draws = Draws(generator("cpu", step), 4, indices=torch.arange(4), epoch=0)
        with HostReads() as reads:
            pipeline.apply(images, torch.zeros(4, dtype=torch.long), draws)
    assert reads.count == 0
    with HostReads() as reads:
        torch.tensor([1.0]).item()
    assert reads.count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_gpu_never_synchronizes_and_sharding_does_not_matter(path: Path) -> None:
    images, targets = pictures(12, 3, 32, 32), torch.arange(12, device="cuda") % 10
    pipeline, images = ready(path, images), images.cuda()

    whole, _ = apply(pipeline, images, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = [apply(pipeline, images, targets, 0, part)[0] for part in (slice(0, 4), slice(4, 12))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cat(parts).float() - whole.float()).abs().max() < 1e-3


def test_a_change_of_size_precedes_random_boxes() -> None:
    train = InMemory(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    erase = RandomErase(p=1.0, area=(0.1, 0.3), ratio=(0.5, 2.0), fill="random", train=train)
    crop = RandomCrop(size=6)
    assert Pipeline(operations=[crop, erase], border="zero", input_shape=(1, 8, 8)).output_shape == (1, 6, 6)
    with pytest.raises(
        UserError, match=r"augmentation.operations.1: RandomCrop changes the image size; list it before"
    ):
        Pipeline(operations=[erase, crop], border="zero", input_shape=(1, 8, 8))
