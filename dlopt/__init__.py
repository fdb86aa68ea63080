"""dlopt: experiments on the optimization of deep networks. `train` and `load` are what the commands are made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlopt.api import load, train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch only when it is needed: `dlopt --help` answers at once."""
    if name in ("load", "train"):
        from dlopt import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
