"""The copy of the code that a submitted sweep runs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

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
    others = {"space": settings / "a.yaml"}
    copied = copy_code(["mine_copied.optim", "torch"], others, tmp_path / "code", [repository / "outputs"])
    names = {str(path.relative_to(copied.folder)) for path in copied.folder.rglob("*") if path.is_file()}
    others = {name for name in names if not name.startswith("dlopt/")}
    assert others == {
        "project/.gitignore", "project/data.csv", "project/src/mine_copied/__init__.py",
        "project/src/mine_copied/new.py", "space/a.yaml",
    }  # fmt: skip
    assert {"dlopt/dlopt/cli.py", "dlopt/conf/train.yaml"} <= names and "dlopt/tests/conftest.py" not in names
    assert copied.paths == ("dlopt", "project/src") and copied.left_out[repository] == []


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


def copied_names(copied: CopiedCode, source: str) -> set[str]:
    folder = copied.folder / source
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_in_no_repository_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import it from its folder, and take configs from theirs."""
    project = tmp_path / "project"
    (project / "conf").mkdir(parents=True)
    (project / "mine_alone.py").write_text("")
    (tmp_path / "space.yaml").write_text("{}")
    monkeypatch.syspath_prepend(project)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    others = {"config": project / "conf", "space": tmp_path / "space.yaml"}
    copied = copy_code(["mine_alone"], others, tmp_path / "code", [])
    assert copied.paths == ("dlopt", str(project))
    assert {path.name for path in copied.folder.iterdir()} == {"dlopt", "space"}
    assert copied_names(copied, "space") == {"space.yaml"}


@mock.patch.dict(sys.modules)
def test_a_module_that_jobs_need_is_copied_or_refused(repository: Path, tmp_path: Path) -> None:
    """Whatever this process has imported from the folder of the package, also if it is not of the package."""
    (repository / ".gitignore").write_text(".ipynb_checkpoints/\nignored*\n*.pt\n")
    for name in ("beside.py", "unrelated.py", "beside_package/inner.py", "ignored_module.py"):
        (repository / "src" / name).parent.mkdir(exist_ok=True)
        (repository / "src" / name).write_text("")
    (repository / "src/mine_copied/.ipynb_checkpoints").mkdir()
    (repository / "src/mine_copied/.ipynb_checkpoints/new.py").write_text("")
    (repository / "src/mine_copied/__init__.py").write_text("import beside, beside_package.inner")
    importlib.import_module("mine_copied")
    copied = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    modules = {"beside.py", "beside_package/inner.py", "mine_copied/__init__.py", "mine_copied/new.py"}
    assert copied_names(copied, "project/src") == modules
    assert copied.left_out[repository] == ["src/unrelated.py"]
    importlib.import_module("ignored_module")
    with pytest.raises(UserError, match=r"/src/ignored_module\.py: imported, but not copied .* ignored by Git"):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
    subprocess.run(["git", "-C", repository, "add", "-f", "src/ignored_module.py"], check=True)
    assert "ignored_module.py" in copied_names(copy_code(["mine_copied"], {}, tmp_path / "code", []), "project/src")


SECRETS = (  # none of a package or a module that runs
    ".env", "prod.env", "a.env.yaml", ".env.local.json", "id_rsa", "keys/id_ed25519.json", "server.pem", "a.key",
    "credentials.json", "my_credentials.yaml", "gcp-credentials.json", "secrets.toml", "secret.py", ".aws/config.toml",
    ".ssh/config.yaml", ".netrc", "token.json", "hf_token.json", "tokens.yaml", "api_key.json", "passwords.json",
    "service_account.json", ".docker/config.json", "sub/.kube/config.yaml", "kaggle.json", ".mcp.json",
    ".cursor/mcp.json", ".claude/settings.local.json", ".vscode/settings.json", ".config/gh/hosts.yml", ".npmrc.json",
    "gcp-sa.json", "firebase-adminsdk.json", "oauth.json", "auth.toml", "terraform.tfstate.json", "config/prod.json",
    "db.yaml", "wandb_key.yaml", "mykey.yaml", "keys.json", "login.yaml", "api_key.py", "settings.toml",
)  # fmt: skip
PRIVATE = (
    "secret.py",
    "my_credentials.py",
    "api_key.py",
    "keys.env/a.py",
    ".hidden.py",
    ".local/a.py",
    "passwords/a.py",
)
CODE = ("tokens.py", "token_mixer.py", "environment.py", "sub/keyboard.py")


def test_untracked_secrets_are_not_copied(repository: Path, tmp_path: Path) -> None:
    """Of untracked files, only Python ones of the package are copied: none hidden, private or named like a secret."""
    package = repository / "src/mine_copied"
    for path in (*(repository / name for name in SECRETS), *(package / name for name in (*PRIVATE, *CODE))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (package / "for_me.py").write_text("")
    (package / "for_me.py").chmod(0o600)
    copied = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    modules = {f"src/mine_copied/{name}" for name in (*CODE, "__init__.py", "new.py")}
    assert copied_names(copied, "project") == {".gitignore", "data.csv", *modules}
    private = [f"src/mine_copied/{name}" for name in (*PRIVATE, "for_me.py")]
    left_out = copied.left_out[repository]
    assert ".aws/" in left_out and "src/mine_copied/keys.env/" in left_out
    assert all(any(name.startswith(entry) for entry in left_out) for name in (*SECRETS, *private))
    assert not [name for name in CODE if f"src/mine_copied/{name}".startswith(tuple(left_out))]


def test_tracked_files_are_copied_with_their_modes(repository: Path, tmp_path: Path) -> None:
    """As they are in the working tree, with submodules; no links to other places, and no pipes."""
    subprocess.run(["git", "init", "-q", tmp_path / "library"], check=True)
    (tmp_path / "library/inner.py").write_text("")
    git = ("git", "-c", "user.name=a", "-c", "user.email=b", "-c", "protocol.file.allow=always", "-C")
    for line in (["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, tmp_path / "library", *line], check=True)
    subprocess.run([*git, repository, "submodule", "--quiet", "add", tmp_path / "library", "library"], check=True)
    modes = {"run.sh": 0o755, "for_me.json": 0o600, "fixed.txt": 0o444, "removed.py": 0o644, "pipe.py": 0o644}
    for name, mode in modes.items():
        (repository / name).write_text("before")
        (repository / name).chmod(mode)
    (tmp_path / "there.py").write_text("SECRET-MARKER")
    for name, target in {"link.py": tmp_path / "there.py", "dangling.py": "missing", "inside.py": "run.sh"}.items():
        (repository / name).symlink_to(target)
    subprocess.run(["git", "-C", repository, "add", "."], check=True)
    (repository / "run.sh").write_text("after")
    for name in ("removed.py", "pipe.py"):
        (repository / name).unlink()
    os.mkfifo(repository / "pipe.py")
    copied = copy_code(["mine_copied"], {}, tmp_path / "code", [])
    names = {"run.sh", "for_me.json", "fixed.txt", "inside.py", "library/inner.py"}
    tracked = {".gitignore", ".gitmodules", "data.csv", "src/mine_copied/__init__.py", "src/mine_copied/new.py"}
    assert copied_names(copied, "project") == names | tracked
    project = copied.folder / "project"
    assert not any(path.is_symlink() for path in copied.folder.rglob("*"))
    assert {name: (project / name).stat().st_mode & 0o777 for name in modes if name in names} == {
        "run.sh": 0o755, "for_me.json": 0o600, "fixed.txt": 0o444
    }  # fmt: skip
    assert (project / "run.sh").read_text() == (project / "inside.py").read_text() == "after"


def test_configs_that_are_typed(repository: Path, tmp_path: Path) -> None:
    """Also untracked ones."""
    for name in ("conf/experiment/mine.yaml", "conf/secrets.yaml", "conf/notes.txt"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("a: 1\n")
    copied = copy_code(["mine_copied"], {"config": repository / "conf"}, tmp_path / "code", [])
    assert copied_names(copied, "config/conf") == {"experiment/mine.yaml"}
    assert copied.left_out[repository] == ["conf/"]
    assert {*copied.left_out} == {repository, ROOT.parent}


def test_git_does_not_answer(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied, instead of a part of the code."""
    git = code_copy.git
    monkeypatch.setattr(code_copy, "git", lambda *words: None if "--others" in words else git(*words))
    with pytest.raises(UserError, match=r"`git ls-files` fails or takes several seconds, .* \.gitignore$"):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])


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
    """Not by the current folder, PYTHONPATH or an editable installation, which may hold other code by then.

    They import what is in no repository from its folder.
    """
    workers, shared = tmp_path / "sweep/workers", tmp_path / "shared"
    shared.mkdir()
    copied = copy_code(["mine_copied"], {}, workers / ".code", [])
    in_place = tmp_path / "plain"
    (in_place / "dlopt").mkdir(parents=True)
    entries = [*(str(copied.folder / path) for path in copied.paths), str(in_place)]
    others = ["", ".", str(repository), str(repository / "src"), str(repository.parent / "project/src/..")]
    installed = [str(Path(torch.__file__).parents[1]), *(path for path in sys.path if path.endswith("lib-dynload"))]
    monkeypatch.setattr(sys, "path", [*others, *entries, str(shared), *installed])
    monkeypatch.setenv("DLOPT_SUBMITTED", str(workers))
    monkeypatch.setenv("DLOPT_IN_PLACE", str(in_place))
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
    (repository / "large.csv").write_bytes(bytes(2000))
    subprocess.run(["git", "-C", repository, "add", "large.csv"], check=True)
    advice = "move what is no code out of the repository"
    with pytest.raises(UserError, match=rf"more than .*\(largest: .*large\.csv, 1\.95 KiB\); {advice}$"):
        copy_code(["mine_copied"], {}, tmp_path / "code", [])
