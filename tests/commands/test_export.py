"""`dlopt export`: outputs of the exported files, loaded without dlopt."""

import contextlib
import csv
import io
import json
import random
import re
import subprocess
import sys
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import RunError
from dlopt.config.parsing import parse
from dlopt.data.checks import GAPS
from dlopt.data.tables.columns import as_dates
from dlopt.trained import exporting, portable, preprocessing
from dlopt.trained.classify import Classified
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import SMALL, dlopt, entries, refused

CHECKPOINT = "run/checkpoints/best.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert dlopt(folder, "train", *SMALL, "hydra.run.dir=run", "tracking=[]", "device=cpu").code == 0
    return folder


def reference(folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 test images and the model's outputs."""
    checkpoint = load(folder / CHECKPOINT)
    workload = build_workload(parse(checkpoint.config), checkpoint)
    assert workload.dataset.test is not None
    workload.module.load_state_dict(checkpoint.model)
    workload.module.eval()
    images = workload.dataset.test.fetch(torch.arange(5))
    with torch.no_grad():
        return images, workload.module(workload.normalize(images))


def exported(folder: Path, *arguments: str) -> str:
    result = dlopt(folder, "export", f"checkpoint={CHECKPOINT}", *arguments)
    assert (result.code, result.err) == (0, "")
    assert "16 samples of the test set" in result.out
    return result.out


def test_safetensors(run: Path) -> None:
    from safetensors import safe_open

    assert exported(run, "format=safetensors").startswith("run/best.safetensors\ninput: uint8 [batch, 1, 8, 8]\n")
    checkpoint = load(run / CHECKPOINT)
    with safe_open(run / "run/best.safetensors", "pt") as file:
        outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    expected = {f"model.{k}": v for k, v in checkpoint.model.items()}
    expected |= {f"normalize.{k}": v for k, v in checkpoint.normalize.items()}
    assert outputs.keys() == expected.keys() and all(torch.equal(outputs[name], expected[name]) for name in outputs)
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["config"]) == checkpoint.config
    assert (run / "run/best.safetensors").stat().st_mode == (run / "run/config.yaml").stat().st_mode


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_torch_export(run: Path, kind: str, tmp_path: Path) -> None:
    exported(run, "format=torch_export", f"input={kind}", f"output={tmp_path / 'model.pt2'}")
    images, expected = reference(run)
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    for count in (1, 5):
        outputs = program(images[:count].to(getattr(torch, kind)))
        torch.testing.assert_close(outputs, expected[:count])
    assert json.loads(extra["metadata.json"])["input"] == {"shape": [1, 8, 8], "type": kind}


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs dlopt[export]"
)
@pytest.mark.parametrize("kind", [pytest.param("uint8", marks=pytest.mark.slow), "float32"])
def test_onnx(run: Path, kind: str, tmp_path: Path) -> None:
    import onnxruntime

    exported(run, "format=onnx", f"input={kind}", f"output={tmp_path / 'model.onnx'}")
    images, expected = reference(run)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        [outputs] = session.run(None, {"images": images[:count].numpy().astype(kind)})
        np.testing.assert_allclose(outputs, expected[:count].numpy(), rtol=1e-4, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert entries(tmp_path) == {"model.onnx"}


PAGE = Path(__file__).parents[2] / "docs/howto/export.md"
EXTRA = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs dlopt[export]"
)


def lines_of_the_page(number: int) -> str:
    """Returns a Python block of the page."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def difference(file: Path) -> float:
    import onnxruntime

    metadata = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_modelmeta()
    found = json.loads(metadata.custom_metadata_map["preprocessing"])
    assert found["odd_inputs"] == 200
    return float(found["largest_difference"])


def printed_by_the_page(number: int, names: dict[str, str]) -> list[str]:
    """Runs a Python block of the page, with these texts in place of others; returns the words that it prints."""
    code = lines_of_the_page(number)
    for old, new in names.items():
        code = code.replace(old, new)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().split()


@EXTRA
@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_reads_images_as_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """The model reads centres of 8x8 of images of 10x14."""
    from PIL import Image

    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for label, level in (("dark", 0), ("light", 120)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(level, level + 135, (11, 22, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"train/{label}/{number}.png", exif=exif if number % 3 else None)
    colours = generator.integers(0, 256, (40, 20, 3), dtype=np.uint8)
    images = {
        "wide": colours[:10],
        "tall": colours[:, :3],
        "grey": colours[..., 0],
        "rotated": colours,
        "pixel": colours[:1, :1],
        "whole": colours[:10, :14],
    }
    (tmp_path / "new").mkdir()
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / f"new/{name}.png", exif=exif if name == "rotated" else None)
    line = ["data=image_folder", "data.root=.", f"data.channels={channels}", "data.image_size=[10,14]", "model=mlp"]
    line += ["augmentation.operations=[{_target_: dlopt.augment.RandomCrop, size: 8}]", "model.widths=[8]", "epochs=2"]
    assert dlopt(tmp_path, "train", *line, "threads=1", "device=cpu", "tracking=[]", "hydra.run.dir=run").code == 0
    found = dlopt(tmp_path, "export", "run", "format=onnx", "include=preprocessing", "output=best.onnx")
    assert "preprocessing: in the graph\ninput: image uint8 [batch, height, width, channels]\n" in found.out
    assert difference(tmp_path / "best.onnx") < 1e-5
    assert dlopt(tmp_path, "predict", "run", "images=new").code == 0
    monkeypatch.chdir(tmp_path)
    for row in predictions(tmp_path):
        label, probability = printed_by_the_page(0, {"photo.png": row["image"]})
        assert label == row["class"], row
        assert float(probability) == pytest.approx(float(row["probability"]), abs=1e-6), row


TOWNS = ["Bern", "Zürich", 'St. "Gallen"', "a;b, c", "(x|y)*\\d", "日本"]


def write_table(path: Path, rows: int, seed: int, dates: str | None, *, is_new: bool = False) -> None:
    """Writes numbers, codes, categories and dates with gaps, and what depends on them. A new table has more towns."""
    draws = random.Random(seed)
    names = ["age", "code", "the town, of class", *(["day"] if dates else []), "price", "bought"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(names)
        for _ in range(rows):
            age, code, town = draws.randint(18, 80), draws.choice("12"), draws.choice(TOWNS)
            day = datetime(2024, 1, 1) + timedelta(days=draws.randrange(360), hours=draws.randrange(24))
            price = 1_000_000 + age + 50 * (town == "Bern") + 5 * day.month + draws.random()
            row = [str(age), code + draws.choice(["", ".0"]), town, *([day.strftime(dates)] if dates else [])]
            row = [
                draws.choice(["", "NA"] if each != row[0] else [""]) if draws.random() < 0.1 else each for each in row
            ]
            row[2] = draws.choice(["Genf", "bern"]) if is_new and draws.random() < 0.2 else row[2]
            table.writerow([*row, f"{price:.3f}", "yes" if price > 1_000_100 else "no"])


def train_table(folder: Path, target: str, dates: str | None) -> None:
    """Trains on a table, and predicts new rows of it."""
    write_table(folder / "train.csv", 120, 0, dates)
    write_table(folder / "new.csv", 60, 1, dates, is_new=True)
    other = "bought" if target == "price" else "price"
    line = ["data=table", "data.file=train.csv", f"data.target={target}", f"data.ignore=[{other}]"]
    line += ["data.categories=[code]", *(["data.labels=value", "loss=mse"] if target == "price" else [])]
    line += ["model=mlp", "model.widths=[8]", "epochs=12", "threads=1", "tracking=[]", "hydra.run.dir=run"]
    assert dlopt(folder, "train", *line).code == 0


@EXTRA
def test_the_graph_reads_tables_as_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold and a temperature."""
    import onnxruntime

    train_table(tmp_path, "bought", None)
    assert dlopt(tmp_path, "eval", "run", "threshold=recall:0.5").code == 0
    assert dlopt(tmp_path, "predict", "run", "file=new.csv", "probabilities=all").code == 0
    found = dlopt(tmp_path, "export", "run", "format=onnx", "include=preprocessing", "output=best.onnx")
    shown = "input: age double [batch], code string [batch], the town, of class string [batch]\n"
    assert "preprocessing: in the graph\n" in found.out and shown in found.out and "decision, applied: yes" in found.out
    assert difference(tmp_path / "best.onnx") < 1e-5
    monkeypatch.chdir(tmp_path)
    expected = predictions(tmp_path)
    labels = [row["prediction"] for row in expected]
    assert printed_by_the_page(1, {}) == labels and len({*labels}) == 2
    session = onnxruntime.InferenceSession("best.onnx", providers=["CPUExecutionProvider"])
    texts = {name: [row[name] for row in expected] for name in ("code", "the town, of class")}
    ages = np.array([float(row["age"] or "nan") for row in expected])
    for pad in ("{}", " {}\t", "\u00a0{}\r\n"):
        inputs = {name: np.array([pad.format(text) for text in column]) for name, column in texts.items()}
        probabilities, numbers = session.run(["probabilities", "prediction"], {"age": ages, **inputs})
        np.testing.assert_allclose(probabilities[:, 1], [float(row["p(yes)"]) for row in expected], atol=1e-6)
        assert [("no", "yes")[number] for number in numbers] == labels


@EXTRA
@pytest.mark.parametrize("dates", ["%d/%m/%Y %I:%M %p", pytest.param("%Y-%m-%dT%H:%M+02:00", marks=pytest.mark.slow)])
def test_a_program_reads_dates_as_predict(tmp_path: Path, dates: str) -> None:
    """It runs where neither dlopt nor torch can be imported."""
    train_table(tmp_path, "price", dates)
    assert dlopt(tmp_path, "predict", "run", "file=new.csv").code == 0
    (tmp_path / "best.py").write_text("print('mine')\n")
    line = ["export", "run", "format=onnx", "include=preprocessing", "output=best.onnx"]
    before = entries(tmp_path)
    assert "best.py is another program; use another name" in refused(tmp_path, *line)
    assert entries(tmp_path) == before
    (tmp_path / "best.py").unlink()
    assert "in best.py, because ONNX cannot read dates (day)\n" in dlopt(tmp_path, *line).out
    assert dlopt(tmp_path, *line).code == 0  # replaces both
    assert difference(tmp_path / "best.onnx") < 1e-5
    assert len((tmp_path / "best.py").read_text().splitlines()) <= 40
    hidden = "import sys; sys.modules |= dict.fromkeys(('dlopt', 'torch', 'pandas'))\n"
    code = f"{hidden}{lines_of_the_page(2)}print(*outputs[0][:, 0], sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = [float(row["prediction"]) for row in predictions(tmp_path)]
    assert [*map(float, run.stdout.split())] == pytest.approx(expected, abs=1e-3)


def test_the_program_reads_fields_as_dlopt() -> None:
    assert portable.GAPS == GAPS
    for form, text in [
        ("2024-01-31", "2024-02-29"),
        ("2024-01-31", "2024/2/9 7:05"),
        ("2024-01-31", "1969-12-31T23:59:59.25"),
        ("2024-01-31", "9.2.2024, 12:00:01"),
        ("31/1/2024", "9/2/2024 12:10 am"),
        ("31/1/2024", "9-2-2024"),
        ("1/31/2024", "9/2/2024 12:10:30 PM"),
        ("1/31/2024", "9.2.1024 1:10PM"),
        ("2024-01-31T14:05Z", "2024-02-09T01:00Z"),
        ("2024-01-31T14:05Z", "2024-02-09 01:00-07:30"),
    ]:
        column = as_dates("day", [text], form)
        assert column is not None and portable.seconds(text, form) == column.values[0], text
    for form, text in (("2024-01-31T14:05Z", "2024-02-09"), ("31/1/2024", "9/2/24"), ("2024-01-31", "soon")):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            portable.seconds(text, form)


@EXTRA
def test_a_graph_that_differs_is_not_written(run: Path) -> None:
    before = entries(run)
    with mock.patch.object(preprocessing, "classify", lambda images, *_: [("", Classified([0.1] * 10, 0, None))] * 200):
        result = dlopt(run, "export", "run", "format=onnx", "include=preprocessing")
    assert result.code == 1 and re.search("by 0.[0-9]+, more than 0.001; nothing was written\n$", result.err)
    assert entries(run) == before


@EXTRA
def test_metadata_of_images(run: Path, tmp_path: Path) -> None:
    """The digits of scikit-learn: 0 to 255, of one channel; the model has their mean and deviation."""
    import onnxruntime

    exported(run, "format=onnx", f"output={tmp_path / 'model.onnx'}")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    rule = {"mode": "L", "background": "white", "resize": "cover", "filter": "bilinear", "size": [8, 8], "crop": [8, 8]}
    assert json.loads(metadata["image"]) == rule and "columns" not in metadata
    checkpoint = load(run / CHECKPOINT)
    workload = build_workload(parse(checkpoint.config), checkpoint)
    images = workload.dataset.train.fetch(torch.arange(len(workload.dataset.train))).double()
    found = json.loads(metadata["normalize"])
    assert found["mean"] == pytest.approx([images.mean().item()], rel=1e-5)
    assert found["std"] == pytest.approx([images.std(correction=0).item()], rel=1e-5)


def test_removes_file_with_wrong_outputs(run: Path) -> None:
    before = entries(run)
    line = ("export", f"checkpoint={CHECKPOINT}", "format=torch_export", "output=wrong.pt2")
    with mock.patch.object(exporting, "_read", lambda form, path, trained, inputs: torch.zeros(len(inputs), 10)):
        result = dlopt(run, *line)
    assert result.code == 1 and "differ from the model's" in result.err
    with mock.patch.object(exporting, "_read", side_effect=RuntimeError("Got: 16 Expected: 2")):
        result = dlopt(run, *line)
    assert result.code == 1 and "does not accept 16 inputs: Got: 16 Expected: 2" in result.err
    assert entries(run) == before


class Branching(torch.nn.Module):
    """A model with data-dependent control flow, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_one_sample_is_enough(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    trained = mock.Mock(normalize=torch.nn.Identity(), module=module)
    trained.task.normalization = lambda normalize: normalize
    path = tmp_path / "model.pt2"
    exporting.write("torch_export", trained, torch.ones(1, 1, 4, 4), {}, path)
    for count in (1, 5):
        assert exporting.verify("torch_export", path, trained, torch.rand(count, 1, 4, 4)) is not None


def test_reports_unconvertible_model(tmp_path: Path) -> None:
    trained = mock.Mock(normalize=torch.nn.Identity(), module=Branching())
    with pytest.raises(RunError, match="format=torch_export: torch cannot convert this model"):
        exporting.write("torch_export", trained, torch.ones(2, 1, 4, 4), {}, tmp_path / "model.pt2")


def test_exact_statistics_are_not_exported(tmp_path: Path) -> None:
    line = ("epochs=1", "model.norm=batch", "norm_statistics=exact", "hydra.run.dir=run", "device=cpu")
    assert dlopt(tmp_path, "train", *SMALL, *line).code == 0
    result = dlopt(tmp_path, "export", "checkpoint=run", "format=safetensors")
    assert result.code == 0 and "norm_statistics=exact: needs the training data" in result.err


def test_verifies_on_random_images_without_data(tmp_path: Path) -> None:
    from PIL import Image

    for part, label in (("train", "a"), ("train", "b")):
        (tmp_path / "data" / part / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 8), (40 * i, 90 * (label == "a"), 7)).save(tmp_path / f"data/{part}/{label}/{i}.png")
    line = [
        "data=image_folder",
        "data.root=data",
        "data.val_split=0",
        "model=mlp",
        "model.widths=[4]",
        "model.norm=none",
    ]
    assert dlopt(tmp_path, "train", *line, "epochs=1", "threads=1", "hydra.run.dir=run").code == 0
    export = ["export", "checkpoint=run/checkpoints/last.pt", "format=torch_export"]
    assert "6 samples of the training set" in dlopt(tmp_path, *export).out
    (tmp_path / "data").rename(tmp_path / "moved")
    result = dlopt(tmp_path, *export)
    assert result.code == 0 and "random samples" in result.out and "data" in result.out
    assert "6 samples of the training set" in dlopt(tmp_path, *export, "data.root=moved").out
    assert "data.root=nowhere" in refused(tmp_path, *export, "data.root=nowhere")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ([], ["format", "required"]),
        (["format=pickle"], ["format=pickle", "onnx"]),
        (["format=onnx", "input=int4"], ["input=int4", "uint8"]),
        (["format=onnx", "output=."], ["output=.", "folder"]),
        (["format=onnx", "model.widths=[3]"], ["model.widths", "may be changed"]),
        (["format=onnx", "include=images"], ["include=images", "preprocessing"]),
        (["format=safetensors", "include=preprocessing"], ["include=preprocessing: needs format=onnx"]),
        (["format=onnx", "include=preprocessing", "input=uint8"], ["include", "input"]),
        (["format=onnx", "include=preprocessing", "data.root=x"], ["data.root: include=preprocessing reads no data"]),
    ],
)
def test_refused(run: Path, line: list[str], parts: list[str]) -> None:
    message = refused(run, "export", f"checkpoint={CHECKPOINT}", *line)
    for part in parts:
        assert part in message
