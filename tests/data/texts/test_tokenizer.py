"""Tokenizers of texts: byte-pair encoding, tokenizer.json, and the text in their tokens."""

import json
import pickle
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.data.texts import text as texts
from dlopt.data.texts import tokenizer as module
from dlopt.data.texts.tokenizer import SMALLEST, Tokenizer, _chunks, read_tokenizer, train_tokenizer
from dlopt.data.texts.windows import Windows
from tests.support.line import refused

tokenizers = pytest.importorskip("tokenizers")
SOURCE = "data.tokenizer=bpe"
TEXT = "".join(f"def größe{number}(x):\n    return x + {number}  # naïve →\n" for number in range(200)).encode()
text = partial(
    texts.text,
    val_file=None,
    column=None,
    pattern="*.txt",
    sequence_length=8,
    val_split=0.2,
    test_split=0.2,
    saved_tokenizer=None,
)
bpe = partial(text, tokenizer="bpe", vocabulary=300)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    return str(path)


def reference_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding of Sennrich et al. 2016 as in the paper's figure 1, of words separated by spaces."""
    words = [list(word) for word in text.split(" ")]
    merges = []
    for _ in range(count):
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: pairs[pair])
        merges.append(best)
        for word in words:
            for index in range(len(word) - 2, -1, -1):
                if index + 1 < len(word) and (word[index], word[index + 1]) == best:
                    word[index : index + 2] = ["".join(best)]
    return merges


def test_merges_are_those_of_the_paper() -> None:
    # Counts without ties: ab 9, cd 5, abcd 4.
    document = " ".join(["ab"] * 5 + ["abcd"] * 4 + ["cd"])
    trained = json.loads(train_tokenizer(document.encode(), 260, SOURCE).description)["model"]["merges"]
    merged = [tuple(pair) for pair in trained if "Ġ" not in "".join(pair)]
    assert merged == [("a", "b"), ("c", "d"), ("ab", "cd")][: len(merged)] and len(merged) >= 2
    assert reference_merges(document, 2) == merged[:2]


def test_tokens_joined_are_the_text_and_training_is_repeatable(cache: Path) -> None:
    first = train_tokenizer(TEXT, 300, SOURCE)
    for path in cache.rglob("*.npz"):
        path.unlink()
    again = train_tokenizer(TEXT, 300, SOURCE)
    assert first.description == again.description and first.size == 300
    tokens = first.encode(TEXT + b"\0end", "a text")
    assert b"".join(first.bytes_of[token] for token in tokens) == TEXT + b"\0end" and tokens.dtype == np.uint16
    assert len(tokens) < len(TEXT) / 2 and first.lengths[tokens].sum() == len(TEXT) + 4
    library = tokenizers.Tokenizer.from_str(first.description)
    assert library.encode(TEXT.decode(), add_special_tokens=False).ids == first.encode(TEXT, "a text").tolist()
    assert pickle.loads(pickle.dumps(first)).bytes_of == first.bytes_of


def test_long_texts_are_tokenized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(TEXT, 300, SOURCE)
    whole = tokenizer.encode(TEXT, "a text")
    monkeypatch.setattr("dlopt.data.texts.tokenizer._CHUNK", 100)
    assert len([*_chunks(TEXT)]) > 50 and np.array_equal(tokenizer.encode(TEXT, "a text"), whole)
    line = ("→" * 500).encode()  # without an end of a line, chunks end between characters
    assert b"".join(tokenizer.bytes_of[token] for token in tokenizer.encode(line, "a text")) == line


def test_it_is_trained_on_the_training_set_only(file: str, tmp_path: Path) -> None:
    dataset = bpe(file=file)
    assert dataset.tokenizer is not None
    parts: list[Any] = [dataset.train, dataset.val, dataset.test]
    decoded = [b"".join(dataset.tokenizer.bytes_of[token] for token in part.tokens) for part in parts]
    bytes_ = text(file=file, tokenizer="bytes", vocabulary=None)
    assert decoded == [bytes(part.tokens) for part in (bytes_.train, bytes_.val, bytes_.test)]  # type: ignore[union-attr]
    assert dataset.tokenizer.description == train_tokenizer(decoded[0], 300, SOURCE).description
    path = Path(file)
    path.write_bytes(decoded[0] + decoded[1].upper() + decoded[2].upper())  # other held-out texts
    changed = bpe(file=file)
    assert changed.tokenizer is not None and changed.tokenizer.description == dataset.tokenizer.description
    assert dataset.facts["tokenizer_sha256"] == dataset.tokenizer.digest
    assert dataset.facts["tokens"] == sum(len(part.tokens) for part in parts)


def test_bits_per_byte_are_those_of_the_predicted_tokens(file: str) -> None:
    dataset = bpe(file=file)
    assert isinstance(dataset.val, Windows) and dataset.tokenizer is not None
    targets = torch.cat([dataset.val.fetch(torch.tensor([i]))[0, 1:] for i in range(len(dataset.val))]).tolist()
    decoded = tokenizers.Tokenizer.from_str(dataset.tokenizer.description).decode(targets, skip_special_tokens=False)
    loss = 2.5  # nats per token
    expected = loss * len(targets) / len(decoded.encode()) / np.log(2)
    metrics = dataset.task_on(dataset.val).loss_metrics(loss)
    assert metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-12)
    assert metrics["perplexity"] == pytest.approx(np.exp(loss))
    some = dataset.val.select(torch.tensor([0, 2]))
    lengths = dataset.tokenizer.lengths[some.fetch(torch.arange(2))[:, 1:].numpy()]
    assert dataset.task_on(some).bytes_per_token == pytest.approx(lengths.mean())


def test_results_are_cached_by_content(file: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bpe(file=file)
    monkeypatch.setattr(Tokenizer, "encode", None)  # cannot be called
    second = bpe(file=file)
    assert np.array_equal(first.train.tokens, second.train.tokens)  # type: ignore[attr-defined]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", file)  # not a folder
    third = bpe(file=file)
    assert np.array_equal(first.train.tokens, third.train.tokens)  # type: ignore[attr-defined]


def test_a_file_or_a_saved_tokenizer_replaces_the_training(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_tokenizer(TEXT[:500], 280, SOURCE)
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.description)
    from_file = text(file=file, tokenizer=str(path), vocabulary=None)
    saved = bpe(file=file, saved_tokenizer=trained.description)
    assert from_file.tokenizer is not None and from_file.task.outputs == trained.size
    assert np.array_equal(from_file.train.tokens, saved.train.tokens)  # type: ignore[attr-defined]
    narrow = trained.encode(TEXT, "a text")
    monkeypatch.setattr(Tokenizer, "size", 70000)  # more tokens than two bytes can tell apart
    wide = trained.encode(TEXT, "a text")
    assert wide.dtype == np.int32 and np.array_equal(wide, narrow)
    windows = Windows(wide, 8)
    assert torch.equal(windows.on(torch.device("cpu")), windows.fetch(torch.arange(len(windows))))


def test_what_cannot_be_tokenized_is_refused(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer=none\.json: no such file; bytes, bpe, or the path"):
        read_tokenizer("none.json")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        read_tokenizer(file)
    with pytest.raises(UserError, match=r"data\.vocabulary=300: only data\.tokenizer=bpe has this key"):
        text(file=file, tokenizer="bytes", vocabulary=300)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"déjà vu": 0, "?": 1}, unk_token="?"))
    (tmp_path / "words.json").write_text(words.to_str())
    with pytest.raises(UserError, match="is not byte-level: its token 'déjà vu'"):
        read_tokenizer(str(tmp_path / "words.json"))
    lower = json.loads(train_tokenizer(TEXT, 300, SOURCE).description)
    lower["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(UserError, match="changes the text"):
        Tokenizer(json.dumps(lower), SOURCE).encode(b"ABC", "a text")
    Path(file).write_bytes(TEXT + b"\xff\n" * 500)
    with pytest.raises(UserError, match=r"data\.file: the (validation|test|training) text is not UTF-8 \(bytes ff\)"):
        bpe(file=file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"data\.tokenizer=bpe: the package tokenizers is not installed; .*\[text\]"):
        train_tokenizer(TEXT, 300, SOURCE)


def test_the_smallest_vocabulary_has_every_byte_and_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    line = ("train", "data=text", f"data.file={tmp_path / 'a.txt'}", "data.tokenizer=bpe", "model=gpt_nano")
    message = refused(tmp_path, *line, "data.vocabulary=256")
    assert "data.vocabulary=256: input should be greater than or equal to 257" in message
    assert len(train_tokenizer(b"some words", SMALLEST, "test").bytes_of) == SMALLEST


def test_a_file_on_which_the_library_panics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # that of pyo3 is no Exception, either
        pass

    def panic(text: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(module, "_library", lambda source: SimpleNamespace(Tokenizer=SimpleNamespace(from_str=panic)))
    with pytest.raises(UserError, match=r"data.tokenizer=a: is not a tokenizer\.json \(index out of bounds"):
        Tokenizer("{}", "data.tokenizer=a")
