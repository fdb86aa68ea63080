"""Sharded checkpoints: the file holds everything but the tensors that are sharded over processes. A folder
`shards/NAME` beside it holds those, and the file names that folder's files with their SHA-256.

The file makes the checkpoint: it is written last, links to it share the shards, and shards that no file names are
unused.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlopt.files import reason, sha256
from dlopt.parallel import shard_files
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.shards import is_sharded_tensor

FOLDER = "shards"
KEY = "shards"  # of the state in the file: {folder, files, tensors}

Keys = list[str | int]
"""The way to a value in nested dicts."""


def write(folder: Path, state: Mapping[str, Any], writer: ShardWriter) -> dict[str, Any]:
    """Writes the sharded tensors of `state` on all processes; returns the state for the file in `folder`.

    That has None in their places, and their files under `KEY`. Raises `RunError` naming the rank that could not write.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Keys] = {}

    def without(value: Any, keys: Keys) -> Any:
        if is_sharded_tensor(value):
            name = ".".join(map(str, keys))
            tensors[name], places[name] = value, keys
            return None
        if isinstance(value, dict):
            return {key: without(each, [*keys, key]) for key, each in value.items()}
        return value

    rest = {key: without(value, [key]) for key, value in state.items()}
    name, files = writer.write(folder / FOLDER, f"step-{state['progress']['step']}", tensors)
    return {**rest, KEY: {"folder": name, "files": files, "tensors": places}}


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Whether this is what a sharded checkpoint's file holds."""
    return KEY in state


def damage(path: Path, state: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the shards of the checkpoint file `path`, which holds `state`."""
    if not is_sharded(state):
        return None
    folder = _folder(path, state)
    if folder is None or not state[KEY].get("files"):
        return "it does not say where its shards are"
    if not folder.is_dir():
        return f"its shards are missing: the folder {folder} belongs to it"
    for name, digest in dict(state[KEY]["files"]).items():
        file = folder / Path(str(name)).name
        try:
            if sha256(file) != digest:
                return f"its shard {file} is damaged: its SHA-256 is not the recorded one"
        except FileNotFoundError:
            return f"its shard {file} is missing"
        except OSError as error:
            return f"its shard {file} cannot be read: {reason(error)}"
    return None


def joined(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of the checkpoint file `path` with its tensors in their places. Raises any exception."""
    folder = _folder(path, state)
    assert folder is not None
    places = state.pop(KEY)["tensors"]
    tensors = shard_files.read(folder)
    for name, keys in places.items():
        inner: Any = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = tensors[name]
    return state


def copy(path: Path, folder: Path) -> None:
    """Copies the shards of the checkpoint file `path`, where it has any, to beside a copy of it in `folder`."""
    shards = _folder(path, opened(path))
    if shards is not None:
        shutil.copytree(shards, folder / FOLDER / shards.name, dirs_exist_ok=True)


def size(path: Path) -> int:
    """Bytes of the shards of the checkpoint file `path` that no other checkpoint beside it has, too."""
    name = shards_of(path)
    if name is None or any(shards_of(other) == name for other in path.parent.glob("*.pt") if other != path):
        return 0
    return sum(each.stat().st_size for each in (path.parent / FOLDER / name).glob("*"))


def remove_unused(folder: Path) -> None:
    """Removes the shards in a folder of checkpoints that none of its files names. Raises OSError."""
    shards = folder / FOLDER
    if not shards.is_dir():
        return
    used = {name for path in folder.glob("*.pt") if (name := shards_of(path)) is not None}
    for each in shards.iterdir():
        if each.name not in used:
            shutil.rmtree(each, ignore_errors=True)
    if not used:
        shards.rmdir()


def shards_of(path: Path) -> str | None:
    """The name of the folder with the shards of the checkpoint file `path`; None where it has none, or is damaged.

    Raises OSError where it cannot be read.
    """
    folder = _folder(path, opened(path))
    return None if folder is None else folder.name


def opened(path: Path) -> dict[str, Any]:
    """What the file holds, its tensors left on the disk; nothing where it is damaged or a link to nowhere.

    Raises OSError where it cannot be read.
    """
    try:
        with path.open("rb"):
            pass
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        if error.errno is None:  # what torch says of a truncated file
            return {}
        raise
    except Exception:
        return {}
    return state if isinstance(state, dict) else {}


def _folder(path: Path, state: Mapping[str, Any]) -> Path | None:
    """Where the shards are, or should be."""
    said = state.get(KEY)
    name = said.get("folder") if isinstance(said, dict) else None
    if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
        return None
    return path.resolve().parent / FOLDER / name
