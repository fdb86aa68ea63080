"""Without an optional package, the message names the extra to install; every extra has such a message."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dlopt.basics.errors import install
from tests.support.line import dlopt
from tests.support.sizes import TINY

ROOT = Path(__file__).resolve().parents[2]

NEEDING = {  # extra -> command lines that need it
    "sweep": ["train -m hydra/sweeper=dlopt_optuna optimizer.lr=0.1,0.2"],
    "schedulefree": ["train optimizer=schedule_free_sgd"],
    "text": ["train data=text data.file=a.txt data.tokenizer=bpe data.sequence_length=8 model=gpt_nano"],
    "hub": ["train data=parquet data.file=a.parquet", "train data=huggingface data.name=folder"],
    "timm": ["train model=timm model.name=resnet18 data=csv data.file=list.csv"],
    "mlflow": ["train tracking=[mlflow]"],
    "wandb": ["train tracking=[wandb]"],
    "export": ["export checkpoint=run/checkpoints/last.pt format=onnx"],
}

# What pyproject.toml lists as optional cannot be found; then each command line of its own arguments is run.
WITHOUT = """
import importlib.machinery, re, shlex, sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
listed = [line for name, lines in extras.items() if name not in ("docs", "test") for line in lines]
missing = {re.split("[^A-Za-z0-9_-]", line)[0].removesuffix("-skinny") for line in listed}
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in missing else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)  # dill calls it on an instance
from dlopt import cli
for line in sys.argv[2:]:
    sys.argv = ["dlopt", *shlex.split(line)]
    try:
        cli.main()
    except SystemExit as end:
        print(f"exit {end.code}", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_missing_package_is_answered_with_its_extra(tmp_path: Path) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"].keys()
    assert NEEDING.keys() == extras - {"docs", "test", "pandas"}  # pandas: no command; tests/python/test_runs.py
    assert dlopt(tmp_path, "train", *TINY, "tracking=[]", "hydra.run.dir=run").code == 0
    shutil.copy(ROOT / "docs/gallery/paths.png", tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"a.png,{i % 2}\n" for i in range(20)))
    (tmp_path / "a.txt").write_text("a line of a text\n" * 100)
    (tmp_path / "a.parquet").touch()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "sbatch").write_text("#!/bin/sh\n")
    (bin_folder / "sbatch").chmod(0o755)
    lines = [(extra, line) for extra, each in NEEDING.items() for line in each]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(ROOT / "pyproject.toml"), *(line for _, line in lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    messages = done.stderr.splitlines()
    assert len(messages) == 2 * len(lines), done.stderr
    for (extra, line), message, end in zip(lines, messages[::2], messages[1::2], strict=True):
        assert re.search(rf"pip install -e '\S+\[{extra}\]'", message) and end == "exit 2", (line, message, end)
        assert "importing" not in message and "Error" not in message, message  # no chain of errors


def test_the_line_names_the_pip_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "pip").write_text("#!/bin/sh\n")
        (folder / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(own))
    assert install("onnx") == "pip install onnx"
    place = min(os.path.relpath(ROOT), str(ROOT), key=len)
    assert install("dlopt[export]") == f"pip install -e '{place}[export]'"  # of this checkout
    monkeypatch.setattr("dlopt.basics.errors.CHECKOUT", tmp_path)  # of a wheel
    assert install("dlopt[export]") == "pip install 'dlopt[export]'"
    monkeypatch.setenv("PATH", str(other))
    assert install("dlopt[export]") == "own/pip install 'dlopt[export]'"
    (own / "pip").unlink()
    assert install("dlopt[export]") == f"{own / 'python'} -m pip install 'dlopt[export]'"
