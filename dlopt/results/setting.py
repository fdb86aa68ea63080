"""What the runs of a report trained, in one line: data, model, length, device, version and date."""

from collections.abc import Callable

from dlopt.basics.formats import format_count, printable
from dlopt.results.leaderboard import Record, is_number
from dlopt.results.ranking import Ranking
from dlopt.results.reading import date_of


def setting_text(ranking: Ranking) -> str:
    """Formats digits (1,294 train, 144 val, 359 test) · 2 models · 3 epochs: how many, where runs differ."""
    runs = [run for run in ranking.records if run.has_ended] or ranking.records
    parts = []
    for noun, describe in _PARTS.items():
        found = {text for run in runs if (text := describe(run))}
        parts += [printable(*found) if len(found) == 1 else format_count(noun, len(found))] if found else []
    dates = sorted({date for run in runs if (date := date_of(run)[:10])})
    return " · ".join([*parts, *([" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else [])])


def _data(run: Record) -> str:
    """Counts the samples as the header of a run does, of a text the tokens; with a subset as they were read."""
    identity, validation, sizes = run.origin.get("data"), run.origin.get("validation"), {}
    subset = run.config.get("data.subset")
    for split, part in identity.items() if isinstance(identity, dict) else ():
        size = (part.get("samples") or part.get("tokens")) if isinstance(part, dict) else None
        if is_number(size):
            sizes[split] = size
    texts = {split: f"{size:,} {split}" for split, size in sizes.items()}
    if validation and "train" in sizes and "val" not in sizes:
        count = validation["count"]
        kept = f"{sizes['train'] - count:,} train, {count:,} val"
        texts["train"] = kept if subset is None else f"{texts['train']} incl. {count:,} val"
    texts |= {} if subset is None else {"subset": f"subset {subset}"}
    return f"{run.config.get('data', '')} ({', '.join(texts.values())})".removesuffix(" ()")


def _model(run: Record) -> str:
    parameters = run.metric("parameters")
    return str(run.config.get("model", "")) + ("" if parameters is None else f", {parameters:,.0f} parameters")


def _length(run: Record) -> str:
    found = ((unit, run.config.get(unit)) for unit in ("steps", "epochs"))
    return next((f"{value:,} {unit if value != 1 else unit[:-1]}" for unit, value in found if is_number(value)), "")


def _version(run: Record) -> str:
    commit = f" at commit {run.commit[:8]}" if run.commit else ""
    return f"dlopt {run.origin.get('versions', {}).get('dlopt', '')}".rstrip() + commit


_PARTS: dict[str, Callable[[Record], str]] = {
    "data sets": _data,
    "models": _model,
    "lengths": _length,
    "devices": lambda run: run.origin.get("device", ""),
    "versions": _version,
}
