"""What the runs of a report trained, in one line: data, model, length, device, version and date."""

import re
from collections.abc import Callable

from dlopt.basics.formats import format_count, printable
from dlopt.basics.plain_values import regular_lines
from dlopt.results.leaderboard import Record, is_number
from dlopt.results.ranking import Ranking

_LARGEST = 100_000_000  # bytes of train.log, whose first line is read


def setting_text(ranking: Ranking) -> str:
    """Formats digits (1,438 train incl. 144 val, 359 test) · 2 models · 3 epochs: how many, where runs differ."""
    runs = [run for run in ranking.records if run.has_ended] or ranking.records
    parts = []
    for noun, describe in _PARTS.items():
        found = {text for run in runs if (text := describe(run))}
        parts += [printable(*found) if len(found) == 1 else format_count(noun, len(found))] if found else []
    dates = sorted({date for run in runs if (date := _date(run))})
    return " · ".join([*parts, *([" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else [])])


def _data(run: Record) -> str:
    """Counts the samples as they were read, of a text the tokens."""
    identity, validation, sizes = run.origin.get("data"), run.origin.get("validation"), {}
    for split, part in identity.items() if isinstance(identity, dict) else ():
        size = (part.get("samples") or part.get("tokens")) if isinstance(part, dict) else None
        if is_number(size):
            sizes[split] = f"{size:,} {split}"
    if validation and "train" in sizes and "val" not in sizes:
        sizes["train"] += f" incl. {validation['count']:,} val"
    subset = run.config.get("data.subset")
    sizes |= {} if subset is None else {"subset": f"subset {subset}"}
    return f"{run.config.get('data', '')} ({', '.join(sizes.values())})".removesuffix(" ()")


def _model(run: Record) -> str:
    parameters = run.metric("parameters")
    return str(run.config.get("model", "")) + ("" if parameters is None else f", {parameters:,.0f} parameters")


def _length(run: Record) -> str:
    found = ((unit, run.config.get(unit)) for unit in ("steps", "epochs"))
    return next((f"{value:,} {unit if value != 1 else unit[:-1]}" for unit, value in found if is_number(value)), "")


def _version(run: Record) -> str:
    commit = f" at commit {run.commit[:8]}" if run.commit else ""
    return f"dlopt {run.origin.get('versions', {}).get('dlopt', '')}".rstrip() + commit


def _date(run: Record) -> str:
    try:
        line = next(regular_lines(run.path / "train.log", _LARGEST), b"")[:10].decode(errors="replace")
    except (OSError, ValueError):
        return ""
    return line if re.fullmatch(r"\d{4}-\d\d-\d\d", line) else ""


_PARTS: dict[str, Callable[[Record], str]] = {
    "data sets": _data,
    "models": _model,
    "lengths": _length,
    "devices": lambda run: run.origin.get("device", ""),
    "versions": _version,
}
