"""The lines on splits and images, and how all of them reach the user."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dlopt.config.schema import parameters_of
from dlopt.data.inspection import notes
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
    assert notes(dataset(vectors, [0, 0, 1, 1, 2, 2], None)) == ("no test set: the best model will not be tested",)
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
    assert notes(target(**arguments)) == target(**arguments).notes


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
