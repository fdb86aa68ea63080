"""The runner works without the laboratory, and names nothing of it."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dlopt.config.packages import PACKAGES
from dlopt.lab import ENTRY_POINTS
from tests.support.line import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_laboratory(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "dlopt", tmp_path / "dlopt", ignore=shutil.ignore_patterns("lab", "__pycache__"))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    return tmp_path


def run(folder: Path, *lines: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs commands in one new interpreter: a forked one has imported the package with its laboratory."""
    code = "import json, sys; from dlopt import cli; "
    code += "[command(words) for command, words in map(cli.find, json.loads(sys.argv[1]))]"
    environment |= {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{code}; import dlopt; print(dlopt.__file__)", json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode or done.stdout.splitlines()[-1] == str(folder / "dlopt/__init__.py")
    return done


def test_help_and_completion_without_laboratory(without_laboratory: Path) -> None:
    done = run(without_laboratory, ["--help"], ["-sc", "query=bash"], COMP_LINE="dlopt ")
    assert done.returncode == 0, done.stderr
    *shown, commands, _ = done.stdout.splitlines()
    assert any(line.startswith("  train ") for line in shown) and "Laboratory:" not in shown
    assert "train" in commands.split() and not {*ENTRY_POINTS["dlopt.commands"]} & {*commands.split()}


@pytest.mark.slow
def test_runner_without_laboratory(without_laboratory: Path) -> None:
    folder = without_laboratory
    done = run(
        folder,
        ["train", *SMALL, "hydra.run.dir=run"],
        ["train", *SMALL, "-m", "seed=0,1", "hydra.sweep.dir=sweep"],
        ["eval", "checkpoint=run"],
        ["report", "sweep", "format=[html,csv]"],
        ["runs", "run", "sweep"],
        ["options"],
        ["template", "schema"],
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "sweep/report/index.html").is_file()
    refused = run(folder, ["train", "experiment=lecture/momentum"])
    assert "UserError: comparison" in refused.stderr and "unknown key" in refused.stderr


def names() -> set[str]:
    """The commands, keys and groups of the laboratory, and its modules."""
    config = yaml.safe_load((ROOT / "dlopt/lab/conf/trajectory.yaml").read_text())
    groups = {path.name for path in (ROOT / "dlopt/lab/conf").iterdir() if path.is_dir()}
    assert groups <= {name for each in config["defaults"] if isinstance(each, dict) for name in each}
    return {*ENTRY_POINTS["dlopt.commands"], *ENTRY_POINTS["dlopt.series"], *groups}


def constants(path: Path) -> Iterator[str]:
    """Yields the strings in the code of a module: its docstrings, too."""
    yield from (
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_the_runner_names_nothing_of_the_laboratory() -> None:
    forbidden = names()
    found = set()
    for path in (ROOT / "dlopt").rglob("*.py"):
        if path.is_relative_to(ROOT / "dlopt/lab"):
            continue
        for text in constants(path):
            is_name = text in forbidden or any(text.startswith(f"{name}.") for name in forbidden)
            is_command = any(re.search(rf"dlopt {name}\b", text) for name in forbidden)
            is_command |= any(f"`{name}`" in text for name in ENTRY_POINTS["dlopt.commands"])
            if is_name or is_command or ("dlopt.lab" in text and text not in PACKAGES):
                found.add(f"{path.relative_to(ROOT)}: {text[:60]!r}")
    assert not found
