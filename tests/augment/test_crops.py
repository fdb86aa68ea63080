"""Random crops: of images in memory against torchvision, and of whole image files against Pillow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as vision
from PIL import Image
from torch import Tensor

from dlopt.augment import Draws, HorizontalFlip, Pipeline, RandomCrop, RandomResizedCrop, RandomScaleCrop, Rotate
from dlopt.augment.crops import CropReader, ResizingCrop
from dlopt.augment.pipeline import crop_when_reading
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.data.batches import Batches, Delivery
from dlopt.data.images.files import Files, ImageList
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.splits import prepare
from tests.augment.helpers import matrix, pictures, run
from tests.support.data import data_settings

TOLERANCE = 0.01  # of 255, by rounding
CPU = torch.device("cpu")


# -- images in memory


def test_scale_and_crop_is_resize_and_crop() -> None:
    """On noise, at every factor: shrinking is anti-aliased from the first per cent on."""
    images = pictures(5, 3, 60, 75)
    strength = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    out = run([RandomScaleCrop(short_side=(36, 76), size=32)], images, strength=strength, border="reflect")
    assert out.shape == (5, 3, 32, 32)
    for image, got, side in zip(images.float(), out, [36, 46, 56, 66, 76], strict=True):
        resized = vision.resize(image, [side, int(75 * side / 60 + 1e-3)], antialias=True)
        start = [(n - 32 + 1) // 2 for n in resized.shape[1:]]
        want = resized[:, start[0] : start[0] + 32, start[1] : start[1] + 32]
        assert (got - want).abs().max() < TOLERANCE


def test_a_long_side_that_is_rounded_down_is_anti_aliased_too() -> None:
    """From 100 pixels to 66, not 66.67, at a short side of 36: the long side shrinks more than the short one."""
    images, crop = pictures(8, 1, 54, 100), RandomScaleCrop(short_side=(36, 36), size=36)
    out = run([crop], images)
    numbers = crop.draw(Draws(generator("cpu", 0), 8))
    for image, got, (x, y, w, h) in zip(
        images, out, crop.boxes(numbers, torch.tensor(54.0), torch.tensor(100.0)).tolist(), strict=True
    ):
        want = Image.fromarray(image[0].float().numpy()).resize(
            (36, 36), Image.Resampling.BILINEAR, (x, y, x + w, y + h)
        )
        assert (got[0] - torch.from_numpy(np.array(want))).abs().max() < TOLERANCE


def test_scale_and_crop_reaches_every_side_and_place() -> None:
    drawn = matrix(RandomScaleCrop(short_side=(8, 12), size=6), 6000, (3, 8, 8))
    side = 8 / drawn[:, 0, 0]
    for k in range(8, 13):
        chosen = drawn[(side - k).abs() < 1e-3]
        assert abs(len(chosen) / 6000 - 0.2) < 0.03
        start = (chosen[:, :2, 2] * k / 8 - 6 / 2 + k / 2).round().long()
        assert set(start[:, 0].tolist()) == set(start[:, 1].tolist()) == set(range(k - 6 + 1))


@pytest.mark.parametrize("size", [24, 40])
def test_random_resized_crop_is_resized_crop(size: int) -> None:
    images = pictures(40, 3, 40, 56)
    operation = RandomResizedCrop(size=size, scale=(0.2, 0.9), ratio=(0.7, 1.4))
    out = run([operation], images, seed=3, border="reflect")
    drawn = matrix(operation, 40, (3, 40, 56), seed=3)
    assert out.shape == (40, 3, size, size)
    shrinks = []
    for image, got, m in zip(images.float(), out, drawn, strict=True):
        w, h = m[0, 0] * size, m[1, 1] * size
        left, top = m[0, 2] - w / 2 + 28, m[1, 2] - h / 2 + 20
        box = [round(float(value)) for value in (top, left, h, w)]
        assert max(abs(float(a) - b) for a, b in zip((top, left, h, w), box, strict=True)) < 1e-3
        want = vision.resized_crop(image, *box, size=[size, size], antialias=True)
        inner = (slice(None), slice(3, -3), slice(3, -3))  # at the edge torchvision does not see beyond the crop
        assert (got - want)[inner].abs().max() < TOLERANCE
        shrinks.append(float(m[0, 0]))
    assert size == 40 or any(1.05 < shrink < 1.5 for shrink in shrinks)


def test_whole_images_are_resized_as_by_pillow() -> None:
    images = pictures(3, 3, 50, 50)
    flip = HorizontalFlip(p=1.0)
    operation = RandomResizedCrop(size=37, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    out = run([operation, flip], images, border="zero")
    for image, got in zip(images, out, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((37, 37), Image.Resampling.BILINEAR)
        want = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1).flip(2)
        assert (got - want).abs().max() < 1.01  # Pillow rounds to integers, twice


def test_crops_of_rotated_images_are_averaged_too() -> None:
    """A crop and a rotation become one map, which is sampled several times per pixel."""
    checks = torch.zeros(1, 1, 65, 65)
    checks[:, :, ::2, ::2] = checks[:, :, 1::2, 1::2] = 255.0
    out = run([RandomScaleCrop(short_side=(48, 48), size=32), Rotate(degrees=45.0)], checks, strength=1.0)
    assert out[:, :, 8:-8, 8:-8].std() < 30  # 127 without averaging


@pytest.mark.parametrize(("shape", "scale"), [((3, 40, 56), (0.08, 1.0)), ((3, 20, 90), (0.5, 1.0))])
def test_random_resized_crop_draws_as_torchvision(shape: tuple[int, int, int], scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(24, scale=scale)
    image = torch.zeros(shape)
    parameters = [theirs.make_params([image]) for _ in range(3000)]
    ours = matrix(RandomResizedCrop(size=24, scale=scale, ratio=(3 / 4, 4 / 3)), 3000, shape)
    w, h = ours[:, 0, 0] * 24, ours[:, 1, 1] * 24
    left, top = ours[:, 0, 2] - w / 2 + shape[2] / 2, ours[:, 1, 2] - h / 2 + shape[1] / 2
    for key, values in {"width": w, "height": h, "left": left, "top": top}.items():
        expected = [each[key] for each in parameters]
        assert scipy.stats.ks_2samp(values.round().numpy(), expected).pvalue > 1e-3, key


def test_random_crops_copy_pixels_from_every_place() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(1, 1, 5, 6).expand(2000, 1, 5, 6)
    out = run([RandomCrop(size=3)], images)
    assert out.dtype == torch.uint8
    corners, counts = out[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [6 * row + column for row in range(3) for column in range(4)]
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert torch.equal(out[:, 0] - out[:, :, 0, :1], images[0, 0, :3, :3].expand(2000, 3, 3))


def test_rejects_impossible_crop_sizes() -> None:
    with pytest.raises(UserError, match=r"short_side=\[200,480\].*size=224"):
        RandomScaleCrop(short_side=(200, 480), size=224)
    with pytest.raises(UserError, match=r"crops of size=9 do not fit in images of 8x12 pixels"):
        Pipeline(operations=[RandomCrop(size=9)], border="zero", input_shape=(3, 8, 12))


# -- image files

SIZES = [(40, 90), (90, 40), (33, 33), (60, 71), (20, 24)]  # height, width
CROPS: list[ResizingCrop] = [
    RandomScaleCrop(short_side=(20, 48), size=16),
    RandomResizedCrop(size=None, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Images of noise with five sizes, 40 altogether."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    paths = []
    for number in range(40):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(draw.integers(0, 256, (*SIZES[number % 5], 3), dtype=np.uint8)).save(paths[-1])
    return Files(ImageList.of(paths, torch.arange(40)), (16, 16), 3)


def boxes_of(crop: ResizingCrop, requests: Tensor, files: Files) -> list[list[float]]:
    """Returns the boxes (left, top, right, bottom) that a reader with seed 5 draws for `requests`."""
    result = []
    for index, update, position in requests.tolist():
        height, width = (torch.tensor([float(length)]) for length in SIZES[index % 5])
        numbers = crop.draw(Draws(generator("cpu", 5, update, position), 1))
        [(left, top, w, h)] = crop.boxes(numbers, height, width).tolist()
        result.append([left, top, left + w, top + h])
    return result


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
def test_reads_crops_of_whole_files_as_pillow(files: Files, crop: ResizingCrop) -> None:
    requests = torch.stack([torch.arange(40), torch.full((40,), 7), torch.arange(40)], 1)
    out = CropReader(files, crop, (3, 16, 16), seed=5).fetch(requests)
    assert out.shape == (40, 3, 16, 16) and out.dtype == torch.uint8
    boxes = boxes_of(crop, requests, files)
    for number, (got, box) in enumerate(zip(out, boxes, strict=True)):
        image = Image.open(files.path(number))
        left, top, right, bottom = box
        box = [max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height)]
        want = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=tuple(box)))  # type: ignore[arg-type]
        assert np.array_equal(got.permute(1, 2, 0).numpy(), want)
    wide = [box for (height, width), box in zip(SIZES * 8, boxes, strict=True) if width == 90]
    assert min(left for left, *_ in wide) < 25 and max(right for _, _, right, _ in wide) > 65  # beyond the centre


def test_rotated_and_large_jpegs(tmp_path: Path) -> None:
    """Boxes refer to the image as it is shown; large images are decoded at a reduced size."""
    rows, columns = np.mgrid[0:640, 0:960]
    smooth = np.stack([rows * 255 // 640, columns * 255 // 960, np.zeros_like(rows)], -1).astype(np.uint8)
    image = Image.fromarray(smooth)
    image.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    paths = [str(tmp_path / "plain.png"), str(tmp_path / "turned.jpg")]
    samples = Files(ImageList.of(paths, torch.zeros(2, dtype=torch.long)), (16, 16), 3)
    crop = RandomResizedCrop(size=16, scale=(0.3, 0.9), ratio=(3 / 4, 4 / 3))
    reader = CropReader(samples, crop, (3, 16, 16), seed=0)
    for update in range(8):
        first, second = (reader.fetch(torch.tensor([[i, update, 3]]))[0].float() for i in range(2))
        assert (first - second).abs().max() <= 4


def test_datasets_of_users_are_cropped_as_files(files: Files) -> None:
    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(files.path(index)), index

    requests = torch.stack([torch.arange(10), torch.zeros(10, dtype=torch.long), torch.arange(10)], 1)
    wrapped = Wrapped(Pictures(), (16, 16), "data.train")
    for crop in CROPS:
        ours, theirs = (CropReader(s, crop, (3, 16, 16), seed=1).fetch(requests).int() for s in (files, wrapped))
        assert (ours - theirs).abs().max() <= 1
    assert CropReader(wrapped, CROPS[0], (3, 16, 16), seed=1).fetch(requests[:0]).shape == (0, 3, 16, 16)


def batches(files: Files, *, workers: int = 0, shard: slice | None = None, start: int = 0) -> list[Tensor]:
    pipeline = Pipeline(operations=[CROPS[0], HorizontalFlip(p=0.5)], border="reflect", input_shape=files.shape)
    reader, augment = crop_when_reading(pipeline, files, 3)
    made = Batches(
        files,
        Delivery(CPU, False, workers),
        batch_size=12,
        augment=augment,
        seed=3,
        shard=None if shard is None else lambda total: slice(*shard.indices(total)),
        reader=reader,
    )
    result = [inputs for inputs, _ in made.epoch(0, start, step=20 + start)]
    made.close()
    return result


def test_batches_do_not_depend_on_workers_ranks_and_interruptions(files: Files) -> None:
    whole = batches(files)
    assert [len(batch) for batch in whole] == [12, 12, 12, 4] and whole[0].shape[1:] == (3, 16, 16)
    assert all(map(torch.equal, batches(files, workers=2), whole))
    assert all(map(torch.equal, batches(files, start=2), whole[2:]))
    ranks = [batches(files, shard=slice(0, 6)), batches(files, shard=slice(6, None))]
    assert all(torch.equal(torch.cat(parts), batch) for *parts, batch in zip(*ranks, whole, strict=True))
    assert not torch.equal(whole[0], batches(files, start=0)[1])


def test_crops_must_come_first_and_need_the_files(files: Files) -> None:
    late = Pipeline(operations=[HorizontalFlip(p=0.5), CROPS[0]], border="zero", input_shape=files.shape)
    with pytest.raises(UserError, match=r"augmentation.operations.1: RandomScaleCrop must be the first operation"):
        crop_when_reading(late, files, 0)
    memory: Samples = InMemory(pictures(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))
    assert crop_when_reading(late, memory, 0) == (None, late)
    data = Dataset(files, None, None, None)
    auto, memory_only = (data_settings(memory=choice, image_size=16) for choice in ("auto", True))
    assert prepare(data, auto).in_memory
    assert not prepare(data, auto, random_crops=True).in_memory
    assert prepare(Dataset(memory, None, None, None), memory_only, random_crops=True).in_memory
    with pytest.raises(UserError, match=r"data.memory=true: .* crops from the whole image; use data.memory=auto"):
        prepare(data, memory_only, random_crops=True)
    same_size = Files(ImageList.of([files.path(0)] * 2, torch.arange(2)), None, 3)
    assert not same_size.is_cut  # shows the whole images
