"""dlopt: an experiment runner for deep-network optimization. Python API: `train`, `sweep`, `runs`, ..."""

from typing import TYPE_CHECKING, Any

from dlopt._version import __version__

if TYPE_CHECKING:
    from dlopt.python.api import find_lr, sweep, train
    from dlopt.python.model import load
    from dlopt.python.runs import open_run, runs

__all__ = ["__version__", "find_lr", "load", "open_run", "runs", "sweep", "train"]

_MODULES = {
    "find_lr": "api", "load": "model", "open_run": "runs", "runs": "runs", "sweep": "api", "train": "api"
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and with most of them torch, on first use: `dlopt --help` stays fast."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"dlopt.python.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names, for tab completion."""
    return sorted(__all__)
