#!/usr/bin/env python
"""Records 20 updates and the evaluations of every recipe, data set and model to the last bit, and compares them.

Run it before and after a change that must not move any number, on the same machine. Data that are not in the package
are generated, and everything that only decides how long a run takes is made small. Models of 224 x 224 pixels and the
largest residual networks are left out, unless a recipe uses them.

.venv/bin/python scripts/record_runs.py FILE            record into FILE what it does not have yet (about an hour)
.venv/bin/python scripts/record_runs.py FILE --compare  run what it has again, and print what differs (exit code 1)
.venv/bin/python scripts/record_runs.py FILE --compare gpt vit    only cases whose names have one of these words

tests/recorded_runs.json has the numbers of an AMD EPYC with torch 2.15.0 before tasks were objects (commit 5d2466db);
other processors and versions of torch round differently.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, open_dict
from PIL import Image

from dlopt.basics.errors import RunError, UserError
from dlopt.config.compose import Composer, config_folder
from dlopt.config.plan import checked
from dlopt.metrics.measures import VARYING
from dlopt.python.model import preserve_global_state
from dlopt.run.runner import run

SMALL = ("steps=20", "data.batch_size=8", "data.subset=40", "threads=1", "device=cpu", "tracking=[]", "data.workers=0",
    "checkpoint.every_epochs=null", "seed=0", "parallel=single", "compile=false", "max_time=null",
    "evaluate.every_epochs=2", "precision=fp32", "stopping=none", "diagnostics=[]")  # fmt: skip
TOKENS = ("data.sequence_length=32", "evaluate.samples=40")
SERIES = ("comparison", "benchmark", "ladder", "judge")
"""Keys that make several runs of one recipe: the run of the recipe itself is recorded."""
LARGE = ("_224", "resnet50", "resnet101", "gpt2_small", "resnet18",
    "resnet34", "alexnet", "vgg11")  # fmt: skip
MEASURED = ("eta", *VARYING)


def main() -> int:
    parser = argparse.ArgumentParser(description="Record small runs of everything, or compare them with a record")
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("words", nargs="*", help="only cases whose names have one of these words")
    arguments = parser.parse_intermixed_args()
    recorded: dict[str, Any] = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generate_data(root)
        for name, lines in cases(root):
            if arguments.words and not any(word in name for word in arguments.words):
                continue
            if arguments.compare != (name in recorded):
                continue
            found = json.loads(json.dumps(record(lines, root)))
            if not arguments.compare:
                recorded[name] = found
                entries = (f" {json.dumps(case)}: {json.dumps(values)}" for case, values in recorded.items())
                arguments.file.write_text("{\n" + ",\n".join(entries) + "\n}\n")
                print(name, found.get("refused", f"{len(found)} numbers"), flush=True)
            elif found != recorded.get(name):
                differing += 1
                print(f"{name} differs", flush=True)
                before = recorded.get(name, {})
                for key in sorted(found.keys() | before.keys()):
                    if found.get(key) != before.get(key):
                        print(f"    {key}: {before.get(key)} -> {found.get(key)}", flush=True)
    if arguments.compare:
        print(f"{differing} of {len(recorded)} cases differ")
    return 1 if differing else 0


def cases(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, overrides) of all recipes, data sets and models."""
    conf = config_folder()
    for path in sorted((conf / "experiment").rglob("[!_]*.yaml")):
        recipe = str(path.relative_to(conf / "experiment").with_suffix(""))
        yield f"experiment={recipe}", [f"experiment={recipe}"]
    for data, lines in sources(root).items():
        yield f"data={data}", lines
    for path in sorted((conf / "model").glob("[!_]*.yaml")):
        model = path.stem
        if not any(part in model for part in LARGE) and model not in ("custom", "timm", "torchvision"):
            data = {"polynomial": "polynomial", "rnn": "copying", "lstm": "copying"}.get(model, "digits")
            if model.startswith("gpt"):
                data = "python_source"
            yield f"model={model}", [*sources(root)[data], f"model={model}"]


def sources(root: Path) -> dict[str, list[str]]:
    """Returns the overrides of a run on each data set, with generated files where the package has none."""
    own = {
        "table": f"data.file={root}/table.csv", "text": f"data.file={root}/text.txt",
        "tokens": f"data.root={root}/tokens", "image_folder": f"data.root={root}/images",
        "imagenet": f"data.root={root}/imagenet", "csv": f"data.file={root}/images/train.csv",
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for path in sorted((config_folder() / "data").glob("[!_]*.yaml")):
        name = path.stem
        lines = [f"data={name}"]
        if name in own:
            lines.append(own[name])
        elif name in ("custom", "webdataset", "huggingface", "parquet"):
            continue
        if name in ("polynomial", "linear", "diabetes"):
            lines += ["model=mlp", "loss=mse", "optimizer.lr=0.001"]
        elif name in ("table", "wine", "breast_cancer"):
            lines += ["model=mlp"]
        elif name in ("copying", "recall"):
            lines += ["model=rnn", "normalize=none"]
        if name == "imagenet":
            lines += ["data.image_size=32"]
        found[name] = lines
    found["table, regression"] = ["data=table", own["table"], "model=mlp", "data.labels=value", "loss=mse",
        "optimizer.lr=0.001"]  # fmt: skip
    found["digits, reconstruction"] = ["data=digits", "model=autoencoder"]
    found["digits, metrics"] = [
        "data=digits", "evaluate.metrics=[macro_f1,calibration_error,class_accuracy,top5_accuracy]",
    ]  # fmt: skip
    found["diabetes, metrics"] = [*found["diabetes"], "evaluate.metrics=[r2,mae]"]
    found["python_source, bpe"] = ["data=text", own["text"], "data.tokenizer=bpe", "data.vocabulary=300",
        "evaluate.samples=20"]  # fmt: skip
    found["digits, smoothing"] = ["data=digits", "loss.label_smoothing=0.1", "ema=0.9", "evaluate.tta=flip"]
    return found


def record(lines: list[str], root: Path) -> dict[str, Any]:
    """Returns the metrics of a run as hexadecimal numbers, or why it is refused."""
    typed = {line.partition("=")[0] for line in lines}
    small = [line for line in SMALL if line.partition("=")[0] not in typed]
    while True:
        try:
            with tempfile.TemporaryDirectory() as folder, preserve_global_state("record"):
                words = [*lines, *small, *for_data(lines, small, root), f"hydra.run.dir={folder}/run"]
                path, _ = run(checked(single_run(words), words), console=False, from_python=True)
                return numbers(path.path)
        except (UserError, RunError) as error:
            # A key that the choices of the recipe do not have is left out.
            message = str(error)
            missing = next((line for line in small if line.partition("=")[0] in message), None)
            if missing is None:
                return {"refused": message.replace(str(root), "ROOT")[:300]}
            small.remove(missing)


def single_run(words: list[str]) -> DictConfig:
    """Composes a recipe without what makes several runs of it."""
    config = Composer(words=words).compose(words)
    with open_dict(config):
        for key in SERIES:
            config.pop(key, None)
    return config


def for_data(lines: list[str], small: list[str], root: Path) -> list[str]:
    """Returns the overrides with which a recipe reads generated files, except those that `lines` have."""
    name = str(single_run([*lines, *small]).data._target_).rpartition(".")[2]
    files = {"tokens": "tokens", "fashion_mnist": "idx", "mnist": "idx", "imagenet": "imagenet"}
    found = [f"data.root={root}/{files[name]}"] if name in files else []
    if name in ("text", "tokens", "python_source"):
        found += TOKENS
    return [line for line in found if not any(typed.startswith(line.partition("=")[0]) for typed in lines)]


def numbers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found |= {f"{values['step']}/{key}": exact(value) for key, value in values.items() if key not in MEASURED}
    summary = json.loads((folder / "summary.json").read_text())
    return found | {
        key: exact(value) for key, value in summary.items() if key.startswith(("test_", "best_", "parameters"))
    }


def exact(value: Any) -> Any:
    return float(value).hex() if isinstance(value, float) and math.isfinite(value) else value


def generate_data(root: Path) -> None:
    """Writes small files of all formats below `root`, and replaces torchvision's CIFAR by random images."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(120, 4))
    lines = [",".join(f"{value:.6f}" for value in row) + f",{int(row.sum() > 0)}" for row in rows]
    (root / "table.csv").write_text("a,b,c,d,target\n" + "\n".join(lines) + "\n")
    words = ["the", "rate", "of", "a", "run", "falls", "and", "rises"]
    (root / "text.txt").write_text("\n".join(" ".join(draw.choice(words, 12)) for _ in range(800)))
    (root / "tokens").mkdir()
    for split in ("train", "val"):
        draw.integers(0, 50257, 6000).astype(np.uint16).tofile(root / "tokens" / f"{split}.bin")
    write_idx(root / "idx", draw)
    for place, splits in (("images", ("train", "test")), ("imagenet", ("train", "val"))):
        for split in splits:
            for name in ("n01440764", "n01443537"):
                (root / place / split / name).mkdir(parents=True)
                for number in range(40):
                    pixels = draw.integers(0, 256, (40, 36, 3)).astype(np.uint8)
                    Image.fromarray(pixels).resize((32, 32)).save(root / place / split / name / f"{number}.png")
    listed = sorted((root / "images" / "train").rglob("*.png"))
    listing = [f"{path.relative_to(root / 'images')},{path.parent.name}" for path in listed]
    (root / "images" / "train.csv").write_text("path,label\n" + "\n".join(listing) + "\n")
    import torchvision.datasets

    torchvision.datasets.CIFAR10 = generated_cifar(10)
    torchvision.datasets.CIFAR100 = generated_cifar(100)


def generated_cifar(classes: int) -> Callable[..., Any]:
    class Cifar:
        base_folder = "generated"

        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            draw = np.random.default_rng(int(train))
            count = 4 * classes if classes > 10 else 160
            self.data = draw.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
            self.targets = [number % classes for number in range(count)]
            self.classes = [str(number) for number in range(classes)]

    return Cifar


def write_idx(folder: Path, draw: np.random.Generator) -> None:
    folder.mkdir()
    for prefix, count in (("train", 160), ("t10k", 60)):
        images = draw.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / name).write_bytes(head + array.tobytes())


if __name__ == "__main__":
    sys.exit(main())
