"""All refusals of a command line at once, where they are independent of each other."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        lists = [_values_of(composer, word) if multirun else [word] for word in words]
        values = {(number, i): value for number, listed in enumerate(lists) for i, value in enumerate(listed)}
        refusal = _first_refusal(composer, values, multirun) if multirun else _placed(error, values)
        found: dict[_Place, UserError] = {}
        while refusal is not None and group_of(values[refusal[0]]) not in _FIRST:
            found[refusal[0]] = refusal[1]
            values = {each: word for each, word in values.items() if not _may_follow(each, word, refusal, values)}
            refusal = _first_refusal(composer, values, multirun)
        parts = [found[place] for place in sorted(found)]
        if len(parts) < 2 or str(error) not in map(str, parts):
            raise
        lines = [f"  {each}" for each in parts]
        together = UserError("\n".join([f"{len(found)} overrides are refused:", *lines]))
        together.parts = parts
        raise together from None


def _values_of(composer: "Composer", word: "str | Override") -> "Sequence[str | Override]":
    """Returns the overrides that a word of a sweep lists; the word itself if it lists none, or is refused."""
    if not is_hydra(word) and key_of(word) not in SWEEP_WORDS:
        with contextlib.suppress(UserError):
            [axis] = parse_axes([word], composer)
            if axis.is_swept and not axis.is_zip and not axis.is_continuous:
                return [override for row in axis.rows()[:_MOST_VALUES] for override in row] or [word]
    return [word]


def _first_refusal(
    composer: "Composer", values: "Mapping[_Place, str | Override]", multirun: bool
) -> tuple[_Place, UserError] | None:
    """Returns the first override that is refused, and the error.

    Composes and checks a run of the first values of all words, and runs that differ from it in one value.
    """
    first: dict[int, _Place] = {}  # the first value of each word
    more: list[_Place] = []
    for place, value in values.items():
        if multirun:
            try:
                [axis] = parse_axes([value], composer)
            except UserError as error:
                return _placed(error, {place: value})
            if axis.is_swept or key_of(value) in SWEEP_WORDS:
                continue  # zip(...) and ranges: the sweep refuses them itself
        if first.setdefault(place[0], place) != place:
            more.append(place)
    for changes in [{}, *({place[0]: place} for place in more)]:
        run = {place: values[place] for place in (first | changes).values()}
        try:
            parsed = composer.parse(run.values())
            plain, _ = to_plain(composer.compose(parsed))
            check_values(plain, parsed)
        except UserError as error:
            return _placed(error, run)
    return None


def _placed(error: UserError, values: "Mapping[_Place, str | Override]") -> tuple[_Place, UserError] | None:
    """Returns the override with which a message begins; of several with the same key, the last."""
    found = None
    for place, word in values.items():
        key = key_of(word)
        if str(error).startswith((f"{text_of(word)}:", f"{key}=", f"{key}:", f"{key} ")):
            found = place, error
    return found


def _may_follow(
    place: _Place, word: "str | Override", refusal: tuple[_Place, UserError], values: "Mapping[_Place, str | Override]"
) -> bool:
    """Returns whether an override is refused, or what is wrong with it may follow from what is refused."""
    (number, _), error = refusal
    refused = values[refusal[0]]
    if place[0] == number:  # another value of the same key, or itself
        return place == refusal[0] or error.kind == "unknown_key"
    is_part = "=" not in text_of(refused) + text_of(word)  # perhaps of one word: optimizer.lr 0.1
    return is_part or is_below(key_of(word), [key_of(refused)])  # a key of a refused choice
