"""dlopt's plug-ins for Hydra. Hydra loads this module with every command, so it imports nothing heavy."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dlopt.config.choices import config_dir, extensions


class Folders(SearchPathPlugin):
    """Adds the config folders of installed packages, and that of --config-dir, to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for extension in extensions():
            search_path.append(f"dlopt-{extension.package}", f"file://{extension.folder}")
        if (folder := config_dir.get()) is not None:
            search_path.append("command-line", f"file://{folder.resolve()}")


class _PoolLauncher(Launcher):
    """Runs jobs in the worker pool that a function builds. Hydra's task function is not called."""

    function = ""  # its dotted name

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config

    def build_pool(self) -> Any:
        from hydra.utils import get_method

        from dlopt.sweeps.pool import build_pool

        return build_pool(get_method(self.function), self.settings)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dlopt.sweeps.grid import launch_jobs

        return launch_jobs(self._loader, self._config, self.build_pool(), job_overrides, initial_job_idx)


class LocalLauncher(_PoolLauncher):
    """hydra/launcher=serial and joblib."""

    function = "dlopt.sweeps.pool.local"


class GpuLauncher(_PoolLauncher):
    """hydra/launcher=gpus."""

    function = "dlopt.sweeps.pool.gpus"


class SlurmLauncher(_PoolLauncher):
    """hydra/launcher=slurm."""

    function = "dlopt.sweeps.slurm.slurm"


class OptunaSweeper(Sweeper):
    """hydra/sweeper=dlopt_optuna."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from dlopt.sweeps.search import run_search

        return run_search(self._loader, self._config, self._launcher.build_pool(), arguments)


PLUGINS = (Folders, LocalLauncher, GpuLauncher, SlurmLauncher, OptunaSweeper)
