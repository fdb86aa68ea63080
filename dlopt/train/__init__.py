"""The trainer: how a run is built, looped, evaluated, saved and summarized.

The public function `dlopt.train` has the name of this package, which is an attribute of `dlopt` once it is imported: so
the package can be called, and is that function then.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import dlopt


class _Package(ModuleType):
    def __call__(self, overrides: Sequence[str] = (), *, console: bool = False) -> Any:
        return dlopt.__getattr__("train")(overrides, console=console)


sys.modules[__name__].__class__ = _Package
