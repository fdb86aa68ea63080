"""Schedules of the weight decay. Config group `decay`, for optimizers whose decay is decoupled.

Such an optimizer subtracts lr_t * weight_decay * theta in update t, where lr_t = lr * s_t is the learning rate: the
peak rate of the parameter's group times the schedule's factor. A choice is a factory that takes the `Horizon` of the
run and returns the factor c_t of weight_decay (None: weight_decay is unchanged). An update then subtracts, per
weight_decay * theta:

    constant     lr * s_t         the decay follows the rate (torch's AdamW)
    independent  s_t              the decay follows the schedule, but does not depend on the peak rate
    linear       lr * s_t * c_t   c_t falls linearly over the run
    cosine       lr * s_t * c_t   c_t falls as half a cosine over the run
    corrected    lr * s_t^2       for weights before a normalization layer; the others as with constant
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dlopt.basics.ranges import Probability
from dlopt.schedules.horizon import Horizon, half_cosine, progress


@dataclass(frozen=True, kw_only=True)
class DecaySettings:
    """The keys that all choices have.

    `cautious`: see `dlopt.optim.cautious_decay`; `width`: see `dlopt.training.builders.mup.width_factors`.
    """

    cautious: bool = False
    width: Literal["none", "inverse"] = "none"


@dataclass(frozen=True)
class WeightDecay:
    """A schedule of the weight decay.

    Attributes:
        factor: (update t, the schedule's factor s_t, peak rate of the group) -> factor c_t of weight_decay.
        varies: whether the factor differs between updates.
        normalized_only: leave the decay of weights constant that no normalization layer follows.
    """

    factor: Callable[[float, float, float], float]
    varies: bool = True
    normalized_only: bool = False


def constant(*, horizon: Horizon) -> WeightDecay | None:
    return None


def independent(*, horizon: Horizon) -> WeightDecay | None:
    """theta <- theta - s_t * weight_decay * theta: as in Loshchilov & Hutter 2019, algorithm 2, with eta_t = s_t.

    The decay follows the schedule, but not the peak rate, and is the "independent weight decay" of Wortsman et al. 2023
    (arXiv 2309.14322). So good values are those of torch's AdamW times the peak rate: 1e-4.
    """
    return WeightDecay(lambda t, factor, peak: 1.0 / peak if peak else 0.0, varies=False)  # a rule may set lr: 0


def linear(*, final: Probability, horizon: Horizon) -> WeightDecay | None:
    """Falls linearly from 1 at the first update to `final` at the end of the run, its warmup included."""
    return WeightDecay(lambda t, factor, peak: 1.0 - (1.0 - final) * progress(t, 0, horizon.steps))


def cosine(*, final: Probability, horizon: Horizon) -> WeightDecay | None:
    """Falls as half a cosine from 1 at the first update to `final` at the end of the run, its warmup included."""
    return WeightDecay(lambda t, factor, peak: final + (1.0 - final) * half_cosine(progress(t, 0, horizon.steps)))


def corrected(*, horizon: Horizon) -> WeightDecay | None:
    """weight_decay * gamma_t / gamma_max, where gamma_t is the rate and gamma_max its peak: AdamC (Defazio 2025, arXiv
    2506.02285), for any optimizer with decoupled decay.

    Before a normalization layer, decay and rate set the ratio of gradient and weight norms, sqrt(2 weight_decay /
    gamma_t) for SGD, which otherwise rises as the rate falls. Hence only for matrices and kernels that such a layer
    follows (see `dlopt.optim.parameters.normalized_weights`): not for the output layer, embeddings and vectors.
    """
    return WeightDecay(lambda t, factor, peak: factor, normalized_only=True)
