"""Finds what broke layers that were healthy at the start: inputs off scale, large outputs, or the learning rate."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlopt.instruments.layers import is_off_scale
from dlopt.lab.diagnosis.measuring import Diagnosis
from dlopt.lab.diagnosis.verdicts import Cause, Verdict, recommended_init

_LONG_STEP = 0.02
"""||update|| / ||weights|| above which updates may break a healthy layer; 1e-3 is usual."""
_ABOVE_CHANCE = 2.0
"""Ratio of the loss at the start to that of equal probabilities above which the outputs are too large."""


@dataclass(frozen=True)
class Recipe:
    """What the typed keys say: choices of init and normalize, the learning rate, and the activation of most layers."""

    init: str
    normalize: str
    lr: float | None
    activation: str | None


def find_cause(
    diagnosis: Diagnosis, judged: Sequence[Sequence[Verdict]], recipe: Recipe, found_lr: Callable[[], float | None]
) -> Cause | None:
    """Returns what to blame before the layers' own verdicts; None if nothing is wrong, or if only these say what.

    Args:
        judged: the verdicts of each snapshot.
        found_lr: measures the learning rate that `dlopt find-lr` suggests; None if it has no suggestion.
    """
    before, after, trace = diagnosis.before, diagnosis.after, diagnosis.trace
    are_healthy = [all(verdict.label == "healthy" for verdict in verdicts) for verdicts in judged]
    has_risen = bool(trace.ended) or (after is not None and not after.loss <= before.loss)
    is_initial = before.updates == 0 and diagnosis.chance is not None  # a checkpoint's weights are not those of `init`
    is_large = is_initial and not before.loss <= _ABOVE_CHANCE * (diagnosis.chance or 0.0)
    if all(are_healthy) and not has_risen and not is_large:
        return None
    start = f"the loss is {before.loss:.3g} at the start"
    start += f"; of equal probabilities it is {diagnosis.chance:.3g}" if diagnosis.chance is not None else ""
    inputs = diagnosis.inputs
    if inputs is not None and is_off_scale(inputs) and recipe.normalize != "standardize":
        scale = f"the inputs have mean {inputs.mean:.2g} and standard deviation {inputs.std:.2g}, not about 0 and 1"
        return Cause(f"{scale}; {start}", "normalize=standardize")
    init = recommended_init(recipe.activation)
    if are_healthy[0] and is_large and recipe.init.rpartition("_")[0] != init.rpartition("_")[0]:
        return Cause(f"{start}: the weights, and with them the outputs, are too large", f"init={init}")
    step = statistics.median([statistics.median(ratios) for ratios in trace.ratios.values()] or [0.0])
    if are_healthy[0] and (has_risen or not all(are_healthy)) and not step <= _LONG_STEP and recipe.lr:
        rate = found_lr()
        reason = f"optimizer.lr={recipe.lr:g} is too high: an update changes {_percent(step)} of a layer's weights"
        if rate is None or rate >= recipe.lr:
            return Cause(f"{reason}, where 0.1 % is usual", "a smaller optimizer.lr")
        return Cause(f"{reason}, where 0.1 % is usual; dlopt find-lr finds {rate:.2g}", f"optimizer.lr={rate:.2g}")
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if math.isfinite(share) else "all"
