"""Texts: windows, documents, splits, files of tokens."""

import gzip
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.data.identity import identify
from dlopt.data.samplers import Random, ShiftedWindows
from dlopt.data.texts import text as texts
from dlopt.data.texts.text import python_source, tokens
from dlopt.data.texts.windows import Windows

CPU = torch.device("cpu")
text = partial(texts.text, val_file=None, column=None, tokenizer="bytes", vocabulary=None, saved_tokenizer=None)


@given(count=st.integers(8, 300), length=st.integers(1, 7), epoch=st.integers(0, 9))
def test_an_epoch_covers_the_text_once_in_shifted_windows(count: int, length: int, epoch: int) -> None:
    windows = Windows(np.arange(count, dtype=np.uint16), length)
    everything = torch.cat([windows.fetch(torch.tensor([i]))[:, 1:].flatten() for i in range(len(windows))]).int()
    assert everything.tolist() == list(range(1, length * len(windows) + 1)) and count - 1 - len(everything) < length
    order = ShiftedWindows(Random(targets=windows.targets, seed=3, epoch_size=None), windows, seed=4)
    starts = order.order(epoch)
    assert torch.equal(starts, order.order(epoch)) and len(starts) == len(order) == len(windows)
    first, *rest = sorted(starts.tolist())
    assert first < length and all(b - a == length for a, b in zip([first, *rest[:-2]], rest[:-1], strict=False))
    source = windows.at_every_token()
    fetched = source.fetch(starts)
    assert torch.equal(fetched[:, 0].int(), starts.int()) and fetched.shape[1] == length + 1
    assert torch.equal(source.on(CPU).index_select(0, starts), fetched)


def test_the_shift_changes_with_the_epoch_and_not_for_a_subset() -> None:
    windows = Windows(np.arange(2000, dtype=np.uint16), 50)
    order = ShiftedWindows(Random(targets=windows.targets, seed=3, epoch_size=None), windows, seed=4)
    assert len({int(order.order(epoch).min()) for epoch in range(20)}) > 10
    chosen = windows.select(torch.tensor([1, 5, 7]))
    subset = ShiftedWindows(Random(targets=chosen.targets, seed=3, epoch_size=None), chosen, seed=4)
    assert sorted(subset.order(3).tolist()) == [50, 250, 350]
    assert torch.equal(chosen.on(CPU), chosen.fetch(torch.arange(3)))


def test_windows_are_views_of_the_tokens() -> None:
    windows = Windows(np.zeros(1000, dtype=np.uint8), 99).at_every_token()
    assert windows.on(CPU).untyped_storage().nbytes() == 1000 and len(windows) == 901


def test_splits_are_cut_between_documents(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([65 + number]) * 100)
    (tmp_path / "other.md").write_bytes(b"?" * 5000)
    dataset = text(file=str(tmp_path), pattern="*.txt", sequence_length=10, val_split=0.1, test_split=0.1)
    assert dataset.val is not None and dataset.test is not None
    parts = [bytes(split.tokens) for split in (dataset.train, dataset.val, dataset.test)]  # type: ignore[attr-defined]
    documents = [bytes([65 + number]) * 100 + b"\0" for number in range(20)]
    assert parts == [b"".join(documents[:16]), b"".join(documents[16:18]), b"".join(documents[18:])]
    assert dataset.task.unit == "byte" and dataset.task.outputs == 256 and dataset.facts["files"] == 20


def test_one_document_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(500)))
    dataset = text(file=[str(path)], pattern="*.txt", sequence_length=8, val_split=0.2, test_split=0.1)
    splits = (dataset.train, dataset.val, dataset.test)
    parts = [bytes(split.tokens) for split in splits]  # type: ignore[union-attr]
    assert b"".join(parts) == path.read_bytes() and all(part.endswith(b"\n") for part in parts)
    assert [round(len(part) / path.stat().st_size, 1) for part in parts] == [0.7, 0.2, 0.1]


def test_large_texts_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(name.encode() * 500)
    keys = {"pattern": "*.txt", "sequence_length": 10, "val_split": 0.1, "test_split": 0.1}
    for file in (str(tmp_path), str(tmp_path / "a.txt")):
        read = text(file=file, **keys)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            patch.setattr(texts, "_MAX_READ", 100)
            mapped = text(file=file, **keys)  # type: ignore[arg-type]
        assert isinstance(mapped.train.tokens.base, np.memmap)  # type: ignore[attr-defined]
        for a, b in ((read.train, mapped.train), (read.val, mapped.val), (read.test, mapped.test)):
            assert np.array_equal(a.tokens, b.tokens)  # type: ignore[union-attr]


def test_large_texts_are_read_if_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(name.encode() * 500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.txt"))  # not a folder
    monkeypatch.setattr(texts, "_MAX_READ", 100)
    dataset = text(file=str(tmp_path), pattern="*.txt", sequence_length=10, val_split=0, test_split=0)
    assert bytes(dataset.train.tokens) == b"a.txt" * 500 + b"\0" + b"b.txt" * 500 + b"\0"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("documents", "val_split", "test_split", "expected"),
    [((850, 150), 0.1, 0.1, (800, 100, 100)), ((10, 990), 0.45, 0.45, (100, 450, 450))],
)
def test_large_documents_leave_no_split_out(
    tmp_path: Path, documents: tuple[int, ...], val_split: float, test_split: float, expected: tuple[int, ...]
) -> None:
    """An end of a document halfway between two cuts is not both; a small training set has its own bound."""
    for number, size in enumerate(documents):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * (size - 1))
    dataset = text(file=str(tmp_path), pattern="*.txt", sequence_length=8, val_split=val_split, test_split=test_split)
    splits = (dataset.train, dataset.val, dataset.test)
    assert tuple(len(split.tokens) for split in splits) == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("line", [500, 2999])
def test_long_lines_leave_no_split_out(tmp_path: Path, line: int) -> None:
    """Without the end of a line within the smallest split, the text is cut within one."""
    (tmp_path / "a.txt").write_text(("x" * line + "\n") * 6)
    keys = {"pattern": "*.txt", "sequence_length": 8, "val_split": 0.02, "test_split": 0.02}
    dataset = text(file=str(tmp_path / "a.txt"), **keys)  # type: ignore[arg-type]
    assert isinstance(dataset.val, Windows) and isinstance(dataset.test, Windows)
    sizes = [len(part.tokens) / (6 * line + 6) for part in (dataset.val, dataset.test)]
    assert sizes == pytest.approx([0.02, 0.02], abs=0.01)


@pytest.mark.parametrize("size, searched", [(1000, 25), (400_000, 4096)])
def test_the_end_of_a_line_is_searched_nearby(tmp_path: Path, size: int, searched: int) -> None:
    """In a quarter of the smallest split, and in at most 4096 bytes."""
    start = size * 8 // 10
    for offset, cut in ((searched - 1, start + searched), (searched, start)):
        content = bytearray(b"x" * size)
        content[start + offset] = ord("\n")
        (tmp_path / "a.txt").write_bytes(content)
        dataset = text(file=str(tmp_path / "a.txt"), pattern="*", sequence_length=8, val_split=0.1, test_split=0.1)
        assert isinstance(dataset.train, Windows) and len(dataset.train.tokens) == cut


def test_python_source_needs_a_training_set() -> None:
    with pytest.raises(UserError, match=r"val_split=0\.6, data\.test_split=0\.6: leave no text for training"):
        python_source(sequence_length=8, val_split=0.6, test_split=0.6)


@pytest.mark.parametrize("key", ["val_split", "test_split"])
def test_no_module_in_a_split_is_an_error(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a run without a validation text would split windows off the training text."""
    (tmp_path / "a.py").write_text("a = 1\n" * 10)
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=rf"the text of data\.{key}=1e-09 has only 0 tokens; a window needs two"):
        python_source(**{"sequence_length": 8, "val_split": 0, "test_split": 0, key: 1e-9})  # type: ignore[arg-type]


def test_the_standard_library_is_split_by_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [f"{folder}/m{number}.py" for folder in ("json", "http") for number in range(200)]
    for name in [*names, "test/test_x.py", "site-packages/y.py", "json/tests/z.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"'{name}'")
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: str(tmp_path))

    def splits() -> list[set[str]]:
        dataset = python_source(sequence_length=8, val_split=0.2, test_split=0.1)
        assert dataset.val is not None and dataset.test is not None
        parts = [bytes(split.tokens) for split in (dataset.train, dataset.val, dataset.test)]  # type: ignore[attr-defined]
        return [{each.strip("'") for each in part.decode().split("\0") if each} for part in parts]

    before = splits()
    assert set.union(*before) == set(names) and sum(map(len, before)) == len(names)
    assert 0.6 < len(before[0]) / len(names) < 0.8 and 0.1 < len(before[1]) / len(names) < 0.3
    (tmp_path / "aaa.py").write_text("'aaa.py'")  # another version of Python has another module
    assert [split - {"aaa.py"} for split in splits()] == before


def test_tokens_are_read_as_nanogpt_writes_them(tmp_path: Path) -> None:
    ids = np.arange(1000, dtype="<u2") % 700
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    dataset = tokens(root=str(tmp_path), sequence_length=16, vocabulary=700)
    assert dataset.test is None and dataset.task.unit == "token" and dataset.task.outputs == 700
    assert dataset.train.fetch(torch.tensor([1])).int().tolist() == [ids[16:33].tolist()]
    with pytest.raises(UserError, match="contains token 699"):
        tokens(root=str(tmp_path), sequence_length=16, vocabulary=699)
    (tmp_path / "val.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"val\.bin: cannot be read as uint16"):
        tokens(root=str(tmp_path), sequence_length=16, vocabulary=700)


def test_evenly_spaced_parts_of_a_large_file_are_compared_with_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_CHECKED", 64)

    def compared(count: int) -> list[int]:
        """Returns the positions at which a token outside of the vocabulary is refused."""
        found = []
        for position in range(count):
            ids = np.zeros(count, dtype="<u2")
            np.zeros(9, dtype="<u2").tofile(tmp_path / "val.bin")
            ids[position] = 10
            ids.tofile(tmp_path / "train.bin")
            try:
                tokens(root=str(tmp_path), sequence_length=8, vocabulary=10)
            except UserError:
                found.append(position)
        return found

    assert compared(64) == [*range(64)]
    found = compared(256)
    assert len(found) == 64 and {position // 16 for position in found} == {*range(16)}


def test_names_what_is_wrong_with_a_text(tmp_path: Path) -> None:
    keys = {"pattern": "*.txt", "sequence_length": 10, "val_split": 0.1, "test_split": 0.1}
    (tmp_path / "a.txt").write_bytes(b"short text")
    for changed, message in (
        ({"file": str(tmp_path / "none")}, r"no such file; a name, a pattern \(shards/\*\) or a folder"),
        ({"file": str(tmp_path), "pattern": "*.md"}, r"data\.pattern=\*\.md: no file"),
        ({"file": str(tmp_path), "pattern": "/a/*.txt"}, r"data\.pattern=/a/\*\.txt: must be a pattern of names"),
        ({"file": str(tmp_path)}, "data.sequence_length=10: the training text has only 8 tokens"),
        ({"file": str(tmp_path), "val_split": 0.9}, "leave no text for training"),
    ):
        with pytest.raises(UserError, match=message):
            text(**{**keys, **changed})  # type: ignore[arg-type]


def test_files_that_are_left_out_are_counted_by_ending(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.TXT", "d.md", "e.md", ".f.txt"):
        (tmp_path / name).write_text("some text to read\n" * 9)
    dataset = text(file=str(tmp_path), pattern="*.txt", sequence_length=8, val_split=0, test_split=0)
    assert dataset.source == f"3 files, {3 * 163} bytes" and dataset.notes == ("left out: 3 files (2 *.md, 1 *.TXT)",)
    with pytest.raises(UserError, match=r"no file in .* has such a name; it has \*\.md: set data\.pattern="):
        text(file=str(tmp_path), pattern="*.rst", sequence_length=8, val_split=0, test_split=0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-8", "utf-8-sig"])
def test_texts_in_utf_16(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to read, with an é\n" * 30, encoding="utf-8")
    (tmp_path / "b.txt").write_text("some text to read, with an é\n" * 30, encoding=encoding)
    (tmp_path / "c.txt").write_text("")
    keys = {"pattern": "*.txt", "sequence_length": 8, "val_split": 0, "test_split": 0}
    if encoding == "utf-16":
        with pytest.raises(UserError, match=r"data\.file: .*b\.txt is UTF-16; convert it to UTF-8"):
            text(file=str(tmp_path), **keys)
        return
    expected = (
        f"warning: 1 of 3 files have a zero at every other byte, as UTF-16, and are read as bytes: {tmp_path}/b.txt"
    )
    assert text(file=str(tmp_path), **keys).notes == ((expected,) if "-16" in encoding else ())


def test_characters_are_not_cut() -> None:
    tokens = np.frombuffer("aé→b".encode(), dtype=np.uint8)
    assert [texts.character_start(tokens, position) for position in range(8)] == [0, 1, 3, 3, 6, 6, 6, 7]
    assert texts.character_start(tokens[:5], 4) == 5


@pytest.mark.parametrize(
    ("length", "count", "hint"), [(5, 4, "use at most 3"), (1, 1, "two or more"), (3, 2, "most 1")]
)
def test_texts_shorter_than_a_window(length: int, count: int, hint: str) -> None:
    with pytest.raises(UserError, match=f"data.sequence_length={length}: it has only {count} tokens; .*{hint}"):
        texts._windows(np.zeros(count), length, "it")
    assert len(texts._windows(np.zeros(length + 1), length, "it")) == 1


def test_a_pattern_without_files_suggests_the_most_common_suffix(tmp_path: Path) -> None:
    for name in ("a.md", "b/c.md", "d.txt", "none"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"no file in .* has such a name; it has \*\.md: set data\.pattern='\*\.md'$"):
        texts._files("data.file", str(tmp_path), "*.py", Counter())
    others: Counter[str] = Counter()
    assert [path.name for path in texts._files("data.file", str(tmp_path), "*.md", others)] == ["a.md", "c.md"]
    assert others.total() == 2 and others["*.txt"] == 1
    assert texts._files("data.file", str(tmp_path / "none"), "*.md", others) == [tmp_path / "none"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file in .* has such a name$"):
        texts._files("data.file", str(tmp_path / "empty"), "*.py", Counter())


@pytest.mark.parametrize(("limit", "is_mapped"), [(13, False), (12, True)])
def test_texts_above_a_size_are_mapped(
    tmp_path: Path, limit: int, is_mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of five and six bytes, with a separator after each; or one of as many bytes."""
    monkeypatch.setattr(texts, "_MAX_READ", limit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, content in (("a", b"12345"), ("b", b"123456"), ("c", b"1234567890123"), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    joined, ends = texts._concatenate([tmp_path / "a", tmp_path / "b"])
    assert bytes(joined) == b"12345\x00123456\0" and ends == [6, 13] and isinstance(joined, np.memmap) is is_mapped
    one, ends = texts._concatenate([tmp_path / "c"])
    assert bytes(one) == b"1234567890123" and ends == [13] and isinstance(one, np.memmap) is is_mapped
    assert len(texts._concatenate([tmp_path / "d"])[0]) == 0


@pytest.mark.parametrize(("count", "length", "expected"), [(10, 3, 9), (9, 3, 6), (10, 4, 8), (4, 3, 3)])
def test_predicted_tokens_are_those_of_the_targets(count: int, length: int, expected: int) -> None:
    windows = Windows(np.arange(count, dtype=np.uint8), length)
    assert windows.predicted().tolist() == list(range(1, expected + 1))
    everything = windows.fetch(torch.arange(len(windows)))
    assert everything[:, 1:].flatten().tolist() == windows.predicted().tolist()
    some = windows.select(torch.tensor([0]))
    assert some.predicted().tolist() == list(range(1, length + 1)) and windows.shape == (length + 1,)
    every = Windows(np.arange(count, dtype=np.uint8), length, stride=1)
    assert len(every) == count - length and len(every.predicted()) == length * (count - length)


def shard(path: Path, tokens: np.ndarray, *, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    """Writes a file as llm.c's data_common.py does."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())


def test_shards_are_one_text_in_the_order_of_their_names(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 1000).astype("<u2")
    for name, part in (("train_000002", ids[300:500]), ("train_000001", ids[:300]), ("val_000000", ids[500:])):
        shard(tmp_path / f"fineweb_{name}.bin", part)
    (tmp_path / "tokenizer.bin").write_bytes(b"?")
    (tmp_path / "plain").mkdir()
    ids[:500].tofile(tmp_path / "plain/train.bin")
    ids[500:].tofile(tmp_path / "plain/val.bin")
    plain = tokens(root=str(tmp_path / "plain"), sequence_length=16, vocabulary=50257)
    for root in (tmp_path, tmp_path / "fineweb_*.bin"):
        found = tokens(root=str(root), sequence_length=16, vocabulary=50257)
        assert isinstance(found.train, Windows) and isinstance(plain.train, Windows)
        everything = torch.arange(len(plain.train.at_every_token()))
        expected = plain.train.at_every_token().fetch(everything)
        assert torch.equal(found.train.at_every_token().fetch(everything), expected)
        assert torch.equal(found.train.loaded().on(CPU), plain.train.on(CPU))
        assert identify(found) == identify(plain) and found.source == "tokens: train 500 (2 files), val 500 (1 file)"
    left_out = "left out: 1 file without train, val or test in the name: tokenizer.bin"
    assert tokens(root=str(tmp_path), sequence_length=16, vocabulary=50257).notes == (left_out,)


def test_tokens_of_four_bytes(tmp_path: Path) -> None:
    ids = np.arange(128_000, 128_256, dtype="<u4")
    for name in ("train", "val"):
        shard(tmp_path / f"{name}.bin", ids, magic=20240801, version=7)
    found = tokens(root=str(tmp_path), sequence_length=16, vocabulary=128_256).train
    assert isinstance(found, Windows) and found.fetch(torch.arange(len(found)))[:, 1:].flatten().tolist() == [
        *ids[1:241]
    ]
    with pytest.raises(UserError, match="contains token 128255"):
        tokens(root=str(tmp_path), sequence_length=16, vocabulary=128_000)


def test_headers_are_checked(tmp_path: Path) -> None:
    ids = np.zeros(100, dtype="<u2")
    ids.tofile(tmp_path / "val.bin")
    for changed, message in (
        ({"count": 99}, r"train\.bin: is damaged: its header counts 99 tokens, the file has 200 bytes of them"),
        ({"count": -100}, "is damaged"),
        ({"version": 2}, "has version 2 of the format 20240520; only version 1 is read"),
        ({"magic": 20240801, "version": 7}, "is damaged: its header counts 100 tokens"),
        ({"magic": 20251013}, r"starts with the header of another format \(20251013\); 20240520 and 20240801"),
    ):
        shard(tmp_path / "train.bin", ids, **changed)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            tokens(root=str(tmp_path), sequence_length=8, vocabulary=50257)
    (tmp_path / "train.bin").write_bytes(np.int32(20240520).tobytes())
    with pytest.raises(UserError, match="has version 0 of the format 20240520"):
        tokens(root=str(tmp_path), sequence_length=8, vocabulary=50257)
    (tmp_path / "train.bin").unlink()
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.bin", ids)
    with pytest.raises(UserError, match=r"no name of its 3 files says train; shards need names such as"):
        tokens(root=str(tmp_path / "*.bin"), sequence_length=8, vocabulary=10)


def test_validation_files_are_left_out_of_training(tmp_path: Path) -> None:
    """The layout of nanochat, whose last file is the validation set."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [tmp_path / f"shard_{number:05}.parquet" for number in range(4)]
    for number, path in enumerate(files):
        parquet.write_table(arrow.table({"text": [f"text {number} {row}\n" * 3 for row in range(50)]}), path, 7)
    keys = {"pattern": "*.txt", "column": "text", "sequence_length": 8, "val_split": 0.1, "test_split": 0}
    found = texts.text(
        file=str(tmp_path / "*.parquet"),
        val_file=str(tmp_path / "." / ".." / tmp_path.name / files[-1].name),
        tokenizer="bytes",
        vocabulary=None,
        saved_tokenizer=None,
        **keys,  # type: ignore[arg-type]
    )
    columns = [parquet.read_table(path)["text"].to_pylist() for path in files]
    expected = "".join(f"{each}\0" for column in columns[:3] for each in column)
    assert isinstance(found.train, Windows) and isinstance(found.val, Windows) and found.test is None
    assert bytes(found.train.tokens).decode() == expected
    assert bytes(found.val.tokens).decode() == "".join(f"{each}\0" for each in columns[3])
    with pytest.raises(UserError, match=r"data\.val_file: has all files of data\.file"):
        text(file=str(files[3]), **{**keys, "val_file": str(files[3])})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shard_00000\.parquet is a Parquet file; name the column"):
        text(file=str(files[0]), **{**keys, "column": None})  # type: ignore[arg-type]


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a text " * 100))
    with pytest.raises(UserError, match=r"a\.txt\.gz: is compressed \(gzip\); unpack it"):
        texts.read_text(str(tmp_path / "a.txt.gz"), None, is_table=False)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    for values, message in (
        (["a", None], r"data\.file: row 1: text is missing \(null\): remove the row$"),
        ([1, 2], r"data\.file: row 0: text is no text, but of the type int64$"),
    ):
        parquet.write_table(arrow.table({"text": values}), path)
        with pytest.raises(UserError, match=message):
            texts.read_text(str(path), "text", is_table=True)
