"""All refusals of a command line at once, where they are independent of each other."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import is_below
from dlopt.config.early_checks import check_values
from dlopt.config.overrides import group_of, key_of, text_of
from dlopt.config.resolve import to_plain

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dlopt.config.compose import Composer

_FIRST = ("experiment", "debug", "hydra", "from")  # without these, the other words may mean something else


@contextlib.contextmanager
def refused_together(composer: "Composer", overrides: "Iterable[str | Override]") -> Iterator[None]:
    """Adds to a `UserError` about one of the overrides the refusals of the others, one a line, in their order."""
    words = list(overrides)
    try:
        yield
    except UserError as error:
        found = _refusals(composer, words, str(error))
        if len(found) < 2:
            raise
        lines = [f"  {found[index]}" for index in sorted(found)]
        raise UserError("\n".join([f"{len(found)} overrides are refused:", *lines])) from None


def _refusals(composer: "Composer", words: "Sequence[str | Override]", known: str) -> dict[int, str]:
    """Returns the messages about refused words by their index. `known`: the one that has been raised.

    The remaining words, without the keys of a refused choice, are checked again.
    """
    remaining = dict(enumerate(words))
    found: dict[int, str] = {}
    message: str | None = known
    while message is not None:
        refused = _index_of(message, remaining)
        if refused is None or group_of(remaining[refused]) in _FIRST:
            break
        found[refused] = message
        refused_word = remaining.pop(refused)
        for index, word in [*remaining.items()]:
            is_part = "=" not in text_of(refused_word) + text_of(word)  # perhaps of one word: optimizer.lr 0.1
            if is_part or is_below(key_of(word), [key_of(refused_word)]):
                del remaining[index]
        message = _first_refusal(composer, [*remaining.values()])
    return found


def _index_of(message: str, words: "dict[int, str | Override]") -> int | None:
    """Returns the index of the word with which a message begins; of several with the same key, that of the last."""
    found = None
    for index, word in words.items():
        key = key_of(word)
        if message.startswith((f"{text_of(word)}:", f"{key}=", f"{key}:", f"{key} ")):
            found = index
    return found


def _first_refusal(composer: "Composer", words: "Sequence[str | Override]") -> str | None:
    try:
        parsed = composer.parse(words)
        plain, _ = to_plain(composer.compose(parsed), parsed)
        check_values(plain, parsed)
    except UserError as error:
        return str(error)
    return None
