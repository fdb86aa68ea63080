"""All refusals of a command line at once, where they are independent of each other."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import is_below
from dlopt.config.early_checks import check_values
from dlopt.config.overrides import SWEEP_WORDS, group_of, is_hydra, key_of, parse_axes, text_of
from dlopt.config.resolve import to_plain

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dlopt.config.compose import Composer

_FIRST = ("experiment", "debug", "hydra", "from")  # without these, the other words may mean something else
_MOST_VALUES = 100  # of a word of a sweep
_Place = tuple[int, int]  # of an override: the number of the word, and of its value in a list of values


@contextlib.contextmanager
def refused_together(
    composer: "Composer", overrides: "Iterable[str | Override]", *, multirun: bool = False
) -> Iterator[None]:
    """Adds to a `UserError` about one of the overrides the refusals of the others, one a line, in their order.

    `multirun`: the overrides are the words of a sweep; checks each value that they list.
    """
    words = list(overrides)
    try:
        yield
    except UserError as error:
        known = str(error)
        if multirun:
            values = _values_of(composer, words)
            first = _first_refusal_of_sweep(composer, values)
        else:
            values = {(number, 0): word for number, word in enumerate(words)}
            first = _placed(known, values)
        found = _refusals(composer, values, first, multirun)
        if len(found) < 2 or known not in found.values():
            raise
        lines = [f"  {found[place]}" for place in sorted(found)]
        raise UserError("\n".join([f"{len(found)} overrides are refused:", *lines])) from None


def _refusals(
    composer: "Composer",
    values: "Mapping[_Place, str | Override]",
    first: tuple[_Place, str] | None,
    multirun: bool,
) -> dict[_Place, str]:
    """Returns the messages about refused overrides by their place. `first`: the first of them.

    The remaining overrides, without the keys of a refused choice, are checked again.
    """
    remaining = dict(values)
    found: dict[_Place, str] = {}
    refusal = first
    while refusal is not None:
        refused, message = refusal
        refused_word = remaining.pop(refused)
        if group_of(refused_word) in _FIRST:
            break
        found[refused] = message
        for place, word in [*remaining.items()]:
            if place[0] == refused[0]:  # another value of the same key
                is_affected = ": unknown key" in message
            else:
                is_part = "=" not in text_of(refused_word) + text_of(word)  # perhaps of one word: optimizer.lr 0.1
                is_affected = is_part or is_below(key_of(word), [key_of(refused_word)])
            if is_affected:
                del remaining[place]
        refusal = (_first_refusal_of_sweep if multirun else _first_refusal)(composer, remaining)
    return found


def _first_refusal(composer: "Composer", values: "Mapping[_Place, str | Override]") -> tuple[_Place, str] | None:
    """Composes and checks one run; returns the refused override and the message."""
    try:
        parsed = composer.parse(values.values())
        plain, _ = to_plain(composer.compose(parsed))
        check_values(plain, parsed)
    except UserError as error:
        return _placed(str(error), values)
    return None


def _placed(message: str, values: "Mapping[_Place, str | Override]") -> tuple[_Place, str] | None:
    """Returns the override with which a message begins; of several with the same key, the last."""
    found = None
    for place, word in values.items():
        key = key_of(word)
        if message.startswith((f"{text_of(word)}:", f"{key}=", f"{key}:", f"{key} ")):
            found = place, message
    return found


# -- words of a sweep


def _values_of(composer: "Composer", words: "Iterable[str | Override]") -> "dict[_Place, str | Override]":
    """Returns the overrides that each word lists; the word itself if it lists none, or is refused."""
    values: dict[_Place, str | Override] = {}
    for number, word in enumerate(words):
        listed: list[str] = []
        if not is_hydra(word) and key_of(word) not in SWEEP_WORDS:
            with contextlib.suppress(UserError):
                [axis] = parse_axes([word], composer)
                if axis.is_swept and not axis.is_zip and not axis.is_continuous:
                    listed = [override for row in axis.rows()[:_MOST_VALUES] for override in row]
        for position, value in enumerate(listed or [word]):
            values[number, position] = value
    return values


def _first_refusal_of_sweep(
    composer: "Composer", values: "Mapping[_Place, str | Override]"
) -> tuple[_Place, str] | None:
    """Checks each word, then the job of the first values of all words, and jobs that differ from it in one value."""
    base: dict[int, _Place] = {}  # the first value of each word
    more: list[_Place] = []
    for place, value in values.items():
        try:
            [axis] = parse_axes([value], composer)
        except UserError as error:
            return _placed(str(error), {place: value})
        if axis.is_swept or key_of(value) in SWEEP_WORDS:
            continue  # zip(...) and ranges: the sweep refuses them itself
        if place[0] in base:
            more.append(place)
        else:
            base[place[0]] = place
    for changes in [{}, *({place[0]: place} for place in more)]:
        job = {place: values[place] for place in (base | changes).values()}
        refusal = _first_refusal(composer, job)
        if refusal is not None:
            return refusal
    return None
