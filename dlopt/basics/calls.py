"""How a function may be called."""

import inspect


def can_call(function: object, count: int) -> bool:
    """Returns whether `function` is callable with `count` positional arguments; true if it has no signature."""
    try:
        inspect.signature(function).bind(*[None] * count)  # type: ignore[arg-type]
    except ValueError:  # a function of an extension
        return True
    except TypeError:  # not callable, or with other arguments
        return False
    return True
