"""`dlopt diagnose`, `dlopt find-lr` and `dlopt summary`."""

import json
import math
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from dlopt.lab.diagnosis import printing
from tests.support.line import SMALL, dlopt, only, refused

NET = ("model=mlp", "model.widths=[6,6]", "model.activation=tanh", "model.norm=none", "data.subset=60", "threads=1")
SHORT = ("data.batch_size=20", "updates=2", "batches=2", "eigenvalues=1", "iterations=3")


def test_compares_initializations(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "diagnose", *NET, *SHORT, "init=normal,xavier_normal", "init.std=30", "output=x")
    assert (result.code, result.err) == (0, "")
    names = {"activations", "inputs", "gradients", "depth", "updates", "curvature"}
    assert {path.name for path in (tmp_path / "x").glob("*.*")} == {
        *(f"{name}.{kind}" for name in names for kind in ("png", "svg")),
        "diagnosis.json",
    }
    assert "saturated (2 of 3 layers): try init=xavier_normal, model.norm=batch" in result.out
    lines = result.out.splitlines()
    which, why, what = lines[lines.index("normal") + 1 :][:3]
    assert which == "saturated: layer1.linear, layer2.linear (2 of 3 layers), before"
    assert why.startswith("why: layer1.linear is saturated: ") and what.startswith("type: dlopt diagnose model=mlp ")
    assert "init=xavier_normal" in what and "init.std" not in what and "updates=2" in what
    assert lines[lines.index("xavier_normal") + 1] == "healthy: all 3 layers, before and after 2 updates"
    assert "init.std: ignored for xavier_normal (no such key)" in result.out
    wide, xavier = json.loads((tmp_path / "x" / "diagnosis.json").read_text())
    assert wide["label"] == "normal" and [each["updates"] for each in wide["snapshots"]] == [0, 2]
    assert [layer["verdict"] for layer in wide["snapshots"][0]["layers"]] == ["saturated", "saturated", "healthy"]
    assert {layer["verdict"] for layer in xavier["snapshots"][0]["layers"]} == {"healthy"}
    assert len(wide["updates"]["losses"]) == 2 and len(list((tmp_path / "x" / "tensorboard").rglob("events*"))) == 2


@pytest.mark.slow
def test_reports_the_entropy_of_attention_heads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to read " * 40)
    text = ("data=text", "data.file=a.txt", "data.sequence_length=8", "model=gpt_nano", "model.width=12", "threads=1")
    result = dlopt(tmp_path, "diagnose", *text, *SHORT, "data.batch_size=8", "output=x")
    assert (result.code, result.err) == (0, "")
    assert "attention entropy of the heads, in nats" in result.out and "block3.attention" in result.out
    [record] = json.loads((tmp_path / "x" / "diagnosis.json").read_text())
    largest = sum(math.log(t) for t in range(1, 9)) / 8
    for snapshot in record["snapshots"]:
        assert [layer["name"] for layer in snapshot["attention"]] == [f"block{i}.attention" for i in (1, 2, 3)]
        for layer in snapshot["attention"]:
            assert len(layer["heads"]) == 3 and math.isclose(layer["largest"], largest)
            assert all(0.8 * largest < entropy <= largest + 1e-6 for entropy in layer["heads"])  # small weights


def test_checkpoint(tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run").code == 0
    typed = ("checkpoint=run/checkpoints/last.pt", "updates=1", "batches=1", "eigenvalues=0")
    result = dlopt(tmp_path, "diagnose", *typed, "threads=1")
    assert (result.code, result.err) == (0, "")
    [record] = json.loads(only(tmp_path, "outputs/diagnose/*/diagnosis.json").read_text())
    assert record["snapshots"][0]["updates"] == json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert "the updates changed nothing: the schedule has ended" in result.out and "did not fall" not in result.out
    assert "the checkpoint fixes the choices" in refused(tmp_path, "diagnose", *typed, "model=resnet20")


def test_checkpoint_of_a_resumed_run(tmp_path: Path) -> None:
    """The key `resume` in its config is of the run, not of the diagnosis."""
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run", "max_time=1e-9").code == 75
    resumed = dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=run", "resume=run/checkpoints/last.pt", "max_time=null")
    assert resumed.code == 0, resumed.err
    result = dlopt(tmp_path, "diagnose", "checkpoint=run", "updates=0", "batches=1", "eigenvalues=0", "threads=1")
    assert (result.code, result.err) == (0, "")


@pytest.mark.slow
def test_marks_eigenvalues_that_have_not_converged(tmp_path: Path) -> None:
    typed = ("diagnose", *NET, "data.batch_size=20", "updates=0", "batches=1", "eigenvalues=2", "output=x")
    rough, exact = (dlopt(tmp_path, *typed, f"iterations={n}").out for n in (3, 80))
    assert "lower bounds" in rough and "; increase iterations)" in rough and "lower bounds" not in exact
    low, high = (float(out.partition("eigenvalues ")[2].split(",")[0]) for out in (rough, exact))
    assert low <= high


@pytest.mark.parametrize("command", ["diagnose", "find-lr", "show-batch", "summary"])
def test_dry_run_is_refused(command: str, tmp_path: Path) -> None:
    assert "dry_run=true: only available in `dlopt train`" in refused(tmp_path, command, "dry_run=true")


def test_find_lr(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "find-lr", *NET, "data.batch_size=20", "updates=30", "output=lr")
    assert (result.code, result.err) == (0, "")
    record = json.loads((tmp_path / "lr" / "find_lr.json").read_text())
    assert f"valley: optimizer.lr={record['valley']:.2g}" in result.out
    assert {path.name for path in (tmp_path / "lr").iterdir()} == {"find_lr.png", "find_lr.svg", "find_lr.json"}
    assert record["off_scale"] is None and "standardize" not in result.out


def test_find_lr_names_inputs_that_are_off_scale(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "find-lr", *NET, "data.batch_size=20", "normalize=none", "updates=10", "output=lr")
    mean, std = json.loads((tmp_path / "lr" / "find_lr.json").read_text())["off_scale"]
    pixels = load_digits().images * 255 / 16  # the mean and the deviation of 20 images are within 15 % of those of all
    assert mean == pytest.approx(pixels.mean(), rel=0.15) and std == pytest.approx(pixels.std(), rel=0.15)
    assert (
        f"inputs have mean {mean:.2g} and standard deviation {std:.2g}: first try normalize=standardize" in result.out
    )


def test_find_lr_help_mentions_auto(tmp_path: Path) -> None:
    assert 'train with the suggestion "steepest"' in dlopt(tmp_path, "find-lr", "--help").out


def test_summary_with_input_shape_does_not_read_data(tmp_path: Path) -> None:
    typed = ("model=resnet50", "model.stem=imagenet", "input_shape=[3,224,224]", "classes=1000", "data=imagenet")
    result = dlopt(tmp_path, "summary", *typed, "data.root=nowhere")
    assert (result.code, result.err) == (0, "")
    assert "parameters: 25,557,032" in result.out and "forward: 4.09 GMACs per sample" in result.out
    assert "model: resnet20, input 1x8x8" in dlopt(tmp_path, "summary").out


def test_summary_of_a_full_batch_and_of_one_sample(tmp_path: Path) -> None:
    out = dlopt(tmp_path, "summary", "model=mlp", "data.batch_size=full", "data.subset=50").out
    assert out.endswith("batch size 40\n")  # the others are the validation set
    message = refused(tmp_path, "summary", "model=mlp", "data.batch_size=1")
    assert "data.batch_size=1: the model does not support this size: Expected more than 1 value" in message


def test_summary_of_a_model_of_any_size(tmp_path: Path) -> None:
    """The weights would take 149 GiB of memory."""
    typed = ("model=mlp", "model.norm=none", "model.widths=[200000,200000]", "input_shape=[100]", "classes=10")
    result = dlopt(tmp_path, "summary", *typed)
    assert "parameters: 40,022,400,010\n" in result.out


def test_refused(tmp_path: Path) -> None:
    assert "updates=-1: input should be" in refused(tmp_path, "diagnose", "updates=-1")
    assert "batchs=1: unknown key; did you mean batches?" in refused(tmp_path, "diagnose", "batchs=1")
    assert "checkpoint=none.pt" in refused(tmp_path, "diagnose", "checkpoint=none.pt")
    assert "use checkpoint=PATH" in refused(tmp_path, "diagnose", "resume=auto")
    assert "diagnose runs in one process" in refused(tmp_path, "diagnose", "parallel=ddp", "parallel.processes=2")
    assert "only `dlopt train` runs a range test" in refused(tmp_path, "diagnose", *NET, "optimizer.lr=auto")
    assert "max_lr=0.1: must be > min_lr=1" in refused(tmp_path, "find-lr", "min_lr=1", "max_lr=0.1")
    assert "input_shape=[]: the model does" in refused(tmp_path, "summary", *NET[:-1], "input_shape=[]", "classes=2")
    assert "input_shape=[5, 0]" in refused(tmp_path, "summary", "input_shape=[5,0]", "classes=2")


@pytest.mark.parametrize("width", [60, 100])
def test_lines_in_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Words and numbers stay whole, which a terminal cuts at its edge."""
    line = "before: loss 2.33; gradient norm 1.07; largest Hessian eigenvalues 57.1, 39.6, 35.4 (lower bounds); end"
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    printing._print(line, "  ")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 1
    assert " ".join(lines).split() == line.split()
