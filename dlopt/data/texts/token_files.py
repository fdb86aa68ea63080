"""Files of tokens: those of nanoGPT, and the shards of llm.c and modded-nanogpt, which have a header."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.files import refuse_special
from dlopt.data.checks import LEFT_OUT, listed
from dlopt.data.rows.rows import find_files
from dlopt.data.settings import SPLITS

_HEADER = 256  # int32
_FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Version and type of the tokens by the first number of a header: of llm.c, for GPT-2's and Llama 3's tokenizer."""
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?![a-z])", re.IGNORECASE)  # tiny_shakespeare_val.bin


def find_splits(root: str) -> tuple[Mapping[str, Sequence[Path]], tuple[str, ...]]:
    """Returns the sorted files of each split, and a line about those left out.

    `root`: a folder with train.bin and val.bin; or a folder or a pattern of shards, whose names say train, val or test.
    Raises `UserError`.
    """
    folder = Path(os.path.expanduser(root))
    if folder.is_dir():
        paths = sorted(each for each in folder.glob("*.bin") if each.is_file())
    else:
        paths = [Path(each) for each in find_files("data.root", root, ".bin")[0]]
    plain = {name: folder / f"{name}.bin" for name in SPLITS}
    if folder.is_dir() and (plain["train"] in paths or not any(_split(path) == "train" for path in paths)):
        return {name: [path] for name, path in plain.items() if name != "test" or path in paths}, ()
    files = {name: [path for path in paths if _split(path) == name] for name in SPLITS}
    for name in ("train", "val"):
        if not files[name]:
            raise UserError(
                f"data.root={root}: no name of its {len(paths)} files says {name}; shards need names such as "
                "fineweb_train_000001.bin and fineweb_val_000000.bin"
            )
    others = [path.name for path in paths if _split(path) is None]
    notes: tuple[str, ...] = ()
    if others:
        plural = "s" * (len(others) > 1)
        notes = (f"{LEFT_OUT}{len(others)} file{plural} without train, val or test in the name: {listed(others)}",)
    return {name: each for name, each in files.items() if each}, notes


def _split(path: Path) -> str | None:
    found = _SPLIT.search(path.name)
    return found[1].lower() if found else None


def read_tokens(path: Path) -> np.ndarray:
    """Maps the tokens of a file: uint16, or uint32 if its header says so. Raises `UserError` for a damaged file."""
    first = memory_map(path, "u1")[: 4 * _HEADER].tobytes()
    magic, version, count, *rest = np.frombuffer(first.ljust(4 * _HEADER, b"\0"), "<i4").tolist()
    if magic not in _FORMATS:
        # A header has a large number, a version, a count, and zeros: as tokens, these would train the model.
        is_whole = len(first) == 4 * _HEADER
        if is_whole and magic >= 1 << 16 and 0 < version < 1 << 10 and count > 0 and not any(rest[1:]):
            known = " and ".join(map(str, _FORMATS))
            raise UserError(f"{path}: starts with the header of another format ({magic}); {known} of llm.c are read")
        return memory_map(path, "<u2")
    known_version, kind = _FORMATS[magic]
    if version != known_version:
        raise UserError(f"{path}: has version {version} of the format {magic}; only version {known_version} is read")
    size = max(path.stat().st_size - 4 * _HEADER, 0)
    if count <= 0 or count * np.dtype(kind).itemsize != size:
        raise FileError(f"{path}: is damaged: its header counts {count:,} tokens, the file has {size:,} bytes of them")
    return memory_map(path, kind, 4 * _HEADER)


def memory_map(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    try:
        refuse_special(path)
        # Copy-on-write: torch warns about read-only memory.
        return np.memmap(path, dtype=dtype, mode="c", offset=offset)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {np.dtype(dtype).name} values ({error})") from None
