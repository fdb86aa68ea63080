"""The order in which an epoch visits the training samples: a function of the seed, of the epoch, and of a state."""

from dlopt.data.samplers.classes import ClassBalanced, ClassInterleaved, ClassSorted
from dlopt.data.samplers.diverse import Diverse
from dlopt.data.samplers.hard import HardExamples
from dlopt.data.samplers.protocol import Attentive, Sampler
from dlopt.data.samplers.uniform import Random, Sequential, WithReplacement

__all__ = [
    "Attentive",
    "ClassBalanced",
    "ClassInterleaved",
    "ClassSorted",
    "Diverse",
    "HardExamples",
    "Random",
    "Sampler",
    "Sequential",
    "WithReplacement",
]
