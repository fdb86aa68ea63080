"""The copy of the code that a submitted sweep runs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlopt._version import ROOT
from dlopt.basics.errors import UserError
from dlopt.config.schema import trusted_packages
from dlopt.sweeps import code_copy
from dlopt.sweeps.code_copy import CopiedCode, copy_code, is_unchanged
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


def copied_names(copied: CopiedCode, source: str) -> set[str]:
    folder = copied.folder / source
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_modules_beside_one_outside_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were imported are part of the code; the others are not."""
    project = tmp_path / "project"
    (project / "beside_package").mkdir(parents=True)
    (project / "mine_importing.py").write_text("import beside_module, beside_package.inner")
    for name in ("beside_module.py", "unrelated.py", "beside_package/__init__.py", "beside_package/inner.py"):
        (project / name).write_text("")
    monkeypatch.syspath_prepend(project)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    importlib.import_module("mine_importing")
    copied = copy_code(["mine_importing"], {}, tmp_path / "code", [])
    assert copied_names(copied, "mine_importing") == {
        "mine_importing.py", "beside_module.py", "beside_package/__init__.py", "beside_package/inner.py",
    }  # fmt: skip


def test_a_package_that_git_ignores_is_refused(repository: Path, tmp_path: Path) -> None:
    (repository / ".gitignore").write_text(".ipynb_checkpoints/\nnew.py\n")
    (repository / "src/mine_copied/.ipynb_checkpoints").mkdir()
    (repository / "src/mine_copied/.ipynb_checkpoints/new.py").write_text("")
    with pytest.raises(UserError, match=r"/src/mine_copied/new.py: not copied with the code, because Git ignores it"):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
    (repository / "src/mine_copied/new.py").rename(repository / "src/mine_copied/secrets.py")
    with pytest.raises(UserError, match=r"mine_copied/secrets\.py: not copied"):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
    subprocess.run(["git", "-C", repository, "add", "-f", "src"], check=True)
    assert "src/mine_copied/secrets.py" in copied_names(
        copy_code(["mine_copied"], {}, tmp_path / "code", []), "project"
    )


SECRETS = (
    ".env", "prod.env", "a.env.yaml", ".env.local.json", "id_rsa", "keys/id_ed25519.json", "server.pem", "a.key",
    "credentials.json", "my_credentials.yaml", "gcp-credentials.json", "secrets.toml", "secret.py", ".aws/config.toml",
    ".ssh/config.yaml", ".netrc", "token.json", "hf_token.json", "tokens.yaml", "api_key.json", "passwords.json",
    "service_account.json", ".docker/config.json", "sub/.kube/config.yaml",
)  # fmt: skip
OTHERS = ("notes.txt", "a.csv", "b.so", "w.pt", "run.sh", "no_suffix")
COPIED = (
    "a.py",
    "b.yaml",
    "c.yml",
    "d.json",
    "e.toml",
    "tokenizer.json",
    "environment.yaml",
    "token_mixer.py",
    "monkeys.yaml",
)


@pytest.mark.parametrize("is_tracked", [False, True])
def test_secrets_and_data_are_not_copied(is_tracked: bool, repository: Path, tmp_path: Path) -> None:
    """Of files that Git does not track, code and settings are copied; tracked ones too, but no secrets except code."""
    for name in (*SECRETS, *OTHERS, *COPIED):
        path = repository / "more" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("SECRET-MARKER" if name in SECRETS else "text")
    os.mkfifo(repository / "more/pipe.py")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "there.py").write_text("SECRET-MARKER")
    (repository / "more/link.py").symlink_to(outside / "there.py")
    (repository / "more/folder").symlink_to(outside)
    (repository / "more/dangling.py").symlink_to(outside / "missing.py")
    (repository / "more/inside.py").symlink_to(repository / "more/a.py")
    if is_tracked:
        subprocess.run(["git", "-C", repository, "add", "-f", "more"], check=True)
    copied = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    names = {name.removeprefix("more/") for name in copied_names(copied, "project") if name.startswith("more/")}
    expected = {*COPIED, "inside.py"} | ({*OTHERS, "secret.py"} if is_tracked else set())
    assert names == expected
    assert not any(path.is_symlink() for path in copied.folder.rglob("*"))
    left = {str(Path(name).relative_to(repository)) for name in copied.left_out if name.startswith(f"{repository}/")}
    every = {*SECRETS, *OTHERS, "link.py", "folder", "dangling.py"} - names
    assert left == {f"more/{name}" for name in every} | {"ignored", "weights.pt"}


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling", "fifo", "bytecode", "changed", "top"])
def test_a_copy_with_something_else_in_it_is_refused(kind: str, repository: Path, tmp_path: Path) -> None:
    copied = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    assert is_unchanged(copied.folder, copied.sha256)
    package = copied.folder / "project/src/mine_copied"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "torch").mkdir(parents=True)
    (elsewhere / "new.py").write_bytes((package / "new.py").read_bytes())
    match kind:
        case "file":
            (package / "new.py").unlink()
            (package / "new.py").symlink_to(elsewhere / "new.py")
        case "folder":
            (package / "torch").symlink_to(elsewhere / "torch")
        case "empty folder":
            (package / "torch").symlink_to(tmp_path / "empty")
            (tmp_path / "empty").mkdir()
        case "dangling":
            (package / "torch").symlink_to(tmp_path / "missing")
        case "fifo":
            os.mkfifo(package / "torch.py")
        case "bytecode":
            (package / "__pycache__").mkdir()
            (package / "__pycache__/new.cpython-311.pyc").write_bytes(b"x")
        case "changed":
            (package / "new.py").write_text("RATE = 3\n")
        case "top":
            package.rename(elsewhere / "mine_copied")
            package.symlink_to(elsewhere / "mine_copied")
    assert not is_unchanged(copied.folder, copied.sha256)


def test_workers_do_not_look_into_the_working_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the current folder, PYTHONPATH or an editable installation, which may hold other code by then."""
    workers, shared = tmp_path / "sweep/workers", tmp_path / "shared"
    shared.mkdir()
    copied = copy_code(["mine_copied"], {}, workers / ".code", [])
    entries = [str(copied.folder / path) for path in copied.paths]
    others = ["", ".", str(repository), str(repository / "src"), str(repository.parent / "project/src/..")]
    installed = [str(Path(torch.__file__).parents[1]), *(path for path in sys.path if path.endswith("lib-dynload"))]
    monkeypatch.setattr(sys, "path", [*others, *entries, str(shared), *installed])
    monkeypatch.setenv("DLOPT_SUBMITTED", str(workers))
    monkeypatch.chdir(repository)
    assert "mine_copied" in trusted_packages(["mine_copied"])
    assert sys.path == [*entries, str(shared), *installed]


def test_installed_packages_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "ROOT", tmp_path / "lib/site-packages/dlopt")
    copied = copy_code(["torch.optim", "sys", "no_such_package"], {}, tmp_path / "code", [])
    assert copied.paths == () and not list(copied.folder.iterdir())


def test_too_much(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "ROOT", ROOT.parents[1] / "site-packages/dlopt")
    monkeypatch.setattr(code_copy, "MAX_BYTES", 900)
    copy_code(["mine_copied"], {}, tmp_path / "code", [])
    (repository / "large.py").write_bytes(bytes(2000))
    with pytest.raises(
        UserError, match=r"more than .*\(largest: .*large.py, 1.95 KiB\); add what is no code to .gitig"
    ):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
