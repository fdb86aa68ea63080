#!/usr/bin/env python
"""Simulates the verdict of a leaderboard on tables whose rows are equal, or differ by a known amount.

.venv/bin/python scripts/verdict_simulations.py [--seed N] [--tables N] [--only folds]

writes docs/verdict/simulations.json.

The decision is that of the leaderboard: `compare`, on the rows ranked by their means. "Better" means that the interval
of some row excludes 0 on the side of the first row. Fixed before the results, with other seeds than those that chose
the procedure:

- Equal rows: at most 5 % of the tables say "better" anywhere, with 2 to 30 rows and 3 to 10 seeds, for normal noise,
  heavy tails (Student's t with 3 degrees of freedom), log-normal losses, accuracies of 144, 1,000 and 10,000 samples
  (ties), rates near divergence (15 % of the runs drop), missing runs (15 %), and rows without those of diverged runs.
- Equal means with spreads that differ three-, five- and tenfold (one row, half of the rows, a geometric sequence): at
  most 8 %.
- Seeds that are added one at a time from 3 to 10, with a look after each: at most 5 % say "better" at any look.
- Two seeds: never.
- Two equal rows above all others: at most 5 % call one of them better than the other.
- Rows with normal effects of 0 to 4 standard deviations: in at least 95 % of the tables, all intervals contain the
  differences they are of.
- Folds of a cross-validation, whose errors have a correlation of 1/folds (.2 for 5 folds, .1 for 10) within a row,
  because the training sets overlap: at most 6.5 % with 2, 5 and 10 equal rows. Without the factor of Nadeau and Bengio
  for the overlap, as if folds were seeds, for comparison. The factor assumes this correlation: 10 folds with .2 have a
  larger rate, which is shown without a margin. Power: one of 2, 5 and 10 rows is better by 2 deviations of a fold.

A case breaks its margin if it is beyond it by more than two standard errors of its number of tables, and no margin may
be broken by the mean over the cases of a kind. Power is for the page: five rows of three seeds, one of them better by
3 standard deviations, and others; beside paired t-tests (the leaderboard until November 2026), the range with pooled
spread alone, and the range with the larger of pooled and own spread.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dlopt.results.intervals import half_width  # noqa: E402
from dlopt.results.simultaneous import RATE, Comparison, compare, studentized_range  # noqa: E402

RESULTS = ROOT / "docs" / "verdict" / "simulations.json"
SEED = 20_261_130
TABLES = 2000
ROWS, SEEDS = (2, 3, 5, 10, 20, 30), (3, 5, 10)
UNEQUAL_RATE = 0.08
LAST = 10  # seeds of the tables that grow
FOLDS_RATE = 0.065
FOLDS = ((5, 0.2), (10, 0.1), (10, 0.2))  # and the correlation of the errors of two folds

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Array]
"""Draws a table [rows, seeds]: larger is better; NaN for a run without a value."""


def _seeds(rng: np.random.Generator, seeds: int) -> Array:
    return rng.standard_normal(seeds)


def _normal(rng: np.random.Generator, rows: int, seeds: int) -> Array:
    return rng.standard_normal((rows, seeds)) + _seeds(rng, seeds)


def _accuracy(samples: int, mean: float) -> Draw:
    return lambda rng, rows, seeds: rng.binomial(samples, mean, (rows, seeds)) / samples


def _near_divergence(rng: np.random.Generator, rows: int, seeds: int) -> Array:
    drops = (rng.random((rows, seeds)) < 0.15) * rng.exponential(10.0, (rows, seeds))
    return _normal(rng, rows, seeds) - drops


def _missing(rng: np.random.Generator, rows: int, seeds: int) -> Array:
    return np.where(rng.random((rows, seeds)) < 0.15, np.nan, _normal(rng, rows, seeds))


def _diverged(rng: np.random.Generator, rows: int, seeds: int) -> Array:
    """A row with a diverged run does not enter."""
    lost = (rng.random((rows, seeds)) < 0.02).any(1, keepdims=True)
    return np.where(lost, np.nan, _normal(rng, rows, seeds))


NOISE: dict[str, Draw] = {
    "normal": _normal,
    "heavy tails": lambda rng, rows, seeds: rng.standard_t(3, (rows, seeds)) + _seeds(rng, seeds),
    "log-normal loss": lambda rng, rows, seeds: -rng.lognormal(0.0, 1.0, (rows, seeds)),
    "accuracy of 144 samples": _accuracy(144, 0.94),
    "accuracy of 1,000 samples": _accuracy(1000, 0.97),
    "accuracy of 10,000 samples": _accuracy(10_000, 0.93),
    "near divergence": _near_divergence,
    "missing runs": _missing,
    "without rows that diverged": _diverged,
}


def _unequal(ratio: float, shape: str) -> Draw:
    def draw(rng: np.random.Generator, rows: int, seeds: int) -> Array:
        spreads = np.geomspace(1.0, ratio, rows)
        if shape != "a sequence":
            spreads = np.where(np.arange(rows) < (1 if shape == "one row" else rows // 2), ratio, 1.0)
        return rng.standard_normal((rows, seeds)) * spreads[:, None] + _seeds(rng, seeds)

    return draw


UNEQUAL = {
    f"{shape}, {ratio} times": _unequal(ratio, shape)
    for ratio in (3, 5, 10)
    for shape in ("one row", "half of the rows", "a sequence")
}


def ranked(table: Array) -> tuple[list[dict[int, float]], list[int]]:
    """Returns the rows with a run by their means, the best first, as values by seed; and their indices."""
    rows = {i: {seed: float(x) for seed, x in enumerate(row) if not np.isnan(x)} for i, row in enumerate(table)}
    order = sorted((i for i in rows if rows[i]), key=lambda i: -statistics.fmean(rows[i].values()))
    return [rows[i] for i in order], order


def better(comparison: Comparison) -> list[bool]:
    return [each is not None and each.high is not None and each.high < 0 for each in comparison.differences]


def compared(
    table: Array, look: int = 1, resolution: float = 0.0, overlap: float = 0.0
) -> tuple[list[bool], list[int]]:
    rows, order = ranked(table)
    if len(rows) < 2:
        return [], order
    return better(compare(rows, seen=range(3, 2 + look), resolution=resolution, overlap=overlap)), order


def false_rate(draw: Draw, rows: int, seeds: int, tables: int, seed: Sequence[int], resolution: float = 0.0) -> float:
    rng = np.random.default_rng(seed)
    return sum(any(compared(draw(rng, rows, seeds), 1, resolution)[0]) for _ in range(tables)) / tables


def cases(draws: dict[str, Draw], kind: int, tables: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for number, (name, draw) in enumerate(draws.items()):
        step = 1 / int("".join(filter(str.isdigit, name))) if name.startswith("accuracy") else 0.0
        for rows in ROWS:
            for seeds in SEEDS:
                rate = false_rate(draw, rows, seeds, tables, (seed, kind, number, rows, seeds), step)
                found.append({"noise": name, "rows": rows, "seeds": seeds, "rate": rate})
    return found


def looks(rows: int, tables: int, seed: Sequence[int]) -> dict[str, float]:
    """Returns the fraction of tables that say "better" at some look; `all`: if each look has the level of the first."""
    rng, found = np.random.default_rng(seed), {"rate": 0, "all": 0}
    for _ in range(tables):
        table = _normal(rng, rows, LAST)
        grown = [table[:, :seeds] for seeds in range(3, LAST + 1)]
        found["rate"] += any(any(compared(each, look)[0]) for look, each in enumerate(grown, 1))
        found["all"] += any(any(compared(each)[0]) for each in grown)
    return {name: count / tables for name, count in found.items()}


def two_best(rows: int, seeds: int, tables: int, seed: Sequence[int]) -> float:
    """Returns how often one of two equal rows, 6 deviations above the others, is called better than the other."""
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(tables):
        found, order = compared(_normal(rng, rows, seeds) + 6.0 * (np.arange(rows) < 2)[:, None])
        wrong += any(is_better for is_better, i in zip(found, order[1:], strict=True) if {order[0], i} == {0, 1})
    return wrong / tables


def coverage(rows: int, seeds: int, tables: int, seed: Sequence[int]) -> float:
    """Returns the fraction of tables all of whose intervals contain the true differences."""
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(tables):
        means = rng.uniform(0.0, 4.0, rows)
        values, order = ranked(_normal(rng, rows, seeds) + means[:, None])
        ends = zip(compare(values).differences, (means[i] - means[order[0]] for i in order[1:]), strict=True)
        hits += all(each is not None and (each.low is None or each.low <= true <= each.high) for each, true in ends)
    return hits / tables


def folds(
    rows: int, count: int, correlation: float, size: float, tables: int, seed: Sequence[int]
) -> dict[str, float | int]:
    """Returns how often the verdict of tables [rows, folds] says "better" of any row, and without the factor (`naive`).

    `size`: by how much one row is better, in deviations of a fold; "better" is then that this row is better than all.
    """
    rng = np.random.default_rng(seed)
    found = {"rate": 0, "naive": 0}
    for _ in range(tables):
        shared = math.sqrt(correlation) * rng.standard_normal((rows, 1))
        table = shared + math.sqrt(1 - correlation) * rng.standard_normal((rows, count)) + _seeds(rng, count)
        table[0] += size
        for name, overlap in (("rate", 1 / (count - 1)), ("naive", 0.0)):
            said, order = compared(table, overlap=overlap)
            found[name] += all(said) and order[0] == 0 if size else any(said)
    rates = {name: each / tables for name, each in found.items()}
    return {"rows": rows, "folds": count, "correlation": correlation, "size": size, **rates}


# -- other procedures, for the power


def paired(table: Array) -> list[bool]:
    rows, _ = ranked(table)
    gains = [np.array([rows[0][seed] - row[seed] for seed in row]) for row in rows[1:]]
    return [bool(each.mean() > half_width(len(each)) * each.std(ddof=1)) for each in gains]


def one_range(table: Array, *, own: bool) -> list[bool]:
    """Applies the range of all rows to the pooled spread; `own`: or to that of a pair, if it is larger."""
    rows, seeds = table.shape
    table = table[np.argsort(-table.mean(1))]
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (rows - 1) * (seeds - 1)
    pooled, gains = float((residuals**2).sum()) / freedom, table[0] - table[1:]
    variances = np.maximum(pooled, gains.var(1, ddof=1) / 2) if own else np.full(rows - 1, pooled)
    return (gains.mean(1) > studentized_range(rows, freedom, RATE) * np.sqrt(variances / seeds)).tolist()


PROCEDURES: dict[str, Callable[[Array], list[bool]]] = {
    "the leaderboard": lambda table: compared(table)[0],
    "range, pooled": lambda table: one_range(table, own=False),
    "range, the larger spread": lambda table: one_range(table, own=True),
    "paired t-tests": paired,
}


def power(rows: int, seeds: int, size: float, tables: int, seed: Sequence[int]) -> dict[str, list[float]]:
    """Returns how often the better row is first and better than all others, and than how many of them on average."""
    found = {}
    for name, procedure in PROCEDURES.items():
        rng, every, part = np.random.default_rng(seed), 0, 0.0
        for _ in range(tables):
            table = _normal(rng, rows, seeds)
            table[0] += size
            if table.mean(1).argmax() == 0:
                decided = procedure(table)
                every, part = every + all(decided), part + sum(decided) / len(decided)
        found[name] = [every / tables, part / tables]
    return found


def of_folds(tables: int, seed: int) -> list[dict[str, float | int]]:
    return [
        folds(rows, count, correlation, size, tables, (seed, 8, rows, count, round(10 * correlation), int(size)))
        for size in (0.0, 2.0)
        for count, correlation in FOLDS
        for rows in (2, 5, 10)
    ]


def simulate(seed: int, tables: int) -> dict[str, Any]:
    pairs = [(5, 3), (10, 5), (20, 3)]
    return {
        "seed": seed,
        "tables": tables,
        "folds": of_folds(tables, seed),
        "equal": cases(NOISE, 1, tables, seed),
        "unequal spreads": cases(UNEQUAL, 2, tables, seed),
        "looks": [{"rows": rows, **looks(rows, tables, (seed, 3, rows))} for rows in (2, 5, 10)],
        "two seeds": [false_rate(_normal, rows, 2, tables // 4, (seed, 4, rows)) for rows in ROWS],
        "two best": [
            {"rows": rows, "seeds": seeds, "rate": two_best(rows, seeds, tables, (seed, 5, rows))}
            for rows, seeds in pairs
        ],
        "coverage": [
            {"rows": rows, "seeds": seeds, "rate": coverage(rows, seeds, tables, (seed, 6, rows))}
            for rows, seeds in [(2, 3), *pairs]
        ],
        "power": [
            {"rows": rows, "seeds": seeds, "size": size, **power(rows, seeds, size, tables, (seed, 7, rows))}
            for rows, seeds, size in ((2, 3, 4.0), (5, 3, 3.0), (10, 3, 3.0), (10, 5, 2.0), (20, 5, 2.0))
        ],
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Returns the margins that the results break."""

    def beyond(rate: float, margin: float, count: int) -> bool:
        return rate > margin + 2 * math.sqrt(margin * (1 - margin) / count)

    tables, wrong = found["tables"], []
    for kind, margin in (("equal", RATE), ("unequal spreads", UNEQUAL_RATE), ("looks", RATE), ("two best", RATE)):
        wrong += [f"{kind}: {each}" for each in found[kind] if beyond(each["rate"], margin, tables)]
        if statistics.fmean(each["rate"] for each in found[kind]) > margin:
            wrong.append(f"{kind}: their mean")
    known = [each for each in found["folds"] if not each["size"] and each["correlation"] <= 1 / each["folds"]]
    wrong += [f"folds: {each}" for each in known if beyond(each["rate"], FOLDS_RATE, tables)]
    if statistics.fmean(each["rate"] for each in known) > FOLDS_RATE:
        wrong.append("folds: their mean")
    wrong += [f"coverage: {each}" for each in found["coverage"] if beyond(1 - each["rate"], RATE, tables)]
    return [*wrong, *(["two seeds"] if any(found["two seeds"]) else [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tables", type=int, default=TABLES)
    parser.add_argument("--only", choices=["folds"], help="the cases to draw; the others are kept")
    options = parser.parse_args()
    start = time.process_time()
    if options.only:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        if (found["seed"], found["tables"]) != (options.seed, options.tables):
            parser.error(f"--only keeps the other cases, which have seed {found['seed']} and {found['tables']} tables")
        found["folds"] = of_folds(options.tables, options.seed)
    else:
        found = simulate(options.seed, options.tables)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{(time.process_time() - start) / 60:.1f} minutes of processor time")
    print("\n".join(broken(found)) or "no margin is broken")
    return 1 if broken(found) else 0


if __name__ == "__main__":
    sys.exit(main())
