"""Texts: files of bytes, the source code of Python's standard library, and files of tokens."""

import codecs
import hashlib
import math
import os
import platform
import shutil
import sysconfig
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from dlopt.basics.cache import cache_file, exclusive, file_state
from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special, temporary_sibling
from dlopt.basics.formats import format_count
from dlopt.basics.ranges import Fraction
from dlopt.data.checks import WARNING, ending, left_out_note, sampled
from dlopt.data.rows.rows import Files, find_files
from dlopt.data.samples import Dataset
from dlopt.data.tables.csv_file import refuse_packed
from dlopt.data.tables.parquet import read_parquet, text_column
from dlopt.data.texts.token_files import find_splits, memory_map, read_tokens
from dlopt.data.texts.tokenizer import SMALLEST, Tokenizer, character_start, read_tokenizer, tokenize, train_tokenizer
from dlopt.data.texts.windows import Shards, Windows
from dlopt.tasks.text import NextToken

SequenceLength = Annotated[int, Interval(ge=1, le=1 << 20)]
Vocabulary = Annotated[int, Interval(ge=2, le=1 << 24)]
TrainedVocabulary = Annotated[int, Interval(ge=SMALLEST, le=1 << 16)]  # tokens of two bytes

BYTES = 256
SEPARATOR = b"\0"  # between documents
_TRAINED_SIZE = 4096
_MAX_READ = 1 << 26  # bytes; larger texts are memory-mapped
_LINE = 1 << 12  # bytes in which the end of a line is searched
_CHECKED = 1 << 24  # tokens of a file that are compared with the vocabulary
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def text(
    *,
    file: Files,
    val_file: Files | None = None,
    pattern: str,
    column: str | None,
    tokenizer: Literal["bytes", "bpe"] | str,
    vocabulary: TrainedVocabulary | None,
    sequence_length: SequenceLength,
    val_split: Fraction,
    test_split: Fraction,
    saved_tokenizer: str | None,
) -> Dataset:
    """Reads files as bytes, tokens 0..255, or as the tokens of a byte-level tokenizer; a zero byte between documents.

    Every file is a document, in the order of `file`; files of a folder are sorted. Test and validation set are the last
    parts of the text, cut between documents if these are small enough, else at the end of a line. The splits do not
    depend on the tokenizer. The keys: see `conf/data/text.yaml`.

    Args:
        saved_tokenizer: the tokenizer.json of a checkpoint, which replaces `tokenizer`.

    Raises:
        UserError: a file is missing, a split is shorter than a window, or the tokenizer cannot be used.
    """
    if vocabulary is not None and tokenizer != "bpe":
        raise UserError(f"data.vocabulary={vocabulary}: only data.tokenizer=bpe has this key; leave it out")
    others: Counter[str] = Counter()
    paths, held = _files("data.file", file, pattern, others), []
    if val_file is not None:
        held = _files("data.val_file", val_file, pattern, others)
        real = {os.path.realpath(path) for path in held}
        paths, val_split = [path for path in paths if os.path.realpath(path) not in real], 0.0
        if not paths:
            raise UserError("data.val_file: has all files of data.file; leave some of them for training")
    text, ends, warnings = _documents("data.file", paths, column)
    cuts = _cuts(text, ends, val_split, test_split)
    parts = np.split(text, cuts if tokenizer == "bytes" else [character_start(text, cut) for cut in cuts])
    names = _part_names(val_split, test_split)
    facts: dict[str, Any] = {"files": len(paths) + len(held), "bytes": len(text)}
    source = f"{format_count('files', len(paths))}, {len(text):,} bytes"
    if held:
        parts[1], _, more = _documents("data.val_file", held, column)
        names, warnings = (names[0], "the text of data.val_file", names[2]), (*warnings, *more)
        facts["bytes"] += len(parts[1])
        source += f"; validation: {format_count('files', len(held))}, {len(parts[1]):,} bytes"
    used = None
    if tokenizer != "bytes":
        used = _tokenizer(tokenizer, vocabulary, saved_tokenizer, parts[0])
        parts = tokenize(used, parts, ["the training text", "the validation text", "the test text"])
        facts |= {"tokens": sum(map(len, parts)), "tokenizer_sha256": used.digest}
    notes = (*left_out_note(others), *warnings)
    dataset = _dataset(parts, names, sequence_length, facts=facts, notes=notes, tokenizer=used)
    return replace(dataset, source=source if used is None else f"data.tokenizer={tokenizer}")


def _tokenizer(kind: str, vocabulary: int | None, saved: str | None, text: np.ndarray) -> Tokenizer:
    """Returns the tokenizer of a checkpoint, the one trained on a text, or that of a file."""
    source = f"data.tokenizer={kind}"
    if saved is not None:
        return Tokenizer(saved, source)
    if kind == "bpe":
        return train_tokenizer(text.tobytes(), vocabulary or _TRAINED_SIZE, source)
    return read_tokenizer(kind)


def python_source(*, sequence_length: SequenceLength, val_split: Fraction, test_split: Fraction) -> Dataset:
    """Reads the standard library of the running Python as bytes, without its tests. Every module is a document.

    A hash of its path assigns a module to a split, so most modules stay in theirs in other versions of Python.

    Raises:
        UserError: the standard library has no source files, or a split is shorter than a window.
    """
    _refuse_splits(val_split, test_split)
    root = Path(sysconfig.get_path("stdlib"))
    names = _modules(root)
    if not names:
        raise UserError(f"data=python_source: no source files in {root}; use data=text data.file=FOLDER")
    splits: list[list[str]] = [[], [], []]
    for name in names:
        position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        splits[2 if position < test_split else 1 if position < test_split + val_split else 0].append(name)
    paths = [root / name for split in splits for name in split]
    tokens, ends = _concatenate(paths)
    cuts = [[0, *ends][count] for count in (len(splits[0]), len(splits[0]) + len(splits[1]))]
    version, licence = platform.python_version(), "Python Software Foundation License"
    facts = {"python": version, "files": len(names), "bytes": len(tokens)}
    notes = (f"standard library of Python {version} ({licence}): {len(names)} files",)
    parts = np.split(tokens, cuts)
    return _dataset(parts, _part_names(val_split, test_split), sequence_length, facts=facts, notes=notes)


def tokens(*, root: str, sequence_length: SequenceLength, vocabulary: Vocabulary) -> Dataset:
    """Reads files of tokens: train.bin, val.bin and test.bin of nanoGPT, or the shards of llm.c and modded-nanogpt.

    test.bin may be missing. Files are uint16, or as their header says. The shards of a split are one text, in the order
    of their names: a document that one of them cuts off continues in the next. The files are memory-mapped. meta.pkl is
    not read: a pickle may run code. `root`: folder of the files, or a pattern of them.

    Raises:
        UserError: a file is missing or damaged, or has a token outside of the vocabulary.
    """
    files, notes = find_splits(root)
    splits: dict[str, Windows] = {}
    for name, paths in files.items():
        arrays = []
        for path in paths:
            array = read_tokens(path)
            if (token := token_outside(array, vocabulary)) is not None:
                raise UserError(
                    f"data.vocabulary={vocabulary}: {path} contains token {token}; use the tokenizer's size"
                )
            arrays.append(array.view("<i4") if array.itemsize == 4 else array)  # torch has few operations for uint32
        shown = f"{paths[0]}" if len(paths) == 1 else f"{name} of data.root={root}"
        splits[name] = _windows(arrays[0] if len(arrays) == 1 else Shards(arrays), sequence_length, shown)
    task = NextToken(vocabulary, predictions=sequence_length)
    counts = (
        f"{name} {len(splits[name].tokens):,} ({format_count('files', len(paths))})" for name, paths in files.items()
    )
    source = f"tokens: {', '.join(counts)}" if any(len(paths) > 1 for paths in files.values()) else ""
    return Dataset(
        splits["train"], splits["val"], splits.get("test"), None, unlabelled=task, notes=notes, source=source
    )


def _refuse_splits(val_split: float, test_split: float) -> None:
    if val_split + test_split >= 1:
        raise UserError(f"data.val_split={val_split:g}, data.test_split={test_split:g}: leave no text for training")


def _part_names(val_split: float, test_split: float) -> tuple[str, str | None, str | None]:
    """Returns the names of the training, validation and test text for messages; None for one that is not wanted."""
    val, test = (
        f"the text of data.{key}={fraction:g}" if fraction > 0 else None
        for key, fraction in (("val_split", val_split), ("test_split", test_split))
    )
    return "the training text", val, test


def _dataset(
    parts: Sequence[np.ndarray],
    names: Sequence[str | None],
    length: int,
    *,
    facts: dict[str, Any],
    notes: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Returns the dataset of the tokens of a training, validation and test text; see `_part_names`.

    `tokenizer`: of the tokens; None if they are bytes.
    """
    train, val, test = (
        None if name is None else _windows(part, length, name) for part, name in zip(parts, names, strict=True)
    )
    assert train is not None
    if tokenizer is None:
        task = NextToken(BYTES, predictions=length, unit="byte")
        return Dataset(train, val, test, None, unlabelled=task, notes=notes, facts=facts)
    task = NextToken(tokenizer.size, predictions=length, bytes_per_token=tokenizer.bytes_per_token(train.predicted()))
    notes = (*notes, f"tokenizer: {tokenizer.size:,} tokens, {task.bytes_per_token:.2f} bytes per token")
    return Dataset(train, val, test, None, unlabelled=task, notes=notes, facts=facts, tokenizer=tokenizer)


def _windows(tokens: np.ndarray | Shards, length: int, name: str) -> Windows:
    windows = Windows(tokens, length)
    if len(windows) == 0:
        hint = f"use at most {len(tokens) - 1}" if len(tokens) > 1 else "a window needs two or more"
        raise UserError(f"data.sequence_length={length}: {name} has only {len(tokens)} tokens; {hint}")
    return windows


# -- documents


def _files(key: str, files: Files, pattern: str, others: Counter[str]) -> list[Path]:
    """Returns files, those of patterns, and those of folders that match `pattern`; counts `others` by ending."""
    paths: list[Path] = []
    for entry in [files] if isinstance(files, str) else files:
        path = Path(os.path.expanduser(entry))
        paths += _in_folder(entry, path, pattern, others) if path.is_dir() else map(Path, find_files(key, entry, "")[0])
    return paths


def _in_folder(entry: str, path: Path, pattern: str, others: Counter[str]) -> list[Path]:
    try:
        found = sorted(each for each in path.rglob(pattern) if each.is_file())
    except (NotImplementedError, ValueError):
        raise UserError(f"data.pattern={pattern}: must be a pattern of names in the folder, such as *.txt") from None
    everything = Counter(ending(each.name) for each in path.rglob("*") if each.is_file())
    left_out = everything - Counter(ending(each.name) for each in found)
    if not found:
        suffixes = [(each, count) for each, count in left_out.most_common() if each.startswith("*.")]
        hint = "".join(f"; it has {each}: set data.pattern='{each}'" for each, _ in suffixes[:1])
        raise UserError(f"data.pattern={pattern}: no file in {entry} has such a name{hint}")
    others += left_out
    return found


def _documents(key: str, paths: Sequence[Path], column: str | None) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Returns the bytes of files, or of a column of Parquet files, the end of each document, and warnings."""
    if column is not None:
        return *_rows(key, paths, column), ()
    text, ends = _concatenate(paths)
    return text, ends, _format_warnings(text, ends, paths)


_LOOKED_AT = 1 << 10  # bytes at the start of a document
_DOCUMENTS = 1 << 12  # that are looked at, evenly spaced
_FEW_BYTES = 16
_PARQUET = b"PAR1"
_ZEROS = 0.4  # of the bytes at even, or at odd positions; UTF-16 has more in the alphabets of Europe


def _format_warnings(tokens: np.ndarray, ends: Sequence[int], paths: Sequence[Path]) -> tuple[str, ...]:
    """Returns a warning if a text has zeros at every other byte.

    Raises `UserError` for the byte order mark of UTF-16, for a compressed file, and for a Parquet file.

    As bytes, or for a tokenizer, half of such a text means nothing.
    """
    looks = []
    # Not all of a million: a mapped text would be read as a whole at every start.
    chosen = sampled(len(paths), _DOCUMENTS).tolist()
    for index in chosen:
        start, end, path = ends[index - 1] if index else 0, ends[index], paths[index]
        first = tokens[start : min(start + _LOOKED_AT, end)].tobytes().removesuffix(SEPARATOR)
        if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"data.file: {path} is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW")
        refuse_packed(f"data.file: {path}", first)
        if first[:4] == _PARQUET:
            raise UserError(f"data.file: {path} is a Parquet file; name the column of its documents: data.column=text")
        zeros = sorted(2 * first[parity::2].count(0) / max(len(first), 1) for parity in (0, 1))
        if len(first) >= _FEW_BYTES and zeros[1] > max(_ZEROS, 4 * zeros[0]):
            looks.append(path)
    if not looks:
        return ()
    count = f"{len(looks):,} of {len(chosen):,} files"
    return (f"{WARNING}{count} have a zero at every other byte, as UTF-16, and are read as bytes: {looks[0]}",)


def _modules(root: Path) -> list[str]:
    """Returns the sorted paths of the source files below `root`, relative to it; without tests and other packages."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def _concatenate(paths: Sequence[Path]) -> tuple[np.ndarray, list[int]]:
    """Returns the bytes of the files, uint8 [N], and the end of each file. Maps large texts instead of reading them."""
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise UserError(f"data.file: {error.filename}: cannot be read ({error.strerror})") from None
    ends = list(accumulate(size + len(SEPARATOR) for size in sizes))
    if len(paths) == 1 and sizes[0] > 0:
        return (memory_map(paths[0], "u1") if sizes[0] > _MAX_READ else _read(paths)), sizes
    return (_read(paths) if ends[-1] <= _MAX_READ else _map_joined(paths)), ends


def read_text(file: str, column: str | None, *, is_table: bool) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Returns the bytes of a text, the end of each document, and what looks wrong in it.

    `column`: of a Parquet file with a document in each row, if `is_table`; its only column of texts without such a
    column. Raises `UserError`.
    """
    path = Path(os.path.expanduser(file))
    column = text_column(f"data.file={file}", str(path), column) if is_table else None
    text, ends, notes = _documents("data.file", [path], column)
    if not len(text):
        raise UserError(f"data.file={file}: is empty")
    return text, ends, notes


def _rows(key: str, paths: Sequence[Path], column: str) -> tuple[np.ndarray, list[int]]:
    """Returns the bytes of the documents in a column of Parquet files, in memory, and the end of each."""
    table, _ = read_parquet(key, list(map(str, paths)), [column], column)
    joined, ends = bytearray(), []
    for row, value in enumerate(table.column(column)):
        document = value.as_py()
        if not isinstance(document, str | bytes):
            kind = table.schema.field(column).type
            what = "is missing (null): remove the row" if document is None else f"is no text, but of the type {kind}"
            raise UserError(f"{key}: row {row}: {column} {what}")
        joined += (document.encode() if isinstance(document, str) else document) + SEPARATOR
        ends.append(len(joined))
    return np.frombuffer(joined, dtype=np.uint8), ends


def _read(paths: Sequence[Path]) -> np.ndarray:
    """Returns the bytes of the files, with a separator after each of several."""
    parts = []
    for path in paths:
        try:
            refuse_special(path)
            parts.append(path.read_bytes())
        except OSError as error:
            raise UserError(f"data.file: {path}: cannot be read ({error.strerror})") from None
    joined = bytearray(parts[0]) if len(parts) == 1 else bytearray(SEPARATOR).join([*parts, b""])
    return np.frombuffer(joined, dtype=np.uint8)


def _map_joined(paths: Sequence[Path]) -> np.ndarray:
    """Writes the bytes of the files to one file in the cache, which is reused while they are unchanged.

    Reads the files into memory if the cache cannot be written.
    """
    states = [f"{path.absolute()} {file_state(path)}" for path in paths]
    target = cache_file("text", *states).with_suffix(".bin")
    try:
        with exclusive(target):
            if not target.exists():
                with temporary_sibling(target) as temporary:
                    with temporary.open("wb") as joined:
                        for path in paths:
                            refuse_special(path)
                            with path.open("rb") as source:
                                shutil.copyfileobj(source, joined)
                            joined.write(SEPARATOR)
                    # Renamed when it is complete: a killed process leaves no text of this name that is cut off.
                    os.replace(temporary, target)
    except OSError:  # no access, or no space
        return _read(paths)
    return memory_map(target, "u1")


def token_outside(tokens: np.ndarray, vocabulary: int) -> int | None:
    """Returns a token that is not in the vocabulary; None without one.

    Looks at all tokens of small files, and at evenly spaced parts of large ones.
    """
    step = math.ceil(len(tokens) / _CHECKED)
    block = _CHECKED // 16
    for start in range(0, len(tokens), block * step):
        largest = int(tokens[start : start + block].max())
        if largest >= vocabulary:
            return largest
    return None


def _cuts(text: np.ndarray, ends: Sequence[int], val_split: float, test_split: float) -> list[int]:
    """Returns the end of the training and of the validation text."""
    _refuse_splits(val_split, test_split)
    smallest = min(part for part in (1 - val_split - test_split, val_split, test_split) if part > 0)
    return [_cut(text, ends, fraction, smallest / 2) for fraction in (1 - val_split - test_split, 1 - test_split)]


def _cut(tokens: np.ndarray, ends: Sequence[int], fraction: float, tolerance: float) -> int:
    """Returns the end of the document nearest to `fraction` of the bytes; if it is too far, the end of a line.

    `tolerance`: bound of the distance of a document's end, as a fraction of the bytes, and twice that of a line's end.
    With half of the smallest split no split vanishes. Without such an end, the text is cut at `fraction`.
    """
    total = len(tokens)
    if fraction >= 1:
        return total
    position = round(fraction * total)
    index = bisect_left(ends, position)
    nearest = min(ends[max(index - 1, 0) : index + 1], key=lambda end: abs(end - position), default=total)
    # Less than the tolerance, by a byte for rounding: at the tolerance, both cuts of a split could be the same end.
    if 0 < nearest < total and abs(nearest - position) + 1 < tolerance * total:
        return nearest
    searched = min(_LINE, round(tolerance / 2 * total))
    lines = np.flatnonzero(tokens[position : position + searched] == ord("\n"))
    return position + int(lines[0]) + 1 if len(lines) else position
