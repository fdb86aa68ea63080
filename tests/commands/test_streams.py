"""Commands with redirected, piped or closed standard streams."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlopt.tracking.metrics import read_metrics, read_summary
from dlopt.tracking.tracking import Tracking
from dlopt.training.checkpoint.checkpoints import is_intact
from tests.support.line import SMALL
from tests.support.requires import requires

ROOT = Path(__file__).parents[2]
RUN = " ".join(f"'{word}'" for word in (*SMALL, "tracking=[]"))


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `dlopt` is that of this Python."""
    line = line.replace("dlopt ", f"{sys.executable} -m dlopt ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def is_complete(folder: Path) -> bool:
    checkpoint = is_intact(folder / "checkpoints/last.pt") and is_intact(folder / "checkpoints/best.pt")
    return checkpoint and (read_summary(folder) or {})["status"] == "finished" and len(read_metrics(folder)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", "<&- >&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    done = shell(tmp_path, f"dlopt train {RUN} hydra.run.dir=run {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert is_complete(tmp_path / "run")
    listing = shell(tmp_path, f"dlopt runs clean run {closed}")
    assert listing.returncode == 2 and "Traceback" not in listing.stderr  # no terminal to ask on


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ["-m seed=0,1 hydra.sweep.dir=sweep", "parallel=ddp parallel.processes=2 hydra.run.dir=run"]
)
def test_child_processes_with_closed_streams(tmp_path: Path, more: str) -> None:
    done = shell(tmp_path, f"dlopt train {RUN} model.norm=none {more} <&- >&- 2>&-")
    assert done.returncode == 0
    assert all(map(is_complete, [tmp_path / "sweep/0", tmp_path / "sweep/1"] if "-m" in more else [tmp_path / "run"]))


@pytest.mark.slow
@requires("nohup")
def test_nohup(tmp_path: Path) -> None:
    done = shell(tmp_path, f"nohup dlopt train {RUN} hydra.run.dir=run >nohup.out 2>&1")
    text = (tmp_path / "nohup.out").read_text()
    assert done.returncode == 0 and is_complete(tmp_path / "run")
    assert " 2/2 " in text and not [each for each in text if each < " " and each != "\n"], "control characters"


def test_logs_contain_no_control_characters(tmp_path: Path) -> None:
    with Tracking(tmp_path, sinks=[], console=False) as tracking:
        tracking.message("\x1b[31msaid\x1b[0m")
        logging.getLogger("a.package").warning("\x1b[1;33m12 %%\r\x1b[2K13 %%\x07 of it\x1b[?25h")
        tracking.finish({"status": "finished", "steps": 1})
    text = (tmp_path / "train.log").read_text()
    assert "said" in text and "12 %%13 %% of it" in text
    assert not [each for each in text if each < " " and each != "\n"]
