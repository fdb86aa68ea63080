"""A ladder: the arms and rungs that its folder compares, its trials, and which trials can run now."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from dlopt.basics.locks import locked
from dlopt.config.overrides import quoted_plain
from dlopt.extend import NonNegative, Positive, RunFolder, Stored, UserError, write_json
from dlopt.lab.claimed_trials import UNRECORDED
from dlopt.lab.ladder.arms import CENTRE, RUNGS, SEARCHED, Arm, DecaySearch, decay_search, missing_decays
from dlopt.lab.ladder.family import Branch, Rules, Rung
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
from dlopt.lab.stored import MOST_RUNS, Name
from dlopt.results.leaderboard import is_number
from dlopt.tracking.metrics import read_metrics

MANIFEST = "ladder.json"
RESULTS = "results.json"
FORMAT = 2  # of results.json
_MAX_BYTES = 1 << 26  # of ladder.json and results.json: 300 runs have 0.2 MB
_SAVE_EVERY = 1000  # updates: about so many are lost when a process is killed
_REPEATED = 0.05  # of the updates of a run: so many may its branches repeat, because checkpoints are rare
_PARTS = 50  # of a run, at whose ends checkpoints are kept: some of them, if the run is long


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

    rates: Mapping[str, Positive]
    lr: Positive | None
    overrides: Sequence[str]
    choice: Name | None = None
    arm: Arm | None = None

    def lines(self, lr: float) -> list[str]:
        """Returns the overrides of all rates for a learning rate."""
        if self.lr is not None:  # typed, in `overrides`
            return []
        centre = self.rates["optimizer.lr"]
        return [f"{key}={float(f'{value * lr / centre:.4g}')!r}" for key, value in self.rates.items()]


@dataclass(frozen=True)
class Trial:
    """A run of a rung: in the search, with the rate of an index (`rates.py`); or with the rung's best rate (None).

    `decay`: index of the weight decay, in the search that the arms of the optimizer share. `length`: of a branch, in
    tokens per parameter; None: the longest.
    """

    optimizer: str
    rung: str
    seed: int
    index: int | None = None
    decay: int | None = None
    length: float | None = None

    @property
    def stem(self) -> "Trial":
        """The run from which a branch continues."""
        return replace(self, length=None)

    @property
    def subfolder(self) -> str:
        last = f"seed-{self.seed}" if self.index is None else f"rate{self.index:+d}"
        if self.length is not None:
            last += f"-length-{self.length:g}"
        if self.decay is not None:
            last = f"decay{self.decay:+d}-{last}"
        return f"{self.optimizer}/{self.rung}/{last}"


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        loss: at the end of training; infinity if failed.
        seconds: of the training.
    """

    loss: float
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Ladder:
    """What a folder compares.

    Attributes:
        tokens_per_parameter: of the longest runs, also in the searches.
        searched: the smallest rungs, whose learning rates are searched.
        overrides: of all trials, from the command line.
        commands: that have run the trials, without `output`.
        shorter: the other tokens per parameter, ascending, of runs that branch off.
    """

    family: str
    experiment: str
    metric: str
    unit: str
    rules: Rules
    tokens_per_parameter: Positive
    rungs: Mapping[Name, Rung]
    searched: Sequence[str]
    seeds: Annotated[int, Interval(ge=1, le=1000)]
    optimizers: Mapping[Name, Contestant]
    overrides: Sequence[str]
    commands: Sequence[str] = ()
    shorter: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for parts that contradict each other."""
        lr_free = [each for each in self.optimizers.values() if each.lr is None]
        if (
            not (self.rungs and self.optimizers)
            or self.seeds * len(self.rungs) * len(self.optimizers) * len(self.lengths) > MOST_RUNS
        ):
            raise ValueError(f"must plan 1 to {MOST_RUNS:,} runs")
        if not {*self.searched} <= {*self.rungs} or (lr_free and not self.searched):
            raise ValueError("searched: must name rungs")
        if any("optimizer.lr" not in each.rates for each in lr_free):
            raise ValueError("optimizers: a rate is missing")
        if any(len(rung.branches) != len(self.shorter) for rung in self.rungs.values()):
            raise ValueError("branches: each length needs one")

    @property
    def lengths(self) -> list[float]:
        """All tokens per parameter, ascending."""
        return [*self.shorter, self.tokens_per_parameter]

    @property
    def joint(self) -> list[str]:
        """Optimizers whose weight decay and rates are searched together."""
        found = [each.choice for each in self.optimizers.values() if each.arm in SEARCHED and each.choice]
        return [*dict.fromkeys(found)]

    def merged(self, other: "Ladder", folder: Path) -> "Ladder":
        """Returns the ladder of the trials of both. Raises `UserError` if they contradict each other."""
        keys = ("family", "experiment", "metric", "tokens_per_parameter", "shorter", "overrides")
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

    def branch(self, trial: Trial) -> Branch | None:
        """Returns the lengths of a trial that branches off; None for another one."""
        if trial.length is None:
            return None
        return self.rungs[trial.rung].branches[self.shorter.index(trial.length)]

    def start(self, trial: Trial) -> int:
        """Returns the updates after which a branch leaves its stem: those of a checkpoint; 0: it repeats all."""
        branch, every = self.branch(trial), save_every(self.rungs[trial.rung])
        return 0 if branch is None else branch.shared // every * every

    def added(self, rung: str) -> int:
        """Returns the updates that the branches of a run of this rung add to its own."""
        found = 0
        for length, branch in zip(self.shorter, self.rungs[rung].branches, strict=True):
            found += branch.updates - self.start(Trial("", rung, 0, length=length))
        return found

    def line(
        self, trial: Trial, lr: float, decay: float | None, shared: Sequence[str], folder: Path | None = None
    ) -> list[str]:
        """Returns the overrides of a run, evaluated at its end only.

        `decay`: None keeps the optimizer's; `shared`: as typed, with the machine's overrides; `folder`: of the ladder,
        where a branch finds its checkpoint.
        """
        contestant, rung, branch = self.contestant(trial), self.rungs[trial.rung], self.branch(trial)
        own = []
        if rung.branches and branch is None and trial.index is None:
            own.append("checkpoint.keep=1000")
        if rung.warmup is not None:
            own.append(f"schedule.warmup_steps={rung.warmup}")
        checkpoint = None if folder is None or branch is None else self.checkpoint(trial, folder)
        # Without it (the branch is repeated, or its stem diverged before), the straight run has the same result.
        if checkpoint is not None and checkpoint.exists():
            own.append(f"resume={quoted_plain(str(checkpoint))}")
        return [
            f"experiment={self.experiment}",
            *rung.overrides,
            f"optimizer={contestant.choice or trial.optimizer}",
            *contestant.lines(lr),
            *contestant.overrides,
            *([] if decay is None else [f"optimizer.weight_decay={decay!r}"]),
            *shared,
            f"steps={rung.updates if branch is None else branch.updates}",
            f"monitor={self.metric}",
            f"seed={trial.seed}",
            "evaluate.every_epochs=1000000",
            *UNRECORDED,
            f"checkpoint.every_steps={save_every(rung)}",
            *own,
        ]

    def checkpoint(self, trial: Trial, folder: Path) -> Path:
        """Returns the checkpoint with which a branch begins. `folder`: of the ladder."""
        return RunFolder(folder / trial.stem.subfolder).checkpoints / f"step-{self.start(trial)}.pt"


def save_every(rung: Rung) -> int:
    """Returns the updates between checkpoints. Branches begin with one, and repeat the updates after it."""
    every = math.ceil(rung.updates / _PARTS)
    most = max(_SAVE_EVERY // every, 1)
    for count in range(most, 1, -1):
        repeated = sum(branch.shared % (every * count) for branch in rung.branches)
        if repeated <= _REPEATED * rung.updates:
            return every * count
    return every


def read_ladder(folder: Path) -> Ladder | None:
    """Reads the manifest of a folder, or else that of its results; None if it has neither.

    Raises `UserError` for a damaged one.
    """
    found = Stored(folder / MANIFEST, Ladder).read()
    if found is None and (results := _results(folder)) is not None:
        found = results.ladder
    return found


def update_ladder(folder: Path, ladder: Ladder) -> Ladder:
    """Merges `ladder` into the folder's and returns the result. Raises `UserError` if they contradict each other."""
    with locked(folder / ".manifest.lock"):
        former = read_ladder(folder)
        merged = ladder if former is None else former.merged(ladder, folder)
        write_json(folder / MANIFEST, asdict(merged), indent=1)
    return merged


@dataclass(frozen=True)
class _SavedRun:
    """A run of results.json. `loss`: None for infinity."""

    optimizer: str
    rung: str
    seed: int
    index: int | None
    decay: int | None
    loss: Positive | None
    seconds: NonNegative
    failure: str
    length: float | None = None


@dataclass(frozen=True)
class _Saved:
    """What is read of results.json."""

    ladder: Ladder
    runs: Sequence[_SavedRun]
    search_runs: Sequence[_SavedRun]


def _results(folder: Path) -> _Saved | None:
    """Reads results.json; None if the folder has none. Raises `UserError` if it is damaged."""
    path = folder / RESULTS
    version = Stored(path, dict[str, Any], _MAX_BYTES).read()
    if version is not None and version.get("format") != FORMAT:
        raise UserError(
            f"{path}: is from another version of dlopt; remove it: the folders of the runs have their results"
        )
    return Stored(path, _Saved, _MAX_BYTES).read()


def recorded(folder: Path) -> dict[Trial, Outcome]:
    """Reads the trials of results.json. Raises `UserError` for a damaged one."""
    found = _results(folder)
    return {
        Trial(each.optimizer, each.rung, each.seed, each.index, each.decay, each.length): Outcome(
            math.inf if each.loss is None else each.loss, each.seconds, each.failure
        )
        for each in (() if found is None else [*found.runs, *found.search_runs])
    }


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
        self._branches: dict[Path, list[Trial]] = {}
        for optimizer in ladder.optimizers:
            for trial in self.branches(optimizer):
                self._branches.setdefault(ladder.checkpoint(trial, folder), []).append(trial)

    def outcome(self, trial: Trial) -> Outcome | None:
        """Returns the result of a trial, also of one whose folder has been removed; None if it has not ended."""
        if trial not in self._known:
            folder = RunFolder(self.folder / trial.subfolder)
            if trial in self._recorded and not folder.path.exists():
                self._known[trial] = self._recorded[trial]
            elif not folder.has_ended(or_failed=True):
                return None
            else:
                self._known[trial] = self._read(trial, folder)
        return self._known[trial]

    def _read(self, trial: Trial, folder: RunFolder) -> Outcome:
        summary, lines = folder.summary() or {}, read_metrics(folder.path)
        value = lines[-1].get(self.ladder.metric) if lines else None
        is_good = summary["status"] != "failed" and is_number(value) and value > 0
        loss, seconds = float(value) if is_good and value else math.inf, summary.get("seconds")
        default = f"{self.ladder.metric}={value} is not above 0" if is_number(value) and value <= 0 else "diverged"
        reason = "" if is_good else " ".join(str(summary.get("reason") or default).split())
        return Outcome(loss, float(seconds) if is_number(seconds) else 0.0, reason)

    def known(self) -> dict[Trial, Outcome]:
        """Returns the results of all trials that have been read."""
        return dict(self._known)

    def seconds(self, optimizer: str, rung: str) -> list[float]:
        """Returns the seconds of the whole runs of an optimizer and a rung that have been read."""
        whole = {trial: each for trial, each in self._known.items() if trial.length is None and not each.failure}
        return [each.seconds for trial, each in whole.items() if (trial.optimizer, trial.rung) == (optimizer, rung)]

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
        """Returns the runs at the best rates, of the largest length."""
        return [Trial(optimizer, rung, seed) for rung in self.ladder.rungs for seed in range(self.ladder.seeds)]

    def branches(self, optimizer: str) -> list[Trial]:
        """Returns the shorter runs at the best rates."""
        return [replace(each, length=length) for each in self.finals(optimizer) for length in self.ladder.shorter]

    def is_needed(self, path: Path) -> bool:
        """Whether a branch without a result begins with the checkpoint `path`, or with that of this checksum."""
        checkpoint = path.with_suffix("") if path.suffix == ".sha256" else path
        return any(self.outcome(trial) is None for trial in self._branches.get(checkpoint, ()))

    def remove_unneeded(self) -> None:
        """Removes the checkpoints with which branches have begun that have ended."""
        from dlopt.training.checkpoint.checkpoints import remove  # imports torch

        for checkpoint in self._branches:
            if checkpoint.exists() and not self.is_needed(checkpoint):
                remove(checkpoint)

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
            found += [each for each in self.branches(optimizer) if self.outcome(each.stem) is not None]
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
        if trial.length is not None:
            purpose += f", {trial.length:g} {self.ladder.unit} per parameter"
        return f"{trial.optimizer}, {trial.rung}, {purpose}: lr={self.lr(trial):g}{decays}"

    def expected(self) -> int:
        """Returns the number of trials, if no grid has to be extended further."""
        ladder = self.ladder
        runs = [expected_runs(place) for place in range(len(ladder.searched))]
        searches = sum(each.lr is None for each in ladder.optimizers.values()) * sum(runs)
        decays = len(GRID) * len(ladder.joint) * sum(runs[:RUNGS])
        planned = searches + decays + len(ladder.optimizers) * len(ladder.rungs) * ladder.seeds * len(ladder.lengths)
        return max(planned, len(self.waiting()) + len(self.known()))
