"""The examples of tasks of the user's own run as their first lines say, and are swept, judged and resumed."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.line import dlopt
from tests.support.pages import ROOT
from tests.support.runs import assert_same_run, at_update, terminate

FOLDER = ROOT / "docs/examples/tasks"
SMALL = {
    "burgers": ["data.train_size=64"],
    "contrastive": [],
    "denoising": [],
    "graphs": [],
    "two_heads": ["model=mlp"],
}
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FOLDER, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "tasks")
    return tmp_path / "tasks"


def command(name: str) -> list[str]:
    """Returns the overrides in the first lines of an example, without its length."""
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    [line] = re.findall(r"^dlopt train ((?:.*\\\n)*.*)$", text.partition('\n"""')[0], re.MULTILINE)
    words = shlex.split(line.replace("\\\n", ""))
    return [*(word for word in words if not word.startswith("epochs=")), *SMALL[name], "tracking=[]"]


def test_there_are_five() -> None:
    assert sorted(SMALL) == FILES


@pytest.mark.parametrize("name", FILES)
def test_an_example_trains(folder: Path, name: str) -> None:
    result = dlopt(folder, "train", *command(name), "epochs=2", "output=run")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_example_is_swept_judged_stopped_and_resumed(folder: Path, name: str) -> None:
    line = [*command(name), "epochs=2"]

    with at_update(2, terminate):
        assert dlopt(folder, "train", *line, "checkpoint.every_steps=1", "output=run").code == 75
    assert dlopt(folder, "train", *line, "checkpoint.every_steps=1", "output=run", "resume=auto").code == 0
    assert dlopt(folder, "train", *line, "output=whole").code == 0
    assert_same_run(folder / "whole", folder / "run")

    swept = dlopt(folder, "train", "-m", *line, "optimizer=adamw,soap", "hydra.sweep.dir=sweep")
    assert swept.code == 0 and "2 done, 0 failed" in swept.out + swept.err, swept
    judged = dlopt(folder, "judge", " ".join(line), "optimizer.lr=1e-9", "output=judged", "seeds=8")
    assert judged.code in (3, 4), judged  # worse, or undecided
