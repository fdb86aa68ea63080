"""Copies the code of a submitted sweep beside it, so that what is edited afterwards changes none of its jobs.

Copied are dlopt, where it is a checkout, and the packages of `allow_packages`: with the whole of their Git repository,
tracked and untracked files that are not ignored. Installed packages belong to the environment, and are not copied.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt._version import ROOT
from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_bytes
from dlopt.run.environment import find_package, git

MAX_BYTES = 100_000_000
_MAX_FILES = 20_000
_INSTALLED = {"site-packages", "dist-packages"}
_IGNORED = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True)
class CopiedCode:
    """`folder`: the copy; `paths`: entries of sys.path, relative to it; `sha256`: of the names and contents."""

    folder: Path
    paths: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class _Source:
    """A folder to copy as `name`. `only`: its entries to copy (empty: all); `entry`: of sys.path, relative to it."""

    folder: Path
    name: str
    only: tuple[str, ...] = ()
    entry: str | None = None


def copy_code(
    packages: Iterable[str], others: Mapping[str, Path], target: Path, excluded: Sequence[Path]
) -> CopiedCode:
    """Copies the code into a folder of `target` that is named after its hash.

    Args:
        packages: dotted names, as in `allow_packages`.
        others: further files and folders; each goes into a folder of this name.
        excluded: folders that are never copied: those of the results.

    Raises:
        UserError: too much to copy, or a file that cannot be copied.
    """
    more = [_Source(path.parent, name, (path.name,)) for name, path in others.items()]
    sources = [*dict.fromkeys(_sources(packages)), *more]
    files = {
        f"{source.name}/{name}": source.folder / name
        for source in sources
        for name in _names(source)
        if not any((source.folder / name).is_relative_to(folder) for folder in excluded)
    }
    _check_size(files)
    try:
        contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        digest = _digest(contents)
        folder = target / digest[:12]
        if not folder.exists():
            part = folder.with_suffix(".part")
            for name, data in contents.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(data)
            for name, path in {"": Path(), **others}.items():  # also empty folders
                if path.is_dir():
                    (part / name / path.name).mkdir(parents=True, exist_ok=True)
            part.rename(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be copied beside the sweep: {error.strerror}") from None
    paths = dict.fromkeys(str(Path(each.name, each.entry)) for each in sources if each.entry is not None)
    return CopiedCode(folder, tuple(paths), digest)


def is_unchanged(folder: Path, sha256: str) -> bool:
    """Returns whether a copy has the files that were copied, and no others."""
    try:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}
    except OSError:
        return False
    return _digest(files) == sha256


def _digest(contents: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of names and contents."""
    digest = hashlib.sha256()
    for name, data in sorted(contents.items()):
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sources(packages: Iterable[str]) -> Iterator[_Source]:
    """Yields dlopt and the packages, each with the place from which it is imported. Raises `UserError`."""
    if not _INSTALLED & set(ROOT.parts):
        yield _Source(ROOT.parent, "dlopt", ("dlopt", "conf"), "")
    for name in dict.fromkeys(each.partition(".")[0] for each in packages):
        if (place := _place(name)) is None or _INSTALLED & set(place.parts) or place == ROOT:
            continue
        entry = place.parent.resolve()
        top = git("-C", str(entry), "rev-parse", "--show-toplevel")
        if top is None:
            yield _Source(entry, name, (place.name,), "")
        else:
            folder = Path(os.fsdecode(top.removesuffix(b"\n")))
            yield _Source(folder, folder.name or name, entry=str(entry.relative_to(folder)))


def _place(name: str) -> Path | None:
    """Returns the folder of a package or the file of a module; None for what is built into Python or missing."""
    spec = find_package(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _names(source: _Source) -> Iterator[str]:
    """Yields the files of a source, relative to its folder."""
    listed = git(
        "-C", str(source.folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *source.only
    )
    for name in _walk(source) if listed is None else sorted({*os.fsdecode(listed).split("\0")} - {""}):
        if (source.folder / name).is_dir():  # a submodule, or a repository in the repository
            inner = _Source(source.folder / name, "")
            yield from (f"{name.rstrip('/')}/{each}" for each in _names(inner))
        else:
            yield name


def _walk(source: _Source) -> Iterator[str]:
    """Yields the files of a folder that is in no repository."""
    for only in source.only or (".",):
        path = source.folder / only
        if path.is_file():
            yield only
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = sorted(set(subfolders) - set(_IGNORED(folder, subfolders)))
            for name in sorted(set(files) - set(_IGNORED(folder, files))):
                yield str(Path(folder, name).relative_to(source.folder))


def _check_size(files: dict[str, Path]) -> None:
    """Raises `UserError` for more than what a copy of code takes."""
    sizes = {path: path.stat().st_size for path in files.values() if path.is_file()}
    if sum(sizes.values()) > MAX_BYTES or len(sizes) > _MAX_FILES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"hydra/launcher=slurm: copies the code of the sweep: {len(sizes)} files, "
            f"{format_bytes(sum(sizes.values()))}, more than {_MAX_FILES} files or {format_bytes(MAX_BYTES)} (largest: "
            f"{largest}, {format_bytes(sizes[largest])}); add what is no code to .gitignore"
        )
