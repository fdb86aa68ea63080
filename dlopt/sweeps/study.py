"""A study that several processes share: its storage, who works on which job, and recovery from dead processes.

Every job is a waiting trial from the time when the study is made, so that their number is fixed, a trial's number is
its folder's name, and taking one is a single atomic step of the storage. A trial that a dead process has taken is taken
over, number, values and checkpoint included.
"""

import os
import socket
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import DuplicatedStudyError, OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from dlopt.analysis.leaderboard import Direction
from dlopt.errors import RunError, UserError
from dlopt.locks import hold, is_held, locked, taken
from dlopt.sweeps.samplers import Sampler
from dlopt.sweeps.space import Space, suggest

JOURNAL = "study.journal"
WORKERS = "workers"
_ORPHAN_SECONDS = 60.0  # after which a trial that nobody has put a name to belongs to a dead process

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Plan:
    """What a search computes and how it chooses its jobs."""

    space: Space
    objectives: Sequence[str]
    directions: Sequence[Direction]
    watched: str | None  # metric that the pruner compares; None: nothing is pruned
    sampler: Sampler
    pruner: BasePruner
    total: int
    storage: str | None  # URL of a database; None: a journal in the sweep's folder
    name: str


@dataclass(frozen=True)
class Claim:
    """A job of this process: `again` where a dead one had begun it."""

    number: int
    values: Mapping[str, Any]
    trial: optuna.trial.Trial
    again: bool


class _JournalLock:
    """For Optuna's journal. Its own locks are files, which a killed process leaves behind: others then wait 30 s."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._held = journal, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(locked(self._journal.with_name(f"{self._journal.name}.lock")))
        self._mend()
        return True

    def release(self) -> None:
        self._held.close()

    def _mend(self) -> None:
        """Cuts off what a process that was killed while it wrote has left of its last line."""
        with suppress(FileNotFoundError), self._journal.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            if size == 0:
                return
            journal.seek(size - 1)
            if journal.read(1) == b"\n":
                return
            start = max(size - (1 << 20), 0)
            journal.seek(start)
            journal.truncate(start + journal.read().rfind(b"\n") + 1)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The journal file of a sweep's folder, or the database at `url`. Raises `UserError`."""
    setup = folder / WORKERS / "setup.lock"
    setup.parent.mkdir(parents=True, exist_ok=True)
    if url is None:
        path = folder / JOURNAL
        return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, _JournalLock(path))))
    try:
        with locked(setup):  # two processes may not lay down the tables at once
            return RDBStorage(url, engine_kwargs={} if url.startswith("sqlite") else {"pool_pre_ping": True})
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or error.name or "the database's driver"
        driver = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
        raise UserError(
            f"hydra.sweeper.storage={hidden(url)}: needs a package: pip install {driver.get(missing, missing)}"
        ) from None
    except Exception as error:  # SQLAlchemy's, its drivers' and Optuna's own
        raise UserError(f"hydra.sweeper.storage={hidden(url)}: {_reason(error, url)}") from None


def hidden(url: str | None) -> str:
    """A database's URL without its password."""
    if url is None:
        return JOURNAL
    parsed = _parsed(url)
    return "***" if parsed is None else str(parsed.render_as_string(hide_password=True))


def _parsed(url: str) -> Any:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return make_url(url)
    except (SQLAlchemyError, ValueError):
        return None


def _reason(error: Exception, url: str | None) -> str:
    """The first line of the message, without the password of the database."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if url is None:
        return text
    parsed = _parsed(url)
    if parsed is None:
        return "this is no URL of a database"
    return text.replace(str(parsed.password), "***") if parsed.password else text


class Study:
    """One process's view of the study."""

    def __init__(self, folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
        """Makes or joins the study. `facts`: what has to be equal for those who share it, as JSON.

        Raises `UserError` with the difference where the study searches something else.
        """
        self.folder, self.space, self.total = folder, plan.space, plan.total
        self._storage, self._sampler = open_storage(plan.storage, folder), plan.sampler
        self._workers = folder / WORKERS
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._mine: set[int] = set()
        self._alive = hold(self._workers / f"{self.worker}.lock")
        with locked(self._workers / "setup.lock"):
            self._study = _create(self._storage, plan)
            _agree(self._study, {**facts, "space": plan.space.describe(), "directions": list(plan.directions)})
            self._add_trials()

    def close(self) -> None:
        """Gives back what is not finished, to whoever resumes it."""
        self._alive.close()

    def _add_trials(self) -> None:
        """Waiting trials up to the total, which may have grown."""
        missing = self.total - len(self._trials())
        while missing > 0:  # another machine's process, which does not see our lock, may be at it: not if none comes
            time.sleep(0 if missing == self.total else 1.0)
            now = self.total - len(self._trials())
            if now == missing:
                break
            missing = now
        for _ in range(missing):
            self._study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if trial.number < self.total]

    def claim(self) -> Claim | None:
        """The next job: one that a dead process has left, or a new one; None where nothing is left to take."""
        for trial in self._trials(TrialState.RUNNING):
            if trial.number not in self._mine and self._take_over(trial):
                return self._claimed(trial, again=True)
        for trial in self._trials(TrialState.WAITING):
            if self._take(trial):
                return self._claimed(trial, again=False)
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        try:
            if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return False
        except (UpdateFinishedTrialError, RuntimeError):  # another process was faster, and has even finished it
            return False
        self._sign(trial)
        return True

    def _sign(self, trial: FrozenTrial) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, "folder", str(self.folder))
        self._storage.set_trial_user_attr(trial._trial_id, "worker", self.worker)

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Whether the trial's process is dead, and no other has taken the trial over meanwhile."""
        with taken(self._lock_of(trial)) as is_dead:
            if not is_dead:
                return False
            now = self._storage.get_trial(trial._trial_id)
            if now.state != TrialState.RUNNING or now.user_attrs.get("worker") != trial.user_attrs.get("worker"):
                return False
            self._sign(trial)
            return True

    def _lock_of(self, trial: FrozenTrial) -> Path:
        worker = trial.user_attrs.get("worker")
        if worker is None:
            begun = trial.datetime_start
            is_young = begun is None or (datetime.now() - begun).total_seconds() < _ORPHAN_SECONDS
            orphans = self._workers / "orphans.lock"
            orphans.touch()
            return self._workers / "nobody" if is_young else orphans
        there = Path(str(trial.user_attrs.get("folder", self.folder)))
        return (there if there.is_dir() else self.folder) / WORKERS / f"{worker}.lock"

    def _claimed(self, trial: FrozenTrial, again: bool) -> Claim:
        self._mine.add(trial.number)
        self._study.sampler = self._sampler(trial.number)
        own = optuna.trial.Trial(self._study, trial._trial_id)
        values = {}
        for key, each in self.space.searched.items():
            if key in trial.params and key not in own.relative_params and not each.single():
                # A dead process has drawn it, and perhaps not all: what follows is drawn from where it stood.
                self._study.sampler.sample_independent(self._study, trial, key, each)
            values[key] = suggest(own, key, each)
        return Claim(trial.number, values, own, again)

    def report(self, claim: Claim, epoch: int, value: float) -> bool:
        """Takes a running job's metric; returns whether the job is to be stopped."""
        claim.trial.report(value, epoch)
        return claim.trial.should_prune()

    def finish(self, claim: Claim, objectives: Sequence[float]) -> None:
        self._study.tell(claim.number, list(objectives), skip_if_finished=True)

    def prune(self, claim: Claim) -> None:
        self._study.tell(claim.number, state=TrialState.PRUNED, skip_if_finished=True)

    def fail(self, claim: Claim, reason: str) -> None:
        self._storage.set_trial_user_attr(claim.trial._trial_id, "reason", reason)
        self._study.tell(claim.number, state=TrialState.FAIL, skip_if_finished=True)

    def counts(self) -> Counter[TrialState]:
        return Counter(trial.state for trial in self._trials())

    def finished(self) -> list[tuple[int, Mapping[str, Any], Sequence[float]]]:
        """(number, values, objectives) of the jobs that count."""
        return [(trial.number, trial.params, trial.values) for trial in self._trials(TrialState.COMPLETE)]

    def awaits_orphans(self) -> bool:
        """Whether a trial was taken by a process that may have died before it signed."""
        return any(trial.user_attrs.get("worker") is None for trial in self._trials(TrialState.RUNNING))


def is_worked_on(folder: Path) -> bool:
    """Whether a living process works on the search in this folder."""
    return any(is_held(path) for path in (folder / WORKERS).glob("*-*.lock"))


def _create(storage: BaseStorage, plan: Plan) -> optuna.Study:
    directions = list(plan.directions)
    try:
        return optuna.create_study(storage=storage, study_name=plan.name, directions=directions, pruner=plan.pruner)
    except DuplicatedStudyError:
        return optuna.load_study(storage=storage, study_name=plan.name, pruner=plan.pruner)


def _agree(study: optuna.Study, facts: Mapping[str, Any]) -> None:
    """Raises `UserError` where the study was made for other facts; notes them where it is new."""
    known = study.user_attrs.get("facts")
    if known is None:
        study.set_user_attr("facts", dict(facts))
        return
    different = differing(known, facts)
    if different:
        raise UserError(
            f"hydra.sweeper: the study {study.study_name} searches something else ({different}); "
            "take its search space, or another hydra.sweep.dir or hydra.sweeper.study_name"
        )


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`key: a there, b now` for all keys that differ; '' where none does."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in {**there, **now}:
        a, b = there.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            pairs |= {inner: (a.get(inner), b.get(inner)) for inner in {**a, **b}}
        else:
            pairs[key] = (a, b)
    return "; ".join(f"{key}: {_show(a)} there, {_show(b)} now" for key, (a, b) in pairs.items() if a != b)


def _show(value: Any) -> str:
    return "nothing" if value is None else str(value)


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """A database that fails in the middle of a sweep ends it in one message."""
    try:
        yield
    except (OptunaError, OSError) as error:
        raise RunError(f"hydra.sweeper.storage={hidden(url)}: {_reason(error, url)}; resume=auto goes on") from error
