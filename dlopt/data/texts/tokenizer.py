"""Byte-level tokenizers: trained on a text with the package tokenizers, or read from a tokenizer.json."""

import hashlib
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dlopt.basics.cache import cache_file, exclusive, load_arrays, save_arrays
from dlopt.basics.errors import FileError, UserError, require_package
from dlopt.basics.files import reason
from dlopt.basics.plain_values import read_regular

SEPARATOR = "\0"  # between documents: one token, one byte
SMALLEST = 257  # every byte, and the separator
_MAX_BYTES = 1 << 28  # of a tokenizer.json
_CHUNK = 1 << 16  # bytes that are tokenized at once; a chunk ends with a line
_SHOWN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _SHOWN]
_BYTES = {chr(byte): byte for byte in _SHOWN} | {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}
"""The byte of each character of a byte-level vocabulary, as in GPT-2."""
_LINE_END = re.compile(rb"(?<=\S)\n(?=\S)")  # more white space around it may belong to one token


class Tokenizer:
    """Maps texts to tokens whose bytes, joined, are the text.

    Args:
        description: the content of a tokenizer.json.
        source: the override that set it, for messages.

    Raises:
        UserError: the package is missing, or this is no byte-level tokenizer.
    """

    def __init__(self, description: str, source: str) -> None:
        library = _library(source)
        try:
            self._tokenizer = library.Tokenizer.from_str(description)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises Exception itself, and panics of Rust are no Exception
            raise UserError(f"{source}: is not a tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.description = description
        self.source = source
        _ = self.bytes_of

    def __getstate__(self) -> tuple[str, str]:
        return self.description, self.source

    def __setstate__(self, state: tuple[str, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def size(self) -> int:
        """Number of tokens: the largest one plus 1."""
        return len(self.bytes_of)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.description.encode()).hexdigest()

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """The bytes of each token; empty for numbers without a token. Raises `UserError` if it is not byte-level."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        added = {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        table = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
        for text, number in vocabulary.items():
            if number in added:
                continue
            try:
                table[number] = bytes(_BYTES[character] for character in text)
            except KeyError:
                raise UserError(
                    f"{self.source}: is not byte-level: its token {text!r} is not a sequence of bytes; "
                    "use data.tokenizer=bpe, or a byte-level tokenizer such as GPT-2's"
                ) from None
        for number, content in added.items():
            table[number] = content.encode()
        return table

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of bytes of each token, int64 [size]."""
        return np.array([len(each) for each in self.bytes_of], dtype=np.int64)

    def bytes_per_token(self, tokens: np.ndarray) -> float:
        """Returns the mean number of bytes of the tokens."""
        return float(self.lengths[tokens].mean())

    def encode(self, text: bytes, name: str) -> np.ndarray:
        """Returns the tokens of a text: uint16, or int32 for more than 65,536 tokens.

        Raises `UserError` that names the text if it is not UTF-8, or if its tokens are not exactly the text.
        """
        dtype = np.uint16 if self.size <= 1 << 16 else np.int32
        parts = [np.empty(0, dtype)]
        for chunk in _chunks(text):
            encoded = self._tokenizer.encode(_decoded(chunk, name), add_special_tokens=False).ids
            if b"".join(map(self.bytes_of.__getitem__, encoded)) != chunk:
                raise UserError(
                    f"{self.source}: changes the text (it normalizes it, adds spaces, or lacks characters), so bits "
                    "per byte would be wrong; use data.tokenizer=bpe, or a tokenizer that keeps every byte"
                )
            parts.append(np.array(encoded, dtype))
        return np.concatenate(parts)


def read_tokenizer(file: str) -> Tokenizer:
    """Reads a tokenizer.json. Raises `UserError`."""
    path, source = Path(os.path.expanduser(file)), f"data.tokenizer={file}"
    try:
        return Tokenizer(read_regular(path, _MAX_BYTES).decode(), source)
    except FileNotFoundError:
        raise FileError(f"{source}: no such file; bytes, bpe, or the path of a tokenizer.json are allowed") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{source}: cannot be read ({reason(error)})") from None


def train_tokenizer(text: bytes, vocabulary: int, source: str) -> Tokenizer:
    """Trains byte-pair encoding (Sennrich et al. 2016) on the bytes of `text`, with the word boundaries of GPT-2.

    Deterministic; the result is cached. It has fewer tokens if the text has fewer different words.
    Raises `UserError`.
    """
    library = _library(source)
    key = hashlib.sha256(text).hexdigest()
    target = cache_file("tokenizer", "1", library.__version__, str(vocabulary), key)
    with exclusive(target):
        if (cached := load_arrays(target)) is not None:
            return Tokenizer(cached["description"].tobytes().decode(), source)
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(_BYTES),
            show_progress=False,
        )
        documents = (part for chunk in _chunks(text) for part in _decoded(chunk, "the training text").split(SEPARATOR))
        tokenizer.train_from_iterator(documents, trainer)
        description: str = tokenizer.to_str()
        save_arrays(target, {"description": np.frombuffer(description.encode(), dtype=np.uint8)})
    return Tokenizer(description, source)


def tokenize(tokenizer: Tokenizer, parts: list[np.ndarray], names: list[str]) -> list[np.ndarray]:
    """Returns the tokens of each part, the bytes (uint8) of a text. They are cached, by content.

    Raises `UserError`, see `Tokenizer.encode`.
    """
    digests = [hashlib.sha256(part.data).hexdigest() for part in parts]
    target = cache_file("tokens", "1", tokenizer.digest, *digests)
    with exclusive(target):
        if (cached := load_arrays(target)) is not None:
            return [cached[str(number)] for number in range(len(parts))]
        encoded = [tokenizer.encode(part.tobytes(), name) for part, name in zip(parts, names, strict=True)]
        save_arrays(target, {str(number): tokens for number, tokens in enumerate(encoded)})
    return encoded


def _chunks(text: bytes) -> Iterator[bytes]:
    """Splits a text where pre-tokenizers do, or between characters where a paragraph is too long."""
    start = 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text):
            line = _LINE_END.search(text, end, end + _CHUNK)
            end = character_start(text, end if line is None else line.end())
        yield text[start:end]
        start = end


def character_start(text: bytes | np.ndarray, position: int) -> int:
    """Returns the first position from `position` at which a character of UTF-8 starts."""
    while position < len(text) and text[position] & 0xC0 == 0x80:
        position += 1
    return position


def _decoded(chunk: bytes, name: str) -> str:
    try:
        return chunk.decode()
    except UnicodeDecodeError as error:
        shown = chunk[error.start : error.end].hex(" ")
        raise UserError(f"data.file: {name} is not UTF-8 (bytes {shown}); use data.tokenizer=bytes") from None


def _library(source: str) -> Any:
    require_package(source, "tokenizers", "text")
    import tokenizers

    # Its threads do not survive a fork, with which loader workers and the jobs of a sweep start.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return tokenizers
