"""Describes where a run ran, for environment.json: machine, versions, and the user's code."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from dlopt._version import ROOT, __version__
from dlopt.basics.files import read_json, sha256
from dlopt.basics.folders import SUBMITTED
from dlopt.basics.plain_values import read_regular

DIFF = "code.diff"  # in a run folder: the uncommitted changes of the user's repository
REPOSITORY = "repository.json"  # with DIFF in the folder SUBMITTED: the user's repository when a sweep was submitted
MAX_DIFF_BYTES = 200_000
_PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "hydra-core", "omegaconf", "pydantic", "scikit-learn", "pillow",
    "matplotlib", "tensorboard", "optuna", "schedulefree", "timm",
)  # fmt: skip
_GIT_SECONDS = 5.0


def machine() -> dict[str, Any]:
    """Returns platform, host name, processor, number of cores, bytes of memory, and the first GPU.

    With DLOPT_HASH_HOST=1, a hash identifies the host: run folders that are shared do not reveal its name.
    """
    import torch

    from dlopt.machine.memory import installed_memory

    host = platform.node()
    if os.environ.get("DLOPT_HASH_HOST") == "1":
        host = hashlib.sha256(host.encode()).hexdigest()[:12]
    return {
        "platform": platform.platform(),
        "host": host,
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": installed_memory(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, Any]:
    """Returns the versions of Python, of CUDA, of dlopt with its commit, and of the installed packages that it uses."""
    import torch

    commit = None
    if (facts := submitted()) is not None:
        commit = facts.get("git_commit")
    elif (ROOT.parent / ".git").exists():
        commit = _text(git("-C", str(ROOT.parent), "rev-parse", "HEAD"))
    return {
        "dlopt": __version__,
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def changed_versions(before: Mapping[str, Any]) -> list[str]:
    """Returns what differs from the environment.json `before`, of a former start: "dlopt 0.2.0 (was 0.1.0)"."""
    now, names = versions(), {"dlopt": "dlopt", "git_commit": "its commit", "torch": "torch"}
    return [
        f"{shown} {now[name][:16]} (was {str(before[name])[:16]})"
        for name, shown in names.items()
        if before.get(name) and now[name] and before[name] != now[name]
    ]


def repository() -> tuple[dict[str, Any] | None, bytes]:
    """Describes the Git repository of the current folder (None without one, or without git) and what is uncommitted.

    Untracked files, submodules and what filters such as Git LFS would change do not count: files are compared as they
    are. The last line of a diff says if it is cut, after `MAX_DIFF_BYTES`.
    """
    if (facts := submitted()) is not None:
        diff = b""
        with contextlib.suppress(OSError, ValueError):
            diff = read_regular(Path(os.environ[SUBMITTED], DIFF), 2 * MAX_DIFF_BYTES)
        return facts.get("code"), diff
    top = (git("rev-parse", "--show-toplevel") or b"").removesuffix(b"\n")
    if not top:
        return None, b""
    commit = git("rev-parse", "--verify", "HEAD")
    changes = None if commit is None else _diff(top)
    facts = {
        "folder": os.fsdecode(top),
        "commit": _text(commit),
        "dirty": None if changes is None else bool(changes),
        "diff": DIFF if changes else None,
    }
    changes = changes or b""
    if len(changes) > MAX_DIFF_BYTES:
        changes = changes[:MAX_DIFF_BYTES] + f"\n[cut after {MAX_DIFF_BYTES} bytes]\n".encode()
    return facts, changes


def submitted() -> dict[str, Any] | None:
    """Returns the record of the code from when the sweep of this job was submitted; None for other runs."""
    folder = os.environ.get(SUBMITTED)
    return None if folder is None else read_json(Path(folder, REPOSITORY))


def packages(names: Iterable[str]) -> dict[str, dict[str, str] | None]:
    """Identifies the code of importable packages, by name.

    Installed ones by `version`, others by `folder` and the `sha256` of their Python files; None if not found.
    """
    return {name: _identify(name) for name in dict.fromkeys(each.split(".")[0] for each in names)}


def find_package(name: str) -> ModuleSpec | None:
    """Returns the spec of a package or module without importing it; None if not found."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _identify(name: str) -> dict[str, str] | None:
    spec = find_package(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        files = sorted((folder, path) for folder in folders for path in folder.rglob("*.py"))
    elif spec.has_location and spec.origin is not None:
        folders = [Path(spec.origin).parent]
        files = [(folders[0], Path(spec.origin))]
    else:  # built into Python
        return {"version": platform.python_version()}
    if {"site-packages", "dist-packages"} & set(folders[0].parts):
        for distribution in importlib.metadata.packages_distributions().get(name, []):
            return {"version": importlib.metadata.version(distribution)}
    return {"folder": str(folders[0]), "sha256": _sha256(files)}


def code_sha256(folder: Path) -> str:
    """Returns the hash of the names and contents of the Python files below a folder."""
    return _sha256(sorted((folder, path) for path in folder.rglob("*.py")))


def _sha256(files: Iterable[tuple[Path, Path]]) -> str:
    """`files`: each with the folder that its name is relative to."""
    digest = hashlib.sha256()
    for folder, path in files:
        with contextlib.suppress(OSError):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode("utf-8", "surrogateescape"))
            digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _diff(top: bytes) -> bytes | None:
    """Returns the uncommitted changes below `top`. Starts no program of the repository; None if that is impossible."""
    if git("rev-parse", "--absolute-git-dir") != git("-C", os.fsdecode(top), "rev-parse", "--absolute-git-dir"):
        return None  # core.worktree: the repository compares itself with files of others, such as your home folder
    keys = git("config", "--null", "--name-only", "--get-regexp", r"^filter\.", allowed=(0, 1))  # 1: no such key
    if keys is None:
        return None
    # A filter, selected by .gitattributes or .git/info/attributes, is a command. An empty one is none.
    names = {os.fsdecode(key).rpartition(".")[0] for key in keys.split(b"\0") if key}
    if any("=" in name for name in names):  # `-c` would set another key
        return None
    off = [f"{name}.{key}" for name in sorted(names) for key in ("clean=", "smudge=", "process=", "required=false")]
    settings = [word for setting in off for word in ("-c", setting)]
    # Also without diff drivers, and without submodules, which have a configuration of their own.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--ignore-submodules=all")
    return git(*settings, "diff", *plain, "HEAD", "--")


# A stranger's repository may configure programs: these keys and variables stop Git from starting them. Fetching missing
# objects of a partial clone starts programs, too; Git before 2.45 does not know GIT_NO_LAZY_FETCH.
_GIT = ("git", "--no-pager", "-c", "core.fsmonitor=", "-c", f"core.hooksPath={os.devnull}")
_GIT_VARIABLES = {
    "GIT_OPTIONAL_LOCKS": "0",  # a run does not write to the repository
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_TERMINAL_PROMPT": "0",
}


def git(*arguments: str, allowed: tuple[int, ...] = (0,)) -> bytes | None:
    """Returns the output of a Git command; None if it fails: with an exit code that is not `allowed`."""
    null, pipe, environment = subprocess.DEVNULL, subprocess.PIPE, {**os.environ, **_GIT_VARIABLES}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*_GIT, *arguments], stdin=null, stdout=pipe, stderr=null, env=environment, timeout=_GIT_SECONDS
        )
        return done.stdout if done.returncode in allowed else None
    return None


def _text(output: bytes | None) -> str | None:
    return None if output is None else output.decode().strip()


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
