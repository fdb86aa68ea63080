"""Generates the tables of what `dlopt judge` decided, from docs/judge: evidence.json of runs, and simulations.json."""

import functools
import itertools
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
SIZES = ((1, 2), (2, 3), (3, 5), (5, 10), (10, math.inf))


def evidence(folder: Path) -> str:
    """The tables of both metrics, of the changes with an effect, and of the pairs that a proposal takes."""
    found: dict[str, Any] = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    return "\n".join([*_nulls(found), "", _dependence(found), "", *_changes(found), "", *_pairs()])


def simulations(folder: Path) -> str:
    """The tables of simulated changes, of dependent pairs, and of a change that acts in 2 of 20 runs."""
    found: dict[str, Any] = json.loads((folder / "simulations.json").read_text(encoding="utf-8"))
    return "\n".join([*_simulated_nulls(found), "", *_simulated_changes(found), "", *_simulated_dependence(found)])


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
        f"Renamed variables and reordered keys: {len(same)} of {len(nulls) - len(seeds)} are equal, in every metric of "
        f"{found['pairs']} pairs of runs, or already in the config. The former stay undecided; the latter are refused, "
        "because they change nothing.",
    ]


def _dependence(found: dict[str, Any]) -> str:
    """How much the real pairs depend on one another."""
    rows = [[*map(float, each["val_loss"])] for each in found["nulls"] if each["kind"] == "other seeds"]
    pairs, squares = len(rows[0]), math.fsum(gain**2 for row in rows for gain in row)
    neighbours = math.fsum(a * b for row in rows for a, b in itertools.pairwise(row))
    others = math.fsum(sum(row) ** 2 - sum(gain**2 for gain in row) for row in rows)
    phi, phi_error = neighbours / squares * pairs / (pairs - 1), 1 / math.sqrt(len(rows) * (pairs - 1))
    rho = others / squares / (pairs - 1)
    rho_error = math.sqrt(2 / (len(rows) * pairs * (pairs - 1)))
    return (
        f"Dependence between these pairs, with standard errors: successive pairs have the correlation {phi:+.3f} ± "
        f"{phi_error:.3f}, any two pairs of a change {rho:+.3f} ± {rho_error:.3f}."
    )


def _simulated_nulls(found: dict[str, Any]) -> list[str]:
    (few, many), repeats = found["pairs"], found["repeats"]
    rows = []
    for name, each in found["nulls"].items():
        rates = [f"{100 * each[key]:.2f} %" for key in ("rate", "rate_many_pairs", "rate_first_proposal")]
        rows.append([name, str(each["better"]), str(each["worse"]), *rates])
    heads = ["Metric", "Better", "Worse", f"{few} pairs", f"{many} pairs", f"{few} pairs, first proposal"]
    own, same = (_percent_of(found["ledgers"][name]) for name in ("own base runs", "the same base runs"))
    return [
        "200 changes that do nothing, each with the error rate 0.05, and how many of them were called better or worse "
        f"in {few} pairs; then the frequency of such verdicts among {repeats['nulls']:,} (seed {found['seed']}):",
        "",
        table(heads, rows).strip(),
        "",
        f"Of {repeats['ledgers']:,} ledgers with {repeats['proposals']} changes that do nothing, {own} have a false "
        f"verdict; {same} if all changes were compared with the same base runs.",
    ]


def _simulated_changes(found: dict[str, Any]) -> list[str]:
    rows = []
    for each in found["changes"]:
        of_10 = [str(each["decided_of_10"]), str(each["wrong_of_10"])]
        rates = [_percent_of(each["better"]), _percent_of(each["worse"])]
        rows.append([each["metric"], f"{each['size']:g}", *of_10, *rates, f"{each['pairs']:g}"])
    heads = ["Metric", "Standard deviations", "Better, of 10", "Worse, of 10", "Better", "Worse", "Pairs (median)"]
    repeats = found["repeats"]["changes"]
    return [
        f"Changes that improve every run, ten of each size, and the frequencies among {repeats:,}; each is the first "
        f"proposal, with at most {found['pairs'][0]} pairs:",
        "",
        table(heads, rows).strip(),
    ]


def _simulated_dependence(found: dict[str, Any]) -> list[str]:
    rare, few = found["rare"], found["pairs"][0]
    lines = []
    for key, name in (("common_part", "any two pairs"), ("autoregressive", "a pair and the next")):
        rates = found[key]
        rows = [["false verdicts", *map(_percent_of, rates.values())]]
        lines += [table([f"Correlation of {name}", *rates], rows).strip(), ""]
    return [
        f"Changes whose gains are 0 on average, but whose pairs depend on one another; error rate 0.05, {few} pairs:",
        "",
        *lines,
        f"A change that acts in 2 of {few} runs: of all {rare['orders']} orders, {rare['ended']} end before the budget "
        f"or in a verdict. In {rare['two_equal']} of them ({_percent(rare['two_equal'], rare['orders'])}), the first "
        "two pairs are equal.",
    ]


def _percent_of(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _changes(found: dict[str, Any]) -> list[str]:
    """What became of the changes with an effect, each as the first proposal against its base."""
    rows = []
    changes = found["changes"]
    for low, high in SIZES:
        chosen = [each for each in changes if low <= abs(each["size"]) < high]
        if chosen:
            rows.append([f"{low} to {high:g}" if math.isfinite(high) else f"{low} or more", *_decided(chosen, found)])
    rows.append(["all", *_decided(changes, found)])
    heads = ["Standard deviations", "Changes", f"Decided in {found['budget']} pairs", "In the wrong direction"]
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
