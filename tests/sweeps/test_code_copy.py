"""The copy of the code that a submitted sweep runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from dlopt._version import ROOT
from dlopt.basics.errors import UserError
from dlopt.sweeps import code_copy
from dlopt.sweeps.code_copy import copy_code
from tests.support.requires import requires

pytestmark = requires("git")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a tracked, an untracked and an ignored module, and a package below src/."""
    folder = tmp_path / "project"
    (folder / "src/mine_copied").mkdir(parents=True)
    files = {
        "src/mine_copied/__init__.py": "from mine_copied.new import RATE",
        ".gitignore": "ignored/\n*.pt\n",
        "data.csv": "1,2\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)
    (folder / "src/mine_copied/new.py").write_text("RATE = 1\n")
    (folder / "ignored").mkdir()
    (folder / "ignored/large.bin").write_bytes(bytes(1000))
    (folder / "weights.pt").write_bytes(bytes(1000))
    monkeypatch.syspath_prepend(folder / "src")
    return folder


def test_tracked_and_untracked_files_are_copied(repository: Path, tmp_path: Path) -> None:
    (repository / "outputs").mkdir()
    (repository / "outputs/summary.json").write_text("{}")
    settings = repository.parent / "settings"
    settings.mkdir()
    (settings / "a.yaml").write_text("a: 1\n")
    copied = copy_code(
        ["mine_copied.optim", "torch"], {"config": settings}, tmp_path / "code", [repository / "outputs"]
    )
    names = {str(path.relative_to(copied.folder)) for path in copied.folder.rglob("*") if path.is_file()}
    others = {name for name in names if not name.startswith("dlopt/")}
    assert others == {
        "project/.gitignore", "project/data.csv", "project/src/mine_copied/__init__.py",
        "project/src/mine_copied/new.py", "config/settings/a.yaml",
    }  # fmt: skip
    assert {"dlopt/dlopt/cli.py", "dlopt/conf/train.yaml"} <= names and "dlopt/tests/conftest.py" not in names
    assert copied.paths == ("dlopt", "project/src")


def test_an_edit_changes_the_hash_and_not_the_copy(repository: Path, tmp_path: Path) -> None:
    first = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    assert copy_code(["mine_copied"], {}, tmp_path / "code", []) == first
    (repository / "src/mine_copied/new.py").write_text("RATE = 2\n")
    second = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    assert second.sha256 != first.sha256 and second.folder != first.folder
    for copied, rate in ((first, "1"), (second, "2")):
        program = [sys.executable, "-c", "import mine_copied, sys; print(mine_copied.RATE)"]
        environment = {"PYTHONPATH": str(copied.folder / copied.paths[1])}
        assert subprocess.run(program, env=environment, capture_output=True, text=True).stdout == f"{rate}\n"


def test_a_module_outside_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("")
    (tmp_path / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    copied = copy_code(["mine_alone"], {}, tmp_path / "code", [])
    assert [path.name for path in (copied.folder / "mine_alone").iterdir()] == ["mine_alone.py"]


def test_installed_packages_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "ROOT", tmp_path / "lib/site-packages/dlopt")
    copied = copy_code(["torch.optim", "sys", "no_such_package"], {}, tmp_path / "code", [])
    assert copied.paths == () and not list(copied.folder.iterdir())


def test_too_much(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "ROOT", ROOT.parents[1] / "site-packages/dlopt")
    monkeypatch.setattr(code_copy, "MAX_BYTES", 900)
    copy_code(["mine_copied"], {}, tmp_path / "code", [])
    (repository / "large.bin").write_bytes(bytes(2000))
    with pytest.raises(
        UserError, match=r"more than .*\(largest: .*large.bin, 1.95 KiB\); add what is no code to .gitig"
    ):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
