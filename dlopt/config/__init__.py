"""From what was typed to a checked experiment: compose, check against signatures, check combinations, explain errors."""

from dlopt.config.experiment import Experiment, parse
from dlopt.config.schema import Component

__all__ = ["Component", "Experiment", "parse"]
