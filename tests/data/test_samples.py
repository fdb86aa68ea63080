import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.images.decoding import decode, from_pil
from dlopt.data.images.files import Files, ImageList
from dlopt.data.loading import materialize
from dlopt.data.rows.arrow import parquet
from dlopt.data.rows.webdataset import webdataset
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.splits import prepare
from dlopt.training.builders.dataset import read_source
from tests.support.runs import run_config

WriteImages = Callable[..., list[Path]]


class Items:
    """A map-style dataset over a list."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.reads = 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.items[index]


def check_protocol(samples: Samples) -> None:
    everything = samples.fetch(torch.arange(len(samples)))
    assert everything.shape == (len(samples), *samples.shape)
    picked = torch.tensor([3, 0, 2])
    assert torch.equal(samples.fetch(picked), everything[picked])
    chosen = samples.select(picked)
    assert len(chosen) == 3 and torch.equal(chosen.targets, samples.targets[picked])
    assert torch.equal(chosen.fetch(torch.tensor([1, 2])), everything[picked[1:]])
    again = chosen.select(torch.tensor([2]))
    assert torch.equal(again.fetch(torch.tensor([0])), everything[[2]])
    assert samples.fetch(torch.tensor([], dtype=torch.int64)).shape == (0, *samples.shape)


def test_tensors_and_wrapped_datasets_follow_the_protocol() -> None:
    check_protocol(InMemory(torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8), torch.arange(5)))
    check_protocol(Wrapped(Items([(torch.rand(3), i % 2) for i in range(5)]), None, "data.train"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (4, 7)])
def test_files_follow_the_protocol(
    tmp_path: Path, write_images: WriteImages, channels: int, size: tuple[int, int] | None
) -> None:
    paths = write_images(tmp_path, 5)
    samples = Files(ImageList.of([str(path) for path in paths], torch.arange(5)), size, channels)
    assert samples.shape == (channels, *(size or (6, 5)))
    check_protocol(samples)


def test_files_of_different_sizes_need_an_image_size(tmp_path: Path, write_images: WriteImages) -> None:
    paths = write_images(tmp_path / "a", 2) + write_images(tmp_path / "b", 1, size=(9, 9))
    with pytest.raises(UserError, match=rf"data.image_size=null.*{paths[2]} is 9x9, others are 6x5.*image_size=224"):
        Files(ImageList.of([str(path) for path in paths], torch.arange(3)), None, 3)


def test_different_size_missed_by_the_header_check_is_reported_on_fetch(
    tmp_path: Path, write_images: WriteImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.data.images.files._HEADERS_CHECKED", 2)
    paths = write_images(tmp_path / "a", 2) + write_images(tmp_path / "b", 1, size=(9, 9))
    samples = Files(ImageList.of([str(paths[i]) for i in (0, 2, 1)], torch.arange(3)), None, 3)
    with pytest.raises(UserError, match="9x9"):
        samples.fetch(torch.arange(3))


def test_paths_outside_ascii(tmp_path: Path, write_images: WriteImages) -> None:
    paths = write_images(tmp_path / "Käfer 甲虫", 2)
    samples = Files(ImageList.of([str(path) for path in paths], torch.arange(2)), None, 3)
    assert samples.path(1) == str(paths[1]) and samples.fetch(torch.tensor([1])).shape == (1, 3, 6, 5)


IMAGE = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
COLOUR = torch.arange(90, dtype=torch.uint8).view(3, 5, 6)


@pytest.mark.parametrize(
    "value, expected",
    [
        (IMAGE, IMAGE),
        (IMAGE[0], IMAGE[:1]),
        (IMAGE.float() / 7, IMAGE.float() / 7),
        (IMAGE.double(), IMAGE.float()),
        (COLOUR.permute(1, 2, 0).numpy(), COLOUR),
        (IMAGE[0].numpy(), IMAGE[:1]),
        (Image.fromarray(IMAGE[0].numpy()), IMAGE[:1]),
        (Image.fromarray(IMAGE[0].numpy()).convert("RGB"), IMAGE[:1].expand(3, 3, 4)),
        (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2, 3])),
        (np.array([1.5, 2]), torch.tensor([1.5, 2])),
        (torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1.0, 2])),
    ],
)
def test_wrapped_inputs_of_every_kind(value: Any, expected: Tensor) -> None:
    samples = Wrapped(Items([(value, 0), (value, 1)]), None, "data.train")
    fetched = samples.fetch(torch.tensor([1]))
    assert samples.shape == expected.shape and fetched.dtype == expected.dtype and torch.equal(fetched[0], expected)


def test_wrapped_images_are_resized() -> None:
    items = [(torch.full((1, 4 + i, 9), i, dtype=torch.uint8), i) for i in range(4)]
    samples = Wrapped(Items(items), (3, 3), "data.train")
    assert samples.shape == (1, 3, 3)
    assert samples.fetch(torch.tensor([2, 3])).unique().tolist() == [2, 3]
    with pytest.raises(UserError, match=r"data.train \(.*Items\)\[1\]: has shape \(1, 5, 9\).*image_size"):
        Wrapped(Items(items), None, "data.train").fetch(torch.arange(2))


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([2, 0, 1], torch.tensor([2, 0, 1])),
        ([torch.tensor(2), torch.tensor(0), torch.tensor(1)], torch.tensor([2, 0, 1])),
        ([np.int32(2), np.int32(0), np.int32(1)], torch.tensor([2, 0, 1])),
        ([torch.tensor([2]), torch.tensor([0]), torch.tensor([1])], torch.tensor([2, 0, 1])),
        ([0.5, 1.5, 2.0], torch.tensor([0.5, 1.5, 2.0])),
        ([torch.tensor([0.5, 1.0])] * 3, torch.tensor([[0.5, 1.0]] * 3)),
    ],
)
def test_wrapped_labels_of_every_kind(labels: list[Any], expected: Tensor) -> None:
    samples = Wrapped(Items([(torch.rand(2), label) for label in labels]), None, "data.train")
    assert samples.targets.dtype == expected.dtype and torch.equal(samples.targets, expected)


def test_labels_attribute_is_used_only_if_it_matches() -> None:
    items = [(torch.rand(2), label) for label in (1, 0, 1)]
    quick, wrong = Items(items, targets=[1, 0, 1]), Items(items, targets=[0, 0, 0])
    for dataset in (quick, wrong):
        assert Wrapped(dataset, None, "data.train").targets.tolist() == [1, 0, 1]
    assert quick.reads == 3 and wrong.reads > 3


@pytest.mark.parametrize("transform", [lambda label: label // 2, float])
def test_labels_attribute_is_not_used_if_the_items_transform_it(transform: Callable[[int], float]) -> None:
    targets = [number // 100 for number in range(300)]
    items = [(torch.rand(2), transform(target)) for target in targets]
    samples = Wrapped(Items(items, targets=targets), None, "data.train")
    expected = torch.tensor([label for _, label in items])
    assert samples.targets.dtype == expected.dtype and torch.equal(samples.targets, expected)
    plain = Items([(torch.rand(2), target) for target in targets], targets=targets)
    Wrapped(plain, None, "data.train")
    assert plain.reads == 4


class Raising(Items):
    def __getitem__(self, index: int) -> Any:
        raise KeyError("colour")


@pytest.mark.parametrize(
    "dataset, message",
    [
        (42, "no __getitem__"),
        (iter([1]), "map-style"),
        (Items([]), "is empty"),
        (Items([torch.rand(2)]), r"\[0\]: is a Tensor.*a pair"),
        (Items([(torch.rand(2), 0, 1)]), "a pair"),
        (Items([("image.jpg", 0)]), "the input is of type str"),
        (Items([(torch.rand(1, 2, 3, 4), 0)]), r"shape \(1, 2, 3, 4\)"),
        (Items([(torch.tensor(1.0), 0)]), "the input is"),
        (Items([(torch.rand(2), "cat")]), "labels must be class numbers"),
        (Items([(torch.rand(2), [0, 1])]), "one integer per sample"),
        (Raising([1]), r"\[0\]: KeyError: 'colour'"),
    ],
)
def test_wrapped_reports_invalid_items(dataset: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Wrapped(dataset, None, "data.train")
    assert str(caught.value).startswith("data.train (")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6, 3), (3, 5, 6)), ((3, 5, 6), (3, 5, 6)), ((1, 5, 6), (1, 5, 6)), ((5, 6, 1), (1, 5, 6)),
     ((4, 32, 32), (4, 32, 32)), ((2, 2, 4), (4, 2, 2))],
)  # fmt: skip
def test_channels_of_arrays_are_the_dimension_of_1_3_or_4(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = Wrapped([(pixels, 0)], None, "data.train").fetch(torch.tensor([0]))[0]
    assert found.shape == expected
    assert (found.numpy() == (pixels if shape == expected else np.moveaxis(pixels, 2, 0))).all()


@pytest.mark.parametrize(("shape", "which"), [((3, 5, 3), "both"), ((1, 8, 4), "both"), ((6, 8, 8), "neither")])
def test_arrays_with_channels_in_either_place_are_refused(shape: tuple[int, ...], which: str) -> None:
    shown = "x".join(map(str, shape))
    with pytest.raises(UserError, match=rf"data.train .*\[0\]: the uint8 array {shown} .*: {which} the first"):
        Wrapped([(np.zeros(shape, np.uint8), 0)], None, "data.train")


def test_boxes_of_images(tmp_path: Path) -> None:
    """Of whole images, before they are resized; of files, as Pillow resizes them."""
    images = [torch.randint(256, (3, 6 + i, 9), dtype=torch.uint8) for i in range(3)]
    sizes: list[list[int]] = []

    def boxes(heights: Tensor, widths: Tensor) -> Tensor:
        sizes.append([*heights.tolist(), *widths.tolist()])
        return torch.stack([torch.ones(len(heights)), torch.zeros(len(heights)), widths - 2, heights - 1], 1)

    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    wrapped = Wrapped(Items([(image, i) for i, image in enumerate(images)]), (4, 4), "data.train")
    files = Files(ImageList.of(paths, torch.arange(3)), (4, 4), 3)
    chosen = torch.tensor([2, 0])
    found = [samples.fetch_boxes(chosen, boxes, (2, 5)) for samples in (wrapped, files)]
    assert sizes == [[8, 6, 9, 9]] * 2 and found[0].shape == found[1].shape == (2, 3, 2, 5)
    assert (found[0].int() - found[1].int()).abs().max() <= 1
    picture = Image.fromarray(images[2].permute(1, 2, 0).numpy())
    expected = np.array(picture.resize((5, 2), Image.Resampling.BILINEAR, box=(1, 0, 7, 7)))
    assert torch.equal(found[1][0], torch.from_numpy(expected).permute(2, 0, 1))
    assert wrapped.fetch_boxes(chosen[:0], boxes, (2, 5)).shape == (0, 3, 2, 5)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), 255.0),
        (torch.ones(3, 1, 2, 2), 1.0),
        (torch.full((3, 1, 2, 2), 1.5), 255.0),
        (torch.tensor([-1.0, 200.0]).view(2, 1, 1, 1), 1.0),
        (torch.full((3, 4), 0.5), 255.0),
        (torch.tensor([0.5] * 99 + [200.0]).view(100, 1, 1, 1), 255.0),
        (torch.tensor([200.0] + [0.5] * 99).view(100, 1, 1, 1), 255.0),
        (torch.tensor([0.5] * 20 + [9.0] + [0.5] * 79).view(100, 1, 1, 1), 1.0),
    ],
)
def test_the_value_of_a_white_pixel(images: Tensor, expected: float) -> None:
    assert InMemory(images, torch.zeros(len(images))).white() == expected


def test_tasks_of_targets() -> None:
    inputs = torch.zeros(4, 2)
    for targets, classes, kind, outputs in (
        (torch.zeros(4), None, "regression", 1),
        (torch.zeros(4, 3), None, "regression", 3),
        (torch.zeros(4, 3), ("a", "b", "c"), "multi-label", 3),
        (torch.zeros(4, dtype=torch.int64), ("a", "b"), "classification", 2),
    ):
        task = Dataset(InMemory(inputs, targets), None, None, classes).task
        assert (task.kind, task.outputs) == (kind, outputs)


def test_at_most_64_labels_are_compared_with_the_attribute() -> None:
    for count, reads in ((64, 65), (65, 65), (300, 65), (3, 4)):
        items = Items([(torch.rand(2), label) for label in range(count)], targets=list(range(count)))
        assert Wrapped(items, None, "data.train").targets.tolist() == list(range(count)) and items.reads == reads


def test_types_of_items_are_not_mixed() -> None:
    """Images 0..255 among floating-point images 0..1: torch would convert them to numbers of one type."""
    items = [(torch.rand(1, 4, 4), 0), ((torch.rand(1, 4, 4) * 255).to(torch.uint8), 1)]
    samples = Wrapped(items, None, "data.train")
    with pytest.raises(
        UserError, match=r"data\.train .*\[1\]: has the type torch\.uint8, the first item torch\.float32"
    ):
        samples.fetch(torch.tensor([1]))


def test_every_source_reads_the_pixels_of_predict(tmp_path: Path) -> None:
    """Parquet, WebDataset and arrays have the pixels that image files have, to the last bit."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    generator = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 1201 * 803 * 3).reshape(803, 1201, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((8, 19), (15, 9), (12, 13))]
    kinds: list[tuple[np.ndarray, str, dict[str, Any]]] = [(each, "png", {}) for each in images]
    kinds += [(images[0], "png", {"exif": exif}), (smooth, "jpg", {"exif": exif}), (smooth, "jpg", {})]
    kinds += [(np.concatenate([images[1], images[1][..., :1]], 2), "png", {})]
    (tmp_path / "tar").mkdir()
    paths = []
    for number, (pixels, suffix, keys) in enumerate(kinds):
        paths.append(tmp_path / "tar" / f"{number}.{suffix}")
        Image.fromarray(pixels).save(paths[-1], **keys)
        (tmp_path / "tar" / f"{number}.cls").write_text(str(number % 2))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted((tmp_path / "tar").iterdir()):
            tar.add(path, path.name)
    rows = {"image": [path.read_bytes() for path in paths], "label": [number % 2 for number in range(len(paths))]}
    writer.write_table(arrow.table(rows), tmp_path / "a.parquet")
    keys: dict[str, Any] = dict.fromkeys(("val_file", "test_file"))
    keys |= {"labels": "class", "image_size": (10, 7)}
    for channels in (1, 3):
        files = Files(ImageList.of([*map(str, paths)], torch.zeros(len(paths))), (10, 7), channels).fetch(
            torch.arange(len(paths))
        )
        tables = parquet(file=str(tmp_path / "a.parquet"), input="image", target="label", channels=channels, **keys)
        archives = webdataset(
            file=str(tmp_path / "a.tar"), input=["png", "jpg"], target="cls", channels=channels, **keys
        )
        for found in (tables, archives):
            assert torch.equal(found.train.fetch(torch.arange(len(paths))), files)
            larger = found.train.resized((31, 30)).fetch(torch.arange(len(paths)))
            assert torch.equal(larger[0], decode(str(paths[0]), (31, 30), channels))
    own = Wrapped(Items([(each, 0) for each in images]), (10, 7), "data.train")
    assert torch.equal(own.fetch(torch.arange(3)), files[:3])
    tensors = Wrapped(Items([(from_pil(Image.open(path)), 0) for path in paths[:3]]), (10, 7), "data.train")
    assert torch.equal(tensors.fetch(torch.arange(3)), files[:3])


@pytest.mark.parametrize("unit", ["", "red"], ids=["numbers", "with categories"])
def test_names_the_line_of_a_row(tmp_path: Path, unit: str) -> None:
    rows = [f"{(7 * number % 20) ** 2},{number % 3}{unit},{'ab'[number % 2]}" for number in range(20)]
    (tmp_path / "table.csv").write_text("\n".join(["x,colour,label", "", *rows]))
    config = run_config("data=table", f"data.file={tmp_path / 'table.csv'}", "model=mlp", "data.test_split=0.2")
    dataset = prepare(read_source(config), config.data_settings)
    for samples in (dataset.train, dataset.val, dataset.test):
        assert isinstance(samples, InMemory) and len(samples)
        numbers = samples.fetch(torch.arange(len(samples)))[:, 0].int().tolist()
        assert [samples.place(i) for i in range(len(samples))] == [
            f"line {3 * round(number**0.5) % 20 + 3}" for number in numbers
        ]


def test_names_files_also_in_memory_and_items(write_images: WriteImages, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 3)
    files = Files(ImageList.of([*map(str, paths)], torch.arange(3)), (8, 8), 1).select(torch.tensor([2, 0]))
    loaded = materialize(files, 0)
    items = Wrapped(Items([(torch.zeros(2), 0)] * 4), None, "data.train").select(torch.tensor([3, 1]))
    assert [each.place(1) for each in (files, loaded, loaded.select(torch.tensor([1, 0])), items)] == [
        str(paths[0]), str(paths[0]), str(paths[2]), "item 1",
    ]  # fmt: skip
    assert InMemory(torch.zeros(1, 2), torch.zeros(1)).place(0) == ""
