"""Trackio, replaced by a module with the signatures of trackio 0.43 that prints as it does."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.tracking.remote import SERVICES
from dlopt.tracking.tracking import Tracking

MODULE = """
inits, logged, finished = [], [], []

class Run:
    def __init__(self, name):
        self.name = name
    def log(self, metrics: dict, step: int | None = None):
        logged.append((self.name, step, metrics))
    def finish(self):
        print("* Run finished. Uploading logs to Trackio (please wait...)")
        finished.append(self.name)

def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
         resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
         auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):
    print(f"* Trackio project initialized: {project}")
    inits.append({"project": project, "name": name, "config": config, "resume": resume, "embed": embed})
    return Run(name)
"""


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module, utils = ModuleType("trackio"), ModuleType("trackio.utils")
    exec(MODULE, vars(module))
    vars(utils)["TRACKIO_DIR"] = tmp_path / "store/trackio"
    for each in (module, utils):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WRITE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return module


def run(folder: Path, epochs: range) -> None:
    with Tracking(folder, sinks=["trackio"], console=False) as tracking:
        tracking.begin({"name": "x", "optimizer": {"lr": 0.1}}, {}, epochs=4, steps_per_epoch=1)
        for epoch in epochs:
            tracking.epoch({"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch})
        tracking.finish({"status": "finished", "steps": 10 * epochs[-1], "test_loss": 0.5})
    assert "without it" not in (folder / "train.log").read_text()


def test_a_resumed_run_continues_under_its_name(
    tmp_path: Path, trackio: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "sweep/0", range(1, 3))
    run(tmp_path / "sweep/0", range(3, 4))
    run(tmp_path / "other/0", range(1, 2))
    names = [each["name"] for each in trackio.inits]
    assert names[0] == names[1] != names[2] and all(name.startswith("0-") for name in names)
    assert trackio.inits[0] == {
        "project": "x", "name": names[0], "config": {"name": "x", "optimizer.lr": 0.1}, "resume": "allow",
        "embed": False,
    }  # fmt: skip
    assert trackio.logged[:3] == [
        (names[0], 10, {"train/loss": 1.0}), (names[0], 20, {"train/loss": 0.5}), (names[0], 20, {"test/loss": 0.5}),
    ]  # fmt: skip
    assert trackio.logged[3][:2] == (names[0], 30) and trackio.finished == names
    assert capfd.readouterr() == ("", "") and "print" not in vars(trackio)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TRACKIO_SERVER_URL": "http://localhost:1"}, "TRACKIO_SERVER_URL: no write token: set TRACKIO_WRITE_TOKEN"),
        ({}, "trackio: cannot write to this folder"),
    ],
)
def test_a_store_that_cannot_record_is_refused(
    tmp_path: Path, trackio: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    SERVICES["trackio"].check("tracking=[trackio]", "x")
    assert (tmp_path / "store/trackio").is_dir()
    (tmp_path / "store/trackio").rmdir()
    (tmp_path / "store/trackio").write_text("")  # a file in its place
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(UserError, match=message):
        SERVICES["trackio"].check("tracking=[trackio]", "x")
