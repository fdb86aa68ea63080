"""Files that runs read, the same for every seed: tables, in CSV and Parquet, images in four formats, and a text."""

import csv
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

ROWS = {"train": 45, "val": 15, "test": 30}


def write_files(folder: Path) -> None:
    """Writes classes.csv (of two: binary.csv), values.csv (numbers only), also in Parquet, images, and text.txt."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    count = sum(ROWS.values())
    numbers = draw.normal(size=(count, 4)).round(3)
    columns: dict[str, list[Any]] = {f"x{place}": [*map(float, column)] for place, column in enumerate(numbers.T)}
    columns["id"] = [f"r{number}" for number in range(count)]
    columns["weight"] = [number % 4 % 3 for number in range(count)]
    columns["person"] = [f"p{number // 3}" for number in range(count)]
    columns["day"] = [*map(float, np.random.default_rng(1).permutation(count))]
    columns["split"] = [split for split, size in ROWS.items() for _ in range(size)]
    target = numbers @ [1.0, -2.0, 0.5, 0.0]
    city = draw.choice(["Bern", "Oslo", "Rome"], count)
    scores = target + 2 * (city == "Oslo")
    classes = np.array(["low", "middle", "high"])[np.digitize(scores, [-1.5, 0.0])]
    tables = {
        "values": columns | {"target": [*map(float, target.round(3))]},
        "classes": columns | {"city": [*map(str, city)], "class": [*map(str, classes)]},
        "binary": columns | {"city": [*map(str, city)], "class": ["yes" if each > 0 else "no" for each in scores]},
    }
    for name, table in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
        parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet")
    words = draw.choice(["to", "be", "or", "not", "that", "is", "the", "question"], 200)
    (folder / "text.txt").write_text(" ".join(words))
    _write_images(folder / "images", draw)


def _write_images(folder: Path, draw: np.random.Generator) -> None:
    """Writes the same images, of three classes, as class folders, as a list in CSV, as tar shards, and in Parquet."""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    lines = [["path", "label", "split"]]
    for split, size in ROWS.items():
        files, labels = [], []
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "shards" / f"{split}.tar", "w") as shard:
            for number in range(size):
                label = number * 3 // size
                pixels = draw.integers(0, 200, (8, 8, 3))
                pixels[:, 2 * label : 2 * label + 3] += 50
                path = folder / split / str(label) / f"{number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                lines.append([str(path), str(label), split])
                files.append(path.read_bytes())
                labels.append(label)
                for suffix, content in (("png", files[-1]), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{number:02}.{suffix}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
        parquet.write_table(pyarrow.table({"image": files, "label": labels}), folder / "shards" / f"{split}.parquet")
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
