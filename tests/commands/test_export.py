"""`dlopt export`: outputs of the exported files, loaded without dlopt."""

import contextlib
import csv
import io
import json
import random
import re
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
from dlopt.trained import exporting
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


@EXTRA
@pytest.mark.parametrize("channels", [1, 3])
def test_the_lines_of_the_page_read_images_as_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    """The model reads centres of 8x8 of images of 10x14. Pillow mixes colours to grey before or after it scales."""
    from PIL import Image

    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for part, count in (("train", 12), ("new", 1)):
        for label, level in (("dark", 0), ("light", 120)):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level, level + 135, (11, 22, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    tmp_path / part / label / f"{number}.png", exif=exif if number % 3 else None
                )
    new, pixels = tmp_path / "new", generator.integers(0, 256, (40, 20, 4), dtype=np.uint8)
    colours = pixels[..., :3]
    images = {
        "wide": colours[:10],
        "clear": pixels,
        "grey": pixels[..., 0],
        "rotated": colours,
        "small": colours[:7, :5],
    }
    for name, image in images.items():
        Image.fromarray(image).save(new / f"{name}.png", exif=exif if name == "rotated" else None)
    crop = "augmentation.operations=[{_target_: dlopt.augment.RandomCrop, size: 8}]"
    line = [
        "data=image_folder",
        "data.root=.",
        f"data.channels={channels}",
        "data.image_size=[10,14]",
        "model=mlp",
        crop,
    ]
    line += ["model.widths=[8]", "epochs=2", "threads=1", "device=cpu", "tracking=[]", "hydra.run.dir=run"]
    assert dlopt(tmp_path, "train", *line).code == 0
    assert "input: uint8 [batch" in (found := dlopt(tmp_path, "export", "run", "format=onnx", "output=best.onnx")).out
    assert f", 8, 8], the centre of [{channels}, 10, 14]\n" in found.out
    assert dlopt(tmp_path, "predict", "run", "images=new").code == 0
    monkeypatch.chdir(tmp_path)
    code = compile(lines_of_the_page(0).replace('"photo.png"', "photo"), "export.md", "exec")
    for row in predictions(tmp_path):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {"photo": row["image"]})
        label, probability = printed.getvalue().split()
        mixed = channels == 1 and "clear" in row["image"]
        assert label == row["class"], row
        assert float(probability) == pytest.approx(float(row["probability"]), abs=0.01 if mixed else 1e-5), row


def write_table(path: Path, rows: int, dates: str, seed: int, *, is_new: bool = False) -> None:
    """Writes numbers, codes, categories and dates with gaps, and what depends on them. A new table has more towns."""
    draws = random.Random(seed)
    lines = ["age,code,town,day,price,bought"]
    for _ in range(rows):
        age, code, town = draws.randint(18, 80), draws.choice("12"), draws.choice(["Bern", "Basel", "Chur"])
        day = datetime(2024, 1, 1) + timedelta(days=draws.randrange(360), hours=draws.randrange(24))
        price = 1000 + age + 50 * (town == "Chur") + 5 * day.month + draws.random()
        row = [str(age), f"{code}.0" if draws.random() < 0.5 else code, town, day.strftime(dates)]
        row = ["NA" if draws.random() < 0.1 else each for each in row]
        row[2] = "Genf" if is_new and draws.random() < 0.2 else row[2]
        lines.append(",".join([*row, f"{price:.3f}", "yes" if price > 1110 else "no"]))
    path.write_text("\n".join(lines) + "\n")


@EXTRA
@pytest.mark.parametrize(("dates", "target"), [("%d/%m/%Y %H:%M", "price"), ("%Y-%m-%dT%H:%M+02:00", "bought")])
def test_the_lines_of_the_page_read_tables_as_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dates: str, target: str
) -> None:
    write_table(tmp_path / "train.csv", 120, dates, 0)
    write_table(tmp_path / "new.csv", 60, dates, 1, is_new=True)
    other = "bought" if target == "price" else "price"
    line = [
        "data=table",
        "data.file=train.csv",
        f"data.target={target}",
        f"data.ignore=[{other}]",
        "data.categories=[code]",
    ]
    line += ["data.labels=value", "loss=mse"] if target == "price" else []
    line += ["model=mlp", "model.widths=[8]", "epochs=3", "threads=1", "tracking=[]", "hydra.run.dir=run"]
    assert dlopt(tmp_path, "train", *line).code == 0
    assert dlopt(tmp_path, "export", "run", "format=onnx", "output=best.onnx").code == 0
    assert dlopt(tmp_path, "predict", "run", "file=new.csv").code == 0
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines_of_the_page(1), {})
    expected = [row["prediction"] for row in predictions(tmp_path)]
    found = printed.getvalue().split()
    assert len({*expected}) > 1
    assert found == expected if target == "bought" else [*map(float, found)] == pytest.approx([*map(float, expected)])


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
    ],
)
def test_refused(run: Path, line: list[str], parts: list[str]) -> None:
    message = refused(run, "export", f"checkpoint={CHECKPOINT}", *line)
    for part in parts:
        assert part in message
