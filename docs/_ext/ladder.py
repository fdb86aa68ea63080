"""Generates the tables of the ladder whose results are in docs/ladder/FAMILY/results.json."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from markup import code, table, text

from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.analysis import Analysis, Gain, Prediction
from dlopt.lab.ladder.ladder import LadderRequest, read_ladder
from dlopt.lab.ladder.results import Results, measured
from dlopt.lab.ladder.scaling_laws import PowerLaw, ScalingLaws
from dlopt.lab.ladder.table import tables

_OMITTED = ("Laws", "Seconds", "Weight decay")  # tables that only the report has
_OF_ARMS = ("Loss at", "Learning rates")  # with arms, in addition to the comparisons within an arm


def ladder(folder: Path) -> str:
    """The tables of measured values, and how the ladder was made. The text beside them says what it shows."""
    found = results(folder)
    facts = dict(found.facts)
    commands = [each for each in str(facts.pop("command")).split("; ") if each]
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
    lines = []
    for each in tables(found):
        title = each.title or ""
        if title.startswith(_OMITTED) or "by the laws" in title:
            continue
        if found.arms and "same arm" not in title and not title.startswith(_OF_ARMS):
            continue
        rows = [[code(row[0]), *map(text, row[1:])] for row in each.rows]
        lines += [f"{text(title)}:", "", table([_head(head, found) for head in each.heads], rows)]
    runs = len(found.outcomes) + len(found.searched)
    by = f"by {' and '.join(map(code, commands))}, with" if len(commands) <= 2 else "with"
    lines += [
        f"{runs} runs, made {by} {text(made)}.",
        f"A copy of [results.json](ladder/{folder.name}/results.json) in a folder is enough for",
        "`dlopt ladder report FOLDER`, which prints all tables and findings.",
    ]
    return "\n".join(lines)


def _head(plain: str, found: Results) -> str:
    """Capitalizes a word; a rung's name and a symbol stay as they are."""
    if plain in found.ladder.rungs:
        return code(plain)
    return plain[0].upper() + plain[1:] if len(plain) > 1 else plain


def results(folder: Path) -> Results:
    """Reads results.json; the analysis is the stored one, since the last digits of a fit depend on the processor."""
    saved: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = read_ladder(folder)
    assert found is not None
    request = LadderRequest(folder, found)
    searches = {name: request.search(name) for name in found.optimizers}
    finals = {trial: request.outcome(trial) for name in found.optimizers for trial in request.finals(name)}
    outcomes = {trial: each for trial, each in finals.items() if each is not None}
    decays = {name: request.decay_search(name) for name in found.joint}
    searched = {trial: each for trial, each in request.known().items() if trial.index is not None}
    plain = Results(found, searches, searched, outcomes, None, saved["facts"], decays)
    plain = replace(plain, arms={arm: _analysis(plain, each) for arm, each in saved.get("arms", {}).items()})
    return plain if saved["analysis"] is None else replace(plain, analysis=_analysis(plain, saved["analysis"]))


def _analysis(plain: Results, saved: dict[str, Any]) -> Analysis:
    whole, names = measured(plain.ladder, plain.outcomes), saved["mean"]
    laws = {name: PowerLaw(math.log(law["scale"]), law["exponent"]["value"]) for name, law in saved["laws"].items()}
    irreducible = _interval(saved["irreducible"])
    return Analysis(
        replace(whole, losses={name: whole.losses[name] for name in names}),
        {name: list(map(_number, means)) for name, means in names.items()},
        ScalingLaws(irreducible.value, laws, math.nan),
        irreducible,
        {name: _interval(law["exponent"]) for name, law in saved["laws"].items()},
        {name: _gain(gain) for name, gain in saved["gains"].items()},
        {
            name: Prediction(_interval(each["predicted"]), each["measured"])
            for name, each in saved["predictions"].items()
        },
    )


def _gain(saved: dict[str, Any]) -> Gain:
    return Gain(
        [*map(_interval, saved["speed_up"])],
        [*map(_interval, saved["interpolated"])],
        [*map(_interval, saved["difference"])],
        _interval(saved["trend"]),
        _interval(saved["change"]),
    )


def _interval(saved: dict[str, Any]) -> Interval:
    return Interval(*(_number(saved[key]) for key in ("value", "low", "high")))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
