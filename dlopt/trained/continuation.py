"""Continues a text with a trained language model."""

import codecs
from collections.abc import Iterator, Sequence

import torch

from dlopt.basics.errors import UserError
from dlopt.models.generation import generate
from dlopt.tasks.text import NextToken
from dlopt.trained.restore import Trained


def _task(trained: Trained) -> NextToken:
    assert isinstance(trained.task, NextToken), "`dlopt sample` refuses other models"
    return trained.task


def encode(trained: Trained, prompt: bytes) -> list[int]:
    """Returns the tokens of a prompt: of its text, or the numbers that it lists for data=tokens. Raises `UserError`."""
    if trained.tokenizer is not None:
        tokens: list[int] = trained.tokenizer.encode(prompt, "the prompt").tolist()
        return tokens
    if _task(trained).unit == "byte":
        return list(prompt)
    words = prompt.decode("utf-8", "replace").strip("[] \n").replace(",", " ").split()
    last = trained.task.outputs - 1
    if not words or not all(word.isdecimal() and len(word) < 20 and int(word) <= last for word in words):
        raise UserError(f"prompt: the model reads tokens 0 to {last}; give them as prompt=[464,1266]")
    return list(map(int, words))


def decoded(
    trained: Trained,
    tokens: Sequence[int],
    length: int,
    *,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> Iterator[str]:
    """Yields the text of `tokens`, and of each of the `length` tokens that follow them as soon as it is sampled.

    Of a model of token numbers: the numbers. See `generate` for the other arguments.
    """
    stream = generate(
        trained.module,
        torch.tensor(tokens, device=trained.precision.device),
        length,
        context=trained.window[0],
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    )
    if _task(trained).unit == "token" and trained.tokenizer is None:
        yield " ".join(map(str, [*tokens, *stream]))
        return
    # A token may be a part of a character, which may have several bytes.
    table = [bytes([byte]) for byte in range(256)] if trained.tokenizer is None else trained.tokenizer.bytes_of
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield decoder.decode(b"".join(table[token] for token in tokens))
    for token in stream:
        yield decoder.decode(table[token])
    yield decoder.decode(b"", final=True)
