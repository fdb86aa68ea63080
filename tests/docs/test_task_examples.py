"""The examples of tasks of the user's own run as their first lines say, and are swept, judged, killed and resumed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.line import dlopt
from tests.support.pages import ROOT
from tests.support.runs import assert_same_run

FOLDER = ROOT / "docs/examples/tasks"
SMALL = {
    "burgers": ["data.train_size=64"],
    "contrastive": [],
    "denoising": [],
    "graphs": [],
    "two_heads": ["model=mlp"],
}
KILLED = """
import os, signal
from dlopt import cli
from tests.support.runs import at_update
with at_update(2, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    cli.main()
"""
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
def test_an_example_is_swept_judged_killed_and_resumed(folder: Path, name: str) -> None:
    line = [*command(name), "epochs=2"]

    words = [sys.executable, "-c", KILLED, "train", *line, "checkpoint.every_steps=1", "output=run"]
    paths = os.pathsep.join([str(ROOT), str(folder)])
    assert subprocess.run(words, cwd=folder, env=os.environ | {"PYTHONPATH": paths}).returncode == -signal.SIGKILL
    assert dlopt(folder, "train", *line, "checkpoint.every_steps=1", "output=run", "resume=auto").code == 0
    assert dlopt(folder, "train", *line, "output=whole").code == 0
    assert_same_run(folder / "whole", folder / "run")

    swept = dlopt(folder, "train", "-m", *line, "optimizer=adamw,soap", "hydra.sweep.dir=sweep")
    assert swept.code == 0 and "2 done, 0 failed" in swept.out + swept.err, swept
    judged = dlopt(folder, "judge", " ".join(line), "optimizer.lr=1e-9", "output=judged", "seeds=8")
    assert judged.code in (3, 4), judged  # worse, or undecided


@pytest.mark.slow
def test_a_benchmark_of_an_example(folder: Path) -> None:
    """A recipe and a tier of the user's own, as docs/howto/own_task.md shows them."""
    text = (ROOT / "docs/howto/own_task.md").read_text()
    for name in ("experiment/denoise", "benchmark/tier/mine"):
        [content] = re.findall(rf"`myconf/{name}.yaml`:\n\n```yaml\n(.*?)```", text, re.DOTALL)
        path = folder / f"myconf/{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(content)
    typed = ["benchmark", "--config-dir", "myconf", "tier=mine", "reference=false", "allow_packages=[denoising]"]
    result = dlopt(folder, *typed, "optimizer=adamw", "studies=1", "trials=2", "output=out")
    assert result.code == 0, result.err
    assert "denoise" in result.out
    found = json.loads((folder / "out/results.json").read_text())
    assert "denoise" in json.dumps(found)
