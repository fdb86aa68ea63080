"""A composed sweep, grid or search: its folder, its jobs, and what it prints at its end."""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dlopt.basics.emphasis import print_emphasized
from dlopt.basics.errors import DONE, UserError
from dlopt.basics.folders import RunFolder, make, make_new, newest, refuse_links, short_path
from dlopt.basics.interruption import print_note
from dlopt.config.compose import Composer
from dlopt.config.overrides import BRANCH, OUTPUT, WAIT, Axis, without
from dlopt.config.packages import series_of
from dlopt.config.plan import Plan, as_job, checked
from dlopt.config.reads import refuse_untested
from dlopt.config.resuming import in_folder
from dlopt.results.leaderboard import ParetoFront
from dlopt.sweeps import pool as pools
from dlopt.sweeps import series
from dlopt.sweeps.axes import is_grid
from dlopt.sweeps.branches import from_checkpoint
from dlopt.sweeps.jobs import seconds_of_ended
from dlopt.tracking.remote import check

if TYPE_CHECKING:
    from dlopt.config.run_config import RunConfig
    from dlopt.results.ranking import Ranking
    from dlopt.sweeps.slurm import Slurm


@dataclass(frozen=True)
class SweepEnd:
    """The end of a sweep: its exit code, and the leaderboard or the Pareto front of its jobs, as printed.

    A search with several objectives that was already finished has neither: dlopt then does not open its study.
    """

    code: int
    board: "Ranking | None" = None
    front: ParetoFront | None = None
    is_submitted: bool = False  # its jobs run without this process

    def document(self, folder: Path) -> dict[str, Any]:
        """Describes the sweep in a folder and its jobs, for docs/howto/json.md."""
        from dlopt.results import documents  # with NumPy
        from dlopt.results.reading import RunReader

        records, damaged = RunReader().read([folder])
        return {
            "folder": os.path.abspath(folder),
            "exit_code": self.code,
            "jobs": [documents.job_entry(record) for record in records],
            "skipped": documents.skipped_entries(damaged),
            "leaderboard": None if self.board is None else documents.leaderboard_entry(self.board),
            "pareto_front": None if self.front is None else documents.front_entry(self.front),
        }


@dataclass(frozen=True)
class SweepRequest:
    """A composed sweep, or the series of runs of a recipe (see the entry point `dlopt.series`)."""

    composer: Composer
    config: DictConfig
    overrides: list[Override]  # of the command line
    hydra: list[Override]  # overrides of Hydra's config, with which every job is composed
    axes: list[Axis]  # of the jobs, including axes with a single value; none for a series
    path: Path  # the value of `key`
    is_typed: bool  # on the command line
    launcher: "pools.Pool | Slurm | None"  # None for another package's launcher
    words: list[str]  # of the command line
    is_waiting: bool = True  # of a submitted sweep: wait for its end
    key: str = "hydra.sweep.dir"  # of the folder
    series: str = ""  # the key of the recipe
    later: tuple[str, ...] = ()  # path prefixes of teachers that earlier jobs train
    sized: set[str] = field(default_factory=set)  # models whose size was checked
    found: list[Path] = field(default_factory=list)  # the folder, once `find_folder` has chosen it

    def find_folder(self, distance: Callable[[RunFolder], int | None], check: Callable[[Path, str], None]) -> Path:
        """Returns the folder of the sweep, created if missing.

        Args:
            distance: of an unfinished sweep that `resume=auto` may continue, see `folders.newest`.
            check: refuses an unsuitable folder; called with its path and key.
        """
        if self.is_typed:
            check(self.path, f"{self.key}={self.path}")
            folder = make(self.path, self.key, exist_ok=True)
        elif self.config.resume == "auto" and (unfinished := newest(self.path.parent, distance)) is not None:
            folder = unfinished.path
            check(folder, "resume=auto")
        else:
            folder = make_new(self.path, self.key)
        refuse_links(folder, f"{self.key}={folder}")
        self.found[:] = [folder]
        return folder

    def begin(self, folder: Path, kind: str, total: int | None = None) -> None:
        """Records what runs in the folder, and the command that continues it."""
        words = without(self.composer.command_line.words, WAIT, "resume", OUTPUT, "hydra.run.dir", "hydra.sweep.dir")
        flags = [*([] if self.series else ["-m"]), *self.composer.flags]
        series.begin(folder, kind, ["train", *flags, *words, *in_folder(folder)], total)

    @property
    def launcher_line(self) -> str:
        """Who has set what of the launcher; "" if there is nothing but the choice."""
        return self.composer.describe_launcher(self.config)

    def check_tracking(self, plans: Iterable[Plan]) -> None:
        """Raises `UserError` if a new sweep has a tracking service that cannot record its jobs."""
        if self.config.resume is None:
            settings = [plan.run_config.settings for plan in plans]
            with env_override(dict(self.config.hydra.job.env_set)):
                for sinks, name in dict.fromkeys((tuple(each.tracking), each.name) for each in settings):
                    check(sinks, name)

    def warn_of_fixed_rates(self, plans: Iterable[Plan]) -> None:
        """Prints a warning if the sweep has several learning rates, but one of those for other parameters (Muon)."""
        keys = {key: axis.is_swept for axis in self.axes for key in axis.keys}
        configs = [plan.saved for plan in plans]
        rates = {str(config["optimizer"].get("rest_lr")) for config in configs} - {"None"}
        if keys.get("optimizer.lr") and "optimizer.rest_lr" not in keys and rates:
            stays = f"optimizer.lr is swept, but optimizer.rest_lr stays at {', '.join(sorted(rates))}"
            both = "rates=zip(optimizer.lr=[A,B],optimizer.rest_lr=[C,D])"
            print_note(f"warning: {stays}; to sweep both: {both}")

    def plan_job(self, overrides: Sequence[str], number: int) -> Plan:
        """Composes and checks a job. Raises `UserError`."""
        parsed = self.composer.parse(overrides)
        config = self.composer.compose([*self.hydra, *parsed])
        self._refuse_recipe(config)
        job = as_job(checked(config, parsed, self.composer.flags, self.later), number, parsed)
        if job.run_config.settings.budget is not None and (self.series or not is_grid(self.config)):
            raise UserError(f"epochs={job.saved['epochs']}: not in a {self.series or 'search'}; set a number, or steps")
        refuse_untested(job.saved, parsed)
        self._check_size(job.run_config)
        resume = job.saved["resume"]
        if resume not in (None, "auto") and not any(axis.name == BRANCH for axis in self.axes):
            raise UserError(f"resume={resume}: not supported in a sweep; use resume=auto, or from=RUN at=LENGTHS")
        return from_checkpoint(job)

    @property
    def _tasks(self) -> int:
        """The processes that the launcher starts for each job."""
        launcher = self.config.hydra.launcher
        return int(launcher.get("nodes", 1) * launcher.get("tasks_per_node", 1))

    def _refuse_recipe(self, config: DictConfig) -> None:
        """Raises `UserError` for a job that is a series of runs itself."""
        name = config.hydra.runtime.choices.get("experiment")
        if (series := series_of(config)) not in (None, self.series):
            raise UserError(
                f"experiment={name}: a {series} is a series of runs already; leave out -m, or sweep its base config "
                f"with {series}=null"
            )
        sweepers = [OmegaConf.to_container(each.hydra.sweeper, resolve=False) for each in (config, self.config)]
        if config.hydra.mode == RunMode.MULTIRUN and sweepers[0] != sweepers[1]:
            raise UserError(f"experiment={name}: a study is a sweep already; run one at a time: experiment={name}")

    def _check_size(self, run_config: "RunConfig") -> None:
        """Raises `UserError` for a model that does not fit into memory, and for tasks that would train the same one."""
        from dlopt.data.images.decoding import size_pair
        from dlopt.training.builders.model_check import check_minimum_memory

        size = size_pair(run_config.data_settings.image_size)
        is_local = isinstance(self.launcher, pools.Pool)  # other machines may have more memory
        if is_local and (key := f"{run_config.model} {size}") not in self.sized:
            self.sized.add(key)
            check_minimum_memory(run_config.model, size)
        if (tasks := self._tasks) > 1 and "processes" not in run_config.parallel.arguments:
            raise UserError(
                f"hydra.launcher: nodes x tasks_per_node starts {tasks} processes per job, which would train the same "
                "model; use parallel=ddp, or one process"
            )

    def rehearse(self, job: Plan, total: int) -> SweepEnd:
        """Describes one of the jobs, and says how long all of them take (dry_run). Raises `UserError`."""
        from dlopt.run import dry_run  # imports torch

        slots = 1 if self.launcher is None else self.launcher.slots
        dry_run.show(job, total, slots, tasks=self._tasks, ended=seconds_of_ended(self.path))
        return SweepEnd(DONE)


def print_next(title: str, sweep: Path, *others: Path, has_failed: bool = False) -> None:
    """Prints `title` and the next commands. `others`: folders with further runs of the same study."""
    path = shlex.join(map(short_path, (sweep, *others)))
    failed = [f"  dlopt runs {path} status=failed"] if has_failed else []
    print_emphasized("\n".join([title, "next:", f"  dlopt report {path}", *failed]))
