"""The Python API."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import dlopt
from dlopt import load, openmp, train
from dlopt.errors import RunError, UserError
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
    }


def test_train_returns_the_result(tmp_path: Path) -> None:
    result = train([*LINES, "name=mine"])
    assert result.folder.parent == tmp_path / "outputs/mine"
    assert result.summary["status"] == "finished" and result.summary["epochs"] == 2
    assert [line["epoch"] for line in result.history] == [1, 2]
    model = result.model
    assert model.classes is not None and len(model.classes) == 10 and not model.training
    assert model is result.model


def test_model_accepts_raw_images() -> None:
    from dlopt.training.build import build_workload
    from tests.support.runs import experiment

    result = train([*LINES, "hydra.run.dir=run"])
    test = build_workload(experiment(*LINES)).dataset.test
    assert test is not None
    with torch.no_grad():
        found = load("run")(test.fetch(torch.arange(len(test)))).argmax(1)
    assert (found == test.targets).double().mean().item() == result.summary["test_accuracy"]
    assert same(load("run/checkpoints/best.pt").state_dict(), result.model.state_dict())


def test_load_warns_if_the_statistics_differ_from_those_of_the_test() -> None:
    train([*LINES, "hydra.run.dir=run", "norm_statistics=exact", "epochs=1"])
    with pytest.warns(UserWarning, match="norm_statistics=exact"):
        load("run")


def test_a_second_thread_cannot_use_the_folder() -> None:
    outcomes = []

    def other() -> None:
        for lines in (["hydra.run.dir=run"], ["hydra.run.dir=run", "resume=auto"]):
            with pytest.raises(UserError, match="another run is active in this folder") as caught:
                train([*LINES, *lines])
            outcomes.append(caught)

    def start_other() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with at_update(2, start_other):
        assert train([*LINES, "hydra.run.dir=run"]).summary["status"] == "finished"
    assert len(outcomes) == 2


@pytest.mark.slow
def test_two_runs_in_one_process_match_two_processes(tmp_path: Path) -> None:
    first, second, again = (train([*LINES, f"seed={seed}"]) for seed in (1, 2, 1))
    assert timeless(first.folder) == timeless(again.folder) != timeless(second.folder)
    line = [sys.executable, "-m", "dlopt", "train", *LINES, "seed=2", "hydra.run.dir=alone"]
    subprocess.run(line, check=True, capture_output=True)
    assert timeless(tmp_path / "alone") == timeless(second.folder)


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


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["optimzer=adamw"], "did you mean optimizer"),
        ("optimizer=sgd epochs=1", r"train\(\['optimizer=sgd', 'epochs=1'\]\)"),
        (["-m", "seed=0,1"], r"train\(\['-m'\]\): must be key=value; use `dlopt train` for sweeps"),
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


def test_resumes() -> None:
    assert train([*LINES, "hydra.run.dir=run", "max_time=1e-9"]).summary["status"] == "interrupted"
    whole = train([*LINES, "hydra.run.dir=whole"])
    resumed = train([*LINES, "hydra.run.dir=run", "resume=auto"])
    assert timeless(resumed.folder) == timeless(whole.folder)
    assert train([*LINES, "hydra.run.dir=run", "resume=auto"]).summary == resumed.summary  # nothing left to do


def test_import_does_not_import_torch() -> None:
    code = "import sys, dlopt; print(dlopt.__version__, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == [dlopt.__version__, "False"]


def test_completion_finds_train_and_load() -> None:
    """`dir` before first use, which IPython's completion reads."""
    code = "import dlopt, sys; print(dir(dlopt)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['__version__', 'load', 'train']", done.stderr
