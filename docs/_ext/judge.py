"""Generates the tables of what `dlopt judge` decided on changes of known size, from docs/judge/evidence.json."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from markup import table

from dlopt.lab.judge.sequential import Look, fewest_pairs, looks, rate_of
from dlopt.lab.judge.sequential import evidence as evidence_of

METRICS = {"val_loss": "validation loss", "val_accuracy": "validation accuracy"}
SIZES = ((2, 3), (3, 5), (5, 10), (10, math.inf))


def evidence(folder: Path) -> str:
    """The tables of both metrics, of the changes with an effect, and of the pairs that a proposal takes."""
    found: dict[str, Any] = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    return "\n".join([*_nulls(found), "", *_changes(found), "", *_pairs()])


def last(gains: Sequence[float | str], rate: float) -> Look:
    return _last(tuple(map(float, gains)), rate)


@functools.cache  # a change is in two rows
def _last(gains: tuple[float, ...], rate: float) -> Look:
    undecided = [*takewhile(lambda each: each < math.log(1 / rate), evidence_of(gains))]  # 0 is in their intervals
    return [*looks(gains, rate, first=min(len(undecided) + 1, len(gains)))][-1]


def _nulls(found: dict[str, Any]) -> list[str]:
    """What each rule did with the changes that do nothing."""
    rate, nulls = found["rate"], found["nulls"]
    seeds = [each for each in nulls if each["kind"] == "other seeds"]
    same = [each for each in nulls if each.get("same")]
    rows = []
    for metric, name in METRICS.items():
        gains = [[*map(float, each[metric])] for each in seeds]
        kept = sum(each[0] > 0 for each in gains)
        rows.append([f"keep what improves the {name} of one run", f"{kept} ({_percent(kept, len(nulls))})", ""])
        rules: dict[str, Callable[[int], float]] = {
            f"`dlopt judge`, {name}, each with the error rate {rate:g}": lambda _: rate,
            f"`dlopt judge`, {name}, each the first against its base": lambda _: rate_of(1, rate),
            f"`dlopt judge`, {name}, all against one base": lambda number: rate_of(number, rate),
        }
        for rule, of in rules.items():
            verdicts = [last(each, of(number)).verdict for number, each in enumerate(gains, start=1)]
            better, worse = verdicts.count("better"), verdicts.count("worse")
            shown = [f"{count} ({_percent(count, len(nulls))})" for count in (better, worse)]
            rows.append([rule, *shown])
    kinds = {kind: sum(each["kind"] == kind for each in nulls) for kind in dict.fromkeys(n["kind"] for n in nulls)}
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return [
        f"{len(nulls)} changes that do nothing ({counted}), and how many of them each rule called better or worse:",
        "",
        table(["Rule", "Better", "Worse"], rows).strip(),
        "",
        f"Renamed variables and reordered keys: {len(same)} of {len(nulls) - len(seeds)} were found to be equal, from "
        "the config or from two pairs of runs.",
    ]


def _changes(found: dict[str, Any]) -> list[str]:
    """What became of the changes with an effect, each as the first proposal against its base."""
    rows = []
    changes = found["changes"]
    for low, high in SIZES:
        chosen = [each for each in changes if low <= abs(each["size"]) < high]
        if chosen:
            rows.append([f"{low} to {high:g}" if math.isfinite(high) else f"{low} or more", *_decided(chosen, found)])
    rows.append(["all", *_decided(changes, found)])
    heads = ["Standard deviations", "Changes", f"Decided in {found['pairs']} pairs", "In the wrong direction"]
    lines = table([*heads, "Pairs (median)", "First run in the wrong direction"], rows).strip()
    return [f"{len(changes)} changes with an effect, by size (measured before, on other seeds):", "", lines]


def _decided(changes: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    verdicts = [last(each["val_loss"], rate_of(1, found["rate"])) for each in changes]
    sides = ["better" if each["size"] > 0 else "worse" for each in changes]
    decided = [look for look in verdicts if look.verdict != "undecided"]
    wrong = sum(look.verdict not in ("undecided", side) for look, side in zip(verdicts, sides, strict=True))
    first = sum((float(each["val_loss"][0]) > 0) != (each["size"] > 0) for each in changes)
    pairs = f"{median(look.pairs for look in decided):g}" if decided else ""
    count = f"{len(decided)} ({_percent(len(decided), len(changes))})"
    return [str(len(changes)), count, str(wrong), pairs, str(first)]


def _pairs() -> list[str]:
    numbers = (1, 2, 5, 10, 20, 50, 100)
    rows = [
        ["error rate", *(f"{rate_of(number, 0.05):.2g}" for number in numbers)],
        ["fewest pairs", *(str(fewest_pairs(rate_of(number, 0.05))) for number in numbers)],
    ]
    return [
        "The price of the correction, with `error_rate=0.05`:",
        "",
        table(["Proposal", *map(str, numbers)], rows).strip(),
    ]


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"
