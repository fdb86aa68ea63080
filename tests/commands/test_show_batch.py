"""`dlopt show-batch`: plots and errors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.line import dlopt, entries, refused


def test_writes_two_plots(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "show-batch", "augmentation=affine", "output=a/shown.png")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == ["a/shown.png", "a/shown_operations.png"]
    assert entries(tmp_path) == {"a", "a/shown.png", "a/shown_operations.png"}
    batch, operations = (np.asarray(Image.open(tmp_path / line)) for line in result.out.splitlines())
    assert batch.std() > 30 and operations.std() > 30
    again = dlopt(tmp_path, "show-batch", "augmentation=affine", "output=b")
    assert again.out.splitlines() == ["b.png", "b_operations.png"]
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a/shown.png").read_bytes()
    other = dlopt(tmp_path, "show-batch", "augmentation=affine", "augmentation_seed=1", "output=c.png")
    assert other.code == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_default_folder_without_operations(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "show-batch")
    [plot] = tmp_path.glob("outputs/show-batch/*/*")
    assert (result.code, result.out.strip()) == (0, str(plot.relative_to(tmp_path)))
    assert plot.name == "batch.png"
    columns = np.asarray(Image.open(plot))[-116:-4, -7 * 116 :]
    assert (columns[:, :112] == columns[:, 116:228]).all()  # the original, and what is made of it


def test_prints_left_out_files_and_warnings(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 3).save(tmp_path / name / "0.png")
        (tmp_path / name / "1.heic").write_text("")
    result = dlopt(tmp_path, "show-batch", "data=image_folder", f"data.root={tmp_path}", "output=x.png")
    assert (result.code, result.out) == (0, "x.png\n")
    lines = result.err.splitlines()
    assert lines[0] == "dlopt: left out: 2 files (2 *.heic)"
    assert lines[1].startswith("dlopt: warning: data.root has 2 classes with one sample: a, b")
    assert lines[2].startswith("dlopt: warning: the images are nearly black: all pixels of 2 of them are from 3 to 3")


def test_several_augmentations(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "show-batch", "augmentation=crop_flip,cutmix,affine", "tile=64", "output=x.png")
    assert (result.code, result.out) == (0, "x.png\n"), result.err
    message = refused(tmp_path, "show-batch", "augmentation=[crop_flip,cutmix]")
    assert "must be one of the choices" in message


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["output=x.txt"], ["output=x.txt", ".txt"]),
        (["output=."], ["output=.", "folder"]),
        (["output=a,b"], ["output=a,b", "one value"]),
        (["seed=1,2"], ["seed=1,2: one value is needed; only augmentation takes several"]),
        (["tile=7"], ["tile=7"]),
        (["-m"], ["-m"]),
        (["augmentation=nope"], ["augmentation=nope", "`dlopt options augmentation` lists all"]),
        (["data=polynomial"], ["data=polynomial", "vectors"]),
    ],
)
def test_refused(line: list[str], parts: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, "show-batch", *line)
    for part in parts:
        assert part in message
