"""A third-party package: through its config folder, and installed with an entry point."""

import json
from pathlib import Path

import pytest

from tests.support.theirs import HERE, dlopt

FOLDER = ["--config-dir", str(HERE / "theirs/conf"), "allow_packages=[theirs]"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A site-packages folder that holds the package with its metadata, as pip leaves it."""
    (tmp_path / "theirs").symlink_to(HERE / "theirs")
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[dlopt]\ntheirs = theirs\n")
    return tmp_path


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """The package where Python finds it, not installed."""
    (tmp_path / "theirs").symlink_to(HERE / "theirs")
    return tmp_path


def test_a_config_folder(beside: Path) -> None:
    run = dlopt(beside, "train", *FOLDER, "experiment=stripes", "hydra.run.dir=run", "tracking=[]")
    assert run.returncode == 0, run.stderr
    assert json.loads((beside / "run/summary.json").read_text())["test_accuracy"] > 0.9
    choices = json.loads((beside / "run/environment.json").read_text())["choices"]
    assert (choices["optimizer"], choices["model"], choices["data"]) == ("sign_descent", "one_layer", "stripes")


def test_an_installed_package(installed: Path) -> None:
    run = dlopt(installed, "train", "experiment=stripes", "optimizer.lr=0.02", "hydra.run.dir=run", "tracking=[]")
    assert run.returncode == 0, run.stderr
    assert json.loads((installed / "run/summary.json").read_text())["test_accuracy"] > 0.9
    tested = dlopt(installed, "eval", "checkpoint=run/checkpoints/best.pt")
    assert tested.returncode == 0, tested.stderr


def test_its_choices_are_listed(installed: Path) -> None:
    listed = dlopt(installed, "options", "optimizer")
    assert "sign_descent" in listed.stdout and "Steps of one length" in listed.stdout
    assert "lr" in dlopt(installed, "options", "optimizer=sign_descent").stdout


@pytest.mark.parametrize("typed", ["optimizer.lr=-1", "optimizer.lrr=1", "model.bias=maybe"])
def test_its_keys_are_checked_like_all_others(installed: Path, typed: str) -> None:
    run = dlopt(installed, "train", "experiment=stripes", typed)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"dlopt: {typed}") and run.stderr.count("\n") == 1


def test_what_is_not_installed_is_not_trusted(beside: Path) -> None:
    run = dlopt(beside, "train", *FOLDER[:2], "experiment=stripes")
    assert run.returncode == 2 and "allow_packages=[theirs]" in run.stderr


def test_a_package_without_a_config_folder_is_named(installed: Path) -> None:
    (installed / "theirs").unlink()
    (installed / "theirs").mkdir()
    (installed / "theirs/__init__.py").touch()
    run = dlopt(installed, "train", "epochs=1")
    assert run.returncode == 2 and run.stderr.startswith("dlopt: theirs: this installed package")
