"""Hydra's view of dlopt's sweeper and launchers. Thin, and without heavy imports: Hydra loads it with every command."""

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Processes(Launcher):
    """Every job a process of its own, in one of `places()`; the task function is not called."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config

    def places(self) -> Any:
        """Where jobs run: see dlopt.sweeps.pool."""
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dlopt.sweeps.grid import run_batch

        return run_batch(self._loader, self._config, self.places(), job_overrides, initial_job_idx)


class LocalLauncher(_Processes):
    """hydra/launcher=basic and joblib."""

    def places(self) -> Any:
        from dlopt.sweeps.pool import checked, local

        return checked(local, self.settings)


class GpuLauncher(_Processes):
    """hydra/launcher=gpus."""

    def places(self) -> Any:
        from dlopt.sweeps.pool import checked, gpus

        return checked(gpus, self.settings)


class SlurmLauncher(_Processes):
    """hydra/launcher=slurm."""

    def places(self) -> Any:
        from dlopt.sweeps.pool import checked
        from dlopt.sweeps.slurm import slurm

        return checked(slurm, self.settings)


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

        return run_search(self._loader, self._config, self._launcher.places(), arguments)
