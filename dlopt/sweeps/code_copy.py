"""Copies the code of a submitted sweep beside it, so that later edits do not change its jobs.

Copies dlopt, if it is a checkout, and the packages of `allow_packages`. In a Git repository: the tracked files, and the
Python, YAML, JSON and TOML files that are neither tracked nor ignored. Outside of a repository: such files of the
package and of the imported modules beside it. Does not copy installed packages, which belong to the environment, files
with names of secrets, and links to other places.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_IGNORED = shutil.ignore_patterns(_CACHE, ".*")
_CODE = (".py", ".yaml", ".yml", ".json", ".toml")  # of files that Git does not track
_SECRET = re.compile(  # a part of a path
    r"(?i)\.env|\.env\..*|.*\.env|.*\.env\..*|\.envrc|id_(rsa|dsa|ecdsa|ed25519).*|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|gpg|asc)"
    r"|\.?(secrets?|credentials?|passwords?|passwd)([._-].*)?|.*[._-](secrets?|credentials?|passwords?)(\.[^.]*)?"
    r"|((.*[._-])?(api[._-]?keys?|tokens?)(\.[^.]*)?|(api[._-]?key|token)s?[._-].*)(?<!\.py)"
    r"|service[._-]?account.*|\.aws|\.ssh|\.gnupg|\.kube|\.docker|\.netrc|_netrc|\.pgpass|\.pypirc|\.npmrc|\.htpasswd"
    r"|\.git-credentials|\.s3cfg|\.boto|kubeconfig"
)


@dataclass(frozen=True)
class CopiedCode:
    """`folder`: the copy; `paths`: entries of sys.path, relative to it; `sha256`: of the names and contents.

    left_out: files and folders beside the code that were not copied.
    """

    folder: Path
    paths: tuple[str, ...]
    sha256: str
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A folder to copy as `name`.

    Attributes:
        only: its entries to copy; empty for all.
        entry: the entry of sys.path, relative to the folder.
        package: the path of a package in it.
        is_typed: the entries of `only` are copied whatever their names: the user typed them, or they are dlopt.
    """

    folder: Path
    name: str
    only: tuple[str, ...] = ()
    entry: str | None = None
    package: str | None = None
    is_typed: bool = False


def copy_code(
    packages: Iterable[str], others: Mapping[str, Path], target: Path, excluded: Sequence[Path]
) -> CopiedCode:
    """Copies the code into a folder of `target` that is named after its hash.

    Args:
        packages: dotted names, as in `allow_packages`.
        others: additional files and folders; each goes into a folder of this name.
        excluded: folders that are never copied: the results.

    Raises:
        UserError: too much to copy, or a file that cannot be copied, or a package without some of its code.
    """
    more = [_Source(path.parent, name, (path.name,), is_typed=path.is_file()) for name, path in others.items()]
    sources = [*dict.fromkeys(_sources(packages)), *more]
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for source in sources:
        for name, is_code in _names(source).items():
            path = source.folder / name
            if any(path.is_relative_to(folder) for folder in excluded):
                continue
            if is_code:
                files[f"{source.name}/{name}"] = path
            else:
                left_out.append(str(path))
        _refuse_incomplete(source, files, excluded)
    _check_size(files)
    try:
        contents = {name: path.read_bytes() for name, path in files.items()}
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
        raise UserError(f"{error.filename or target}: cannot be copied beside the sweep: {error.strerror}") from None
    paths = dict.fromkeys(str(Path(each.name, each.entry)) for each in sources if each.entry is not None)
    return CopiedCode(folder, tuple(paths), digest, tuple(dict.fromkeys(left_out)))


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


def _sources(packages: Iterable[str]) -> Iterator[_Source]:
    """Yields dlopt and the packages, each with the path from which it is imported. Raises `UserError`."""
    if not _INSTALLED & set(ROOT.parts):
        yield _Source(ROOT.parent, "dlopt", ("dlopt", "conf"), "", is_typed=True)
    names = (each.partition(".")[0] for each in (*packages, *extensions()))
    for name in dict.fromkeys(names):
        if name == "dlopt" or (place := _place(name)) is None or _INSTALLED & set(place.parts):
            continue
        entry = place.parent.resolve()
        top = git("-C", str(entry), "rev-parse", "--show-toplevel")
        if top is None:
            yield _Source(entry, name, (place.name, *_imported_from(entry, place.name)), "", place.name)
        else:
            folder = Path(os.fsdecode(top.removesuffix(b"\n")))
            below = entry.relative_to(folder)
            yield _Source(folder, folder.name or name, entry=str(below), package=str(below / place.name))


def _imported_from(entry: Path, package: str) -> list[str]:
    """Returns the other modules and packages in a folder of sys.path that this process has imported."""
    found = set()
    for module in list(sys.modules.values()):
        with contextlib.suppress(AttributeError, ValueError, OSError, TypeError):
            file = Path(module.__file__ or os.devnull).resolve()
            if not _INSTALLED & set(file.parts):
                found.add(file.relative_to(entry).parts[0])
    return sorted(found - {package})


def _refuse_incomplete(source: _Source, files: Mapping[str, Path], excluded: Sequence[Path]) -> None:
    """Raises `UserError` for a package with modules that are not copied: its jobs would run without them."""
    if source.package is None:
        return
    place = source.folder / source.package
    modules = [place]
    if place.is_dir():
        modules = []
        for folder, subfolders, names in os.walk(place):
            # Only importable names: skips .ipynb_checkpoints.
            subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != _CACHE)
            modules += [
                Path(folder, name) for name in sorted(names) if name.endswith(".py") and name[:-3].isidentifier()
            ]
    known = set(files.values())
    missing = [path for path in modules if path not in known and not any(map(path.is_relative_to, excluded))]
    if missing:
        count = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"hydra/launcher=slurm: {missing[0]}{count}: not copied with the code, because Git ignores it, its name is "
            "that of a secret, or it is a link; workers would run without it: add it to Git, or rename it"
        )


def _place(name: str) -> Path | None:
    """Returns the folder of a package or the file of a module; None for what is built into Python or missing."""
    spec = find_package(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.has_location and spec.origin else None


def _names(source: _Source) -> dict[str, bool]:
    """Returns the files of a source, relative to its folder: whether each is to be copied."""
    tracked = _listed(source, "--cached")
    if tracked is None:
        return {name: _is_code(source, name, is_tracked=False) for name in _walk(source)}
    found: dict[str, bool] = {}
    others, ignored = (
        # Python recreates its caches, so they are not reported as missing, with or without a .gitignore.
        {name for name in _listed(source, "--others", *options, "--exclude-standard") or () if _CACHE not in name}
        for options in ((), ("--ignored", "--directory"))
    )
    for name in sorted({*tracked, *others}):
        path = source.folder / name
        if path.is_dir() and not path.is_symlink():  # a submodule, or a repository in the repository
            inner = _names(_Source(path, "", is_typed=source.is_typed))
            found |= {f"{name.rstrip('/')}/{each}": is_code for each, is_code in inner.items()}
        elif os.path.lexists(path):  # tracked files may have been removed
            found[name] = _is_code(source, name, is_tracked=name in tracked)
    unknown = (name for name in ignored if name not in found)
    return found | dict.fromkeys(unknown, False)


def _listed(source: _Source, *options: str) -> set[str] | None:
    """Returns what `git ls-files` lists; None if the folder is in no repository."""
    listed = git("-C", str(source.folder), "ls-files", "-z", *options, "--", *source.only)
    return None if listed is None else {*os.fsdecode(listed).split("\0")} - {""}


def _is_code(source: _Source, name: str, *, is_tracked: bool) -> bool:
    """Returns whether a file is to be copied."""
    path = source.folder / name
    if not path.is_file() or not path.resolve().is_relative_to(source.folder.resolve()):  # a pipe; a link elsewhere
        return False
    if source.is_typed:
        return True
    if is_tracked and path.suffix == ".py":  # a module such as secrets.py, which others import
        return True
    is_secret = any(_SECRET.fullmatch(part) for part in Path(name).parts)
    return not is_secret and (is_tracked or path.suffix.lower() in _CODE)


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
    """Raises `UserError` for code above the size limits of a copy."""
    sizes = {path: path.stat().st_size for path in files.values()}
    if sum(sizes.values()) > MAX_BYTES or len(sizes) > _MAX_FILES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"hydra/launcher=slurm: copies the code of the sweep: {len(sizes)} files, "
            f"{format_bytes(sum(sizes.values()))}, more than {_MAX_FILES} files or {format_bytes(MAX_BYTES)} (largest: "
            f"{largest}, {format_bytes(sizes[largest])}); add what is no code to .gitignore"
        )
