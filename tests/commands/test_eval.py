"""`dlopt eval`: metrics, test-time augmentation, ensembles and output files."""

import contextlib
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torch.nn import functional as F

import dlopt as package
from dlopt import cli
from dlopt.config.parsing import parse
from dlopt.results.confusion import confusion_table, plot_confusion
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import SMALL, Result, dlopt, entries, refused
from tests.support.ports import free_port
from tests.support.processes import start
from tests.support.ranks import run_ranks

NET = ("model=resnet20", "model.depth=8", "model.width=4")
RUN = (
    *NET,
    "data.subset=300",
    "data.batch_size=20",
    "epochs=3",
    "threads=1",
    "device=cpu",
    "tracking=[]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs `a` and `b` with different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        line = (*RUN, f"seed={seed}")
        result = dlopt(folder, "train", *line, f"hydra.run.dir={name}")
        assert result.code == 0, result.err
    return folder


def metrics_of(folder: Path, *arguments: str, run: str = "a") -> dict[str, Any]:
    result = dlopt(folder, "eval", *arguments)
    assert (result.code, result.err) == (0, "")
    report: dict[str, Any] = json.loads((folder / run / "eval.json").read_text())
    return report


def outputs(folder: Path, run: str, views: Any = lambda x: [x]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of best.pt for each augmented crop of the test images, and the targets."""
    checkpoint = load(folder / run / "checkpoints/best.pt")
    workload = build_workload(parse(checkpoint.config), checkpoint)
    assert workload.dataset.test is not None
    workload.module.load_state_dict(checkpoint.model)
    workload.module.eval()
    indices = torch.arange(len(workload.dataset.test))
    images = workload.dataset.test.fetch(indices).float()
    with torch.no_grad():
        return [workload.module(workload.normalize(view)) for view in views(images)], workload.dataset.test.targets


def test_reproduces_metrics_of_the_run_exactly(folder: Path) -> None:
    summary = json.loads((folder / "a/summary.json").read_text())
    for checkpoint in ("a/checkpoints/best.pt", "a/checkpoints", "[a]"):
        report = metrics_of(folder, f"checkpoint={checkpoint}")
        assert report["test_loss"] == summary["test_loss"]
        assert report["test_accuracy"] == summary["test_accuracy"]
        assert report["tta"] == {"name": "none"} and report["average"] is None
    assert 0.15 < report["test_accuracy"] < 1


@pytest.mark.drawn
def test_output_files(folder: Path) -> None:
    report = metrics_of(folder, "checkpoint=a/checkpoints/best.pt", "output=out", run="out")
    summary = json.loads((folder / "a/summary.json").read_text())
    of_run = {key: value for key, value in summary.items() if key.startswith("test_")}
    assert len(of_run) == 10 and of_run == pytest.approx({key: report[key] for key in of_run}, rel=1e-6)
    [scores], targets = outputs(folder, "a")
    predictions = scores.argmax(1)
    assert report["test_macro_f1"] == pytest.approx(metrics.f1_score(targets, predictions, average="macro"))
    assert report["test_top5_accuracy"] == pytest.approx(metrics.top_k_accuracy_score(targets, scores, k=5))
    with (folder / "out/confusion.csv").open() as file:
        head, *rows = csv.reader(file)
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert head[1:] == [row[0] for row in rows] == [str(digit) for digit in range(10)]
    assert (matrix == metrics.confusion_matrix(targets, predictions)).all()
    recall = metrics.recall_score(targets, predictions, average=None, zero_division=0)
    assert [row["accuracy"] for row in report["classes"]] == pytest.approx(recall.tolist())
    assert sum(row["samples"] for row in report["classes"]) == len(targets)
    pictures = {"confusion.png", "evaluation.png", "most_wrong.png"}
    assert entries(folder / "out") == {"eval.json", "confusion.csv", "most_wrong.csv", *pictures}
    assert all((folder / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    wrong = (predictions != targets).nonzero().flatten()
    assert report["confusion"] == matrix.tolist() and report["wrong"] == len(wrong)
    order = wrong[scores.double().softmax(1)[wrong, targets[wrong]].argsort()]
    assert [each["position"] for each in report["most_wrong"]] == order[:24].tolist()
    left, top, width, height = report["most_wrong"][0]["box"]
    with Image.open(folder / "out/most_wrong.png") as picture:
        pixels = picture.convert("L").crop((left, top, left + width, top + height)).resize((8, 8), Image.Resampling.BOX)
    checkpoint = load(folder / "a/checkpoints/best.pt")
    images = build_workload(parse(checkpoint.config), checkpoint).dataset.test
    assert images is not None
    difference = np.asarray(pixels, dtype=float) - images.fetch(order[:1])[0, 0].numpy()
    assert np.abs(difference).mean() < 12, "the picture has the sample at its box"


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_flip_matches_manual_average(folder: Path, average: str) -> None:
    report = metrics_of(folder, "checkpoint=a/checkpoints/best.pt", "tta=flip", f"average={average}")
    (plain, mirrored), targets = outputs(folder, "a", lambda x: [x, x.flip(3)])
    if average == "logits":
        loss = F.cross_entropy((plain + mirrored) / 2, targets)
    else:
        loss = F.nll_loss(((plain.softmax(1) + mirrored.softmax(1)) / 2).log(), targets)
    assert report["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["average"] == average


def test_ensemble_matches_manual_average(folder: Path) -> None:
    report = metrics_of(folder, "checkpoint=[a/checkpoints/best.pt,b/checkpoints/best.pt]", "data.batch_size=50")
    ([a], targets), ([b], _) = outputs(folder, "a"), outputs(folder, "b")
    mean = (a.softmax(1) + b.softmax(1)) / 2
    assert report["test_loss"] == pytest.approx(F.nll_loss(mean.log(), targets).item(), rel=1e-5)
    assert report["test_accuracy"] == pytest.approx((mean.argmax(1) == targets).double().mean().item())
    assert report["checkpoint"] == ["a/checkpoints/best.pt", "b/checkpoints/best.pt"]


# -- several processes


def in_processes(folder: Path, processes: int, *arguments: str) -> list[str]:
    with tempfile.TemporaryDirectory() as store:
        return run_ranks("tests.support.ranks:run_command", processes, Path(store), str(folder), *arguments)


def test_processes_divide_the_test_set(folder: Path) -> None:
    """Of an ensemble with flipped images; the last batch has one sample, hence none for one of the two processes."""
    samples = len(outputs(folder, "a")[1])
    size = next(size for size in range(50, samples) if samples % size == 1)
    line = ["checkpoint=[a,b]", "tta=flip", "precision=fp64", f"data.batch_size={size}"]
    one = metrics_of(folder, *line, "output=one", run="one")
    first, second = in_processes(folder, 2, "eval", *line, "output=two")
    assert "tested" in first and second == ""
    two = json.loads((folder / "two/eval.json").read_text())
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert rounded(two[key]) == rounded(value), key
        assert not isinstance(value, float) or two[key] == pytest.approx(value, rel=1e-12), key
    for exact in ("test_accuracy", "test_top5_accuracy", "test_macro_f1"):
        assert two[exact] == one[exact]
    assert (folder / "two/confusion.csv").read_bytes() == (folder / "one/confusion.csv").read_bytes()


def rounded(value: Any) -> Any:
    """Returns plain values, of which numbers are rounded to 9 digits after the point."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


@pytest.mark.slow
@pytest.mark.drawn
def test_processes_divide_a_test_without_labels(tmp_path: Path) -> None:
    line = ["model=autoencoder", "loss=mse", "data.subset=40", "epochs=1", "threads=1", "device=cpu"]
    result = dlopt(tmp_path, "train", *line, "precision=fp64", "hydra.run.dir=run")
    assert result.code == 0, result.err
    found = []
    for processes in (1, 2):
        if processes == 1:
            assert dlopt(tmp_path, "eval", "checkpoint=run").code == 0
        else:
            in_processes(tmp_path, 2, "eval", "checkpoint=run")
        report = json.loads((tmp_path / "run/eval.json").read_text())
        found.append((report["test_loss"], (tmp_path / "run/reconstructions.png").read_bytes()))
        (tmp_path / "run/eval.json").unlink()
    assert found[1] == (pytest.approx(found[0][0], rel=1e-12), found[0][1])


def test_modes_that_shard_the_model_are_refused_by_name(folder: Path) -> None:
    for choice in ("fsdp", "pipeline"):
        error = refused(folder, "eval", "checkpoint=a", f"parallel={choice}", "parallel.processes=2")
        assert f"parallel={choice}: shards the model" in error and "use parallel=ddp" in error
    assert "parallel.processes=0" in refused(folder, "eval", "checkpoint=a", "parallel.processes=0")
    assert "parallel.proceses=2: unknown key" in refused(folder, "eval", "checkpoint=a", "parallel.proceses=2")
    error = refused(folder, "eval", "checkpoint=a", "parallel=single", "parallel.processes=2")
    assert "parallel=single has one process" in error


def late_rank(seconds: float, *arguments: str) -> None:
    time.sleep(seconds)
    sys.argv = ["dlopt", *arguments]
    cli.main()


@pytest.mark.slow
def test_an_error_of_rank_0_before_another_rank_has_joined(tmp_path: Path) -> None:
    """As under srun, which does not end the other ranks."""
    typed = ("eval", "checkpoint=missing.pt", f"parallel.master_port={free_port()}")
    ranks = []
    for number, seconds in enumerate((0.0, 1.0)):
        names = {"PROCID": number, "STEP_ID": 0, "STEP_NUM_TASKS": 2, "LOCALID": number, "GTIDS": "0,1"}
        environment = {"PATH": "/usr/bin:/bin"} | {f"SLURM_{name}": str(value) for name, value in names.items()}
        log = tmp_path / f"{number}.txt"
        ranks.append(start(late_rank, (seconds, *typed), environment, tmp_path, {1: log, 2: log}))
    for process in ranks:
        process.join(120)  # the timeout of a group is longer
    assert [process.exitcode for process in ranks] == [2, 2]
    lines = [line for number in range(2) for line in (tmp_path / f"{number}.txt").read_text().splitlines()]
    assert [line for line in lines if "missing.pt" in line] == ["dlopt: checkpoint=missing.pt: no such file"]


@pytest.mark.slow
def test_starts_processes_and_runs_under_torchrun(folder: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    metrics_of(folder, "checkpoint=a", "output=single", run="single")
    shown = dlopt(folder, "eval", "checkpoint=a").out.count("test_loss")
    for name, launcher, typed in (("own", [], ["parallel.processes=2"]), ("torchrun", torchrun, [])):
        command = [sys.executable, *launcher, "-m", "dlopt", "eval", "checkpoint=a", f"output={name}", *typed]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test_loss") == shown
        same = (folder / name / "confusion.csv").read_text() == (folder / "single/confusion.csv").read_text()
        assert same, name


@pytest.mark.slow
def test_crops_of_another_size(folder: Path) -> None:
    from torchvision.transforms.v2.functional import ten_crop

    line = ["tta=ten_crop", "tta.scale=8", "tta.crop=7", "average=logits"]
    report = metrics_of(folder, "checkpoint=a/checkpoints/best.pt", *line)
    views, targets = outputs(folder, "a", lambda x: ten_crop(x, [7, 7]))
    assert report["test_loss"] == pytest.approx(F.cross_entropy(torch.stack(views).mean(0), targets).item(), rel=1e-5)
    assert report["tta"] == {"name": "ten_crop", "scale": 8, "crop": 7}
    multi = metrics_of(
        folder, "checkpoint=a/checkpoints/best.pt", *line[2:], "tta=multi_scale_ten_crop", "tta.scales=[8]"
    )
    assert multi["test_loss"] == report["test_loss"]


def test_decodes_images_at_the_scale_of_the_crops(tmp_path: Path) -> None:
    from torchvision.transforms.v2.functional import ten_crop

    from dlopt.data.images.decoding import decode

    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("dark", "light"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(6):
                pixels = draws.integers(0, 160, (24, 30, 3), dtype=np.uint8) + np.uint8(90 * (label == "light"))
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{i}.png")
    line = ("data=image_folder", "data.root=data", "data.image_size=7", "data.val_split=0.2", "data.batch_size=5")
    line += (*NET, "epochs=2", "threads=1", "device=cpu", "hydra.run.dir=run")
    assert dlopt(tmp_path, "train", *line).code == 0
    report = metrics_of(tmp_path, "checkpoint=run/checkpoints/best.pt", "tta=ten_crop", "average=logits", run="run")
    checkpoint = load(tmp_path / "run/checkpoints/best.pt")
    with contextlib.chdir(tmp_path):
        workload = build_workload(parse(checkpoint.config), checkpoint)
    workload.module.load_state_dict(checkpoint.model)
    workload.module.eval()
    images = torch.stack([decode(str(path), (8, 8), 3) for path in sorted((tmp_path / "data/test").rglob("*.png"))])
    with torch.no_grad():
        scores = torch.stack([workload.module(workload.normalize(view)) for view in ten_crop(images.float(), [7, 7])])
    expected = F.cross_entropy(scores.mean(0), torch.arange(2).repeat_interleave(6)).item()
    assert report["test_loss"] == pytest.approx(expected, rel=1e-5)


def image_folder(folder: Path) -> None:
    draws = np.random.default_rng(1)
    for label in ("dark", "light"):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(20):
            pixels = draws.integers(0, 200, (8, 8, 3), dtype=np.uint8) + np.uint8(50 * (label == "light"))
            Image.fromarray(pixels).save(folder / "photos" / label / f"{i:02}.png")


PHOTOS = (
    "data=image_folder", "data.root=photos", "data.batch_size=16", "model=mlp", "model.widths=[8]", "epochs=2",
    "threads=1", "device=cpu", "tracking=[]", "evaluate.metrics=[class_accuracy]",
)  # fmt: skip


def test_without_a_test_set_the_validation_set_is_evaluated(tmp_path: Path) -> None:
    image_folder(tmp_path)
    for seed in (0, 1):
        trained = dlopt(tmp_path, "train", *PHOTOS, "data.val_split=0.3", f"seed={seed}", f"output=run{seed}")
        assert trained.code == 0 and f"  dlopt eval checkpoint=run{seed}" in trained.out
    summary = json.loads((tmp_path / "run0/summary.json").read_text())
    result = dlopt(tmp_path, "eval", "run0")
    report = json.loads((tmp_path / "run0/eval.json").read_text())
    assert result.code == 0 and report["split"] == "validation, which chose the epoch: optimistic"
    assert "split: validation, which chose the epoch: optimistic\n" in result.out and "test " not in result.out
    found = {key: value for key, value in report.items() if key.startswith("val_") and f"best_{key}" in summary}
    assert len(found) == 5
    assert found == pytest.approx({key: summary[f"best_{key}"] for key in found}, rel=1e-6)
    assert result.out.count("dark ") == 1, "the accuracies of the classes are printed once"
    assert report["samples"] == sum(each["samples"] for each in report["classes"]) == 12

    with contextlib.chdir(tmp_path):
        workload = build_workload(parse((checkpoint := load(tmp_path / "run0/checkpoints/best.pt")).config), checkpoint)
    workload.module.load_state_dict(checkpoint.model)
    train = workload.dataset.train
    with torch.no_grad():
        outputs = workload.module.eval()(workload.normalize(train.fetch(torch.arange(len(train)))))
    expected = F.cross_entropy(outputs, train.targets).item()
    report = metrics_of(tmp_path, "run0", "split=train", run="run0")
    assert report["split"] == "training, which chose the weights: optimistic" and report["samples"] == 28
    assert report["evaluated_train_loss"] == pytest.approx(expected, rel=1e-6)

    keys = [each for each in PHOTOS if not each.startswith("tracking")]
    shown = dlopt(tmp_path, "train", *keys, "data.val_split=0.3", "seed=0", "tracking=[tensorboard]", "output=run2")
    assert shown.out[shown.out.index("guessing") :].startswith(
        result.out[result.out.index("guessing") :].split("\n\nc")[0]
    )
    summaries = [json.loads((tmp_path / f"run{number}/summary.json").read_text()) for number in (0, 2)]
    assert summaries[0].keys() == summaries[1].keys() and summaries[1]["test_loss"] is None

    other = refused(tmp_path, "eval", "checkpoint=[run0,run1]")
    assert other.rstrip() == (
        "dlopt: checkpoint=run1/checkpoints/best.pt: its val set differs from that of run0/checkpoints/best.pt"
    )
    assert refused(tmp_path, "eval", "run0", "split=test").rstrip() == (
        "dlopt: split=test: data=image_folder has no test set; allowed: val, train"
    )


def test_without_any_split_no_command_is_recommended(tmp_path: Path) -> None:
    image_folder(tmp_path)
    keys = [each for each in PHOTOS if not each.startswith("evaluate")]
    trained = dlopt(tmp_path, "train", *keys, "data.val_split=0", "output=run")
    assert trained.code == 0 and "dlopt report" in trained.out and "dlopt eval" not in trained.out
    assert refused(tmp_path, "eval", "run").rstrip().endswith("has no test set; allowed: train")


def test_the_validation_set_of_a_run_with_a_test_set(folder: Path, tmp_path: Path) -> None:
    summary = json.loads((folder / "a/summary.json").read_text())
    report = metrics_of(folder, "a", "split=val", "tta=none")
    assert report["val_loss"] == pytest.approx(summary["best_val_loss"], rel=1e-6)
    assert report["val_accuracy"] == summary["best_val_accuracy"] and report["samples"] == 30
    keys = ("model=autoencoder", "data.subset=60", "epochs=1", "threads=1", "tracking=[]")
    assert dlopt(tmp_path, "train", *keys, "output=run").code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    report = metrics_of(tmp_path, "run", "split=val", run="run")
    assert report["val_loss"] == pytest.approx(summary["best_val_loss"], rel=1e-6)


def test_samples_of_another_shape_are_reported(folder: Path) -> None:
    """Also with crops and in an ensemble: a fully convolutional model evaluates any size."""
    for line in (["a"], ["a", "tta=flip"], ["checkpoint=[a,b]"]):
        result = dlopt(folder, "eval", *line, "data.image_size=16", "output=other")
        assert result.code == 0
        assert (
            "a/checkpoints/best.pt: trained on samples of the shape [1, 8, 8], those of the data have [1, 16, 16]"
            in (result.err)
        )


def test_squared_errors_estimate_probabilities(tmp_path: Path) -> None:
    line = ("model=mlp", "model.widths=[16]", "loss=mse", "epochs=1", "threads=1", "device=cpu", "hydra.run.dir=run")
    assert dlopt(tmp_path, "train", *line).code == 0
    report = metrics_of(tmp_path, "checkpoint=run/checkpoints/best.pt", "tta=flip", run="run")
    (plain, mirrored), targets = outputs(tmp_path, "run", lambda x: [x, x.flip(3)])
    loss = F.mse_loss((plain + mirrored) / 2, F.one_hot(targets, 10).float())
    assert report["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["average"] == "logits" and 0 <= report["test_calibration_error"] <= 1


def test_regression(tmp_path: Path) -> None:
    line = (
        "data=polynomial",
        "model=polynomial",
        "loss=mse",
        "epochs=2",
        "threads=1",
        "device=cpu",
        "hydra.run.dir=run",
    )
    assert dlopt(tmp_path, "train", *line).code == 0
    report = metrics_of(tmp_path, "checkpoint=run/checkpoints/best.pt", run="run")
    assert report["test_loss"] == json.loads((tmp_path / "run/summary.json").read_text())["test_loss"]
    assert report["test_r2"] < 1 and report["test_mae"] > 0
    assert "test_accuracy" not in report and not (tmp_path / "run/confusion.csv").exists()
    for typed, word in (("tta=flip", "images"), ("average=probabilities", "average=logits")):
        assert word in refused(tmp_path, "eval", "checkpoint=run/checkpoints/best.pt", typed)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["tta=nope"], ["tta=nope", "ten_crop"]),
        (["tta.crop=7"], ["tta.crop=7", "tta=none"]),
        (["tta=flip", "tta.crop=7"], ["tta.crop=7", "unknown key"]),
        (["tta=ten_crop", "tta.crop=0"], ["tta.crop=0", ">= 1"]),
        (["tta=ten_crop", "tta.crop=9", "tta.scale=8"], ["tta.scale=8", "9x9"]),
        (["tta=multi_scale_ten_crop", "tta.scales=x"], ["tta.scales=x"]),
        (["average=median"], ["average=median"]),
        (["output=a/config.yaml"], ["output=a/config.yaml"]),
        (["data=digits"], ["data=digits: the checkpoint fixes the choices", "data.KEY=VALUE"]),
    ],
)
def test_refused(folder: Path, line: list[str], parts: list[str]) -> None:
    message = refused(folder, "eval", "checkpoint=a/checkpoints/best.pt", *line)
    for part in parts:
        assert part in message


def test_refuses_ensemble_with_different_test_sets(folder: Path) -> None:
    other = dlopt(folder, "train", "model=polynomial", "data=polynomial", "loss=mse", "epochs=1", "hydra.run.dir=c")
    assert other.code == 0
    message = refused(folder, "eval", "checkpoint=[a/checkpoints/best.pt,c/checkpoints/best.pt]", "average=logits")
    assert "c/checkpoints/best.pt" in message and "classes" in message
    assert "checkpoint=[]" in refused(folder, "eval", "checkpoint=[]")


def test_fixed_size_model_reports_its_size(tmp_path: Path) -> None:
    line = (
        "model=mlp",
        "model.widths=[4]",
        "data.subset=40",
        "epochs=1",
        "threads=1",
        "device=cpu",
        "hydra.run.dir=run",
    )
    assert dlopt(tmp_path, "train", *line).code == 0
    message = refused(tmp_path, "eval", "checkpoint=run/checkpoints/best.pt", "tta=ten_crop", "tta.crop=7")
    assert "tta.crop=7" in message and "8x8" in message
    result: Result = dlopt(tmp_path, "eval", "checkpoint=run/checkpoints/best.pt", "tta=ten_crop")
    assert result.code == 0, result.err


def test_model_that_does_not_fit_the_data(tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run").code == 0
    typed = ("checkpoint=run", "data.image_size=5")
    for command in (["eval"], ["trajectory", "points=3"], ["diagnose", "updates=0", "eigenvalues=0"]):
        message = refused(tmp_path, *command, *typed)
        assert message.startswith("dlopt: checkpoint=run") and ": does not fit the model for these data and" in message
        assert "size mismatch for layer1.linear.weight" in message


def test_data_with_other_classes(tmp_path: Path) -> None:
    for root, names in (("one", "ab"), ("two", "bc"), ("three", "abc")):
        for number, name in enumerate(names * 8):
            path = tmp_path / root / ("test" if number < len(names) else "train") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * number).save(path)
    line = [each for each in SMALL if not each.startswith("data")]
    typed = ("data=image_folder", "data.root=one", "data.image_size=4", "data.val_split=0.3", "hydra.run.dir=run")
    assert dlopt(tmp_path, "train", *line, *typed).code == 0
    for root, left_out, samples in (("two", 1, 1), ("three", 1, 2)):  # of the test set, an image of each class
        result = dlopt(tmp_path, "eval", "checkpoint=run", f"data.root={root}", "output=tested")
        assert f"left out: {left_out} of {samples + left_out} samples, of classes that the model does not" in result.out
        assert "other data than those of the run: their test set is tested" in result.out, result.err
        report = json.loads((tmp_path / "tested/eval.json").read_text())
        assert report["samples"] == samples and [each["class"] for each in report["classes"]] == ["a", "b"]
        assert [each["samples"] for each in report["classes"]] == [samples - 1, 1]


def test_other_tables_are_tested_as_a_whole(tmp_path: Path) -> None:
    """Unless they are the training table; classes by name; rows of the training are counted."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 2)).round(3)
    names = np.array(["low", "mid", "top"])[np.digitize(inputs.sum(1), [-0.5, 0.5])]
    rows = [f"{a},{b},{name}" for (a, b), name in zip(inputs, names, strict=True)]

    def write(name: str, rows: list[str], head: str = "a,b,y") -> None:
        (tmp_path / name).write_text("\n".join([head, *rows, ""]))

    write("t.csv", rows[:200])
    line = ["data=table", "data.file=t.csv", "model=mlp", "model.widths=[8]", "epochs=2", "optimizer=adamw"]
    line += ["threads=1", "device=cpu", "tracking=[]", "precision=fp64", "hydra.run.dir=run"]
    assert dlopt(tmp_path, "train", *line).code == 0
    trained = package.load(tmp_path / "run")

    def accuracy(chosen: list[int]) -> float:
        with torch.no_grad():
            found = trained(torch.tensor(inputs[chosen], dtype=torch.float64)).argmax(1)
        return float(np.mean(np.array(trained.classes or ())[found.numpy()] == names[chosen]))

    def tested(*more: str) -> tuple[dict[str, Any], str]:
        result = dlopt(tmp_path, "eval", "run", "output=tested", *more)
        assert result.code == 0, result.err
        report: dict[str, Any] = json.loads((tmp_path / "tested/eval.json").read_text())
        assert f"samples: {report['samples']}\n" in result.out
        return report, result.out

    own, text = tested()
    assert own["samples"] == 40 and "other data" not in text
    write("same.csv", rows[:200])
    assert tested("data.file=same.csv")[0]["test_loss"] == own["test_loss"]

    new = [*range(200, 400)]
    write("new.csv", [rows[i] for i in new])
    report, text = tested("data.file=new.csv")
    assert (report["samples"], report["test_accuracy"]) == (200, pytest.approx(accuracy(new)))
    assert "other data than those of the run: their whole set is tested" in text and "equal to training" not in text
    write("new2.csv", [f"{rows[i]},{'test' if i < 260 else 'train'}" for i in new], "a,b,y,part")
    report, text = tested("data.file=new2.csv", "data.split_column=part")
    assert (report["samples"], report["test_accuracy"]) == (60, pytest.approx(accuracy(new[:60])))
    write("new3.csv", [f"{rows[i]},test" for i in new[:30]], "a,b,y,part")
    report, _ = tested("data.file=new3.csv", "data.split_column=part")
    assert (report["samples"], report["test_accuracy"]) == (30, pytest.approx(accuracy(new[:30])))

    lacking = [i for i in new if names[i] != "low"]
    write("lacks.csv", [rows[i].replace("top", "TOP") for i in lacking])
    report, text = tested("data.file=lacks.csv")
    assert (report["samples"], report["test_accuracy"]) == (len(lacking), pytest.approx(accuracy(lacking)))
    assert "warning: TOP is read as the class top" in text
    write("more.csv", [*(rows[i] for i in new), *(f"{i / 7:.3f},1,odd" for i in range(9)), *rows[:200]])
    report, text = tested("data.file=more.csv")
    assert (report["samples"], report["test_accuracy"]) == (400, pytest.approx(accuracy([*new, *range(200)])))
    assert "left out: 9 of 409 samples, of classes that the model does not know (odd)\n" in text
    assert "warning: 144 of 400 test samples are equal to training samples" in text  # 200 - 40 - 16
    write("odd.csv", ["1,2,odd", "2,1,even"])
    message = refused(tmp_path, "eval", "run", "data.file=odd.csv")
    assert "the data have the classes even, odd, those of the training are low, mid, top" in message
    assert "norm_statistics=exact: needs the training data" in refused(
        tmp_path, "eval", "run", "data.file=new.csv", "norm_statistics=exact"
    )
    (tmp_path / "t.csv").unlink()
    assert "the training data cannot be read as they were" in tested("data.file=new.csv")[1]


def test_glob_pattern_of_checkpoints(folder: Path) -> None:
    checkpoints = folder / "a/checkpoints"
    names = sorted(str(path.relative_to(folder)) for path in checkpoints.glob("*st.pt"))
    assert [Path(name).name for name in names] == ["best.pt", "last.pt"]
    listed = metrics_of(folder, f"checkpoint=[{','.join(names)}]")
    matched = metrics_of(folder, "checkpoint=a/checkpoints/*st.pt")
    assert matched == listed and len(matched["checkpoint"]) == 2
    assert "a/checkpoints/none-*.pt" in refused(folder, "eval", "checkpoint=a/checkpoints/none-*.pt")


# -- confusion matrices


def test_csv_with_special_class_names() -> None:
    names = ["a,b", 'c"d', "größe"]
    head, *rows = csv.reader(io.StringIO(confusion_table(torch.arange(9).view(3, 3), names)))
    assert head[1:] == names and [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("count", [2, 40, 150])
def test_plot_confusion(count: int) -> None:
    names = [f"$class_{i}" for i in range(count)]  # no formulas
    confusion = torch.eye(count, dtype=torch.int64) * 5
    confusion[0, 0] = 0  # a class without samples
    figure = plot_confusion(confusion, names, "title")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), confusion / 5)
    assert len(axes.texts) == (count - 1 if count <= 20 else 0)  # of zeros none is written
    if count <= 60:
        assert [label.get_text() for label in axes.get_yticklabels()] == names
    figure.savefig(io.BytesIO())


def test_plot_confusion_of_class_names_that_are_not_utf_8() -> None:
    figure = plot_confusion(torch.eye(2, dtype=torch.int64), ["caf\udce9", "tea"], "title")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["caf\\udce9", "tea"]
    figure.savefig(io.BytesIO())


def test_refuses_a_folder_without_checkpoints(tmp_path: Path) -> None:
    assert "checkpoint=.: this folder contains neither best.pt nor last.pt" in refused(tmp_path, "eval", "checkpoint=.")


def test_weights_without_a_checkpoint(folder: Path) -> None:
    """Exported weights with the typed config give the metrics of the run, also with test-time augmentation."""
    weights = folder / "exported.safetensors"
    assert dlopt(folder, "export", "checkpoint=a", "format=safetensors", f"output={weights}").code == 0
    config = (*NET, "data.subset=300", "data.batch_size=20", "device=cpu", "threads=1")
    line = ("eval", f"init_from={weights}", *config)
    for tta in ("none", "flip"):
        result = dlopt(folder, *line, f"tta={tta}", "output=tested")
        assert (result.code, result.err) == (0, "")
        assert "44 of 44 tensors loaded (without its normalization" in result.out
        report = json.loads((folder / "tested/eval.json").read_text())
        expected = metrics_of(folder, "checkpoint=a", f"tta={tta}")
        assert report["init_from"] == str(weights) and "checkpoint" not in report
        assert {**report, "init_from": 0} == {**{k: v for k, v in expected.items() if k not in ("checkpoint", "epoch")},
                                              "average": report["average"], "init_from": 0}  # fmt: skip
    assert (folder / "tested/confusion.csv").exists()
    before = entries(folder)
    assert dlopt(folder, *line).code == 0 and entries(folder) == before, "no files without output="


def test_weights_at_chance_get_advice(folder: Path) -> None:
    state = load(folder / "a/checkpoints/best.pt").model
    bias = state["head.bias"] + 1e4 * torch.eye(len(state["head.bias"]))[0]
    torch.save({**state, "head.bias": bias}, folder / "w.pt")
    config = (*NET, "data.subset=300", "data.batch_size=20", "device=cpu", "threads=1")
    result = dlopt(folder, "eval", "init_from=w.pt", *config)
    assert (result.code, result.err) == (0, "")
    assert "the test accuracy is near chance (10 %); try model.shortcut_padding=both" in " ".join(result.out.split())


def test_refused_weights(folder: Path) -> None:
    state = load(folder / "a/checkpoints/best.pt").model
    torch.save({name: value for name, value in state.items() if not name.startswith("head.")}, folder / "headless.pt")
    config = (*NET, "data.subset=300")
    for line, error in (
        ((*config, "init_from=headless.pt"), "an untrained part cannot be tested; the file lacks"),
        ((*config, "init_from=none.pt"), "init_from=none.pt: no such file"),
        ((*config, "init_from=headless.pt", "optimizer.lr=0.1"), "optimizer.lr=0.1: dlopt eval does not read this key"),
        ((*config, "init_from=headless.pt", "tta.crop=4"), "tta.crop=4: unknown key of tta=none"),
        (("checkpoint=headless.pt",), "for weights of another tool: init_from=headless.pt with the model and data"),
    ):
        assert error in refused(folder, "eval", *line)
