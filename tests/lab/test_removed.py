"""The runner works without the laboratory."""

import shutil
from pathlib import Path

import pytest

from tests.support.line import SMALL
from tests.support.processes import run_dlopt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_laboratory(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "dlopt", tmp_path / "dlopt", ignore=shutil.ignore_patterns("lab", "__pycache__"))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    return tmp_path


def test_runner_without_laboratory(without_laboratory: Path) -> None:
    folder = without_laboratory
    sweep = ["-m", "seed=0,1", "hydra.sweep.dir=sweep"]
    for line in (
        ["train", *SMALL, "hydra.run.dir=run"],
        ["train", *SMALL, *sweep],
        ["eval", "checkpoint=run"],
        ["report", "sweep", "format=[html,csv]"],
        ["runs", "run", "sweep"],
    ):
        environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = run_dlopt(folder, *line, environment=environment)
        assert done.returncode == 0, done.stderr
    assert (folder / "sweep/report/index.html").is_file()
