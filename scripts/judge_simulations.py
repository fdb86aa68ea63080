#!/usr/bin/env python
"""Simulates `dlopt judge` on differences whose distribution is known: its false verdicts, its power, dependent pairs.

.venv/bin/python scripts/judge_simulations.py    write docs/judge/simulations.json (about two minutes)

Everything below was fixed before the first run: the seed, the sizes, and what breaks the promise. The differences are
simulated, and the decision is that of the command: `looks`, after every pair. A look that does not reject 0 decides
nothing, so that they begin at the first one that does.

- Changes that do nothing: both runs of a pair draw from one distribution. With an error rate of 5 %, 200 of them, and
  10,000 to know the probability. Broken, if it is above 5 % by more than three standard errors.
- Changes that act: 50 of five sizes, and 2,000 of each size, as the first proposal against their base. Broken, if fewer
  than 90 % of those of two standard deviations are decided in 20 pairs, or more than 1 % in the wrong direction.
- Dependence: pairs with a common part (correlation rho), and pairs that resemble the previous one (AR(1), phi). No
  promise holds there; how much the probability grows is for the page.
- Proposals that share base runs. Broken, if a ledger of 20 has a false verdict with more than 5 % and three standard
  errors.
- A change that acts in 2 of 20 runs, in all 190 orders. Broken, if one order ends early or in a verdict.
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dlopt.lab.judge.sequential import Look, evidence, looks, rate_of  # noqa: E402

RESULTS = ROOT / "docs" / "judge" / "simulations.json"
SEED = 20_261_129
RATE = 0.05
PAIRS, MANY_PAIRS = 20, 100  # the default budget, and one that was continued
NULLS, REPEATS = 200, 10_000
CHANGES, CHANGED_REPEATS = 50, 2_000
SIZES = (0.5, 1.0, 1.5, 2.0, 3.0)  # standard deviations of the differences
LEDGERS, PROPOSALS = 2_000, 20
RHOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PHIS = (-0.5, -0.2, 0.0, 0.1, 0.2, 0.3, 0.5, 0.8)

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
"""Draws the metric of independent runs: larger is better."""


def _small_validation_set(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.binomial(144, 0.94, shape) / 144


def _large_validation_set(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.round(0.9 + 0.003 * rng.standard_normal(shape), 4)


def _diverging(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.where(rng.random(shape) < 0.05, -np.inf, rng.standard_normal(shape))


def _rarely_different(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.where(rng.random(shape) < 0.05, rng.standard_normal(shape), 0.0)


METRICS: dict[str, Draw] = {
    "loss, normal": lambda rng, shape: rng.standard_normal(shape),
    "accuracy of 144 samples": _small_validation_set,
    "accuracy of 10,000 samples": _large_validation_set,
    "loss, skewed (log-normal)": lambda rng, shape: -rng.lognormal(0.0, 1.0, shape),
    "loss, 5 % of the runs diverge": _diverging,
    "equal in nine pairs of ten": _rarely_different,
}
CHANGED = ("loss, normal", "accuracy of 144 samples", "loss, skewed (log-normal)")


def differences(base: Array, change: Array) -> Array:
    """Returns change - base; 0 where both diverge."""
    equal = base == change
    return np.where(equal, 0.0, np.where(equal, 0.0, change) - np.where(equal, 0.0, base))


def decided(gains: Array, rate: float) -> list[Look]:
    """Returns the last look of each row, as `dlopt judge` takes them after every pair."""
    crossed = evidence(gains) >= math.log(1 / rate)
    found = []
    for row, crossings in zip(gains.tolist(), crossed, strict=True):
        first = int(crossings.argmax()) + 1 if crossings.any() else len(row)
        found.append([*looks(row, rate, first=first)][-1])
    return found


def verdicts(gains: Array, rate: float) -> Counter[str]:
    """Counts the verdicts of the rows. Rows that never reject 0 are not looked at."""
    crossed = (evidence(gains) >= math.log(1 / rate)).any(axis=-1)
    counts = Counter[str](look.verdict for look in decided(gains[crossed], rate))
    counts["undecided"] += int((~crossed).sum())
    return counts


def false_rate(gains: Array, rate: float = RATE) -> float:
    counts = verdicts(gains, rate)
    return (counts["better"] + counts["worse"]) / len(gains)


def nulls(name: str, repeats: int, seed: Sequence[int]) -> dict[str, Any]:
    """Returns the verdicts on changes that do nothing, and their frequency."""
    rng, draw = np.random.default_rng(seed), METRICS[name]
    of_200 = verdicts(differences(draw(rng, (NULLS, PAIRS)), draw(rng, (NULLS, PAIRS))), RATE)
    gains = differences(draw(rng, (repeats, MANY_PAIRS)), draw(rng, (repeats, MANY_PAIRS)))
    return {
        "better": of_200["better"],
        "worse": of_200["worse"],
        "rate": false_rate(gains[:, :PAIRS]),
        "rate_many_pairs": false_rate(gains),
        "rate_first_proposal": false_rate(gains[:, :PAIRS], rate_of(1, RATE)),
    }


def changes(name: str, size: float, repeats: int, seed: Sequence[int]) -> dict[str, Any]:
    """Returns what became of changes that improve each run by `size` standard deviations of the differences."""
    rng, draw = np.random.default_rng(seed), METRICS[name]
    base, change = (draw(rng, (repeats, PAIRS)) for _ in range(2))
    resolution = 1 / 144 if "144" in name else 0.0
    shift = size * float(differences(base, change).std())
    shift = round(shift / resolution) * resolution if resolution else shift
    found = decided(differences(base, change) + shift, rate_of(1, RATE))
    ended = [look for look in found if look.verdict != "undecided"]
    part = found[: CHANGES // len(SIZES)]
    return {
        "decided_of_10": sum(look.verdict == "better" for look in part),
        "wrong_of_10": sum(look.verdict == "worse" for look in part),
        "better": sum(look.verdict == "better" for look in found) / repeats,
        "worse": sum(look.verdict == "worse" for look in found) / repeats,
        "pairs": statistics.median(look.pairs for look in ended) if ended else None,
    }


def common_part(rho: float, repeats: int, seed: Sequence[int]) -> float:
    """Returns the frequency of verdicts if the pairs of a judgement share a part: their correlation is `rho`."""
    rng = np.random.default_rng(seed)
    common, own = rng.standard_normal((repeats, 1)), rng.standard_normal((repeats, PAIRS))
    return false_rate(math.sqrt(rho) * common + math.sqrt(1 - rho) * own)


def autoregressive(phi: float, repeats: int, seed: Sequence[int]) -> float:
    """Returns the frequency of verdicts if each pair resembles the one before it."""
    noise = np.random.default_rng(seed).standard_normal((repeats, PAIRS))
    gains = noise.copy()
    for i in range(1, PAIRS):
        gains[:, i] = phi * gains[:, i - 1] + math.sqrt(1 - phi**2) * noise[:, i]
    return false_rate(gains)


def ledgers(is_shared: bool, repeats: int, seed: Sequence[int]) -> float:
    """Returns the frequency of ledgers with a verdict among `PROPOSALS` changes that do nothing.

    `is_shared`: all proposals are compared with the same base runs. In `dlopt judge`, each has base runs of its own.
    """
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((repeats, PROPOSALS, PAIRS))
    base = np.broadcast_to(base[:, :1], base.shape) if is_shared else base
    gains = rng.standard_normal(base.shape) - base
    wrong = np.zeros(repeats, dtype=bool)
    for number in range(1, PROPOSALS + 1):
        of_proposal, rate = gains[:, number - 1], rate_of(number, RATE)
        crossed = (evidence(of_proposal) >= math.log(1 / rate)).any(axis=-1)
        false = [look.verdict != "undecided" for look in decided(of_proposal[crossed], rate)]
        wrong[crossed] |= np.array(false, dtype=bool)
    return float(wrong.mean())


def rare(orders: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Returns what became of a change that acts in the pairs of each order only, in a budget of 20.

    `two_equal`: what an earlier rule called "the change does nothing" after two bitwise equal pairs.
    """
    ended, two_equal = 0, 0
    for order in orders:
        gains = [0.01 * (i in order) for i in range(PAIRS)]
        last = [*looks(gains, rate_of(1, RATE))][-1]
        ended += last.pairs < PAIRS or last.verdict != "undecided"
        two_equal += not any(gains[:2])
    return {"orders": len(orders), "ended": ended, "two_equal": two_equal}


def simulate() -> dict[str, Any]:
    sizes = list(itertools.product(CHANGED, SIZES))
    return {
        "seed": SEED,
        "rate": RATE,
        "pairs": [PAIRS, MANY_PAIRS],
        "repeats": {"nulls": REPEATS, "changes": CHANGED_REPEATS, "ledgers": LEDGERS, "proposals": PROPOSALS},
        "nulls": {name: nulls(name, REPEATS, (SEED, 1, i)) for i, name in enumerate(METRICS)},
        "changes": [
            {"metric": name, "size": size} | changes(name, size, CHANGED_REPEATS, (SEED, 2, i))
            for i, (name, size) in enumerate(sizes)
        ],
        "common_part": {str(rho): common_part(rho, REPEATS, (SEED, 3, i)) for i, rho in enumerate(RHOS)},
        "autoregressive": {str(phi): autoregressive(phi, REPEATS, (SEED, 4, i)) for i, phi in enumerate(PHIS)},
        "ledgers": {
            "own base runs": ledgers(False, LEDGERS, (SEED, 5, 0)),
            "the same base runs": ledgers(True, LEDGERS, (SEED, 5, 1)),
        },
        "rare": rare([*itertools.combinations(range(PAIRS), 2)]),
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Returns the promises that the results break."""

    def above(rate: float, repeats: int) -> bool:
        return rate > RATE + 3 * math.sqrt(RATE * (1 - RATE) / repeats)

    repeats = found["repeats"]
    wrong = [
        f"{name}: {key} {values[key]}"
        for name, values in found["nulls"].items()
        for key in ("rate", "rate_many_pairs", "rate_first_proposal")
        if above(values[key], repeats["nulls"])
    ]
    wrong += [f"ledgers, {name}: {rate}" for name, rate in found["ledgers"].items() if above(rate, repeats["ledgers"])]
    for each in found["changes"]:
        if each["worse"] > 0.01 or (each["size"] >= 2 and each["better"] < 0.9):
            wrong.append(f"{each['metric']}, {each['size']}: {each}")
    return [*wrong, *(["an order of the rare change has ended"] if found["rare"]["ended"] else [])]


def main() -> int:
    start = time.process_time()
    found = simulate()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{(time.process_time() - start) / 60:.1f} minutes of processor time")
    print("\n".join(broken(found)) or "no promise is broken")
    return 1 if broken(found) else 0


if __name__ == "__main__":
    sys.exit(main())
