"""dlopt's own sweeper and launchers, where Hydra looks for plug-ins."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

_ONE = "hydra_plugins.dlopt_sweeps.LocalLauncher"
_FOLDER = Path(__file__).parents[1] / "hydra_plugins"


def offer() -> None:
    """Puts dlopt/hydra_plugins into the namespace `hydra_plugins`, which is all that Hydra scans; before it does."""
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no plug-in is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    if str(_FOLDER) not in namespace.__path__:
        namespace.__path__.append(str(_FOLDER))
    if Plugins in Singleton._instances and _ONE not in Plugins.instance().class_name_to_class:
        Plugins.instance()._initialize()  # Hydra was used before, in this process, and has looked already
