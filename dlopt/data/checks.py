"""What the user should know about data that were read: the same checks, in the same words, for every reader.

The header of a run shows the lines: data read, data left out, and warnings. The checks never change the data.
"""

import collections
import contextlib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dlopt.basics.errors import UserError

LEFT_OUT, WARNING = "left out: ", "warning: "
LARGEST = float(np.finfo(np.float32).max)
_LONGEST = 12  # characters of an ending
_SHOWN = 3  # names in a line, and lines of a kind
_FEW = 20  # rows, which a feature may number by chance
_MANY_CLASSES = 50  # if all of them are numbers, they are likely the values of a regression
# Of the formats that dlopt decodes, as Pillow registers them; importing Pillow's plug-ins to ask would take long.
IMAGE_EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".avifs",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
))  # fmt: skip
MISSING = frozenset({"na", "n/a", "#n/a", "nan", "null", "nil", "?"})
"""Words for a missing value, in lower case."""
GAPS = MISSING | {"", "-", "."}
"""What a field of a table has if its value is missing, in lower case."""
_INVISIBLE = dict.fromkeys(map(ord, "\0\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_DECIMALS = re.compile(r"[+-]?[0-9]+\.0*")
_SEPARATORS = re.compile(r"[\s_\-]+")
_MAX_ROUNDING = 0.01  # of a column's range
_MAX_LOST = 0.1  # of its distinct values
_COMPARED = 4096  # values, few enough that ordinary ones are distinct in float32, too
_SAMPLED = 64  # vectors that are looked at if they are read one at a time


# -- data read and left out


def ending(name: str) -> str:
    """Returns the ending of a file's name, for `left_out_note`."""
    if name.startswith("."):
        return "hidden"
    suffix = os.path.splitext(name)[1]
    if not suffix:
        return "without an ending"
    return f"*{suffix}" if suffix[1:].isalnum() and len(suffix) <= _LONGEST else "with other endings"


def left_out_note(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Returns a line about files left out, given their numbers by ending or reason; none without such files."""
    if not counts:
        return ()
    named = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    shown = [f"{count:,} {reason}" for reason, count in named[:10]]
    if rest := sum(count for _, count in named[10:]):
        shown.append(f"{rest:,} others")
    total = sum(counts.values())
    return (f"{LEFT_OUT}{total:,} file{'s' * (total > 1)} ({', '.join(shown)})",)


def listed(names: Sequence[str]) -> str:
    """Returns the first of the names, with dots for others."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def problems(lines: Iterable[str]) -> list[str]:
    """Returns the lines about data that were left out or look wrong, for commands that do not train."""
    return [line for line in lines if line.startswith((LEFT_OUT, WARNING))]


# -- features and other numbers


def number(text: str) -> float:
    """Returns the number that a text shows; NaN for any other text.

    float() also reads 1_000 and the digits of other scripts, which other programs do not write as numbers.
    """
    with contextlib.suppress(ValueError):
        return float(text) if text.isascii() and "_" not in text else math.nan
    return math.nan


def numbers(value: Any, where: str, kind: str) -> np.ndarray:
    """Returns numbers that are finite in float32. Raises `UserError` that starts with `where`.

    `kind`: the type of the values, for messages.
    """
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(value, dtype=object)
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and not (np.abs(array) <= LARGEST).all()):
        if (wrong := _first_wrong(value.tolist() if isinstance(value, np.ndarray) else value, "")) is not None:
            raise UserError(f"{where}{wrong}")
        raise UserError(f"{where}: must have finite numbers in lists of equal lengths ({kind})")
    return array


def _first_wrong(value: Any, position: str) -> str | None:
    """Describes the first entry of nested lists that is missing, or no finite number; None without one."""
    if isinstance(value, list):
        found = (_first_wrong(each, f"{position}[{index}]") for index, each in enumerate(value))
        return next((each for each in found if each is not None), None)
    if value is None:
        return f"{position} is missing (null)"
    is_number = isinstance(value, int | float) and abs(value) <= LARGEST
    return None if is_number else f"{position} is {value!r:.40}, not a finite number of float32"


def count_rows(values: np.ndarray) -> bool:
    """Returns whether numbers [N] number the rows: integers that are an index of a table or a time, not a feature.

    Such numbers are consecutive in any order, or strictly monotone. Ignores numbers that restart (hours, months).
    """
    if len(values) < _FEW or not (values == np.round(values)).all():
        return False
    steps = np.diff(values)
    if (steps > 0).all() or (steps < 0).all():
        return True
    return len(values) == np.ptp(values) + 1 and len(np.unique(values)) == len(values)


def column_warnings(columns: Iterable[tuple[str, np.ndarray]], remedy: str, kind: str = "column") -> tuple[str, ...]:
    """Returns a warning for each feature that counts the rows, or loses most of its precision in float32.

    Args:
        columns: names and values [N] of the features, one in memory at a time. A single feature may count the rows:
            in a table of x and y, x may well be sorted. Some rows are enough, see `sampled`.
        remedy: how to leave out a column; may have {name}.
        kind: what a column is called.
    """
    counting, rounded, total = [], [], 0
    for name, values in columns:
        total += 1
        if values.dtype.kind in "bu":  # whose differences are not numbers, or not negative
            values = values.astype(np.int64)
        if count_rows(values):
            counting.append(f"{kind} {name} counts the rows; {remedy.format(name=name)} if it is an index or a time")
        rounded += _rounding(f"{kind} {name}", values)
    return (*_capped(counting if total > 1 else []), *_capped(rounded))


def rounding_warnings(columns: Iterable[tuple[str, np.ndarray]]) -> tuple[str, ...]:
    """Returns a warning for each column that loses most of its precision in float32, such as seconds since 1970."""
    return _capped([line for name, values in columns for line in _rounding(name, values)])


def _rounding(name: str, values: np.ndarray) -> list[str]:
    exact = values.astype(np.longdouble)  # holds int64
    extent = float(np.ptp(exact)) if len(exact) else 0.0
    with np.errstate(over="ignore"):  # reported where a sample is read
        rounded = exact.astype(np.float32)
        error = float(np.abs(rounded - exact).max()) if extent > 0 else 0.0
    if not 0 < error < math.inf:  # also NaN, which is reported where a sample is read
        return []
    # The extent hides small differences where some values are far from the others.
    some = np.linspace(0, len(exact) - 1, min(len(exact), _COMPARED), dtype=np.int64)
    is_lost = len(np.unique(rounded[some])) < (1 - _MAX_LOST) * len(np.unique(exact[some]))
    if not is_lost and error <= _MAX_ROUNDING * extent:
        return []
    before, after = len(np.unique(exact)), len(np.unique(rounded))
    return [
        f"float32 rounds {name} by up to {error:.3g}, its values differ by up to {extent:.3g}; of {before:,} distinct "
        f"values {after:,} remain; subtract a constant from them in the file"
    ]


def sampled(count: int, most: int = _SAMPLED) -> np.ndarray:
    """Returns the rows to look at, evenly spaced, of data that are read one row at a time."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=np.int64))


def _capped(lines: Sequence[str]) -> tuple[str, ...]:
    more = len(lines) - _SHOWN
    rest = [f"{WARNING}the same holds for {more} more column{'s' * (more > 1)}"] if more > 0 else []
    return (*(WARNING + line for line in lines[:_SHOWN]), *rest)


# -- labels


def natural(name: str) -> tuple[float, str]:
    """Sorts numbers by value, before names. nan counts as a name, because it is not comparable to numbers."""
    value = number(name)
    return (math.inf, name) if math.isnan(value) else (value, name)


def without_decimals(labels: Sequence[str], column: str) -> tuple[Sequence[str], tuple[str, ...]]:
    """Returns the labels, with 1.0 written as 1 if all are integers, or both occur among numbers, and a line about it.

    A program that fills a gap in a column of integers writes some of them, or all of a file, with decimals.
    """
    found = {label: number(label) for label in set(labels)}
    whole = {label: label.partition(".")[0] for label in found if _DECIMALS.fullmatch(label)}
    merged = {label: short for label, short in whole.items() if short in found}
    if all(map(float.is_integer, found.values())):
        merged = whole
    if not merged or any(map(math.isnan, found.values())):
        return labels, ()
    label, short = min(merged.items())
    return [merged.get(each, each) for each in labels], (f"{column}: {label} is read as the class {short}",)


def refuse_values(column: str, labels: Iterable[str], rows: int | None = None) -> None:
    """Raises `UserError` for labels that are more than a few numbers with decimals: the values of a regression.

    `rows`: of a table, whose labels are also refused if most of them differ: they are values, or texts.
    """
    names = set(labels)
    values = [number(name) for name in names]
    are_measured = len(names) > _FEW and all(map(math.isfinite, values)) and not all(map(float.is_integer, values))
    if are_measured or (rows is not None and len(names) > max(rows / 2, 2)):
        raise UserError(
            f"data.labels=class: {column} has {len(names)} different {'numbers' if are_measured else 'values'}"
            f"{'' if rows is None else f' in {rows} rows'}; for a regression, use data.labels=value loss=mse"
        )


def label_warnings(column: str, counts: Mapping[str, int], *, may_be_values: bool = True) -> tuple[str, ...]:
    """Returns what looks wrong in the names of classes, given the samples of each, a line each.

    `may_be_values`: numbers may be the target of a regression.
    """
    names = sorted((name for name in counts if counts[name]), key=natural)
    found = [
        f"{WARNING}{column} has classes that differ in form only: {', '.join(map(repr, group))}"
        for group in equal_forms(names)
    ]
    if single := [name for name in names if counts[name] == 1]:
        plural = "es" * (len(single) > 1)
        found.append(f"{WARNING}{column} has {len(single)} class{plural} with one sample: {listed(single)}")
    if missing := [name for name in names if name.lower() in {"", *MISSING} and len(names) > 1]:
        found.append(f"{WARNING}{column} has the class {missing[0]!r}, which usually means a missing value")
    if may_be_values and _are_numbers(names):
        found.append(
            f"{WARNING}the {len(names)} classes of {column} are numbers; for a regression, use data.labels=value "
            "loss=mse"
        )
    return tuple(found)


def equal_forms(names: Iterable[str]) -> list[list[str]]:
    """Returns the names that differ in form only, such as Red and red, or 1 and 01, in groups."""
    forms = collections.defaultdict(list)
    for name in names:
        forms[form(name)].append(name)
    return [group for group in forms.values() if len(group) > 1]


def form(name: str) -> str:
    """Normalizes a name: drops case, separators, quotes, invisible characters and the notation of numbers."""
    value = number(name)
    if not math.isnan(value):
        return repr(value)
    plain = unicodedata.normalize("NFKC", name).translate(_INVISIBLE).casefold()
    return _SEPARATORS.sub(" ", plain).strip(" \"'") or name


def _are_numbers(names: Sequence[str]) -> bool:
    """Returns whether many classes are numbers; up to 50 may be numbered from 0 or 1."""
    if len(names) <= _FEW:
        return False
    values = [number(name) for name in names]  # sorted
    if any(map(math.isnan, values)):
        return False
    numbered = values[0] in (0, 1) and values == [values[0] + i for i in range(len(values))]
    return len(names) > _MANY_CLASSES or not numbered
