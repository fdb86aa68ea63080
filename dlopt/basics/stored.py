"""What dlopt reads of the files that it has written: by type and with a limit, as a folder may be a stranger's."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import short_path
from dlopt.basics.formats import printable
from dlopt.basics.plain_values import load_yaml, parse_json, read_regular

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A file that dlopt keeps, and what it must hold.

    The types are strict, as in JSON: "3" or true is no number, but a list may be a tuple.

    Attributes:
        path: .yaml; .jsonl for a value per line; any other name for JSON.
        kind: the type of the value, of a line in .jsonl: a dataclass, `dict[str, Any]`, ...
        limit: bytes of the file.
        cure: what to do about a damaged file.
    """

    path: Path
    kind: type[T] | UnionType
    limit: int = 1 << 20
    cure: str = "restore it, or remove it and repeat the command"

    def read(self) -> T | None:
        """Returns the value; None if there is no file. Raises `UserError` for a damaged one."""
        try:
            if self.path.suffix == ".yaml":
                return self._checked(json.dumps(load_yaml(self.path, self.limit)))
            return self.parse(read_regular(self.path, self.limit))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError, UserError) as error:  # the last one of a condition, see `Condition`
            raise self.damaged(_reason(error)) from None

    def lines(self) -> list[T]:
        """Returns the values of all lines; [] if there is no file. Raises `UserError` for a damaged one."""
        values: list[T] = []
        try:
            content = read_regular(self.path, self.limit)
        except (FileNotFoundError, NotADirectoryError):
            return values
        except (ValueError, OSError) as error:
            raise self.damaged(_reason(error)) from None
        for line in content.removesuffix(b"\n").split(b"\n"):
            try:
                values.append(self.parse(line))
            except ValueError as error:
                raise self.damaged(f"line {len(values) + 1}: {_reason(error)}") from None
        return values

    def parse(self, text: bytes) -> T:
        """Returns the value of a JSON text. Raises ValueError."""
        parse_json(text)  # limits its depth and its numbers
        return self._checked(text)

    def damaged(self, reason: str) -> UserError:
        return FileError(f"{short_path(self.path)}: is damaged: {printable(reason)}; {self.cure}")

    def _checked(self, text: bytes | str) -> T:
        return cast("T", _adapter(cast("Any", self.kind)).validate_json(text, strict=True))


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    """Returns the check of a kind. Making it takes 10 ms: too long for each line of a file."""
    from pydantic import TypeAdapter  # which the help does not need

    return TypeAdapter(kind)


def _reason(error: Exception) -> str:
    """Returns the first error of a check by pydantic, or of reading and parsing, in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))[:200]
    if isinstance(error, UnicodeDecodeError):
        return "is not text in UTF-8"
    return "is not JSON" if isinstance(error, json.JSONDecodeError) else str(getattr(error, "strerror", None) or error)
