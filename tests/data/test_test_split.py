"""`data.test_split`: a test set of data that have none."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.data.identity import difference, identify
from dlopt.data.samples import Dataset, Samples
from dlopt.data.splits import prepare
from dlopt.training.builders.dataset import read_source
from tests.support.line import dlopt, refused
from tests.support.runs import run_config

COUNT = 40
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5), dtype=np.uint8)
LABELS = ["cat" if number % 4 else "dog" for number in range(COUNT)]  # three quarters are cats


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(PICTURES[index]), int(LABELS[index] == "dog")


def write_folder(folder: Path) -> list[str]:
    for number, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"photos/{label}/{number:02}.png")
    return ["data=image_folder", f"data.root={folder / 'photos'}", "data.channels=1"]


def write_list(folder: Path) -> list[str]:
    write_folder(folder)
    lines = [f"photos/{label}/{number:02}.png,{label}" for number, label in enumerate(LABELS)]
    (folder / "list.csv").write_text("\n".join(["path,label", *lines]))
    return ["data=csv", f"data.file={folder / 'list.csv'}", "data.channels=1"]


def write_table(folder: Path) -> list[str]:
    rows = [f"{picture[0, 0]},{picture[0, 1]}.5,{label}" for picture, label in zip(PICTURES, LABELS, strict=True)]
    (folder / "table.csv").write_text("\n".join(["a,b,label", *rows]))
    return ["data=table", f"data.file={folder / 'table.csv'}"]


def columns() -> dict[str, list[object]]:
    return {"image": PICTURES.reshape(COUNT, -1).astype(float).tolist(), "label": [*LABELS]}


def write_parquet(folder: Path) -> list[str]:
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").table(columns()), folder / "a.parquet"
    )
    return ["data=parquet", f"data.file={folder / 'a.parquet'}"]


def write_saved(folder: Path) -> list[str]:
    pytest.importorskip("datasets").Dataset.from_dict(columns()).save_to_disk(str(folder / "saved"))
    return ["data=huggingface", f"data.name={folder / 'saved'}"]


def write_shard(folder: Path) -> list[str]:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "png")
            for ending, data in (("png", content.getvalue()), ("txt", label.encode())):
                entry = tarfile.TarInfo(f"{number:02}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return ["data=webdataset", f"data.file={folder / 'a.tar'}", "data.input=png", "data.target=txt"]


def own(folder: Path) -> list[str]:
    return ["data=custom", f"data.train._target_={Pictures.__module__}.Pictures", "allow_packages=[tests]"]


def drawn(folder: Path) -> list[str]:
    return ["data=copying", "data.symbols=2", f"data.train_size={COUNT}", "data.val_size=0", "data.test_size=0"]


def rows(samples: Samples | None) -> list[bytes]:
    assert samples is not None
    return [row.numpy().tobytes() for row in samples.fetch(torch.arange(len(samples)))]


@pytest.mark.parametrize("memory", ["auto", "false"])
@pytest.mark.parametrize(
    "write", [write_folder, write_list, write_table, write_parquet, write_saved, write_shard, own, drawn]
)
def test_is_the_same_for_all_seeds_and_split_off_first(
    write: Callable[[Path], list[str]], memory: str, tmp_path: Path
) -> None:
    keys = [*write(tmp_path), "model=mlp", f"data.memory={memory}", "data.test_split=0.25"]

    def read(*more: str) -> Dataset:
        config = run_config(*keys, *more)
        source = read_source(config, None, ("train", "test"))
        return prepare(source, config.data_settings)

    whole, other = read("seed=1", "data.val_split=0.2"), read("seed=2", "data.subset=12", "data.val_split=0.25")
    assert rows(whole.test) == rows(other.test) and difference(whole.identity, other.identity) is None
    assert whole.test is not None and len(whole.test) == 10 and len(whole.train) == 24
    if write is not drawn:
        assert whole.test.targets.bincount().tolist() in ([2, 8], [8, 2]), "stratified"
        assert not any("equal to training samples" in note for note in whole.notes)
    for each in (whole, other):
        train, val, test = map(rows, (each.train, each.val, each.test))
        assert len({*train, *val, *test}) == len(train) + len(val) + len(test)
    none = read_source(run_config(*keys, "data.test_split=0"))
    assert none.test is None and len(none.train) == COUNT
    changed = difference(identify(none), whole.identity)
    assert changed == "the training set has 30 samples, not 40"


def test_a_folder_of_classes_is_trained_and_tested(tmp_path: Path) -> None:
    keys = [*write_folder(tmp_path), "data.test_split=0.25", "model=mlp", "model.widths=[4]", "tracking=[]"]
    keys += ["precision=fp64", "threads=1", "output=run"]
    trained = dlopt(tmp_path, "train", *keys, "epochs=2")
    assert trained.code == 0, trained.err
    assert "27 train, 3 val, 10 test" in trained.out and "no test set" not in trained.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())

    def tested(*more: str) -> dict[str, Any]:
        result = dlopt(tmp_path, "eval", "run", *more)
        assert result.code == 0, result.err
        found: dict[str, Any] = json.loads((tmp_path / "run/eval.json").read_text())
        return found

    report = tested()
    assert report["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-9) and report["samples"] == 10
    error = refused(tmp_path, "eval", "run", "data.test_split=0.5")
    assert "data.test_split=0.5: the run has divided these data with 0.25, and trained on a part; leave it out" in error
    for key in ("data.split_seed=7", "data.val_split=0.3", "data.folds=4"):  # would validate what was trained
        error = refused(tmp_path, "eval", "run", "split=val", *([key, "data.fold=1"] if "folds" in key else [key]))
        assert f"{key}: the run has divided these data with" in error
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert tested("data.root=moved")["test_loss"] == report["test_loss"], "a moved folder is the same data"
    (tmp_path / "moved/dog/00.png").unlink()
    assert tested("data.root=moved")["samples"] == 39, "other data are tested whole"
    error = refused(tmp_path, "train", *keys, "epochs=3", "data.test_split=0.5", "resume=auto")
    assert "data.test_split: saved 0.25, now 0.5" in error


def test_refused_where_there_is_a_test_set(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    file = tmp_path / "table.csv"
    lines = file.read_text().splitlines()
    parts = ["part", *(["train", "train", "train", "test"] * 10)]
    file.write_text("\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    table += ["data.target=label", "data.split_column=part", "model=mlp"]
    source = read_source(run_config(*table))
    assert source.test is not None and len(source.test) == 10, "the default of a table yields to the column"
    for split in ("train", "test"):
        write_folder(tmp_path)
        (tmp_path / "photos").rename(tmp_path / split)
    folder = ["data=image_folder", "data.root=.", "data.channels=1"]
    for keys, named in (
        (table, "data.split_column=part names the test set"),
        (["data=polynomial"], "data.test_size=1000 names the test set"),
        (
            ["data=parquet", "data.file=a.parquet", "data.test_file=b.parquet"],
            "data.test_file=b.parquet names the test set",
        ),
        (["data=digits"], "data=digits has a test set of 359 samples"),
        (folder, "data.root=. has a test set of 40 samples"),
    ):
        error = refused(tmp_path, "train", *keys, "data.test_split=0.2", "output=run")
        assert error.rstrip() == f"dlopt: data.test_split=0.2: {named}; use 0"
    error = refused(tmp_path, "train", "data=tokens", "data.root=.", "data.test_split=0.2", "output=run")
    assert "data.test_split=0.2" in error and "unknown" in error
