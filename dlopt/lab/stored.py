"""The types of what manifests of the laboratory hold, whose folders may be a stranger's."""

from typing import Annotated

from annotated_types import Interval, Predicate

from dlopt.extend import printable

MOST_RUNS = 1_000_000
"""Of a folder: what plans more is damaged."""
Number = Annotated[int, Interval(ge=1, le=MOST_RUNS)]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 200 and not text.startswith(".") and "/" not in text and printable(text) == text


Name = Annotated[str, Predicate(_is_name)]  # of a folder
