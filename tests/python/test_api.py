"""The Python API."""

import contextlib
import csv
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import dlopt
from dlopt import load, train
from dlopt.basics.errors import RunError, UserError
from dlopt.basics.locks import global_state_held
from dlopt.machine import openmp
from tests.support.line import dlopt as shell
from tests.support.runs import SMALL, at_update, same, timeless

LINES = [*SMALL, "model.dropout=0.2", "augmentation=crop_flip", "epochs=2", "deterministic=true"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def global_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "matmul": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "folder": os.getcwd(),
        # torch's compiler sets the folder of its cache when it is first imported.
        "environment": {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"},
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "handlers": list(logging.getLogger().handlers),
        "hydra": GlobalHydra.instance().is_initialized(),
        "arguments": list(sys.argv),
        "streams": (sys.stdout, sys.stderr),
    }


def test_train_returns_the_result(tmp_path: Path) -> None:
    result = train([*LINES, "name=mine"])
    assert result.path.parent == tmp_path / "outputs/mine"
    assert result.summary["status"] == "finished" and result.summary["epochs"] == 2
    assert [line["epoch"] for line in result.history] == [1, 2]
    model = result.model
    assert model.classes is not None and len(model.classes) == 10 and not model.training
    assert model is result.model


def test_model_accepts_raw_images() -> None:
    from dlopt.training.builders.workload import build_workload
    from tests.support.runs import run_config

    result = train([*LINES, "hydra.run.dir=run"])
    test = build_workload(run_config(*LINES)).dataset.test
    assert test is not None
    with torch.no_grad():
        found = load("run")(test.fetch(torch.arange(len(test)))).argmax(1)
    assert (found == test.targets).double().mean().item() == result.summary["test_accuracy"]
    assert same(load("run/checkpoints/best.pt").state_dict(), result.model.state_dict())


def test_load_warns_if_the_statistics_differ_from_those_of_the_test() -> None:
    train([*LINES, "hydra.run.dir=run", "norm_statistics=exact", "epochs=1"])
    with pytest.warns(UserWarning, match="norm_statistics=exact"):
        load("run")


def in_thread(action: Any) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


@pytest.mark.parametrize("start", [in_thread, lambda action: action()], ids=["other thread", "nested"])
def test_refuses_a_second_call_at_once(tmp_path: Path, start: Any) -> None:
    """It changes neither the numbers of the first nor the streams, and leaves no files."""
    alone = train([*LINES, "hydra.run.dir=alone"])
    refused = []

    def call() -> None:
        for second in (train, dlopt.sweep, dlopt.find_lr):
            with pytest.raises(UserError, match=r"\(\): train\(\) is running in this process") as caught:
                second(["model=mlp"])
            refused.append(caught)

    streams = sys.stdout, sys.stderr
    with at_update(2, lambda: start(call)):
        first = train([*LINES, "hydra.run.dir=first"])
    assert len(refused) == 3 and timeless(first.path) == timeless(alone.path)
    assert (sys.stdout, sys.stderr) == streams
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "first"]


def test_a_model_of_the_user_may_load_another_one() -> None:
    """As a teacher: in the same thread, whose state `load` restores. Another thread would change it in between."""
    alone = train([*LINES, "hydra.run.dir=teacher"])
    with at_update(2, lambda: load("teacher")):
        first = train([*LINES, "hydra.run.dir=first"])
    assert timeless(first.path) == timeless(alone.path)
    refused = []

    def call() -> None:
        with pytest.raises(UserError, match=r"load\(\): train\(\) is running"):
            load("teacher")
        refused.append(True)

    with at_update(2, lambda: in_thread(call)):
        train([*LINES, "hydra.run.dir=second"])
    assert refused


def test_a_forked_process_may_train() -> None:
    """As a worker of a data set, or a job of a sweep."""
    codes = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), global_state_held("train()"):
                os._exit(7)
            os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with global_state_held("train()"):
        fork()
    assert codes == [7]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("start", [in_thread, lambda action: action()], ids=["thread", "main thread"])
def test_restores_global_state_however_a_run_ends(start: Any, error: type[BaseException] | None) -> None:
    ended = []

    def fail() -> None:
        if error is not None:
            raise error("stopped here")

    def call() -> None:
        with at_update(1, fail), contextlib.suppress(ValueError, KeyboardInterrupt, SystemExit, RunError):
            train([*LINES, "threads=2"])
        ended.append(True)

    torch.set_default_dtype(torch.float64)
    try:
        before = global_state()
        start(call)
        assert ended and global_state() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_in_a_thread_leaves_the_streams_to_the_main_thread() -> None:
    """Which redirects its output at any time, as IPython and pytest do: no stream of the run outlives it."""
    redirected = io.StringIO()
    has_begun, is_redirected = threading.Event(), threading.Event()

    def begin() -> None:
        has_begun.set()
        assert is_redirected.wait(60)

    def call() -> None:
        with at_update(1, begin):
            train(LINES)

    stream, thread = sys.stdout, threading.Thread(target=call)
    thread.start()
    assert has_begun.wait(60)
    with contextlib.redirect_stdout(redirected):
        is_redirected.set()
        thread.join()
        assert sys.stdout is redirected
    assert sys.stdout is stream


@pytest.mark.slow
def test_two_runs_in_one_process_match_two_processes(tmp_path: Path) -> None:
    first, second, again = (train([*LINES, f"seed={seed}"]) for seed in (1, 2, 1))
    assert timeless(first.path) == timeless(again.path) != timeless(second.path)
    line = [sys.executable, "-m", "dlopt", "train", *LINES, "seed=2", "hydra.run.dir=alone"]
    subprocess.run(line, check=True, capture_output=True)
    assert timeless(tmp_path / "alone") == timeless(second.path)


def test_restores_global_state(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = global_state()
    train([*LINES, "threads=2"])
    assert openmp._watch is None
    with pytest.raises(UserError):
        train(["optimizer.lr=-1"])
    assert global_state() == before
    assert capfd.readouterr() == ("", "")


def test_choices_of_an_own_folder(tmp_path: Path) -> None:
    (tmp_path / "mine/optimizer").mkdir(parents=True)
    (tmp_path / "mine/optimizer/slow.yaml").write_text("# SGD\n_target_: torch.optim.SGD\nlr: 0.025\n")
    lines = ["--config-dir=mine", "optimizer=slow", *SMALL, "epochs=1", "tracking=[]"]
    assert train([*lines, "hydra.run.dir=run"]).config["optimizer.lr"] == 0.025
    found = dlopt.sweep([*lines, "seed=0,1", "hydra.sweep.dir=sweep"])
    assert [each.config["optimizer.lr"] for each in found] == [0.025] * 2
    assert dlopt.find_lr(["--config-dir=mine", "optimizer=slow", "model=mlp", "updates=10", "threads=1"]).losses
    for function in (train, dlopt.sweep, dlopt.find_lr):
        with pytest.raises(UserError, match="--config-dir=nowhere: no such folder"):
            function(["--config-dir=nowhere"])
        with pytest.raises(UserError, match="the flag --config-dir=DIR is allowed"):
            function(["--cfg=job"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["optimzer=adamw"], "did you mean optimizer"),
        ("optimizer=sgd epochs=1", r"train\(\['optimizer=sgd', 'epochs=1'\]\)"),
        (["-m", "seed=0,1"], r"train\(\['-m'\]\): must be key=value; use dlopt.sweep for sweeps"),
        ([1], r"train\(\[1\]\): must be key=value"),
        (["name=größe", "epochs=0"], "epochs=0"),
        (["data=image_folder", "data.root=nowhere"], "nowhere"),
        (["experiment=lecture/batch_norm_learning_rate"], "one experiment at a time"),
    ],
)
def test_raises_before_writing(tmp_path: Path, lines: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(lines)
    assert list(tmp_path.iterdir()) == []


def test_failed_run_raises_with_reason() -> None:
    with pytest.raises(RunError, match="learning rate"):
        train([*LINES, "optimizer.lr=1e30", "schedule=constant", "model.norm=none"])


@pytest.mark.parametrize(
    ("error", "update"), [(UserError, 1), (UserError, 3), (RunError, 1), (ValueError, 3), (KeyboardInterrupt, 1)]
)
def test_leaves_what_the_command_leaves(tmp_path: Path, error: type[BaseException], update: int) -> None:
    """Of a run that is refused or fails, before and after its first checkpoint, in a folder with a file of the user."""

    def fail() -> None:
        raise error("stopped here")

    left: dict[str, list[str]] = {}
    lines = [*LINES, "checkpoint.every_steps=1", "tracking=[]"]
    for name in "shell", "python":
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
        with at_update(update, fail):
            if name == "shell":
                assert shell(tmp_path, "train", *lines, "hydra.run.dir=shell").code
            else:
                with pytest.raises((error, RunError), match="stopped here"):
                    train([*lines, "hydra.run.dir=python"])
        left[name] = sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
    assert left["python"] == left["shell"]
    is_refused = (error, update) == (UserError, 1)
    assert (left["shell"] == ["notes.txt"]) is is_refused
    assert ("checkpoints/last.pt" in left["shell"]) is (update == 3)
    assert ("summary.json" in left["shell"]) is (not is_refused and error is not KeyboardInterrupt)


def test_a_run_that_its_processes_refuse_leaves_no_folder(tmp_path: Path) -> None:
    with (
        patch("dlopt.parallel.processes.launch.run_group", return_value=2),
        pytest.raises(UserError, match="processes"),
    ):
        train([*LINES, "parallel=ddp", "parallel.processes=2"])
    assert list(tmp_path.iterdir()) == []


def test_resumes() -> None:
    assert train([*LINES, "hydra.run.dir=run", "max_time=1e-9"]).summary["status"] == "interrupted"
    whole = train([*LINES, "hydra.run.dir=whole"])
    resumed = train([*LINES, "hydra.run.dir=run", "resume=auto"])
    assert timeless(resumed.path) == timeless(whole.path)
    assert train([*LINES, "hydra.run.dir=run", "resume=auto"]).summary == resumed.summary  # nothing left to do


def test_import_does_not_import_torch() -> None:
    code = "import sys, dlopt; print(dlopt.__version__, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == [dlopt.__version__, "False"]


def test_completion_finds_the_public_names() -> None:
    """`dir` before first use, which IPython's completion reads."""
    code = "import dlopt, sys; print(dir(dlopt)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['__version__', 'find_lr', 'load', 'open_run', 'runs', 'sweep', 'train']", (
        done.stderr
    )


# -- sweeps, range tests, predictions

GRID = ["model=mlp", "model.widths=[4]", "data.subset=40", "epochs=2", "threads=1", "tracking=[]"]


def test_sweep_returns_its_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    before = global_state()
    found = dlopt.sweep([*GRID, "optimizer.lr=0.01,0.1", "hydra.sweep.dir=grid", "tags=[mine]"])
    assert global_state() == before and capfd.readouterr() == ("", "")
    assert [run.path for run in found] == [tmp_path / "grid/0", tmp_path / "grid/1"]
    assert [run.config["optimizer.lr"] for run in found] == [0.01, 0.1] and {run.tags for run in found} == {("mine",)}
    alone = train([*GRID, "optimizer.lr=0.1"])
    assert found[1].best["val_loss"] == alone.summary["best_val_loss"]
    assert dlopt.sweep([*GRID, "optimizer.lr=0.01,0.1", "hydra.sweep.dir=grid", "tags=[mine]", "resume=auto"]) == found


def test_sweep_keeps_the_failed_jobs(tmp_path: Path) -> None:
    lines = [*GRID, "model.norm=none", "schedule=constant", "optimizer.lr=0.01,1e30"]
    found = dlopt.sweep(lines)
    assert [run.status for run in found] == ["finished", "failed"]
    assert found[0].path.parents[2] == tmp_path / "outputs" and "loss" in (found[1].reason or "")


@pytest.mark.slow
def test_sweep_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """New processes of multiprocessing execute the script again, unless it is hidden from them."""
    script = f"import dlopt\nprint([run.status for run in dlopt.sweep({[*GRID, 'seed=0,1']})])\n"
    (tmp_path / "mine.py").write_text(script)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "mine.py"], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("['finished', 'finished']\n", 0), done.stderr


def test_find_lr_is_that_of_the_command(tmp_path: Path) -> None:
    lines = [*[line for line in GRID if not line.startswith(("epochs", "tracking"))], "updates=12", "max_lr=1"]
    torch.manual_seed(5)
    before = global_state()
    found = dlopt.find_lr(lines)
    assert global_state() == before and [*tmp_path.iterdir()] == []
    assert shell(tmp_path, "find-lr", *lines, "output=out").code == 0
    assert json.loads((tmp_path / "out/find_lr.json").read_text()) == vars(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("sweep('seed=0,1')", r"sweep\('seed=0,1'\): must be a list: sweep\(\['seed=0,1'\]\)"),
        ("sweep(['-m', 'seed=0,1'])", r"sweep\(\['-m'\]\): must be key=value; -m is implied"),
        ("sweep(['seed=0,1', 'optimizer.lr=-1,1'])", "optimizer.lr=-1"),
        ("sweep(['seed=0,1', 'dry_run=true'])", "dry_run=true: only available in `dlopt train`"),
        ("sweep(['seed=0,1', 'hydra.run.dir=x'])", "use hydra.sweep.dir"),
        (
            "train(optimizer='adamw')",
            r"train\(optimizer='adamw'\): overrides are a list: train\(\[.optimizer=adamw.\]\)",
        ),
        ("sweep(['seed=0,1'], epochs=2)", r"overrides are a list: sweep\(\[.seed=0,1., .epochs=2.\]\)"),
        ("find_lr('updates=20')", r"must be a list: find_lr\(\['updates=20'\]\)"),
        ("find_lr(['optimizer.lr=1,2'])", r"find_lr\(\) runs one test at a time"),
        ("find_lr(['updates=3'])", "updates=3: input should be greater than or equal to 10"),
        ("find_lr(['epochs=3'])", r"epochs=3: find_lr\(\) does not read this key; updates=N sets"),
        ("find_lr(['optimzer=sgd'])", "did you mean optimizer"),
    ],
)
def test_sweep_and_find_lr_refuse_before_writing(tmp_path: Path, call: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        eval(f"dlopt.{call}")
    assert "\n" not in str(caught.value) and [*tmp_path.iterdir()] == []


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of two classes, and a run on them."""
    draws = np.random.default_rng(0)
    for label, low in (("bright", 120), ("dark", 0)):
        (tmp_path / "data/train" / label).mkdir(parents=True)
        for i in range(5):
            pixels = draws.integers(low, low + 130, (10, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/train" / label / f"{i}.png")
    train(["data=image_folder", "data.root=data", "data.image_size=8", "data.batch_size=4", "model=mlp",
           "model.widths=[8]", "epochs=2", "threads=1", "device=cpu", "tracking=[]", "hydra.run.dir=run"])  # fmt: skip
    return tmp_path


def test_predict_is_that_of_the_command(photos: Path) -> None:
    assert shell(photos, "predict", "checkpoint=run", "images=data/train", "batch_size=3").code == 0
    with (photos / "predictions.csv").open(newline="") as file:
        typed = list(csv.DictReader(file))
    model = load("run")
    found = model.predict("data/train", batch_size=3)
    assert [(each.image, each.label) for each in found] == [(row["image"], row["class"]) for row in typed]
    for each, row in zip(found, typed, strict=True):
        assert each.probability == pytest.approx(float(row["probability"]), abs=1e-5)
        assert each.values == pytest.approx((float(row["p(bright)"]), float(row["p(dark)"])), abs=1e-5)
    files = [found[7].image, Path(found[0].image)]
    assert model.predict(files) == [found[7], found[0]] and model.predict(files[1]) == [found[0]]
    with pytest.warns(UserWarning, match=r"^of 1 image: 1 resized and cropped to the centre, from 10x14 to 8x8"):
        model.predict(files[1])
    model(torch.zeros(1, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"the inputs have the shape \[192\], those of the training had \[3, 8, 8\]"):
        model(torch.zeros(1, 192))


def test_predict_reads_images_in_memory_as_files(photos: Path) -> None:
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, clear = (generator.integers(0, 256, (9, 18, channels), dtype=np.uint8) for channels in (3, 4))
    for name, pixels, keys in (
        ("a", colour, {}),
        ("b", clear, {}),
        ("c", colour[..., 0], {}),
        ("d", colour, {"exif": exif}),
    ):
        Image.fromarray(pixels).save(photos / f"{name}.png", **keys)
    model = load("run")
    for name, array in (("a", colour), ("b", clear), ("c", colour[..., 0]), ("d", np.rot90(colour, -1))):
        [expected] = model.predict(f"{name}.png")
        content = (photos / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            for each in (content, array, opened):
                [found] = model.predict(each)
                assert found.values == expected.values and found.image == "images[0]"
    found = model.predict([colour, photos / "b.png", colour.transpose(2, 0, 1), colour[..., :1]])
    names = [model.predict(f"{name}.png")[0].values for name in "abac"]
    assert np.allclose([each.values for each in found], names, rtol=0, atol=1e-6)
    assert [each.image for each in found] == ["images[0]", str(photos / "b.png"), "images[2]", "images[3]"]
    with pytest.warns(UserWarning, match=r"skipped: images\[1\]: cannot be read as an image"):
        assert len(model.predict([colour, b"no image"])) == 1
    with pytest.raises(UserError, match=r"images\[0\]: is a ndarray of shape .* type float64; must be uint8"):
        model.predict(colour / 255)


def test_predict_returns_values_in_the_unit_of_the_label(tmp_path: Path) -> None:
    """The targets are 1005 and 1007: with a model of one weight that is 0, all predictions are their mean."""
    Image.new("L", (4, 4)).save("a.png")
    Path("a.csv").write_text("path,label\n" + "a.png,1005\na.png,1007\n" * 4)
    keys = ["data=csv", "data.file=a.csv", "data.labels=value", "data.channels=1", "data.val_split=0", "loss=mse"]
    keys += ["model=mlp", "model.widths=[]", "init=normal", "init.std=1e-9", "optimizer.lr=1e-9", "epochs=1"]
    train([*keys, "hydra.run.dir=run"])
    assert load("run").predict("a.png")[0].values == pytest.approx((1006.0,), abs=1e-4)
    assert shell(tmp_path, "predict", "run", "images=a.png").code == 0
    assert float((tmp_path / "predictions.csv").read_text().split(",")[-1]) == pytest.approx(1006.0, abs=1e-4)
    train([*keys, "data.standardize_target=false", "hydra.run.dir=raw"])
    assert load("raw").predict("a.png")[0].values == pytest.approx((0.0,), abs=1e-2)


def test_predict_skips_unreadable_files(photos: Path) -> None:
    (photos / "data/train/dark/0.png").write_bytes(b"no image")
    model = load("run")
    with pytest.warns(UserWarning, match=r"skipped: data/train/dark/0\.png"):
        assert len(model.predict("data/train")) == 9
    with pytest.raises(RunError, match="max_errors=0: exceeded by unreadable files"):
        model.predict("data/train", max_errors=0)
    for images, message in [("nowhere", "images=nowhere: no such file"), ([], "needs at least one image"),
                            (torch.zeros(1, 3, 8, 8), "call the model")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            model.predict(images)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"predict\(batch_size=0\): must be >= 1"):
        model.predict("data/train", batch_size=0)


def test_predict_refuses_a_model_of_other_inputs() -> None:
    train(["data=wine", *GRID[:2], *GRID[3:], "hydra.run.dir=run"])
    Path("a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"predict\(\): the model reads rows of a table, not images"):
        load("run").predict("a.png")
