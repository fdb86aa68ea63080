"""Formats numbers and values: one form for each kind, on terminals, pages and in files."""

import math
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

_NAMED_SHARES = 5
_LONG_FLOAT = re.compile(r"(?<![\w.])\d+\.\d{5,}(e[+-]?\d+)?(?![\w.])")
# What is copied from a message: between backticks, or after a colon; "KEY: dlopt find-lr does not read ..." is none.
_COMMAND = re.compile(r"`[^`]*`|(?<=: )dlopt (?!.* does not read).*|(\S+ -m )?\S*\bpip install [^;)]*")


def format_number(value: float | None) -> str:
    """Four decimals for usual losses; scientific notation for very small and large values."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def format_percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def format_shares(counts: Sequence[float], names: Iterable[object], total: int) -> str:
    """no 70.4 %, yes 29.6 %; of more than five names, the smallest and the largest: 0.4 % (ox) to 12.1 % (cat).

    Without the names if the largest is at most 1.5 times the smallest: 9.7 to 10.1 % each.
    """
    percents = [100 * count / max(total, 1) for count in counts]
    texts = [f"{each:.1f} %" if each >= 1 or each == 0 else f"{each:.2g} %" for each in percents]
    known = [printable(str(name)) for name in names]
    if len(counts) <= _NAMED_SHARES:
        return ", ".join(f"{name} {text}" for name, text in zip(known, texts, strict=True))
    low, high = (counts.index(each) for each in (min(counts), max(counts)))
    if counts[high] > 1.5 * counts[low]:
        return f"{texts[low]} ({known[low]}) to {texts[high]} ({known[high]})"
    span = texts[low] if texts[low] == texts[high] else f"{texts[low].removesuffix(' %')} to {texts[high]}"
    return f"{span} each"


def format_epoch_number(epoch: float) -> str:
    """3; within an epoch 2.25."""
    return str(epoch) if isinstance(epoch, int) else f"{epoch:.2f}"


def format_lr(value: float | None) -> str:
    """Four significant digits, no trailing zeros."""
    return "-" if value is None else f"{value:.4g}"


def round_floats(text: str) -> str:
    """Rounds numbers with many decimals to four significant digits: lr=0.12369483267621112 to lr=0.1237."""
    return _LONG_FLOAT.sub(lambda match: f"{float(match[0]):.4g}", text)


def format_bytes(count: float) -> str:
    """1.5 MiB; 1,020 KiB."""
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    return f"{float(f'{count / 1024**power:.3g}'):,g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def format_mib(count: float) -> str:
    """460 MiB: a unit that values of different sizes share."""
    return f"{count / 1024**2:,.0f} MiB"


def format_duration(seconds: float) -> str:
    """7.2 s, 12:34, 1:02:03."""
    return f"{seconds:.1f} s" if seconds < 60 else format_clock(seconds)


def round_duration(seconds: float) -> float:
    """Rounds seconds to what `format_duration` shows, but not to 0."""
    return max(round(seconds, 1), 0.1) if seconds < 60 else math.ceil(seconds)


def format_clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_amount(value: float) -> str:
    """12; 1,200; 43.33: a count, or the mean of several."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def format_rate(value: float) -> str:
    """1,234; "-" if it was not measured (NaN)."""
    return "-" if math.isnan(value) else f"{value:,.0f}"


def format_gib(value: float) -> str:
    return f"{value:.1f} GiB"


def format_count(noun: str, count: int) -> str:
    """1 epoch, 1,200 steps, 1 study. `noun` is a plural."""
    singular = re.sub(r"ies$", "y", noun).removesuffix("s")
    return f"{count:,} {singular if count == 1 else noun}"


def format_value(value: Any) -> str:
    """Formats a value as in an override: true, null, [64,64]."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(format_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{format_value(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)


def brief(value: Any) -> str:
    """Formats a value for labels, with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def printable(value: str) -> str:
    """Replaces characters that would control a terminal or break a table."""
    return "".join(character if character.isprintable() else "�" for character in value)


def terminal_width(stream: TextIO | None) -> int | None:
    """Returns the characters of a line of the terminal; None for a pipe or a file, whose lines have no limit."""
    is_terminal = stream is not None and stream.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None


def wrap(text: str, width: int | None, *, first: str = "", indent: str = "") -> list[str]:
    """Breaks a text into lines at its blanks; words and commands stay whole, also those longer than a line.

    `width`: None for no limit. `first`, `indent`: what the first and the other lines begin with.
    """
    if width is None:
        return [first + text]
    glued = _COMMAND.sub(lambda match: match[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        glued, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in lines] or [""]
