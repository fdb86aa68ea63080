"""Copies the code of a submitted sweep beside it, so that later edits do not change its jobs.

Copies dlopt, if it is a checkout, and the Git repositories of the packages of `allow_packages`: the tracked files as
they are in the working tree, and the Python files of the packages that are neither tracked nor ignored. Of the latter
it leaves out what is hidden, private by its mode, or named like a secret. Does not copy installed packages, which
belong to the environment, links to other places, and folders that are in no repository: the jobs run the code there.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt._version import ROOT
from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_bytes
from dlopt.config.choices import extensions
from dlopt.run.environment import find_package, git

MAX_BYTES = 100_000_000
_MAX_FILES = 20_000
_INSTALLED = {"site-packages", "dist-packages"}
_CACHE = "__pycache__"
_UNTRACKED = ("--others", "--exclude-standard")
_SECRET = re.compile(  # a part of the path of an untracked file
    r"(?i)(.*[._-])?(secrets?|credentials?|passwords?|passwd|(api|access|private)[._-]?keys?)([._-].*)?"
    r"|.*\.(env|pem|key)(\..*)?|id_(rsa|dsa|ecdsa|ed25519).*|(.*[._-])?(token|keys?)\.ya?ml|service[._-]?account.*"
    r"|kubeconfig.*"
)


@dataclass(frozen=True)
class CopiedCode:
    """The copy of the code of a sweep.

    Attributes:
        paths: entries of sys.path: relative to `folder`, or absolute for code that is not copied.
        sha256: of the names and contents of the files.
        left_out: repository -> its untracked files and folders that are not copied, relative to it.
    """

    folder: Path
    paths: tuple[str, ...]
    sha256: str
    left_out: Mapping[Path, Sequence[str]]


@dataclass(frozen=True)
class _Source:
    """Files that Git lists.

    Attributes:
        name: of the folder of the copy.
        folder: the repository, or a folder in it.
        own: packages, modules and folders whose untracked files are copied if they end with one of `suffixes`.
        only: what to copy; empty for all.
    """

    name: str
    folder: Path
    own: frozenset[str]
    suffixes: tuple[str, ...] = (".py",)
    only: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Returns whether a file is a regular one, or a link to one in this folder."""
        path = self.folder / name
        return path.is_file() and path.resolve().is_relative_to(self.folder)

    def is_code(self, name: str) -> bool:
        """Returns whether an untracked file is copied."""
        is_own = not self.own.isdisjoint([name, *map(str, Path(name).parents)])
        if not (is_own and name.endswith(self.suffixes) and self.has(name)):
            return False
        is_private = not (self.folder / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return not is_private and not any(each[0] == "." or _SECRET.fullmatch(each) for each in Path(name).parts)


def copy_code(
    packages: Iterable[str], others: Mapping[str, Path], target: Path, excluded: Sequence[Path]
) -> CopiedCode:
    """Copies the code into a folder of `target` that is named after its hash.

    Args:
        packages: dotted names, as in `allow_packages`.
        others: files, and folders of configs, which are copied from repositories; each goes into a folder of this name.
        excluded: folders that are never copied: the results.

    Raises:
        UserError: too much to copy, or a file that cannot be copied, or code without an imported module.
    """
    sources, paths = [], []
    for name, place in _packages(packages).items():
        if (repository := _repository(place.parent)) is None:
            paths.append(str(place.parent))
            continue
        entry = place.parent.resolve().relative_to(repository)
        if name == "dlopt":
            only = str(entry / place.name), str(entry / "conf")
            sources.append(_Source(name, repository, frozenset(only), only=only))
        else:
            modules = {place.name, *_imported_from(place.parent)}
            sources.append(_Source(repository.name, repository, frozenset(str(entry / each) for each in modules)))
        paths.append(str(Path(sources[-1].name, entry)))
    files = {f"{name}/{path.name}": path for name, path in others.items() if path.is_file()}
    for name, path in others.items():
        if path.is_dir() and _repository(path) is not None:
            sources.append(_Source(f"{name}/{path.name}", path.resolve(), frozenset(["."]), (".yaml", ".yml")))
    untracked = {source: _listed(source, *_UNTRACKED) for source in sources}
    for source, listed in untracked.items():
        for name in (*_listed(source, "--cached", "--recurse-submodules"), *filter(source.is_code, listed)):
            if source.has(name):
                files[f"{source.name}/{name}"] = source.folder / name
        needed = [name for name in sorted(source.own) if (source.folder / name).is_file()]
        if missing := [name for name in needed if f"{source.name}/{name}" not in files]:
            raise UserError(_explain_missing(source.folder, missing))
    results = [folder.resolve() for folder in excluded]
    files = {name: path for name, path in files.items() if not any(map(path.is_relative_to, results))}
    _check_size(files)
    known, folders = {*files.values(), *results}, {source.folder for source in sources}
    left_out = {
        source.folder: _left_out(source, listed, known)
        for source, listed in untracked.items()
        if folders.isdisjoint(source.folder.parents)  # otherwise listed there as well
    }
    folder, digest = _copy(files, target)
    return CopiedCode(folder, tuple(dict.fromkeys(paths)), digest, left_out)


def _copy(files: Mapping[str, Path], target: Path) -> tuple[Path, str]:
    """Copies files, with their modes, into a folder of `target` that is named after their hash; returns both."""
    try:
        contents = {name: path.read_bytes() for name, path in files.items()}
        digest = _digest(contents)
        folder = target / digest[:12]
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # of a killed command
            part.mkdir(parents=True)
            for name, data in contents.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(data)
                shutil.copymode(files[name], part / name)
            part.rename(folder)
    except OSError as error:
        raise UserError(f"{error.filename or target}: cannot be copied beside the sweep: {error.strerror}") from None
    return folder, digest


def is_unchanged(folder: Path, sha256: str) -> bool:
    """Returns whether a copy has the files that were copied, and no others: no links, pipes or devices."""
    files: dict[str, bytes] = {}
    size = 0
    try:
        for parent, subfolders, names in os.walk(folder):  # follows no links
            for name in (*subfolders, *names):
                path = Path(parent, name)
                facts = path.lstat()
                if stat.S_ISDIR(facts.st_mode):
                    continue
                size += facts.st_size
                if not stat.S_ISREG(facts.st_mode) or size > MAX_BYTES:
                    return False
                files[str(path.relative_to(folder))] = path.read_bytes()
    except OSError:
        return False
    return _digest(files) == sha256


def _digest(contents: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of names and contents."""
    digest = hashlib.sha256()
    for name, data in sorted(contents.items()):
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _packages(names: Iterable[str]) -> dict[str, Path]:
    """Returns dlopt and the packages that are not installed, each with its folder or its module."""
    found = {"dlopt": ROOT}
    for name in (each.partition(".")[0] for each in (*names, *extensions())):
        if name not in found and (place := _place(name)) is not None:
            found[name] = place
    return {name: place for name, place in found.items() if not _INSTALLED & {*place.parts}}


def _place(name: str) -> Path | None:
    """Returns the folder of a package or the file of a module; None for what is built into Python or missing."""
    spec = find_package(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _repository(folder: Path) -> Path | None:
    """Returns the root of the Git repository of a folder; None if there is none, or no Git."""
    top = git("-C", str(folder), "rev-parse", "--show-toplevel")
    return None if top is None else Path(os.fsdecode(top.removesuffix(b"\n")))


def _imported_from(entry: Path) -> set[str]:
    """Returns the files of the modules that this process has imported from a folder of sys.path, relative to it."""
    found = set()
    for name, module in [*sys.modules.items()]:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            path = Path(vars(module)["__file__"]).relative_to(entry)
            if path.parts[0].removesuffix(".py") == name.partition(".")[0]:
                found.add(str(path))
    return found


def _listed(source: _Source, *options: str) -> list[str]:
    """Returns what `git ls-files` lists, without Python's caches. Raises `UserError`."""
    listed = git("-C", str(source.folder), "ls-files", "-z", *options, "--", *source.only)
    if listed is None:
        raise UserError(
            f"{source.folder}: `git ls-files` fails or takes several seconds, so the code of the sweep cannot be "
            "copied; add folders of data to .gitignore"
        )
    return [name for name in os.fsdecode(listed).split("\0") if name and _CACHE not in name]


def _left_out(source: _Source, untracked: Iterable[str], known: set[Path]) -> list[str]:
    """Returns the untracked files that are not known; those of a folder without tracked files as one entry."""
    rest = [name for name in untracked if known.isdisjoint([source.folder / name, *(source.folder / name).parents])]
    entries = {*rest, *(f"{parent}/" for name in rest for parent in Path(name).parents)}
    return [entry for entry in _listed(source, *_UNTRACKED, "--directory") if entry in entries]


def _explain_missing(folder: Path, modules: Sequence[str]) -> str:
    more = f", and {len(modules) - 1} more" if len(modules) > 1 else ""
    return (
        f"hydra/launcher=slurm: {folder / modules[0]}{more}: imported, but not copied with the code, because it is "
        "ignored by Git, private (hidden, for you only, or named like a secret), or a link; add it to Git, or rename it"
    )


def _check_size(files: dict[str, Path]) -> None:
    """Raises `UserError` for code above the size limits of a copy."""
    sizes = {path: path.stat().st_size for path in files.values()}
    if sum(sizes.values()) > MAX_BYTES or len(sizes) > _MAX_FILES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"hydra/launcher=slurm: copies the code of the sweep: {len(sizes)} files, "
            f"{format_bytes(sum(sizes.values()))}, more than {_MAX_FILES} files or {format_bytes(MAX_BYTES)} (largest: "
            f"{largest}, {format_bytes(sizes[largest])}); move what is no code out of the repository"
        )
