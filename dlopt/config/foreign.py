"""Ranges for arguments of callables that are not ours, by name: torch's SGD itself takes lr=nan and momentum=1.5."""

from typing import Annotated, Any

from annotated_types import Ge, Interval

from dlopt.ranges import Count, NonNegative, Positive, Share

RANGES: dict[str, Any] = {
    "lr": Positive,
    "momentum": Share,
    "dampening": Annotated[float, Interval(ge=0, le=1)],
    "weight_decay": NonNegative,
    "eps": NonNegative,
    "betas": tuple[Share, Share],
    "alpha": Share,
    "rho": Share,
    "lambd": NonNegative,
    "lr_decay": NonNegative,
    "initial_accumulator_value": NonNegative,
    "momentum_decay": NonNegative,
    "etas": tuple[Annotated[float, Interval(gt=0, lt=1)], Annotated[float, Interval(gt=1)]],
    "step_sizes": tuple[Positive, Positive],
    "max_iter": Count,
    "max_eval": Count | None,
    "history_size": Count,
    "tolerance_grad": NonNegative,
    "tolerance_change": NonNegative,
    "ns_steps": Count,
    "label_smoothing": Annotated[float, Ge(0), Interval(le=1)],
}
