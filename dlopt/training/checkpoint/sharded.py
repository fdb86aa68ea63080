"""Sharded checkpoints: sharded tensors are in the folder `shards/NAME`, everything else is in the checkpoint file.

The file lists the shard files and their SHA-256. It is written last: a save that is killed earlier leaves only
unreferenced shards. Links to a checkpoint file share its shards.
"""

import errno
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlopt.basics.files import reason, sha256
from dlopt.basics.plain_values import open_regular
from dlopt.parallel import shard_files
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.shards import is_sharded_tensor
from dlopt.training.checkpoint.content import Checkpoint

FOLDER = "shards"
KEY = "shards"  # in the checkpoint file: {folder, files, tensors}


def write(folder: Path, state: Mapping[str, Any], writer: ShardWriter) -> dict[str, Any]:
    """Writes the sharded tensors of `state` on all processes; returns the content of the checkpoint file in `folder`.

    It has None in place of these tensors, and lists the shard files under `KEY`. Raises `RunError` with the rank that
    could not write.
    """
    tensors: dict[str, Tensor] = {}
    paths: dict[str, list[str | int]] = {}  # keys in nested dicts

    def without_shards(value: Any, keys: list[str | int]) -> Any:
        if is_sharded_tensor(value):
            name = ".".join(map(str, keys))
            tensors[name], paths[name] = value, keys
            return None
        if isinstance(value, dict):
            return {key: without_shards(item, [*keys, key]) for key, item in value.items()}
        return value

    rest = {key: without_shards(value, [key]) for key, value in state.items()}
    name, files = writer.write(folder / FOLDER, f"step-{Checkpoint(state).step}", tensors)
    return {**rest, KEY: {"folder": name, "files": files, "tensors": paths}}


def is_sharded(state: Mapping[str, Any]) -> bool:
    return KEY in state


def find_damage(path: Path, state: Mapping[str, Any]) -> str | None:
    """Describes the damage to the shards of the checkpoint file `path` with content `state`; None if intact."""
    if not is_sharded(state):
        return None
    folder = _folder(path, state)
    files = None if folder is None else state[KEY].get("files")
    if folder is None or not isinstance(files, dict) or not files:
        return "its list of shards is missing"
    if not folder.is_dir():
        return f"the folder of its shards is missing: {folder}"
    for name, digest in files.items():
        if not isinstance(name, str) or name != Path(name).name:
            return f"the shard {name!r} is not a file name"
        file = folder / name
        try:
            if not stat.S_ISREG(file.lstat().st_mode):  # a link, which may lead elsewhere, or a FIFO
                return f"the shard {file} is not a regular file"
            if sha256(file) != digest:
                return f"the shard {file} is damaged: its SHA-256 differs from the recorded one"
        except FileNotFoundError:
            return f"the shard {file} is missing"
        except OSError as error:
            return f"the shard {file} cannot be read: {reason(error)}"
    return None


def load_shards(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Loads the shards of the intact checkpoint file `path` into its content `state`. May raise any exception."""
    folder = _folder(path, state)
    assert folder is not None
    entry = state.pop(KEY)
    paths, tensors = entry["tensors"], shard_files.read(folder, entry["files"])
    if paths.keys() != tensors.keys():
        raise ValueError("its list of tensors differs from the tensors in the files")
    for name, keys in paths.items():
        inner: Any = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = tensors[name]
    return state


def copy(path: Path, state: Mapping[str, Any], folder: Path) -> None:
    """Copies the shards of the intact checkpoint file `path` with content `state`, if any, to another `folder`."""
    shards = _folder(path, state)
    if shards is not None:
        target = folder / FOLDER / shards.name
        target.mkdir(parents=True, exist_ok=True)
        for name in state[KEY]["files"]:  # no other files of the folder
            shutil.copy(shards / name, target / name)


def size(path: Path) -> int:
    """Returns the bytes of the shards of the checkpoint file `path`; 0 if another file in its folder shares them."""
    name = shard_folder(path)
    if name is None or any(shard_folder(other) == name for other in path.parent.glob("*.pt") if other != path):
        return 0
    return sum(file.stat().st_size for file in (path.parent / FOLDER / name).glob("*"))


def remove_unused(folder: Path) -> None:
    """Removes shards in a folder of checkpoints to which none of its files refers. Raises OSError."""
    shards = folder / FOLDER
    if not shards.is_dir() or folder.is_symlink() or shards.is_symlink():  # a link would lead to files of others
        return
    used = {name for path in folder.glob("*.pt") if (name := shard_folder(path)) is not None}
    for entry in shards.iterdir():
        if entry.name not in used:
            shutil.rmtree(entry, ignore_errors=True)
    if not used:
        shards.rmdir()


def shard_folder(path: Path) -> str | None:
    """Returns the name of a checkpoint's shard folder; None without shards, or if damaged. Raises OSError."""
    folder = _folder(path, load_without_shards(path))
    return None if folder is None else folder.name


def load_without_shards(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint file with memory-mapped tensors; {} if it is damaged or a broken link.

    Raises OSError if it cannot be read.
    """
    try:
        open_regular(path).close()
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # raised by torch for a truncated file
            return {}
        raise
    except Exception:
        return {}
    return state if isinstance(state, dict) else {}


def _folder(path: Path, state: Mapping[str, Any]) -> Path | None:
    """Returns the path of the shard folder, which may be missing; None without a valid entry."""
    entry = state.get(KEY)
    name = entry.get("folder") if isinstance(entry, dict) else None
    # A plain name: a manipulated checkpoint must not read files elsewhere.
    if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
        return None
    return path.resolve().parent / FOLDER / name
