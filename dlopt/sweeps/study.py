"""An Optuna study that several processes share: storage, ownership of trials, recovery from dead processes.

All trials are created as WAITING together with the study. So the number of jobs is fixed, a trial's number is the name
of its job's folder, and claiming a trial is a single atomic operation of the storage. The trial of a dead process is
taken over by another one, with its number, values and checkpoint.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.locks import hold, locked, taken
from dlopt.basics.plain_values import open_regular
from dlopt.basics.secrets import redact, redacted
from dlopt.config.resuming import as_today, describe, may_change
from dlopt.metrics.names import Goal
from dlopt.sweeps.array import WORKERS
from dlopt.sweeps.live import name_worker
from dlopt.sweeps.samplers import Sampler
from dlopt.sweeps.space import Space, Value

JOURNAL = "study.journal"
_MAX_JOURNAL = 1 << 30  # bytes; a job has 1 kB
_FIXED = "fixed_params"  # attribute of a trial, as Optuna's `enqueue_trial` names it: values that are not drawn
STUDY_LOCK = "setup.lock"  # in that folder: for the study and sweep.yaml
_ORPHAN_SECONDS = 60.0  # after which the owner of a running trial that names no owner counts as dead

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class StudySpec:
    """Objectives of a search, and how it chooses its jobs."""

    space: Space
    objectives: Sequence[str]
    directions: Sequence[Goal]
    pruning_metric: str | None  # of metrics.jsonl; None for no pruning
    sampler: Sampler
    pruner: BasePruner
    total: int
    storage: str | None  # URL of a database; None for a journal in the sweep's folder
    name: str
    negate_pruning_metric: bool = False  # it improves in the opposite direction of the objective
    seeds: Sequence[str] = ()  # overrides of the jobs of each trial; () for trials of one job
    enqueued: Sequence[Mapping[str, Value]] = ()  # values of the trials to run next

    @property
    def jobs_per_trial(self) -> int:
        return max(len(self.seeds), 1)


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial whose jobs this process runs."""

    number: int
    values: Mapping[str, Any]
    trial: optuna.trial.Trial
    is_takeover: bool  # a dead process had started it


class _JournalLock:
    """Lock for the journal. Optuna's own locks are files, which survive a killed process and block others for 30 s."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._held = journal, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(locked(self._journal.with_name(f"{self._journal.name}.lock")))
        with suppress(FileNotFoundError), self._journal.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(size - 1, 0))
            if journal.read() not in (b"", b"\n"):  # a process was killed while it wrote a line: remove it
                start = max(size - (1 << 20), 0)
                journal.seek(start)
                journal.truncate(start + journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._held.close()


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Opens the journal file of a sweep's folder, or the database at `url`. Raises `UserError`."""
    lock = folder / WORKERS / STUDY_LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    if url is None:
        path = folder / JOURNAL
        try:
            with suppress(FileNotFoundError):
                open_regular(path, _MAX_JOURNAL).close()
            return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, _JournalLock(path))))
        except OSError:
            raise
        except Exception as error:  # Optuna expects only its own files
            why = str(error) if type(error) is ValueError else f"damaged: {type(error).__name__}: {error}"
            raise UserError(f"hydra.sweep.dir={folder}: {JOURNAL} {why}; use another folder") from None
    try:
        key = f"hydra.sweeper.storage={hide_password(url)}"
    except Exception:  # of SQLAlchemy, or of int() for the port
        raise UserError("hydra.sweeper.storage=***: not the URL of a database") from None
    try:
        with locked(lock):  # creating the tables fails if two processes do it at once
            return RDBStorage(url, engine_kwargs={} if url.startswith("sqlite") else {"pool_pre_ping": True})
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or error.name or "the database's driver"
        driver = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
        raise UserError(f"{key}: needs a package: pip install {driver.get(missing, missing)}") from None
    except Exception as error:  # of SQLAlchemy, its drivers or Optuna
        raise UserError(f"{key}: {_reason(error, url)}") from None


def hide_password(url: str | None) -> str:
    """Returns the URL of a database without its password; the journal's name for None."""
    return JOURNAL if url is None else str(_parsed(url).render_as_string(hide_password=True))


def _parsed(url: str) -> Any:
    from sqlalchemy.engine import make_url

    return make_url(url)


def _reason(error: Exception, url: str | None) -> str:
    """Returns the first line of the error's message, without the database's password."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    password = None if url is None else _parsed(url).password
    return text.replace(str(password), "***") if password else text


class Study:
    """A process's handle of the study."""

    def __init__(self, folder: Path, spec: StudySpec, facts: Mapping[str, Any]) -> None:
        """Creates the study, or joins it. Raises `UserError` if it has other `facts` (JSON values)."""
        self.folder, self.space, self.total = folder, spec.space, spec.total
        self._storage, self._sampler = open_storage(spec.storage, folder), spec.sampler
        self._is_shared = spec.storage is not None
        self._workers = folder / WORKERS
        self.worker = name_worker()
        self._claimed: set[int] = set()
        # The operating system releases this lock when the process dies, which shows others that its trials are free.
        self._alive_lock = hold(self._workers / f"{self.worker}.lock")
        # One process at a time: two that create the study together would both set its facts and add all of its trials.
        with locked(self._workers / STUDY_LOCK):
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=spec.name,
                directions=list(spec.directions),
                pruner=spec.pruner,
                load_if_exists=True,
            )
            facts = redacted({**facts, "space": spec.space.describe(), "directions": list(spec.directions)})
            existing = self._study.user_attrs.get("facts")
            if existing is None:
                self._study.set_user_attr("facts", facts)
            elif different := describe_differences(existing, facts):
                raise UserError(
                    f"hydra.sweeper: the study {spec.name} has another search space or config ({different}); "
                    "use the same one, or another hydra.sweep.dir or hydra.sweeper.study_name"
                )
            # The total may have grown, or a process may have been killed here before it had added all trials. Machines
            # without this folder may add trials at the same time: trials beyond the total are ignored.
            for _ in range(self.total - len(self._trials())):
                self._study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
            self._enqueue(spec.enqueued)

    def _enqueue(self, points: Sequence[Mapping[str, Value]]) -> None:
        """Gives each point that the study does not have yet to the next trial. Raises `UserError` if too few wait."""
        known = [trial.system_attrs[_FIXED] for trial in self._trials() if _FIXED in trial.system_attrs]
        new = []
        for point in map(dict, points):
            if point in known:
                known.remove(point)  # a point that is listed twice runs twice
            else:
                new.append(point)
        free = [each for each in self._trials(TrialState.WAITING) if _FIXED not in each.system_attrs]
        if len(new) > len(free):
            raise UserError(
                f"hydra.sweeper.enqueue: {len(new)} new points, but {len(free)} of hydra.sweeper.n_trials={self.total} "
                f"have not begun; set hydra.sweeper.n_trials={self.total + len(new) - len(free)}"
            )
        for trial in free:
            if not new:
                return
            self._storage.set_trial_system_attr(trial._trial_id, _FIXED, new[0])
            # A process on another machine may have begun the trial before it had the point.
            if self._storage.get_trial(trial._trial_id).state == TrialState.WAITING:
                del new[0]

    def close(self) -> None:
        """Releases the unfinished jobs, so that another process can take them over."""
        self._alive_lock.close()

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if trial.number < self.total]

    def claim(self) -> ClaimedTrial | None:
        """Claims the next trial: one of a dead process, else a new one. Returns None if there is none."""
        for trial in self._trials(TrialState.RUNNING):
            if trial.number not in self._claimed and self._take_over(trial):
                return self._draw_values(trial, is_takeover=True)
        for trial in self._trials(TrialState.WAITING):
            try:
                is_first = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except (UpdateFinishedTrialError, RuntimeError):  # another process has even finished it
                continue
            if is_first:
                self._record_owner(trial)
                return self._draw_values(trial, is_takeover=False)
        return None

    def _record_owner(self, trial: FrozenTrial) -> None:
        # The folder first: a trial that names its worker must also name the folder with the lock of that worker.
        self._storage.set_trial_user_attr(trial._trial_id, "folder", str(self.folder))
        self._storage.set_trial_user_attr(trial._trial_id, "worker", self.worker)

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Becomes the owner of a running trial if its owner is dead; returns whether it did."""
        with taken(self._owner_lock(trial)) as is_dead:
            if not is_dead:
                return False
            # Read again under the lock: another process may have taken the trial over in the meantime.
            current = self._storage.get_trial(trial._trial_id)
            has_owner = current.user_attrs.get("worker") != trial.user_attrs.get("worker")
            if has_owner or current.state != TrialState.RUNNING:
                return False
            self._record_owner(trial)
            return True

    def _owner_lock(self, trial: FrozenTrial) -> Path:
        """Returns the lock file that the trial's owner holds while it lives."""
        worker = trial.user_attrs.get("worker")
        if worker is None:
            # The owner died before `_record_owner`, or has not reached it. A file that does not exist cannot be
            # locked, so recent trials are left alone; orphans.lock lets one process take over an old trial.
            started = trial.datetime_start
            is_recent = started is None or (datetime.now() - started).total_seconds() < _ORPHAN_SECONDS
            orphans = self._workers / "orphans.lock"
            orphans.touch()
            return self._workers / "nobody" if is_recent else orphans
        owner_folder = Path(str(trial.user_attrs["folder"]))
        return (owner_folder if owner_folder.is_dir() else self.folder) / WORKERS / f"{worker}.lock"

    def _draw_values(self, frozen: FrozenTrial, is_takeover: bool) -> ClaimedTrial:
        self._claimed.add(frozen.number)
        enqueued = [each.number for each in self._trials() if _FIXED in each.system_attrs]
        frozen = self._storage.get_trial(frozen._trial_id)  # it may have got a point since it was listed
        fixed: Mapping[str, Value] = frozen.system_attrs.get(_FIXED, {})
        # A sequence of points resumes after the last trial that was drawn.
        index = frozen.number if fixed else frozen.number - sum(number < frozen.number for number in enqueued)
        self._study.sampler = self._sampler(index)
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        values: dict[str, Any] = {}
        for key, distribution in self.space.searched.items():
            if not self.space.has(key, values):
                continue
            is_drawn = key not in fixed and key not in trial.relative_params and not distribution.single()
            if is_drawn and key in frozen.params:
                # A dead process has drawn this value, but perhaps not the values of later keys. Draw it again and
                # discard it: this advances the sampler's random stream, so that later values are the same.
                self._study.sampler.sample_independent(self._study, frozen, key, distribution)
            values[key] = trial._suggest(key, distribution)
        return ClaimedTrial(frozen.number, values, trial, is_takeover)

    def report(self, claim: ClaimedTrial, epoch: int, value: float) -> bool:
        """Reports a running trial's metric to the pruner; returns whether to stop the trial."""
        reported = self._storage.get_trial(claim.trial._trial_id).intermediate_values
        if epoch not in reported:  # a resumed job reports its first epochs again, and Optuna would warn
            claim.trial.report(value, epoch)
        return claim.trial.should_prune()

    def finish(
        self, claim: ClaimedTrial, state: TrialState, objectives: Sequence[float] | None = None, **attributes: Any
    ) -> None:
        """Records the end of a trial: the objectives of a complete one, and attributes (JSON values)."""
        # The attributes first: Optuna refuses attributes of a finished trial, and other processes then read its `run`.
        for name, value in attributes.items():
            stored = redact(value) if name == "reason" else value  # the others are folders, which others read
            self._storage.set_trial_user_attr(claim.trial._trial_id, name, stored)
        self._study.tell(claim.number, objectives, state, skip_if_finished=True)

    def counts(self) -> Counter[TrialState]:
        return Counter(trial.state for trial in self._trials())

    def elsewhere(self) -> list[FrozenTrial]:
        """Returns the trials of a database that other folders have claimed: those whose worker has no lock here."""
        claimed = [trial for trial in self._trials() if self._is_shared and "worker" in trial.user_attrs]
        return [each for each in claimed if not (self._workers / f"{each.user_attrs['worker']}.lock").exists()]

    def jobs_here(self, per_trial: int) -> int:
        """Returns the number of jobs but those of other folders, and those of pruned and failed trials not started."""
        others = {trial.number for trial in self.elsewhere()}
        own = [trial for trial in self._trials() if trial.number not in others]
        return sum(per_trial - trial.user_attrs.get("left_out", 0) for trial in own)

    def finished(self) -> list[FrozenTrial]:
        """Returns the trials with objectives, of this and other processes.

        `user_attrs["run"]`: the folder of the first run; of several, `user_attrs["runs"]`: [folder, objectives] each.
        """
        return self._trials(TrialState.COMPLETE)

    def awaits_orphans(self) -> bool:
        """Returns whether the owner of a running trial may have died before it recorded its name."""
        return any(trial.user_attrs.get("worker") is None for trial in self._trials(TrialState.RUNNING))


def is_fact(key: str) -> bool:
    """Returns whether all jobs of a study, on any machine, must have the same value of this key, unless it varies."""
    return not may_change(key) or key in ("epochs", "steps")  # a search compares runs of one length


def describe_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Lists the facts that differ as `key: saved a, now b`; '' if there are none.

    Ignores saved keys that are no facts in this version of dlopt. Compares the stored form, without secrets.
    """
    saved, current = redacted(saved), redacted(current)
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in {**saved, **current}:
        if key == "enqueue":  # of earlier versions
            continue
        a, b = saved.get(key), current.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            a, b = dict(a), dict(b)
            as_today(a, b)
            keys = [inner for inner in {**a, **b} if key != "config" or is_fact(inner)]
            pairs |= {inner: (a.get(inner), b.get(inner)) for inner in keys}
        else:
            pairs[key] = (a, b)
    return describe({key: (a, b) for key, (a, b) in pairs.items() if a != b}, none="nothing")


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turns errors of the storage during a sweep into a `RunError`."""
    try:
        yield
    except (OptunaError, OSError) as error:
        key = f"hydra.sweeper.storage={hide_password(url)}"
        raise RunError(f"{key}: {_reason(error, url)}; resume with resume=auto") from error
