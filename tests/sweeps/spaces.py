"""Search spaces as one types them."""

from functools import cache

from dlopt.config.compose import Composer
from dlopt.sweeps.space import Space, space_of


@cache
def composer() -> Composer:
    return Composer()


def space(*overrides: str) -> Space:
    return space_of(composer().parse(list(overrides)))
