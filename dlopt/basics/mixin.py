"""Changes the class of an object in place."""

from typing import Any


def mix_in(mixin: type, target: Any, **attributes: object) -> None:
    """Puts `mixin`, and class attributes, in front of the class of an object; its state and references to it stay."""
    kind = type(target)
    # Name and module of the class stay, too: dlopt knows by the module whether a layer or an optimizer is torch's.
    target.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, **attributes})
