"""The reader of what the laboratory has written: by the types of its dataclasses, as a folder may be a stranger's."""

import json
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval, Predicate

from dlopt.basics.formats import printable
from dlopt.basics.plain_values import parse_json, read_regular
from dlopt.extend import UserError, short_path

MOST_RUNS = 1_000_000
"""Of a folder: what plans more is damaged."""
Number = Annotated[int, Interval(ge=1, le=MOST_RUNS)]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 200 and not text.startswith(".") and "/" not in text and printable(text) == text


Name = Annotated[str, Predicate(_is_name)]  # of a folder


def read_stored(path: Path, kind: Any, limit: int = 1 << 20) -> Any:
    """Reads a JSON file of at most `limit` bytes as a value of the type `kind`; None if it is missing.

    The types are strict: "3" or true is no number. Raises `UserError`.
    """
    from pydantic import TypeAdapter  # which the help does not need

    try:
        content = read_regular(path, limit)
        parse_json(content)  # limits its depth and its numbers
        return TypeAdapter(kind).validate_json(content, strict=True)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise damaged(path, getattr(error, "strerror", None) or reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """Returns the first error of a check by pydantic, or of `parse_json`, in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))[:200]
    return "is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)[:200]


def damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{short_path(path)}: is damaged: {printable(reason)}; restore it, or remove it and repeat the command"
    )
