"""dlopt: an experiment runner for deep-network optimization. Python API: `train` and `load`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlopt.api import load, train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `dlopt.api`, and with it torch, on first use: `dlopt --help` stays fast."""
    if name in ("load", "train"):
        from dlopt import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names, for tab completion."""
    return sorted(__all__)
