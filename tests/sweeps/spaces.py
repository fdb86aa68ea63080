"""Search spaces from overrides."""

from functools import cache

from dlopt.config.compose import Composer
from dlopt.config.overrides import parse_axes
from dlopt.sweeps.space import Space, parse_space


@cache
def composer() -> Composer:
    return Composer()


def space(*overrides: str) -> Space:
    return parse_space(parse_axes(overrides, composer()))
