"""What `dlopt benchmark`, `dlopt ladder` and `dlopt judge` share: their command lines, fixed keys, claimed trials.

A trial is a job in its own folder below the output folder. Several processes share the trials: each claims one by
a lock, which the kernel releases when the process dies.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from dlopt.basics.folders import inside, refuse_url
from dlopt.basics.locks import hold
from dlopt.commands.shared.usage import command_key_names
from dlopt.config.overrides import is_hydra, is_set
from dlopt.config.reads import refuse_unread_hydra
from dlopt.extend import Line, Role, RunFolder, UserError, group_of, key_of, role_of, without
from dlopt.sweeps import pool as pools
from dlopt.sweeps import series
from dlopt.sweeps.jobs import Job, JobResult, PlanJob, build_job
from dlopt.sweeps.pool import JobSource, Pool

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dlopt.extend import Plan
    from dlopt.tracking.overview import Overview

READS_OF_HYDRA = ("hydra.launcher", "hydra.job.env_set", "hydra.searchpath")
# Part of the protocol in addition to the keys of a role: workloads and families name the first two groups, and every
# trial runs to its end and writes only the data for the results.
_FIXED = ("schedule", "stopping", "checkpoint", "tracking", "log_every_steps", "max_time")
UNRECORDED = (
    "evaluate.test=false", "tracking=[]", "log_every_steps=null", "checkpoint.every_epochs=null",
)  # fmt: skip
"""Overrides of every trial: it writes what the results need and nothing else."""
_LAUNCHER = "hydra/launcher=joblib"  # by default
S = TypeVar("S")
_CLAIM = ".claim"  # in a trial's folder, locked by the process that runs the trial


# -- the command line


def take_optimizers(line: Line, command: str) -> tuple[list[str], Line]:
    """Takes `optimizer=a,b` from the line. Raises `UserError`."""
    typed = [each for each in line.overrides if key_of(each) == "optimizer"]
    if not typed:
        raise UserError(f"optimizer: name the optimizers to compare: {command} optimizer=adamw,muon")
    if len(typed) > 1:
        raise UserError(f"{typed[1]}: optimizer is already given by {typed[0]}; list them: optimizer=a,b")
    [override] = line.composer.parse(typed)
    names = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
    if len(set(names)) < len(names):
        raise UserError(f"{typed[0]}: an optimizer is listed twice")
    return names, replace(line, overrides=[each for each in line.overrides if each not in typed])


def without_hydra(line: Line, command: str, function: Callable[..., Any]) -> list[str]:
    """Returns the overrides without those of the launcher. Raises `UserError` for other keys of Hydra.

    `function`: declares the keys of the command.
    """
    refuse_unread_hydra(line.overrides, command, READS_OF_HYDRA, {}, command_key_names(function))
    return [each for each in line.overrides if not is_hydra(each)]


def results_folder(output: str | None, *default: str) -> Path:
    """Returns the absolute path of the folder `output`, by default one in outputs/. Raises `UserError` for a URL."""
    refuse_url(output or "", "output")
    return (Path("outputs", *default) if output is None else Path(output)).absolute()


def saved_series(line: Line, command: str, read: Callable[[Path], S | None], manifest: str) -> tuple[Path, S]:
    """Returns the folder that the line of a report names, with the contents of its manifest. Raises `UserError`."""
    if len(line.overrides) != 1:
        raise UserError(f"{command}: one folder is needed: {command} FOLDER")
    folder = Path(line.overrides[0]).absolute()
    found = read(folder) if folder.is_dir() else None
    if found is None:
        raise UserError(f"{line.overrides[0]}: not a folder for `{command}`: it has no {manifest}")
    return folder, found


def is_fixed(override: str) -> bool:
    """Returns whether an override would change the protocol."""
    key = key_of(override)
    role = role_of(key)
    if role is Role.SEED:
        return "." not in key  # an optimizer may have its own seed
    if role is Role.COMMAND:
        return key != "allow_packages"  # an optimizer of the user's needs it
    return role in (Role.LENGTH, Role.PROTOCOL) or group_of(key) in _FIXED


def refuse_protocol(overrides: Iterable[str], advice: str) -> None:
    """Raises `UserError` for an override that would change the protocol."""
    for override in overrides:
        if is_fixed(override):
            raise UserError(f"{override}: part of the protocol, and cannot be changed; {advice}")


def launcher(
    line: Line, run: Sequence[str], command: str, folder: Path, waiting: int, total: int
) -> tuple[Pool, PlanJob] | None:
    """Returns the pool of the launcher of the command line, by default one process per core, and how jobs compose.

    None for hydra/launcher=slurm: workers that run `command` on these trials were submitted.

    Args:
        run: overrides of one trial.
        folder: of the results.
        waiting: trials without a result; `total`: all trials.

    Raises:
        UserError: wrong settings of the launcher.
    """
    from dlopt.config.resolve import job_variables
    from dlopt.sweeps.submitting import submit_command

    pool, plan_job, config = build_pool(line, run)
    words = [command, *without(line.typed, "output"), f"output={folder}"]
    if not isinstance(pool, Pool):
        header = line.composer.describe_launcher(config)
        submit_command(pool, words, line.composer, folder, config, job_variables(config), waiting, header=header)
        return None
    series.begin(folder, command, [command, *line.composer.flags, *words[1:]], total)
    pools.warm_up()
    return pool, plan_job


def build_pool(line: Line, run: Sequence[str]) -> tuple[Any, PlanJob, "DictConfig"]:
    """Returns the launcher, by default one process per core, how jobs compose, and the config. Raises `UserError`.

    The launcher is a `Pool`, or submits to Slurm.
    """
    from dlopt.config.plan import as_job, checked
    from dlopt.sweeps.branches import from_checkpoint
    from dlopt.sweeps.sweep import build_launcher

    hydra, composer = [each for each in line.overrides if is_hydra(each)], line.composer
    if not is_set("hydra.launcher", hydra):
        hydra = [_LAUNCHER, *hydra]
        composer = composer.with_words(_LAUNCHER)
    config = composer.compose([*hydra, *run], multirun=True)
    pool = build_launcher(config, "not supported here")
    assert pool is not None  # has refused other launchers

    def plan_job(overrides: Sequence[str], number: int) -> "Plan":
        config = composer.compose([*hydra, *overrides])
        return from_checkpoint(as_job(checked(config, overrides, composer.flags), number, overrides))

    return pool, plan_job, config


# -- trials


class Subfolder(Protocol):
    """A trial: hashable, with its own folder."""

    @property
    def subfolder(self) -> str: ...


T = TypeVar("T", bound=Subfolder)


class Request(Protocol[T]):
    """The trials of a command and how each is composed."""

    @property
    def folder(self) -> Path: ...

    def waiting(self) -> list[T]:
        """Returns the trials without a result that can run now."""

    def line(self, trial: T) -> list[str]:
        """Returns the overrides of a trial."""

    def label(self, trial: T) -> str: ...


def claim(folder: Path) -> IO[str] | None:
    """Locks a trial's folder; None if another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold(folder / _CLAIM)
    except BlockingIOError:
        return None


class ClaimedTrials(JobSource, Generic[T]):
    """Claims trials one by one.

    Args:
        kept: returns whether a file among a trial's checkpoints is needed after its end.
        overview: of the progress; a second one would stay on the terminal.
    """

    def __init__(
        self,
        request: Request[T],
        plan_job: PlanJob,
        kept: Callable[[Path], bool],
        overview: "Overview | None" = None,
    ) -> None:
        from dlopt.tracking.overview import Overview

        self.request, self._plan_job, self._kept = request, plan_job, kept
        self.series = request.folder
        self.waiting: dict[T, None] = dict.fromkeys(request.waiting())  # in order
        # There is no best job: trials of different workloads are not comparable.
        self.overview = overview or Overview(len(self.waiting), metric="")
        self._claims: dict[int, IO[str]] = {}
        self._number = 0

    def next(self) -> Job | None:
        for trial in list(self.waiting):
            folder = RunFolder(inside(self.request.folder, trial.subfolder, f"output={self.request.folder}"))
            lock = claim(folder.path)
            if lock is None:
                continue
            del self.waiting[trial]
            number, self._number = self._number, self._number + 1
            if folder.has_ended(or_failed=True):  # another process has run it in the meantime
                lock.close()
                self.overview.ended(number, trial.subfolder, "finished", {}, known=True)
                continue
            self._claims[number] = lock
            overrides = [*self.request.line(trial), f"hydra.sweep.subdir={trial.subfolder}"]
            return build_job(self._plan_job, self.request.folder, overrides, number, self.request.label(trial))
        return None

    def ended(self, job: Job, result: JobResult) -> None:
        if job.folder.has_ended(or_failed=True) and not job.folder.checkpoints.is_symlink():
            for path in job.folder.checkpoints.glob("*"):
                if not self._kept(path):
                    path.unlink(missing_ok=True)
        self._claims.pop(job.number).close()
