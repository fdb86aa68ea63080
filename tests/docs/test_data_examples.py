"""The examples of sources of the user's own have what samples of dlopt have: workers, resumption, identity, sizes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import dlopt, refused
from tests.support.pages import ROOT
from tests.support.runs import assert_same_run, metrics

FOLDER = ROOT / "docs/examples/data"
COUNT = 60
LINE = ["data.batch_size=10", "epochs=2", "tracking=[]", "threads=1", "device=cpu"]
MLP = ["model=mlp", "model.widths=[4]"]
SOURCES = {
    "memmap": ["data=arrays", "data.root=images", "allow_packages=[memmap]", *MLP],
    "hdf5": ["data=measurements", "data.file=rows.h5", "allow_packages=[hdf5]", "loss=mse", *MLP],
    "two_targets": ["data=faces", "data.root=images", "allow_packages=[two_targets]", "loss.factor=0.1",
                    "loss=two_targets.ClassAndAge", "model=two_targets.TwoHeads", "model.width=4"],
}  # fmt: skip
KILLED = """
import os, signal
from dlopt import cli
from tests.support.runs import at_update
with at_update(3, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    cli.main()
"""
SPAWNED = """
import multiprocessing
from dlopt import cli
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    cli.main()
"""


def write_images(folder: Path, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for split, count in (("train", COUNT), ("test", 20)):
        images = draw.integers(0, 256, (count, 1, 6, 5), dtype=np.uint8)
        if split == "test":
            images[3] = 7
        else:
            images[11] = 7
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 3)
        np.save(folder / f"{split}_ages.npy", draw.uniform(0, 9, count))


def write_rows(path: Path, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for group, count in (("train", COUNT), ("test", 20)):
            inputs = draw.normal(size=(count, 3))
            file[f"{group}/inputs"], file[f"{group}/targets"] = inputs, inputs.sum(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples as modules, the data sets that their first lines show, and data for them."""
    for name in SOURCES:
        shutil.copy(FOLDER / f"{name}.py", tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        text = (tmp_path / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 70
        lines = [line[4:] for line in text.splitlines() if line.startswith("    ")][:3]
        data = yaml.safe_load("\n".join(lines))
        assert data["_target_"].startswith(f"mine.{name}.")
        conf = tmp_path / "conf/data"
        conf.mkdir(parents=True, exist_ok=True)
        [choice] = [word.partition("=")[2] for word in SOURCES[name] if word.startswith("data=")]
        (conf / f"{choice}.yaml").write_text(
            yaml.safe_dump(data | {"_target_": data["_target_"].removeprefix("mine.")})
        )
    monkeypatch.syspath_prepend(tmp_path)
    write_images(tmp_path / "images")
    write_rows(tmp_path / "rows.h5")
    return tmp_path


def line(name: str, *words: str) -> list[str]:
    return ["train", "--config-dir", "conf", *SOURCES[name], *LINE, *words]


def run_script(folder: Path, script: str, words: list[str]) -> int:
    (folder / "script.py").write_text(script)
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "script.py", *words], cwd=folder, env=os.environ | {"PYTHONPATH": paths}
    ).returncode


@pytest.mark.parametrize("name", SOURCES)
def test_batches_are_the_same_from_memory_and_from_workers(folder: Path, name: str) -> None:
    for output, words in (("memory", ["data.memory=true"]), ("workers", ["data.memory=false", "data.workers=2"])):
        result = dlopt(folder, *line(name, f"output={output}", *words))
        assert result.code == 0, result.err
    assert_same_run(folder / "memory", folder / "workers")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_workers_may_be_spawned(folder: Path, name: str) -> None:
    words = ["data.memory=false", "data.workers=2"]
    assert run_script(folder, SPAWNED, line(name, "output=spawned", *words)) == 0
    assert dlopt(folder, *line(name, "output=forked", *words)).code == 0
    assert_same_run(folder / "forked", folder / "spawned")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "memmap" else pytest.mark.slow) for name in SOURCES]
)
def test_a_run_that_was_killed_in_an_epoch_is_resumed(folder: Path, name: str) -> None:
    words = line(name, "data.memory=false", "checkpoint.every_steps=1", "output=run")
    assert run_script(folder, KILLED, words) == -signal.SIGKILL
    assert dlopt(folder, *words, "resume=auto").code == 0
    assert dlopt(folder, *line(name, "data.memory=false", "output=whole")).code == 0
    assert_same_run(folder / "whole", folder / "run")


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_goes_on_with_the_same_data_only(folder: Path, name: str) -> None:
    words = line(name, "output=run")
    assert dlopt(folder, *words, "max_time=0.00001").code == 75
    (folder / "images").rename(folder / "moved")
    (folder / "rows.h5").rename(folder / "moved.h5")
    write_images(folder / "images", seed=1)
    write_rows(folder / "rows.h5", seed=1)
    assert "the training set has other" in refused(folder, *words, "max_time=1", "resume=auto")
    moved = "data.file=moved.h5" if name == "hdf5" else "data.root=moved"
    assert dlopt(folder, *line(name, moved, "resume=run", "output=other")).code == 0


def test_keys_of_data_are_those_of_any_data_set(folder: Path) -> None:
    for memory in ("true", "false"):
        words = ["data.image_size=8", "data.label_noise=0.5", f"data.memory={memory}", f"output=memory_{memory}"]
        result = dlopt(folder, *line("memmap", *words))
        assert result.code == 0, result.err
        assert "1x8x8" in result.out and "1 of 20 test samples is equal to training samples" in result.out, result.out
    assert_same_run(folder / "memory_true", folder / "memory_false")
    assert dlopt(folder, *line("memmap", "data.image_size=8", "output=clean")).code == 0
    assert metrics(folder / "clean")[0]["train_loss"] != metrics(folder / "memory_true")[0]["train_loss"]
    assert "data.image_size" in refused(folder, *line("hdf5", "data.image_size=8"))


def test_the_loss_of_two_targets_in_numpy(folder: Path) -> None:
    """In training, on the validation set, a named one and the test set, and by `eval`; metrics read the classes."""
    words = ["precision=fp64", "normalize=none", "data.val_split=0.2", "optimizer.lr=1e-12", "epochs=1", "output=run"]
    assert dlopt(folder, *line("two_targets", *words, "validation.other.use=test", "loss.factor=0.5")).code == 0
    weights = {name: value.numpy() for name, value in load(folder / "run/checkpoints/last.pt").model.items()}

    def outputs_and_losses(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels, ages = (
            np.load(folder / f"images/{split}_{name}.npy").astype(float) for name in ("images", "labels", "ages")
        )
        hidden = np.maximum(images.reshape(len(images), -1) @ weights["1.weight"].T + weights["1.bias"], 0)
        outputs = hidden @ weights["3.weight"].T + weights["3.bias"]
        logits, rows = outputs[:, :3], np.arange(len(images))
        entropy = np.log(np.exp(logits).sum(1)) - logits[rows, labels.astype(int)]
        return logits, entropy + 0.5 * (outputs[:, 3] - ages.astype(np.float32)) ** 2

    [logged] = metrics(folder / "run")
    _, losses = outputs_and_losses("train")
    assert 48 * logged["train_loss"] + 12 * logged["val_loss"] == pytest.approx(losses.sum(), rel=1e-6)
    logits, losses = outputs_and_losses("test")
    assert dlopt(folder, "eval", "run", "split=test", "allow_packages=[two_targets]").code == 0
    tested = json.loads((folder / "run/eval.json").read_text())
    accuracy = (logits.argmax(1) == np.arange(20) % 3).mean()
    assert [logged["val_other_loss"], tested["test_loss"]] == pytest.approx([losses.mean()] * 2, rel=1e-9)
    assert [logged["val_other_accuracy"], tested["test_accuracy"]] == [accuracy] * 2

    for number, image in enumerate(np.load(folder / "images/test_images.npy")):
        Image.fromarray(image[0]).save(folder / "images" / f"{number:02}.png")
    words = ["images=images", "output=predicted.csv", "allow_packages=[two_targets]"]
    assert dlopt(folder, "predict", "run", *words).code == 0
    with (folder / "predicted.csv").open(newline="") as file:
        rows = [[float(row[f"p({label})"]) for label in range(3)] for row in csv.DictReader(file)]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-6)
