"""What the pages show works as written: an optimizer, a data set, a comparison, the arguments and keys of a choice."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import cohen_kappa_score

from dlopt.config.run_config import GROUPS
from tests.support.line import dlopt, refused
from tests.support.pages import ROOT, block_after
from tests.support.sizes import TINY

TUTORIAL = "docs/tutorials/write_an_optimizer.md"
EXTENDING = "docs/extending.md"
DATA = "docs/howto/custom_data.md"
LINE = ["train", "--config-dir", "myconf", "optimizer=sign_momentum", "allow_packages=[mine]", *TINY, "tracking=[]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's package and config folder, with the files of the pages."""
    for name, text in {
        "mine/__init__.py": "",
        "mine/optim.py": block_after(TUTORIAL, "python", "`mine/optim.py`"),
        "mine/data.py": block_after(DATA, "python", "`mine/data.py`"),
        "mine/metrics.py": block_after(EXTENDING, "python", "`mine/metrics.py`"),
        "mine/denoise.py": block_after("docs/howto/own_task.md", "python", "`mine/denoise.py`"),
        "mine/watch.py": block_after(EXTENDING, "python", "`mine/watch.py`"),
        "myconf/optimizer/sign_momentum.yaml": block_after(TUTORIAL, "yaml", "`myconf/optimizer/sign_momentum.yaml`"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.optim", "mine.data", "mine.metrics", "mine.watch", "mine.denoise"):
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


def test_a_task_of_the_users(folder: Path) -> None:
    line = ["task=mine.denoise.Denoise", "task.noise=0.3", "monitor=val_error", "allow_packages=[mine]"]
    result = dlopt(folder, "train", *line, *TINY, "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert "keeps the lowest val_error" in result.out
    assert {"best_val_error", "test_error"} <= json.loads((folder / "run/summary.json").read_text()).keys()


def test_a_metric_of_the_users(folder: Path) -> None:
    """The shown kappa equals scikit-learn's."""
    from mine.metrics import kappa  # type: ignore[import-not-found]

    draws = np.random.default_rng(0)
    outputs, targets = draws.normal(size=(60, 4)), draws.integers(4, size=60)
    outputs[np.arange(60), targets] += 1
    expected = cohen_kappa_score(targets, outputs.argmax(1))
    assert kappa(torch.tensor(outputs), torch.tensor(targets)) == pytest.approx(expected, rel=1e-12)
    line = ["evaluate.metrics=[macro_f1,mine.metrics.kappa]", "monitor=val_kappa", "monitor_mode=max"]
    line += ["allow_packages=[mine]"]
    result = dlopt(folder, "train", *line, *TINY, "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert "val kappa" in result.out and "kappa" in result.out.partition("best validation")[0].splitlines()[-2]
    summary = json.loads((folder / "run/summary.json").read_text())
    assert {"best_val_kappa", "test_kappa"} <= summary.keys()
    tested = dlopt(folder, "eval", "checkpoint=run", "allow_packages=[mine]", "output=tested")
    assert tested.code == 0 and "kappa" in tested.out, tested.err


def test_an_observer_of_the_users(folder: Path) -> None:
    watch = "observers=[{_target_: mine.watch.Watch, every_steps: 1}]"
    result = dlopt(folder, "train", watch, "allow_packages=[mine]", *TINY)
    assert result.code == 0, result.err
    assert re.search(r"^update 1: loss \d\.\d+, distance 0\.000$", result.out, re.MULTILINE)
    assert re.search(r"^update 2: loss .*, distance 0\.[0-9]*[1-9]", result.out, re.MULTILINE)
    assert re.search(r"^finished with a test loss of \d", result.out, re.MULTILINE)
    message = refused(folder, "train", watch.replace("every_steps", "often"), "allow_packages=[mine]", *TINY)
    assert "observers.0.often=1: unknown key; did you mean" in message or "observers.0.often=1: unknown key" in message


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
