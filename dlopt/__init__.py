"""dlopt: an experiment runner for deep-network optimization. Python API: `train`, `sweep`, `runs`, ..."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlopt.api import find_lr, sweep, train
    from dlopt.run_table import open_run, runs
    from dlopt.trained import load

__version__ = "0.1.0"
__all__ = ["__version__", "find_lr", "load", "open_run", "runs", "sweep", "train"]

_MODULES = {
    "find_lr": "api", "load": "trained", "open_run": "run_table", "runs": "run_table", "sweep": "api", "train": "api"
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and with most of them torch, on first use: `dlopt --help` stays fast."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"dlopt.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names, for tab completion."""
    return sorted(__all__)
