"""A ladder: the arms and rungs that its folder compares, its trials, and which trials can run now."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dlopt.basics.locks import locked
from dlopt.config.overrides import parse_overrides, quoted_plain, single_values
from dlopt.extend import RunFolder, UserError, key_of, read_json, write_json
from dlopt.lab.claimed_trials import UNRECORDED, has_ended
from dlopt.lab.ladder.arms import CENTRE, RUNGS, SEARCHED, DecaySearch, decay_search, missing_decays
from dlopt.lab.ladder.curve import interval, read_curve
from dlopt.lab.ladder.family import Rules, Rung
from dlopt.lab.ladder.rates import (
    FITTED,
    GRID,
    LIMIT,
    Optimum,
    RateFit,
    expected_runs,
    fit_rates,
    grid_around,
    missing,
    optimum,
    rate,
)
from dlopt.tracking.metrics import read_metrics

MANIFEST = "ladder.json"
RESULTS = "results.json"
FORMAT = 2  # of results.json
_MAX_BYTES = 1 << 26  # of ladder.json and results.json: 300 runs have 0.2 MB
_SAVE_EVERY = 1000  # updates: about so many are lost when a process is killed
_OBSERVER = "dlopt.lab.ladder.curve.LossCurve"


@dataclass(frozen=True)
class Contestant:
    """An optimizer of a ladder, or an arm of one.

    Attributes:
        rates: key -> centre of the search. All of them move together, in the ratio of their centres.
        lr: the learning rate of all rungs, if the user has fixed it; None to search it.
        overrides: of the optimizer, from the command line.
        choice: the optimizer of an arm; None if the contestant has its name.
        arm: how its weight decay follows the width (`arms.py`); None if it keeps its default.
    """

    rates: Mapping[str, float]
    lr: float | None
    overrides: Sequence[str]
    choice: str | None = None
    arm: str | None = None

    def lines(self, lr: float) -> list[str]:
        """Returns the overrides of all rates for a learning rate."""
        if self.lr is not None:  # typed, in `overrides`
            return []
        centre = self.rates["optimizer.lr"]
        return [f"{key}={float(f'{value * lr / centre:.4g}')!r}" for key, value in self.rates.items()]


@dataclass(frozen=True)
class Trial:
    """A run of a rung: in the search, with the rate of an index (`rates.py`); or with the rung's best rate (None).

    `decay`: index of the weight decay, in the search that the arms of the optimizer share.
    """

    optimizer: str
    rung: str
    seed: int
    index: int | None = None
    decay: int | None = None

    @property
    def subfolder(self) -> str:
        last = f"seed-{self.seed}" if self.index is None else f"rate{self.index:+d}"
        if self.decay is not None:
            last = f"decay{self.decay:+d}-{last}"
        return f"{self.optimizer}/{self.rung}/{last}"


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        loss: at the end of training; infinity if failed.
        seconds: of the training.
        curve: of a run at the best rate, see `read_curve`; empty: not recorded.
    """

    loss: float
    seconds: float
    failure: str = ""
    curve: Sequence[float] = ()


@dataclass(frozen=True)
class Ladder:
    """What a folder compares.

    Attributes:
        searched: the smallest rungs, whose learning rates are searched.
        overrides: of all trials, from the command line.
        commands: that have run the trials, without `output`.
    """

    family: str
    experiment: str
    metric: str
    unit: str
    rules: Rules
    tokens_per_parameter: float
    rungs: Mapping[str, Rung]
    searched: Sequence[str]
    seeds: int
    optimizers: Mapping[str, Contestant]
    overrides: Sequence[str]
    commands: Sequence[str] = ()

    @property
    def joint(self) -> list[str]:
        """Optimizers whose weight decay and rates are searched together."""
        found = [each.choice for each in self.optimizers.values() if each.arm in SEARCHED and each.choice]
        return [*dict.fromkeys(found)]

    def merged(self, other: "Ladder", folder: Path) -> "Ladder":
        """Returns the ladder of the trials of both. Raises `UserError` if they contradict each other."""
        keys = ("family", "experiment", "metric", "tokens_per_parameter", "overrides")
        different = [key for key in keys if getattr(self, key) != getattr(other, key)]
        different += [] if self._agrees_on_rates(other, folder) else ["searched"]
        for key in ("rungs", "optimizers"):
            mine, theirs = getattr(self, key), getattr(other, key)
            different += [f"{key}.{name}" for name in sorted(mine.keys() & theirs.keys()) if mine[name] != theirs[name]]
        if different:
            raise UserError(
                f"output={folder}: has runs of another ladder (different: {', '.join(different)}); use another folder"
            )
        rungs = sorted({**self.rungs, **other.rungs}.items(), key=lambda item: item[1].parameters)
        return replace(
            other,
            rungs=dict(rungs),
            seeds=max(self.seeds, other.seeds),
            optimizers={**self.optimizers, **other.optimizers},
            commands=list(dict.fromkeys([*self.commands, *other.commands])),
        )

    def _agrees_on_rates(self, other: "Ladder", folder: Path) -> bool:
        """Whether `other` searches the same rungs, or more before any run has used an extrapolated rate."""
        former = len(self.searched)
        if list(other.searched[:former]) != list(self.searched):
            return False
        if len(other.searched) == former:
            return True
        if self.joint and former < RUNGS:  # the weight decay of the arms would change
            return False
        used = {trial.rung for trial in recorded(folder) if trial.index is None}
        used |= {path.parent.name for path in folder.glob("*/*/seed-*")}
        return used <= set(self.searched)

    def contestant(self, trial: Trial) -> Contestant:
        """Returns the contestant of a trial; arms that share a search differ in nothing that it sets."""
        if trial.decay is None:
            return self.optimizers[trial.optimizer]
        return next(
            each for each in self.optimizers.values() if each.choice == trial.optimizer and each.arm in SEARCHED
        )

    def line(
        self, trial: Trial, lr: float, decay: float | None, shared: Sequence[str], folder: Path | None = None
    ) -> list[str]:
        """Returns the overrides of a run, evaluated at its end only.

        `decay`: None keeps the optimizer's; `shared`: as typed, with the machine's overrides; `folder`: of the ladder,
        whose runs record their loss curves.
        """
        contestant, rung = self.contestant(trial), self.rungs[trial.rung]
        every = interval(rung.updates)
        # A killed run resumes between two points of its curve.
        save_every = every * max(_SAVE_EVERY // every, 1)
        return [
            f"experiment={self.experiment}",
            *rung.overrides,
            f"optimizer={contestant.choice or trial.optimizer}",
            *contestant.lines(lr),
            *contestant.overrides,
            *([] if decay is None else [f"optimizer.weight_decay={decay!r}"]),
            *shared,
            f"steps={rung.updates}",
            f"monitor={self.metric}",
            f"seed={trial.seed}",
            "evaluate.every_epochs=1000000",
            *UNRECORDED,
            f"checkpoint.every_steps={save_every}",
            *([] if folder is None else _with_curve(shared, folder / trial.subfolder, every)),
        ]


def _with_curve(shared: Sequence[str], folder: Path, every: int) -> list[str]:
    """Returns the observers of a run: those of `shared`, and the one that records its loss curve."""
    typed = single_values(parse_overrides(each for each in shared if key_of(each) == "observers"))
    own = {"_target_": _OBSERVER, "folder": str(folder), "every": every}
    return [f"observers={quoted_plain([*typed.get('observers', []), own])}"]


def read_ladder(folder: Path) -> Ladder | None:
    """Reads the manifest of a folder, or else that of its results; None if it has neither.

    Raises `UserError` for a damaged one.
    """
    path = folder / MANIFEST
    if path.exists():
        content: dict[str, Any] = read_json(path, _MAX_BYTES) or {}
    elif (found := _results(folder).get("ladder")) is not None:
        path, content = folder / RESULTS, found
    else:
        return None
    try:
        return Ladder(
            **{
                **content,
                "rules": Rules(**content["rules"]),
                "rungs": {name: Rung(**each) for name, each in content["rungs"].items()},
                "optimizers": {name: Contestant(**each) for name, each in content["optimizers"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; restore it, or remove it and repeat the command") from None


def update_ladder(folder: Path, ladder: Ladder) -> Ladder:
    """Merges `ladder` into the folder's and returns the result. Raises `UserError` if they contradict each other."""
    with locked(folder / ".manifest.lock"):
        former = read_ladder(folder)
        merged = ladder if former is None else former.merged(ladder, folder)
        write_json(folder / MANIFEST, asdict(merged), indent=1)
    return merged


def _results(folder: Path) -> dict[str, Any]:
    """Reads results.json; {} if the folder has none. Raises `UserError` if it is damaged."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    content = read_json(path, _MAX_BYTES)
    if not isinstance(content, dict):
        raise _damaged(path)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: is from another version of dlopt (without loss curves); remove it: the folders of the runs have "
            "their results"
        )
    return content


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged; remove it: the folders of the runs have their results")


def recorded(folder: Path) -> dict[Trial, Outcome]:
    """Reads the trials of results.json. Raises `UserError` for a damaged one."""
    content = _results(folder)
    if not content:
        return {}
    try:
        return {
            Trial(each["optimizer"], each["rung"], each["seed"], each["index"], each["decay"]): Outcome(
                math.inf if each["loss"] is None else each["loss"],
                each["seconds"],
                each["failure"],
                tuple(each["curve"]),
            )
            for each in [*content["runs"], *content["search_runs"]]
        }
    except (KeyError, TypeError):
        raise _damaged(folder / RESULTS) from None


# -- the trials


@dataclass(frozen=True)
class Search:
    """The search of an optimizer's learning rate: losses and optimum of each searched rung, and their fit.

    Attributes:
        losses: rung -> learning rate -> loss; {} without a search, and for an arm whose weight decay is not known yet.
        optima: of the rungs whose search is complete, except rungs where all runs failed.
        fit: extrapolates the optima to larger rungs; None if the search is not complete, or all runs of a rung failed.
        waiting: its trials without a result that can run now.
    """

    losses: Mapping[str, Mapping[float, float]]
    optima: Mapping[str, Optimum]
    fit: RateFit | None
    waiting: Sequence[Trial] = ()

    def lr(self, rung: str, parameters: float) -> float | None:
        """Returns the learning rate of a rung: its optimum if searched, else the fit's; None if not known yet."""
        if rung in self.optima:
            return float(f"{self.optima[rung].lr:.4g}")
        return None if self.fit is None else self.fit(parameters)


class LadderRequest:
    """The trials of a ladder; a rung waits for its learning rate only.

    `shared`: overrides of all trials, as typed.
    """

    def __init__(self, folder: Path, ladder: Ladder, shared: Sequence[str] = ()) -> None:
        self.folder, self.ladder, self.shared = folder, ladder, shared
        self._known: dict[Trial, Outcome] = {}
        self._recorded = recorded(folder)

    def outcome(self, trial: Trial) -> Outcome | None:
        """Returns the result of a trial, also of one whose folder has been removed; None if it has not ended."""
        if trial not in self._known:
            folder = RunFolder(self.folder / trial.subfolder)
            if trial in self._recorded and not folder.path.exists():
                self._known[trial] = self._recorded[trial]
            elif not has_ended(folder):
                return None
            else:
                self._known[trial] = self._read(trial, folder)
        return self._known[trial]

    def _read(self, trial: Trial, folder: RunFolder) -> Outcome:
        summary, lines = folder.summary() or {}, read_metrics(folder.path)
        value = lines[-1].get(self.ladder.metric) if lines else None
        is_good = summary["status"] != "failed" and isinstance(value, int | float)
        loss = float(value) if is_good and math.isfinite(float(value)) else math.inf  # type: ignore[arg-type]
        reason = "" if math.isfinite(loss) else " ".join(str(summary.get("reason") or "diverged").split())
        is_final = trial.index is None and not reason
        curve = read_curve(folder.path, self.ladder.rungs[trial.rung].updates) if is_final else []
        return Outcome(loss, float(summary.get("seconds") or 0.0), reason, tuple(curve))

    def known(self) -> dict[Trial, Outcome]:
        """Returns the results of all trials that have been read."""
        return dict(self._known)

    def rates(
        self, optimizer: str, rung: str, decay: int | None = None, grid: Sequence[int] = GRID
    ) -> tuple[dict[int, float], list[Trial]]:
        """Returns the losses of the search of a rung, by index, and its trials that can run now."""
        trials = {index: Trial(optimizer, rung, 0, index, decay) for index in range(-LIMIT, LIMIT + 1)}
        outcomes = {index: self.outcome(trial) for index, trial in trials.items()}
        losses = {index: outcome.loss for index, outcome in outcomes.items() if outcome is not None}
        return losses, [trials[index] for index in missing(losses, grid)]

    def decays(self, choice: str, rung: str) -> tuple[dict[int, float], list[Trial]]:
        """Returns the losses at the best rate of each weight decay, by index, and the trials that can run now."""
        found: dict[int, float] = {}
        waiting: list[Trial] = []
        while not waiting and (new := missing_decays(found)):
            for decay in new:
                losses, without_result = self.rates(choice, rung, decay)
                if without_result:
                    waiting += without_result
                    continue
                best = optimum({rate(1.0, index): loss for index, loss in losses.items()})
                found[decay] = math.inf if best is None else best.loss
        return found, waiting

    def decay_search(self, choice: str) -> DecaySearch:
        """Returns the state of the search of an optimizer's weight decay."""
        rungs = self.ladder.searched[:RUNGS]
        losses = {rung: self.decays(choice, rung)[0] for rung in rungs}
        return decay_search(losses, [self.ladder.rungs[rung].width for rung in rungs])

    def decay(self, trial: Trial) -> float | None:
        """Returns the weight decay that the ladder sets; None if it sets none, or has found none yet."""
        contestant = self.ladder.contestant(trial)
        if trial.decay is not None:
            return rate(CENTRE, trial.decay)
        if contestant.choice is None or contestant.arm not in SEARCHED:
            return None
        return self.decay_search(contestant.choice).decay(contestant.arm, self.ladder.rungs[trial.rung].width)

    def search(self, optimizer: str) -> Search:
        """Returns the state of an optimizer's search. That of an arm waits for its weight decay."""
        contestant, rungs = self.ladder.optimizers[optimizer], self.ladder.rungs
        if contestant.lr is not None:
            return Search({}, {}, RateFit(contestant.lr, 0.0, None))
        if contestant.arm in SEARCHED and self.decay(Trial(optimizer, self.ladder.searched[0], 0)) is None:
            return Search({}, {}, None)
        centre = contestant.rates["optimizer.lr"]
        losses: dict[str, dict[float, float]] = {}
        optima: dict[str, Optimum] = {}
        waiting: list[Trial] = []
        fit: RateFit | None = None
        for place, rung in enumerate(self.ladder.searched):
            grid: Sequence[int] = GRID
            if place >= FITTED:
                if fit is None:  # a smaller rung has no optimum yet, or all its runs failed
                    return Search(losses, optima, None, waiting)
                grid = grid_around(fit(rungs[rung].parameters), centre)
            indices, without_result = self.rates(optimizer, rung, grid=grid)
            waiting += without_result
            losses[rung] = {rate(centre, index): loss for index, loss in sorted(indices.items())}
            if not without_result and (best := optimum(losses[rung])) is not None:
                optima[rung] = best
            sizes = [rungs[each].parameters for each in optima]
            is_known = not waiting and len(optima) == len(losses)
            fit = fit_rates(sizes, [each.lr for each in optima.values()]) if is_known else None
        return Search(losses, optima, fit, waiting)

    def finals(self, optimizer: str) -> list[Trial]:
        return [Trial(optimizer, rung, seed) for rung in self.ladder.rungs for seed in range(self.ladder.seeds)]

    def waiting(self) -> list[Trial]:
        """Returns the trials without a result that can run now: small rungs first, in them seed by seed."""
        found = []
        for choice in self.ladder.joint:
            for rung in self.ladder.searched[:RUNGS]:
                found += self.decays(choice, rung)[1]
        for optimizer in self.ladder.optimizers:
            search = self.search(optimizer)
            rates = {name: search.lr(name, rung.parameters) for name, rung in self.ladder.rungs.items()}
            found += [*search.waiting, *(each for each in self.finals(optimizer) if rates[each.rung] is not None)]
        return sorted((each for each in found if self.outcome(each) is None), key=self.place)

    def place(self, trial: Trial) -> tuple[int, int]:
        """Returns the place of a trial in the order in which they run."""
        return [*self.ladder.rungs].index(trial.rung), trial.seed

    def lr(self, trial: Trial) -> float:
        if trial.index is not None:
            return rate(self.ladder.contestant(trial).rates["optimizer.lr"], trial.index)
        lr = self.search(trial.optimizer).lr(trial.rung, self.ladder.rungs[trial.rung].parameters)
        assert lr is not None  # otherwise the trial does not wait
        return lr

    def line(self, trial: Trial) -> list[str]:
        return self.ladder.line(trial, self.lr(trial), self.decay(trial), self.shared, self.folder)

    def label(self, trial: Trial) -> str:
        purpose = "search" if trial.index is not None else f"seed {trial.seed}"
        decay = self.decay(trial)
        decays = "" if decay is None else f", weight_decay={decay:g}"
        return f"{trial.optimizer}, {trial.rung}, {purpose}: lr={self.lr(trial):g}{decays}"

    def expected(self) -> int:
        """Returns the number of trials, if no grid has to be extended further."""
        ladder = self.ladder
        runs = [expected_runs(place) for place in range(len(ladder.searched))]
        searches = sum(each.lr is None for each in ladder.optimizers.values()) * sum(runs)
        decays = len(GRID) * len(ladder.joint) * sum(runs[:RUNGS])
        planned = searches + decays + len(ladder.optimizers) * len(ladder.rungs) * ladder.seeds
        return max(planned, len(self.waiting()) + len(self.known()))
