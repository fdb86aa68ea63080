"""Tar files in the format of the package webdataset: a sample is consecutive members KEY.jpg, KEY.cls, ...

Every member is stored as it is, so an index of positions gives random access: a sample is read by one `pread`, in any
order and by any process.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Unpack

import numpy as np

from dlopt.basics.cache import cache_file, exclusive, file_state, load_arrays, save_arrays
from dlopt.basics.errors import FileError, UserError
from dlopt.basics.files import refuse_special
from dlopt.basics.formats import format_count
from dlopt.data.checks import IMAGE_EXTENSIONS, ending, left_out_note, numbers
from dlopt.data.images.decoding import Size, decode
from dlopt.data.rows.rows import SLOW_ROWS, Channels, Files, RowKeys, RowSource, dataset, find_files
from dlopt.data.samples import Dataset

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # key and extension, as the package webdataset splits a name
_INTEGER = re.compile(rb"\s*[+-]?[0-9]+\s*")
_META = re.compile(r"__[^/]*__($|/)")
_CACHE_MIN_SAMPLES = 10_000  # indexes of fewer samples are not cached
_END = bytes(tarfile.BLOCKSIZE)  # a block of zeros ends a tar file
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_IMAGES = tuple(IMAGE_EXTENSIONS)
Members = dict[str, tarfile.TarInfo]
"""Members of a sample by extension."""


def webdataset(*, file: Files, val_file: Files | None, test_file: Files | None, **keys: Unpack[RowKeys]) -> Dataset:
    """Loads samples of tar files: images, arrays or numbers, and their labels.

    The files are indexed once. Inputs are read when a batch needs them; only positions and labels are in memory. The
    keys: see `conf/data/webdataset.yaml`.

    Raises:
        UserError: a file is missing, damaged or compressed, or a sample lacks a member or has an invalid one.
    """
    names = [keys["input"]] if isinstance(keys["input"], str) else keys["input"]
    splits = {"data.file": file, "data.val_file": val_file, "data.test_file": test_file}
    others: Counter[str] = Counter()
    shards = {
        key: None if files is None else _indexed(key, files, names, keys["target"], others)
        for key, files in splits.items()
    }
    count = sum(len(each.paths) for each in shards.values() if each is not None)
    return dataset(shards, keys, f"samples of {format_count('files', count)}", left_out_note(others))


@dataclass
class Shards(RowSource):
    """Samples of tar files; see `dlopt.data.rows.rows.RowSource`.

    `arrays`: shard (the number in `paths`), offset, size and extension (the number in `inputs`) of each input; the
    key; and the label as JSON.
    """

    file_key: str
    inputs: Sequence[str]
    target: str
    paths: Sequence[str]
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["offset"])

    @property
    def encoded(self) -> bool:
        return _is_image(self._input(0))

    def labels(self) -> list[Any]:
        return [json.loads(text) for text in self.arrays["label"].tolist()]

    @property
    def size(self) -> int:
        return int(self.arrays["size"].sum())

    def read(self, start: int, stop: int) -> bytes:
        members = (self.content(row) for row in range(start, stop))
        return b"".join(len(content).to_bytes(8, "little") + content for content in members)

    def rows(self) -> Iterator[bytes] | None:
        return map(self.content, range(len(self))) if len(self) <= SLOW_ROWS else None

    def value(self, row: int, channels: Channels, size: Size = None) -> Any:
        name = self._input(row)
        content, where = self.content(row), f"{self.place(row)}: {name}"
        if _is_image(name):
            return decode(content, size, channels, where)
        array = np.atleast_1d(numbers(_decode(content, name, where), where, "in npy or json"))
        return array if array.dtype == np.uint8 else array.astype(np.float64)  # `Wrapped` rounds them

    def content(self, row: int) -> bytes:
        where = self.place(row)
        offset, size = int(self.arrays["offset"][row]), int(self.arrays["size"][row])
        try:
            # Opened for each sample: there may be more shards than a process may keep open.
            with open(self._path(row), "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from None
        if len(content) < size:
            raise UserError(f"{where}: the file has been cut since its samples were listed")
        return content

    def place(self, row: int) -> str:
        return f"{self.file_key}: sample {os.fsdecode(self.arrays['key'][row])} of {self._path(row)}"

    def type(self, row: int) -> str:
        label = json.loads(self.arrays["label"][row])
        return f"{self.target} of sample {os.fsdecode(self.arrays['key'][row])} is of the type {type(label).__name__}"

    def _input(self, row: int) -> str:
        return self.inputs[self.arrays["extension"][row]]

    def _path(self, row: int) -> str:
        return self.paths[self.arrays["shard"][row]]


# -- members


def _is_image(name: str) -> bool:
    return f".{name}".endswith(_IMAGES)


def _split(name: str) -> tuple[str, list[str]]:
    """Splits json.NAME into the extension and the path of the field, where NAME may have further dots."""
    before, found, field = f".{name}".partition(".json.")
    return (f"{before}.json"[1:], field.split(".")) if found else (name, [])


def _decode(content: bytes, name: str, where: str) -> Any:
    """Returns the value of a member that is no image: an array, or what JSON has. Raises `UserError`."""
    extension, fields = _split(name)
    kind = extension.rpartition(".")[2]
    try:
        match kind:
            case "cls":
                if not _INTEGER.fullmatch(content):  # int() also reads 1_000 and the digits of other scripts
                    raise ValueError
                return int(content)
            case "txt":
                return content.decode().strip()
            case "npy":
                return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            case "json":
                return _field(json.loads(content), extension, fields, where)
    except (ValueError, RecursionError, MemoryError) as error:  # of a header that claims a large array
        if kind == "cls":
            shown = content[:40].decode(errors="replace").strip()
            raise UserError(f"{where} is {shown!r}, not an integer; txt and json may have names of classes") from None
        raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0]})") from None
    raise UserError(
        f"{where}: has no decoder; data.input may be an image, npy or json, and data.target cls, txt, npy or json"
    )


def _field(value: Any, name: str, path: Sequence[str], where: str) -> Any:
    """Returns the field of an object at `path`."""
    for field in path:
        if not isinstance(value, dict) or field not in value:
            has = ", ".join(value) if isinstance(value, dict) else f"the type {type(value).__name__}"
            raise UserError(f"{where}: {name} has no field {field}; it has {has}")
        name, value = f"{name}.{field}", value[field]
    if isinstance(value, dict):
        raise UserError(f"{where} is an object; name a field of it: {', '.join(f'{name}.{each}' for each in value)}")
    return value


# -- index


def _indexed(key: str, files: Files, inputs: Sequence[str], target: str, others: Counter[str]) -> Shards:
    """Returns the samples of all files; the index of many samples is cached. Adds other files to `others`.

    Raises `UserError`.
    """
    paths, left_out = find_files(key, files, ".tar")
    others.update(left_out)
    states = []
    for path in paths:
        with _reading(key, path):
            states.append(f"{os.path.abspath(path)} {file_state(path)}")
    cached = cache_file("webdataset", "3", *inputs, "", target, *states)
    with exclusive(cached):
        arrays = load_arrays(cached)
        if arrays is None:
            arrays = _index(key, paths, inputs, target)
            if len(arrays["offset"]) >= _CACHE_MIN_SAMPLES:
                save_arrays(cached, arrays)
    others.update(json.loads(arrays["left_out"].item()))
    return Shards(key, inputs, target, paths, arrays)


def _index(key: str, paths: Sequence[str], inputs: Sequence[str], target: str) -> dict[str, np.ndarray]:
    """Returns the arrays of `Shards`, and how many members were left out, by reason."""
    positions: list[tuple[int, int, int, int]] = []
    keys: list[bytes] = []
    labels: list[bytes] = []
    others: Counter[str] = Counter()
    for shard, path in enumerate(paths):
        for name, members, read in _samples(key, path, others):
            place = f"sample {name} of {path}"
            number, entry = _find(members, inputs, "data.input", place)
            positions.append((shard, entry.offset_data, entry.size, number))
            keys.append(os.fsencode(name))
            where = f"{key}: {place}: {target}"
            value = _decode(read(_find(members, [target], "data.target", place)[1]), target, where)
            if isinstance(value, np.ndarray):
                value = numbers(value, where, str(value.dtype)).tolist()
            labels.append(json.dumps(value).encode())
    if not keys:
        raise UserError(f"{key}: {', '.join(paths[:3])}: has no samples; members are named KEY.EXTENSION (0001.jpg)")
    columns = zip(("shard", "offset", "size", "extension"), np.array(positions, dtype=np.int64).T, strict=True)
    left_out = np.array(json.dumps(others))
    return {**dict(columns), "key": np.array(keys), "label": np.array(labels), "left_out": left_out}


def _find(members: Members, names: Sequence[str], option: str, place: str) -> tuple[int, tarfile.TarInfo]:
    """Returns the number of the first of `names` that a sample has, and its member. Raises `UserError`."""
    for number, name in enumerate(names):
        if (entry := members.get(_split(name)[0])) is not None:
            return number, entry
    typed = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    # Of an archive that was not sorted by name, only one member of a sample is here.
    hint = " (the members of a sample must be consecutive: tar --sort=name)" if len(members) == 1 else ""
    raise UserError(f"{option}={typed}: {place} has no such member; it has {', '.join(members)}{hint}")


def _samples(
    key: str, path: str, others: Counter[str]
) -> Iterator[tuple[str, Members, Callable[[tarfile.TarInfo], bytes]]]:
    """Yields the samples of a tar file: their keys, their members by extension, and what reads a member.

    Counts `others`, members that belong to no sample, by reason.
    """
    with _reading(key, path):
        refuse_special(path)
    with _reading(key, path), open(path, "rb") as file:
        start = file.read(8)
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{key}: {path}: is compressed; samples are read in any order, so uncompress it with {program}"
                )
        file.seek(0)

        def read(entry: tarfile.TarInfo) -> bytes:
            return os.pread(file.fileno(), entry.size, entry.offset_data)

        with tarfile.open(fileobj=file, mode="r:") as tar:
            for name, group in groupby(_members(tar, f"{key}: {path}", others), lambda each: each[0]):
                members: Members = {}
                for _, extension, entry in group:
                    if extension in members:
                        raise UserError(f"{key}: sample {name} of {path} has two members .{extension}")
                    members[extension] = entry
                yield name, members, read


def _members(tar: tarfile.TarFile, place: str, others: Counter[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields (key, extension, member) of the files with an extension; skips metadata, and counts the `others`."""
    while (entry := tar.next()) is not None:
        # Otherwise the list of a million members needs gigabytes.
        tar.members.clear()  # type: ignore[attr-defined]
        matched = _NAME.fullmatch(entry.name)
        if _META.match(entry.name):  # __meta__/...: the package webdataset skips them, too
            continue
        if matched is not None and entry.isreg() and not entry.issparse():
            yield matched[1], matched[2].lower(), entry
        elif not (entry.isdir() or entry.name.endswith("/")):
            others[ending(os.path.basename(entry.name)) if entry.isreg() else "links in shards"] += 1
    # Before the last sample, which may lack a member for this reason.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(len(_END)) != _END:
        raise FileError(f"{place}: is damaged or truncated at byte {tar.offset}")
    if tar.fileobj.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(f"{place}: has more than one archive; extract each, or name their files")


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = reason or "a header claims more bytes than fit into memory"
        raise UserError(f"{key}: {path}: cannot be read as a tar file ({reason})") from None
