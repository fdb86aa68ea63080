"""dlopt's plug-ins for Hydra. Hydra loads this module with every command, so it imports nothing heavy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dlopt.basics.errors import UserError
from dlopt.config.choices import extensions, search


class Folders(SearchPathPlugin):
    """Adds the config folders of installed packages, and --config-dir, to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package, folder in extensions().items():
            search_path.append(f"dlopt-{package}", f"file://{folder}")
        if (typed := search.get()) is not None:
            search_path.append("command-line", f"file://{typed.resolve()}")


class _PoolLauncher(Launcher):
    """Runs jobs in the worker pool that a callable builds. Hydra's task function only checks them."""

    function = ""  # its dotted name

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config, self._job = hydra_context.config_loader, config, task_function

    def build(self) -> Any:
        """Returns the checked `Pool`, or `Slurm`. Raises `UserError`."""
        from hydra.utils import get_object

        from dlopt.sweeps.pool import build_checked

        return build_checked(get_object(self.function), self.settings)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs jobs that a sweeper of another package has chosen; returns their statuses."""
        from dlopt.config.plan import Plan, as_job
        from dlopt.sweeps.jobs import build_job, labels
        from dlopt.sweeps.pool import Pool, run_jobs
        from dlopt.sweeps.sweep import HydraJob

        pool, job = self.build(), self._job
        assert isinstance(job, HydraJob)
        if not isinstance(pool, Pool):
            raise UserError(
                "hydra/launcher=slurm: runs grids and hydra/sweeper=dlopt_optuna; run other sweepers in a job"
            )

        def plan_job(overrides: Sequence[str], number: int) -> Plan:
            config = self._loader.load_sweep_config(self._config, list(overrides))
            return as_job(job.checked(config, overrides), number, overrides)

        folder, names = Path(str(self._config.hydra.sweep.dir)), labels(job_overrides)
        numbered = enumerate(zip(job_overrides, names, strict=True), initial_job_idx)
        jobs = (build_job(plan_job, folder, overrides, number, name) for number, (overrides, name) in numbered)
        statuses = run_jobs(jobs, len(job_overrides), pool)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=statuses[number])
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]


class LocalLauncher(_PoolLauncher):
    """hydra/launcher=serial and joblib."""

    function = "dlopt.sweeps.pool.local"


class GpuLauncher(_PoolLauncher):
    """hydra/launcher=gpus."""

    function = "dlopt.sweeps.pool.gpus"


class SlurmLauncher(_PoolLauncher):
    """hydra/launcher=slurm."""

    function = "dlopt.sweeps.slurm.Slurm"


PLUGINS = (Folders, LocalLauncher, GpuLauncher, SlurmLauncher)
