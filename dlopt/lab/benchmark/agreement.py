"""Compares the benchmark's ranking with published ones: Kendall's tau-b on the optimizers that both have.

Tau-b is (C - D) / sqrt((P - T) (P - U)) for C concordant and D discordant of P pairs, T and U of which are tied in the
one and in the other ranking (Kendall, The treatment of ties in ranking problems, Biometrika 33, 1945): 1 for the same
order, -1 for the reversed one, NaN if a ranking has only ties.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Results
from dlopt.lab.benchmark.scores import RESAMPLES, Array, Interval, bootstrap, interval, profile_scores, times
from dlopt.lab.report import sentences

PUBLISHED = Path(__file__).with_name("published.yaml")
ALL = "all"
FEWEST = 4
"""Optimizers from which on a ranking is distinguishable from a random one: with 3, one order of 6 agrees perfectly."""
LEVEL = 0.05
_LARGEST = 7  # optimizers up to which all orders are enumerated; above, as many random ones
_DECIMALS = 9  # of scores: differences below are rounding errors


@dataclass(frozen=True)
class League:
    """A published ranking.

    Attributes:
        results: optimizer in dlopt -> published result; the higher, the better.
    """

    name: str
    title: str
    date: str
    source: str
    measure: str
    results: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """Rank correlation with a league.

    Attributes:
        kind: kind of the workloads that decide dlopt's ranking.
        optimizers: that both have, in the order of the league.
        tau: Kendall's tau-b with its bootstrap interval over studies and workloads; [-1, 1] with fewer than `FEWEST`
            optimizers.
        chance: fraction of all orders of the optimizers that agree at least as well.
    """

    league: League
    kind: str
    workloads: Sequence[str]
    optimizers: Sequence[str]
    tau: Interval
    chance: float

    @property
    def verdict(self) -> str:
        """`agrees`, `disagrees`, `inconclusive`, or `too few` optimizers."""
        if len(self.optimizers) < FEWEST:
            return "too few"
        if self.tau.low > 0 and self.chance <= LEVEL:
            return "agrees"
        return "disagrees" if self.tau.high < 0 else "inconclusive"


# -- the published leagues


def published() -> tuple[list[League], dict[str, list[str]]]:
    """Returns the leagues, and the workloads of each kind."""
    read = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [_league(**each) for each in read["leagues"]], read["kinds"]


def _league(*, scores: Mapping[str, tuple[str | None, float]], higher_is_better: bool, **facts: str) -> League:
    sign = 1 if higher_is_better else -1
    return League(**facts, results={name: sign * value for name, value in scores.values() if name is not None})


# -- rank correlation


def kendall_tau(own: Array, other: Array) -> Array:
    """Returns tau-b along the last axis: [..., n] and [..., n] -> [...]. Infinite values are tied with each other."""
    first, second = np.triu_indices(own.shape[-1], k=1)
    with np.errstate(invalid="ignore"):  # inf - inf
        signs = [np.nan_to_num(np.sign(each[..., first] - each[..., second])) for each in (own, other)]
        untied = [np.abs(each).sum(axis=-1) for each in signs]
        tau: Array = (signs[0] * signs[1]).sum(axis=-1) / np.sqrt(untied[0] * untied[1])
    return tau


def chance(own: Array, other: Array) -> float:
    """Returns the fraction of the orders of `own` whose tau is at least as high; NaN without a tau. Both: [n].

    Enumerates all orders of up to 7 optimizers; of more, it draws as many.
    """
    observed = kendall_tau(own, other)
    if np.isnan(observed):
        return math.nan
    if len(own) <= _LARGEST:
        orders = np.array(list(permutations(own)))
    else:
        rng = np.random.default_rng(0)
        orders = rng.permuted(np.tile(own, (math.factorial(_LARGEST), 1)), axis=1)
    return float((kendall_tau(orders, other) >= observed - 1e-9).mean())


# -- agreement of the benchmark with a league


def agreements(results: Results) -> list[Agreement]:
    """Returns the agreement with each league by kind of workload; none where fewer than two optimizers are shared.

    Compares results of external tuning only, as the leagues are.
    """
    if results.track != "external_tuning" or not results.has_targets:
        return []
    leagues, kinds = published()
    replicas = bootstrap(results, "updates")
    return [
        _agreement(results, replicas, league, kind, workloads)
        for league in leagues
        if len(_shared(results, league)) > 1
        for kind, workloads in _kinds(results, kinds).items()
    ]


def _shared(results: Results, league: League) -> list[str]:
    shared = [each for each in results.optimizers if each in league.results]
    return sorted(shared, key=lambda each: -league.results[each])


def _kinds(results: Results, kinds: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    found = {kind: [each for each in results.workloads if each in names] for kind, names in kinds.items()}
    return {ALL: list(results.workloads), **{kind: names for kind, names in found.items() if names}}


def _agreement(results: Results, replicas: Array, league: League, kind: str, workloads: Sequence[str]) -> Agreement:
    shared = _shared(results, league)
    theirs = np.array([league.results[each] for each in shared])
    rows = [results.optimizers.index(each) for each in shared]
    columns = [list(results.workloads).index(each) for each in workloads]
    table = times(results, "updates")
    own = _scores(np.array([[*row.values()] for row in table.values()], dtype=float)[:, columns])[rows]
    tau = float(kendall_tau(own, theirs))
    if len(shared) < FEWEST:
        found = Interval(tau, -1.0, 1.0)
    else:
        found = interval(tau, kendall_tau(_scores(_redrawn(replicas[:, :, columns]))[:, rows], theirs))
    return Agreement(league, kind, workloads, shared, found, chance(own, theirs))


def _scores(table: Array) -> Array:
    """Returns the scores without rounding errors, which would break ties; `table`: [..., optimizers, workloads]."""
    return np.round(profile_scores(table), _DECIMALS)


def _redrawn(replicas: Array) -> Array:
    """Draws workloads with replacement, each with its own studies; [resamples, optimizers, workloads]."""
    count, _, workloads = replicas.shape
    if not count:
        return replicas
    rng = np.random.default_rng(1)
    studies = rng.integers(count, size=(count, workloads))
    columns = rng.integers(workloads, size=(count, workloads))
    return replicas[studies, :, columns].transpose(0, 2, 1)


def worst_workloads(results: Results, league: League) -> dict[str, float]:
    """Returns the workloads whose updates to the target have the lowest tau, if it is not positive."""
    shared, table = _shared(results, league), times(results, "updates")
    theirs = np.array([league.results[each] for each in shared])
    taus = {
        workload: float(kendall_tau(np.array([-table[each][workload] for each in shared]), theirs))
        for workload in results.workloads
    }
    lowest = min((tau for tau in taus.values() if not math.isnan(tau)), default=1.0)
    return {name: tau for name, tau in taus.items() if tau == lowest <= 0}


# -- the table and its interpretation; agreement.txt has the sentences

HEADS = ["League", "Workloads", "Verdict", "Optimizers", "Tau", "95 % interval", "By chance"]


def rows(found: Sequence[Agreement]) -> list[list[str]]:
    """Returns the rows of the table with the heads `HEADS`."""
    return [
        [each.league.name, each.kind, each.verdict, str(len(each.optimizers)), formats.number(each.tau.value, "+.2f"),
         _tau(each.tau).partition(" ")[2] or formats.NONE, formats.number(each.chance, ".2f")]
        for each in found
    ]  # fmt: skip


def _tau(value: Interval) -> str:
    return formats.interval(value, "{:+.2f}".format)


def texts(results: Results, found: Sequence[Agreement], part: Literal["findings", "note", "sources"]) -> list[str]:
    """Returns the meaning of the correlations, how to read the table, or the sources of the leagues."""
    workloads = {each.kind: len(each.workloads) for each in found}
    leagues = {each.league.name: each.league for each in found}
    return sentences(
        Path(__file__).with_name("agreement.txt"),
        part=part, found=found, leagues=leagues, formats=formats, tau=_tau, factorial=math.factorial,
        worst={name: worst_workloads(results, league) for name, league in leagues.items()},
        sparse=[kind for kind, count in workloads.items() if count < FEWEST],
        resamples=RESAMPLES, fewest=FEWEST, level=f"{LEVEL:g}",
    )  # fmt: skip
