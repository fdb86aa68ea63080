"""What the pages show works as written: an optimizer, a data set, a comparison, the arguments and keys of a choice."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dlopt.config.experiment import GROUPS
from tests.support.line import dlopt, refused
from tests.support.pages import ROOT, block_after
from tests.support.sizes import TINY

TUTORIAL = "docs/tutorials/write_an_optimizer.md"
DATA = "docs/howto/custom_data.md"
LINE = ["train", "--config-dir", "myconf", "optimizer=sign_momentum", "allow_packages=[mine]", *TINY, "tracking=[]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's package and config folder, with the files of the pages."""
    for name, text in {
        "mine/__init__.py": "",
        "mine/optim.py": block_after(TUTORIAL, "python", "`mine/optim.py`"),
        "mine/data.py": block_after(DATA, "python", "`mine/data.py`"),
        "myconf/optimizer/sign_momentum.yaml": block_after(TUTORIAL, "yaml", "`myconf/optimizer/sign_momentum.yaml`"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.optim", "mine.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_an_optimizer_of_the_users(folder: Path) -> None:
    result = dlopt(folder, *LINE, "optimizer.lr=0.01", "epochs=2")
    assert result.code == 0, result.err
    assert "finished" in result.out


def test_it_is_not_called_unless_the_package_is_trusted(folder: Path) -> None:
    message = refused(folder, *(each for each in LINE if "allow" not in each))
    assert "mine.optim.SignMomentum" in message and "allow_packages=[mine]" in message


def test_a_data_set_of_the_users(folder: Path) -> None:
    draws = np.random.default_rng(0)
    images, labels = draws.integers(256, size=(40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    np.savez(folder / "train.npz", images=images, labels=labels)
    data = ["data=custom", "data.train._target_=mine.data.Arrays", "+data.train.file=train.npz"]
    result = dlopt(folder, "train", *data, "allow_packages=[mine]", *TINY, "tracking=[]")
    assert result.code == 0, result.err
    assert "finished" in result.out


def test_a_comparison_of_the_users(tmp_path: Path) -> None:
    recipe = block_after("docs/howto/comparisons.md", "yaml", "`myconf/experiment/momentum.yaml`")
    (tmp_path / "myconf/experiment").mkdir(parents=True)
    (tmp_path / "myconf/experiment/momentum.yaml").write_text(recipe)
    small = ["seed=0", "optimizer.lr=0.1", "epochs=2", "data.subset=40"]
    result = dlopt(tmp_path, "train", "--config-dir", "myconf", "experiment=momentum", *small)
    assert result.code == 0, result.err
    assert "Momentum: 2 runs" in result.out
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("outputs/**/config.yaml")]
    assert len({config["data"]["batch_size"] for config in configs if "data" in config}) == 1  # the same updates


def test_the_arguments_that_a_component_gets_at_run_time() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`(?: operations)? \| (.*) \|$", text, re.MULTILINE))
    for group in GROUPS.keys() - {"data", "parallel"}:  # data gets keys of the config; modes have a section
        assert tuple(re.findall(r"`(\w+)`", rows[group])) == GROUPS[group].runtime, group


def test_the_keys_of_a_choice_that_a_tutorial_shows(tmp_path: Path) -> None:
    shown = block_after("docs/tutorials/first_experiment.md", "text", "the resulting config, without training")
    command, _, output = shown.partition("\n")
    assert command == "$ dlopt options optimizer=adamw"
    assert dlopt(tmp_path, "options", "optimizer=adamw").out.split() == output.split()
