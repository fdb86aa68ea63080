"""The lines on splits and images, and how all of them reach the user."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

from dlopt.config.parameters import parameters_of
from dlopt.data.images.decoding import decode
from dlopt.data.images.files import Files, ImageList
from dlopt.data.inspection import notes
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import Dataset, InMemory
from tests.support.line import dlopt

CONF = Path(__file__).parents[2] / "conf"


def dataset(inputs: torch.Tensor, targets: list[int], test: list[int] | None, **more: Any) -> Dataset:
    samples = InMemory(inputs, torch.tensor(targets))
    tested = None if test is None else InMemory(inputs[: len(test)], torch.tensor(test))
    return Dataset(samples, None, tested, ("a", "b", "c"), **more)


def test_what_the_splits_lack() -> None:
    vectors = torch.zeros(6, 2)
    complete = dataset(vectors, [0, 0, 1, 1, 2, 2], [0, 1, 2], notes=("left out: x",), source="6 rows")
    assert notes(complete) == ("read: 6 rows", "left out: x")
    lacking = dataset(vectors, [0, 0, 1, 1, 2, 2], [0])
    assert notes(lacking) == ("warning: the test set has no sample of 2 classes: b, c",)
    assert notes(dataset(vectors, [0, 0, 0, 0, 1, 2], [0])) == (), "their readers report classes with one sample"
    assert notes(dataset(vectors, [0, 0, 1, 1, 2, 2], None)) == (
        "no test set: data.test_split=0.2 sets a fifth of the samples apart",
    )
    assert notes(dataset(vectors, [0, 0, 1, 1, 2, 2], None, is_generated=True)) == ()


@pytest.mark.parametrize(("low", "high", "colour"), [(0, 15, "black"), (3, 3, "black"), (240, 255, "white"),
                                                     (0, 16, None), (239, 255, None), (0, 255, None)])  # fmt: skip
def test_images_that_are_nearly_black_or_white(low: int, high: int, colour: str | None) -> None:
    images = torch.full((6, 1, 2, 2), low, dtype=torch.uint8)
    images[:, :, 0] = high
    found = notes(dataset(images, [0, 0, 1, 1, 2, 2], [0, 1, 2]))
    if colour is None:
        assert found == ()
    else:
        [line] = found
        assert line.startswith(
            f"warning: the images are nearly {colour}: all pixels of 6 of them are from {low} to {high}"
        )
    assert notes(dataset(images / 255, [0, 0, 1, 1, 2, 2], [0, 1, 2])) == ()


def test_held_out_images_of_another_range() -> None:
    bytes_ = torch.arange(6 * 48).remainder(256).to(torch.uint8).view(6, 3, 4, 4)
    scaled, standardized = bytes_ / 255, bytes_ / 64 - 2

    def lines(train: torch.Tensor, val: torch.Tensor, test: torch.Tensor) -> tuple[str, ...]:
        labels = torch.tensor([0, 0, 1, 1, 2, 2])
        return notes(Dataset(*(InMemory(images, labels) for images in (train, val, test)), ("a", "b", "c")))

    for same in (bytes_, scaled, standardized):
        assert lines(same, same, same) == ()
    assert lines(bytes_, bytes_.float(), bytes_) == (), "0 to 255 in another type"
    assert lines(bytes_, bytes_, scaled) == (
        "warning: the test images have another range than the training images: 0 to 1, not 0 to 255; scale neither or "
        "both",
    )
    val, test = lines(scaled, bytes_, bytes_.float())
    assert val.startswith("warning: the validation images have another range") and "0 to 255, not 0 to 1;" in val
    assert test.startswith("warning: the test images have another range")
    assert len(lines(bytes_, standardized, bytes_)) == 1


@pytest.mark.parametrize(
    "name",
    ["digits", "digit_pairs", "shaded_digits", "wine", "breast_cancer", "diabetes", "linear", "recall", "copying"],
)  # fmt: skip
def test_built_in_data_give_no_warnings(name: str) -> None:
    path = CONF / "data" / f"{name}.yaml"
    node = yaml.safe_load(path.read_text().replace("${seed}", "0"))
    module, _, function = node["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), function)
    arguments = {key: node.get(key) for key in parameters_of(target)}
    found = [line for line in notes(target(**arguments)) if not line.startswith("no test set: ")]  # of tables as read
    assert tuple(found) == target(**arguments).notes


def test_the_lines_reach_the_run_and_its_evaluation(tmp_path: Path) -> None:
    for part, classes in (("train", "abc"), ("test", "ab")):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for seed in range(4):
                pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{seed}.png")
            (tmp_path / part / name / "x.heic").write_text("")
    line = ("data=image_folder", f"data.root={tmp_path}", "model=mlp", "model.widths=[4]", "epochs=1", "tracking=[]")
    run = dlopt(tmp_path, "train", *line, "threads=1", "device=cpu", "hydra.run.dir=run")
    expected = ["left out: 5 files (5 *.heic)", "warning: the test set has no sample of class c"]
    assert run.code == 0, run.err
    log = (tmp_path / "run/train.log").read_text()
    for text in ("read: 20 images in 3 class folders", *expected):
        assert f"\n{text}\n" in run.out and text in log
    assert '"test_accuracy": ' in (tmp_path / "run/summary.json").read_text()
    tested = dlopt(tmp_path, "eval", "checkpoint=run")
    assert tested.code == 0 and [each for each in tested.out.splitlines() if each in expected] == expected


def saved(path: Path, mode: str, *, bits: int = 8, orientation: int = 1) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    image = Image.fromarray(pixels) if mode == "RGBA" else Image.fromarray(pixels[..., :3]).convert(mode)
    if bits == 16:
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_what_decoding_drops_is_counted(tmp_path: Path) -> None:
    for number, (mode, bits) in enumerate([("RGB", 8), ("RGBA", 8), ("L", 16), ("L", 8), ("RGB", 8)]):
        saved(tmp_path / f"{number}.png", mode, bits=bits)
    Image.new("RGBA", (5, 6), (9, 99, 199, 255)).save(tmp_path / "opaque.png")
    paths = sorted(map(str, tmp_path.glob("*.png")))
    for channels, expected in (
        (1, ["the colour of 4 of 6", "the transparency (now white) of 1 of 6", "the lower 8 of 16 bits of 1 of 6"]),
        (3, ["the transparency (now white) of 1 of 6", "the lower 8 of 16 bits of 1 of 6"]),
    ):
        files = Files(ImageList.of(paths, torch.tensor([0, 1, 2] * 2)), None, channels)
        lines = notes(Dataset(files, None, None, ("a", "b", "c")))
        assert lines[1:] == tuple(f"left out: {each} images that were looked at" for each in expected)


class Opened:
    """Images of PIL as torchvision opens them: without their EXIF orientation."""

    def __init__(self, paths: list[Path], *, rotates: bool) -> None:
        self.paths, self.rotates = paths, rotates

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(self.paths[index])
        return (ImageOps.exif_transpose(image) if self.rotates else image), index % 2


def test_an_orientation_that_only_predict_would_apply(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        saved(path, "RGB", orientation=6)
    for rotates in (False, True):
        samples = Wrapped(Opened(paths, rotates=rotates), None, "data.train")
        found = [line for line in notes(Dataset(samples, None, None, ("a", "b"))) if "EXIF" in line]
        assert len(found) == (not rotates)
        assert samples.shape == ((3, 5, 6) if rotates else (3, 6, 5))
        assert (decode(str(paths[0]), None, 3).shape == samples.shape) == rotates
