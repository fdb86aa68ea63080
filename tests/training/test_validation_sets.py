"""Tests of validation sets with names: whose samples they are, what is logged, and what they select."""

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dlopt.config.compose import Composer
from dlopt.config.inherit import inherit
from dlopt.metrics.names import direction_of, monitored_directions
from tests.support.line import dlopt, refused
from tests.support.runs import assert_same_run, at_update, metrics, resume, start, terminate, timeless
from tests.support.sizes import RICH, SMALL

SHADED = "validation.shaded.data=shaded_digits"
TABLE = ["data=table", "model=mlp", "model.widths=[8]", "epochs=2", "tracking=[]", "threads=1", "device=cpu"]


def write_table(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Path:
    with path.open("w") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def table(folder: Path, *, values: bool = False, cities: Sequence[str] = ()) -> tuple[Path, list[dict[str, str]]]:
    """Writes a table with a column `part`; returns its path and the rows of the validation set."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        a, b = rng.normal(size=2)
        answer = f"{1000 + 7 * a:.6f}" if values else ("low", "middle", "top")[int(a > 0) + int(b > 0)]
        city = ("Rome", "Oslo", "")[i % 3]
        part = "val" if i % 4 == 0 else "train"
        rows.append({"a": f"{a:.6f}", "b": f"{b:.6f}", "city": city, "part": part, "answer": answer})
    held_out = [row for row in rows if row["part"] == "val"]
    return write_table(folder / "all.csv", rows, ["a", *cities, "b", "part", "answer"]), held_out


@pytest.mark.parametrize(("values", "cities"), [(False, []), (True, []), (True, ["city"])])
def test_equal_samples_have_equal_metrics_whatever_the_order_of_columns_and_classes(
    values: bool, cities: list[str], tmp_path: Path
) -> None:
    """A file with the validation rows only, without a class, and with its columns swapped: bit for bit.

    The encoding of texts and gaps, and the scale of the targets, are those of the training rows.
    """
    path, held_out = table(tmp_path, values=values, cities=cities)
    if not values:
        held_out = [{**row, "part": "val"} for row in held_out if row["answer"] != "low"]
        rows = [row for row in csv.DictReader(path.open()) if (row["part"], row["answer"]) != ("val", "low")]
        path = write_table(path, rows, ["a", "b", "part", "answer"])
    copy = write_table(tmp_path / "copy.csv", held_out, [*cities, "b", "a", "answer"])
    labels = ["data.labels=value", "loss=mse", "evaluate.metrics=[r2]"] if values else []
    keys = [f"data.file={path}", "data.split_column=part", *labels, f"validation.copy.file={copy}"]
    summary = start(tmp_path / "run", *TABLE, *keys, "validation.copy.split_column=null", "ema=0.9")
    for line in metrics(tmp_path / "run"):
        names = [key.removeprefix("val_copy_") for key in line if key.startswith("val_copy_")]
        assert "loss" in names and len(names) == 2
        assert [line[f"val_copy_{name}"] for name in names] == [line[f"val_{name}"] for name in names]
    assert summary["best_val_copy_loss"] == summary["best_val_loss"]


def _text(folder: Path, name: str, seed: int) -> str:
    letters = np.random.default_rng(seed).choice(list("abcdefgh"[: 2 + 2 * seed]), 900)
    (folder / f"{name}.txt").write_text("".join(letters))
    return str(folder / f"{name}.txt")


def _png(seed: int, label: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(40 * label, 150 + 40 * label, (6, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def _parquet(folder: Path, name: str, seed: int) -> str:
    labels = [0, 1, 2] * 6
    images = [{"bytes": _png(100 * seed + i, label)} for i, label in enumerate(labels)]
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


def _webdataset(folder: Path, name: str, seed: int) -> str:
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for i, label in enumerate([0, 1, 2] * 6):
            for ending, content in (("png", _png(100 * seed + i, label)), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:03}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(folder / f"{name}.tar")


_IMAGES = [
    "data.image_size=6",
    "data.channels=1",
    "data.batch_size=6",
    "model=mlp",
    "model.widths=[8]",
    "model.norm=none",
]
FILES: dict[str, tuple[Callable[[Path, str, int], str], list[str]]] = {
    "text": (_text, ["data.sequence_length=16", "model=gpt_nano", "model.width=18", "model.depth=1"]),
    "parquet": (_parquet, _IMAGES),
    "webdataset": (_webdataset, [*_IMAGES, "data.input=png"]),
}


@pytest.mark.parametrize("data", FILES)
def test_a_named_set_is_its_own_file_beside_the_files_of_other_splits(data: str, tmp_path: Path) -> None:
    """Its metrics are those of a run that is validated on this file: the training is the same."""
    write, keys = FILES[data]
    train, val, test, other = (write(tmp_path, name, seed) for seed, name in enumerate(("a", "b", "t", "c"), 1))
    tests = [] if data == "text" else [f"data.test_file={test}"]
    line = [f"data={data}", f"data.file={train}", *keys, "epochs=2", "tracking=[]", "threads=1", "device=cpu"]
    start(tmp_path / "named", *line, *tests, f"data.val_file={val}", f"validation.other.file={other}")
    start(tmp_path / "other", *line, f"data.val_file={other}")
    start(
        tmp_path / "only", *line, *tests, "data.val_split=0", f"validation.other.file={other}", "monitor=val_other_loss"
    )
    expected = [each["val_loss"] for each in metrics(tmp_path / "other")]
    named = metrics(tmp_path / "named")
    assert [each["val_other_loss"] for each in named] == expected
    assert [each["val_other_loss"] for each in metrics(tmp_path / "only")] == expected
    assert all(abs(each["val_loss"] - value) > 1e-3 for each, value in zip(named, expected, strict=True))


def test_a_named_set_changes_no_other_number_of_the_run(tmp_path: Path) -> None:
    keys = [*RICH, "norm_statistics=exact", "model.norm=batch"]
    start(tmp_path / "plain", *keys)
    start(tmp_path / "named", *keys, SHADED)
    named = [{k: v for k, v in line.items() if "shaded" not in k} for line in timeless(tmp_path / "named")]
    assert named == timeless(tmp_path / "plain")
    assert all(0 <= line["val_shaded_accuracy"] <= 1 for line in metrics(tmp_path / "named"))


def test_a_named_set_selects_stops_and_survives_an_interruption(tmp_path: Path) -> None:
    keys = [*RICH, SHADED, "data.val_split=0", "monitor=val_shaded_accuracy", "stopping=early", "epochs=6"]
    keys += ["optimizer.lr=0.8", "schedule=constant", "stopping.patience=2"]
    summary = start(tmp_path / "whole", *keys)
    values = [line["val_shaded_accuracy"] for line in metrics(tmp_path / "whole")]
    best = max(values)
    assert summary["best_val_shaded_accuracy"] == best
    assert values[int(summary["best_epoch"]) - 1] == best
    assert "best_val_shaded_loss" in summary
    with at_update(6, terminate):
        assert start(tmp_path / "cut", *keys)["status"] == "interrupted"
    resume(tmp_path / "cut", *keys)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_eval_shows_all_sets(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dlopt(tmp_path, "train", *SMALL, SHADED, "epochs=1", f"output={run}")
    result = dlopt(tmp_path, "eval", str(run), "threads=1")
    summary, evaluated = (json.loads((run / name).read_text()) for name in ("summary.json", "eval.json"))
    assert evaluated["val_shaded_loss"] == pytest.approx(summary["best_val_shaded_loss"], rel=1e-6)
    assert "validation set shaded: loss" in result.out
    assert (
        "shaded"
        not in dlopt(tmp_path, "eval", str(run), "threads=1", "validation=null").out.partition("checkpoint:")[2]
    )
    words = inherit(Composer(), [f"from={run}"])
    assert Composer().compose(words).validation.shaded["_target_"] == "dlopt.data.images.digits.shaded_digits"


BAD = {
    "digits": (["validation.other.data=breast_cancer"],
        "validation.other: the data have the classes benign, malignant, those"),
    "choice": (["validation.other.data=foo"], "validation.other.data=foo: unknown choice; allowed: "),
    "text": (["validation.other.data=python_source"], "validation.other: is text, the training data are no text"),
    "values": (["validation.other.data=diabetes"], "validation.other: its targets are numbers, those of the training"),
    "shape": (["validation.other.data=digit_pairs"], "validation.other: its targets are several labels per sample"),
    "split": ([SHADED, "validation.shaded.use=val"], "validation.shaded.use=val: .* has no val set"),
    "shared": ([SHADED, "validation.shaded.batch_size=3"], "validation.shaded.batch_size=3: .* leave it out"),
    "block": (["validation.shaded=shaded_digits"], "validation.shaded=shaded_digits: a block of keys; .*data=CHOICE"),
    "key": ([SHADED, "validation.shaded.fille=3"], "validation.shaded.fille=3: unknown key"),
    "name": (["validation.macro.data=shaded_digits"], "validation.macro: val_macro_f1 is a metric of"),
    "names": ([SHADED, "validation.shaded_b.data=digits"], "validation.shaded: the metrics of validation.shaded_b"),
    "monitor": (["monitor=val_shaded_loss"], "monitor=val_shaded_loss: unknown validation metric"),
    "direction": ([SHADED, "monitor=val_shaded_loss", "monitor_mode=max"], "monitor_mode=max: val_loss is better when"),
    "auto": ([SHADED, "data.val_split=0"], "monitor=auto: .*set monitor to .* has a name: val_shaded_loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses_before_the_training(name: str, tmp_path: Path) -> None:
    keys, message = BAD[name]
    assert re.search(message, refused(tmp_path, "train", *SMALL, *keys))


def test_directions_of_named_sets_follow_from_the_config() -> None:
    directions = monitored_directions({"validation.shaded.data": "digits", "directions.residual": "min"})
    assert direction_of("best_val_shaded_loss", directions) == "min"
    assert direction_of("val_shaded_class_accuracy/cat", directions) == "max"
    assert direction_of("val_shaded_residual", directions) == "min"
    assert direction_of("val_other_loss", directions) is None
