"""environment.json: versions, machine, the user's repository, and the code of allow_packages."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlopt.run import environment
from dlopt.run.record import _changed_versions, _record_machine
from tests.support.line import dlopt
from tests.support.requires import requires
from tests.support.sizes import TINY

GIT = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one committed file, code.py; the current folder is a folder in it."""
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("lr = 1\n")
    (tmp_path / ".gitignore").write_text("run\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    return tmp_path


def saved(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return content


@requires("git")
def test_a_run_records_the_repository_of_the_current_folder(repository: Path) -> None:
    commit, run = git(repository, "rev-parse", "HEAD"), repository / "run"
    line = ("train", *TINY, "schedule=constant", "tracking=[]", "hydra.run.dir=run", "resume=auto")
    assert dlopt(repository, *line).code == 0
    clean = {"folder": str(repository), "commit": commit, "dirty": False, "diff": None}
    assert saved(run)["code"] == clean and not (run / "code.diff").exists()
    (repository / "code.py").write_text("lr = 2\n")
    assert dlopt(repository, *line, "epochs=3").code == 0
    assert saved(run)["code"] == clean | {"dirty": True, "diff": "code.diff"}
    git(repository, "checkout", "-q", "code.py")
    git(repository, "apply", "run/code.diff")
    assert (repository / "code.py").read_text() == "lr = 2\n"
    git(repository, "checkout", "-q", "code.py")
    assert dlopt(repository, *line, "epochs=4").code == 0
    assert saved(run)["code"] == clean and not (run / "code.diff").exists()


@requires("git")
def test_a_long_diff_is_cut(repository: Path) -> None:
    (repository / "code.py").write_text("x = 1\n" * 100_000)
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] is True
    assert environment.MAX_DIFF_BYTES < len(diff) < environment.MAX_DIFF_BYTES + 100
    assert diff.endswith(b"[cut after 200000 bytes]\n")


@requires("git")
def test_repositories_without_commits_and_folders_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.repository() == (None, b"")
    git(tmp_path, "init", "-q")
    unknown = {"commit": None, "dirty": None, "diff": None}
    assert environment.repository() == ({"folder": str(tmp_path), **unknown}, b"")
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment.repository() == (None, b"")


@pytest.fixture
def program(repository: Path) -> str:
    """A program that a stranger's repository configures; it leaves a file `started`."""
    path = repository / ".git/program"
    path.write_text(f"#!/bin/sh\ntouch {repository}/started\ncat\n")
    path.chmod(0o755)
    return str(path)


CONFIGURED: dict[str, dict[str, str]] = {  # keys whose value is the program, and other keys
    "diff drivers": {"diff.external": "", "diff.mine.textconv": "", "diff.mine.command": ""},
    "fsmonitor and hooks": {"core.fsmonitor": "", "core.pager": "", "pager.diff": "", "core.sshCommand": ""},
    "a filter": {"filter.mine.clean": "", "filter.mine.smudge": "", "filter.mine.required": "true"},
    "a filter process": {"filter.mine.process": "", "filter.mine.required": "true"},
    "a name with dots": {"filter.mine.clean": "", "filter.a.b C.clean": "", "filter.a.b C.required": "true"},
}


@requires("git")
@pytest.mark.parametrize("keys", CONFIGURED.values(), ids=CONFIGURED)
@pytest.mark.parametrize("attributes", [".gitattributes", ".git/info/attributes"])
def test_programs_of_a_repository_are_not_started(
    repository: Path, program: str, keys: dict[str, str], attributes: str
) -> None:
    for key, value in keys.items():
        git(repository, "config", key, value or program)
    (repository / attributes).write_text("*.py diff=mine filter=mine\n")
    hooks = repository / ".git/hooks/post-index-change"
    hooks.parent.mkdir(exist_ok=True)
    hooks.write_bytes(Path(program).read_bytes())
    hooks.chmod(0o755)
    (repository / "code.py").write_text("lr = 2\n")
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] and b"+lr = 2" in diff
    assert not (repository / "started").exists()
    if "filter.mine.required" in keys and "filter.mine.clean" in keys:
        git(repository, "diff", "HEAD")
        assert (repository / "started").exists(), "the payload works"


@requires("git")
def test_filters_of_included_files_and_of_the_user_are_not_started(
    repository: Path, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / ".gitconfig").write_text(f'[filter "lfs"]\nclean = {program}\nrequired = true\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    (repository / ".git/more").write_text(f'[filter "mine"]\nclean = {program}\n[Filter "Mine"]\nclean={program}')
    git(repository, "config", "include.path", "more")
    (repository / ".gitattributes").write_text("*.py filter=mine\ncode.py filter=lfs\nb.py filter=Mine\n")
    (repository / "code.py").write_text("lr = 2\n")
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] and b"+lr = 2" in diff
    assert not (repository / "started").exists()


@requires("git")
def test_a_filter_that_cannot_be_turned_off_leaves_out_the_diff(repository: Path, program: str) -> None:
    git(repository, "config", "filter.a=b.clean", program)
    (repository / ".gitattributes").write_text("*.py filter=a=b\n")
    (repository / "code.py").write_text("lr = 2\n")
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] is None and facts["diff"] is None and diff == b""
    assert not (repository / "started").exists()


@requires("git")
@pytest.mark.parametrize("url", ["/nowhere/x", "ext::sh -c {program}", "ssh://nowhere.invalid/x"])
def test_missing_objects_are_not_fetched(repository: Path, program: str, url: str) -> None:
    """A partial clone whose remote is a program: `git diff` needs an object that only the remote has."""
    blob = git(repository, "rev-parse", "HEAD:code.py")
    for key, value in {
        "core.repositoryFormatVersion": "1", "extensions.partialClone": "origin", "remote.origin.promisor": "true",
        "remote.origin.url": url.format(program=program), "remote.origin.uploadpack": program,
        "protocol.allow": "always", "protocol.ext.allow": "always", "core.sshCommand": program,
    }.items():  # fmt: skip
        git(repository, "config", key, value)
    (repository / "code.py").write_text("lr = 2\n")
    (repository / f".git/objects/{blob[:2]}/{blob[2:]}").unlink()
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] is None and diff == b""
    assert not (repository / "started").exists()
    if url != "/nowhere/x":  # with some versions of Git
        # Git and the program, which is no server, may wait for each other: both are ended once the program has started.
        quiet = subprocess.DEVNULL
        payload = subprocess.Popen(
            ["git", "diff", "HEAD"], cwd=repository, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while not (repository / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(payload.pid, signal.SIGKILL)
        payload.wait()
        assert (repository / "started").exists(), "the payload works"


@requires("git")
def test_submodules_are_left_alone(repository: Path, program: str) -> None:
    inner = repository / "sub"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "code.py").write_text("lr = 1\n")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "first")
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "sub")
    git(repository, "commit", "-qm", "second")
    git(inner, "config", "filter.mine.clean", program)
    git(repository, "config", "diff.ignoreSubmodules", "none")
    (inner / ".git/info/attributes").write_text("* filter=mine\n")
    (inner / "code.py").write_text("lr = 2\n")
    facts, diff = environment.repository()
    assert facts is not None and facts["dirty"] is False and diff == b""
    assert not (repository / "started").exists()
    git(repository, "diff", "HEAD")
    assert (repository / "started").exists(), "the payload works"


@requires("git")
def test_a_repository_does_not_show_files_elsewhere(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its core.worktree may name the user's home folder, and its commit the names of files there."""
    home = tmp_path_factory.mktemp("home")
    (home / "code.py").write_text("secret\n")
    git(repository, "config", "core.worktree", str(home))
    facts, diff = environment.repository()
    assert diff == b"" and (facts is None or facts["dirty"] is None)


def test_packages_have_a_version_or_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "mine_x"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/a.py", "data.bin"):
        (package / name).write_text("1")
    (tmp_path / "single_x.py").write_text("1")
    first = environment.packages(["mine_x.inner", "single_x", "torch", "nothing_x", "sys"])
    assert first.keys() == {"mine_x", "single_x", "torch", "nothing_x", "sys"}
    assert first["nothing_x"] is None and first["torch"] == {"version": environment.versions()["packages"]["torch"]}
    assert first["mine_x"] is not None and first["mine_x"]["folder"] == str(package)
    (package / "data.bin").write_text("2")  # data is not code
    assert environment.packages(["mine_x"])["mine_x"] == first["mine_x"]
    (package / "inner/a.py").write_text("2")
    (tmp_path / "single_x.py").write_text("2")
    second = environment.packages(["mine_x", "single_x"])
    assert second["mine_x"] != first["mine_x"] and second["single_x"] != first["single_x"]


def test_machine_and_versions() -> None:
    machine, versions = environment.machine(), environment.versions()
    assert machine["host"] == os.uname().nodename and machine["processor"]
    assert machine["cpu_count"] == os.cpu_count() and machine["memory_bytes"] > 2**28
    names = {"torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn"}
    assert names <= versions["packages"].keys() and {"dlopt", "git_commit", "python", "cuda"} <= versions.keys()


def test_the_host_name_is_hashed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLOPT_HASH_HOST", "1")
    hashed = environment.machine()["host"]
    assert re.fullmatch("[0-9a-f]{12}", hashed) and hashed == environment.machine()["host"]
    monkeypatch.setattr("platform.node", lambda: "another")
    assert environment.machine()["host"] != hashed


def test_a_job_records_its_own_machine(tmp_path: Path) -> None:
    _record_machine(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing to update
    (tmp_path / "environment.json").write_text(json.dumps({"host": "login", "choices": {"model": "mlp"}}))
    _record_machine(tmp_path)
    assert saved(tmp_path) == {"choices": {"model": "mlp"}, **environment.machine()}


def test_a_resumed_run_names_changed_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two installations with one folder of outputs have them; resumed in its own folder, or from another run."""
    before = {"dlopt": "0.1.0", "git_commit": "a" * 40, "torch": "2.15.0"}
    monkeypatch.setattr(environment, "versions", lambda: {"dlopt": "0.2.0", "git_commit": None, "torch": "2.16.0"})
    (tmp_path / "environment.json").write_text(json.dumps(before))
    checkpoint = tmp_path / "checkpoints/last.pt"
    for folder, resume in ((tmp_path, "auto"), (tmp_path / "new", tmp_path), (tmp_path / "new", checkpoint)):
        settings = SimpleNamespace(settings=SimpleNamespace(resume=str(resume)))
        run: Any = SimpleNamespace(folder=folder, run_config=settings)
        assert _changed_versions(run) == "dlopt 0.2.0 (was 0.1.0), torch 2.16.0 (was 2.15.0)"
    monkeypatch.setattr(environment, "versions", lambda: {**before, "git_commit": "b" * 40})
    assert _changed_versions(run) == f"its commit {'b' * 16} (was {'a' * 16})"
    monkeypatch.setattr(environment, "versions", lambda: before)
    assert _changed_versions(run) == ""
    # The code of a user's package: its digest, wherever it lies; and one that is gone.
    for known, said in (({"sha256": "0"}, "other code of tests"), (environment.packages(["tests"])["tests"], "")):
        facts = {**before, "allow_packages": {"tests": known, "gone": {"version": "1"}}}
        (tmp_path / "environment.json").write_text(json.dumps(facts))
        assert _changed_versions(run) == said
