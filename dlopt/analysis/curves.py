"""Learning-rate curves of schedules, without a training."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlopt.analysis.drawing import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlopt.schedules import Factor

_POINTS = 4000  # more cannot be seen


@dataclass(frozen=True)
class Curve:
    """The learning rate `rates[i]` holds from `epochs[i]` (fractions included) to the next."""

    label: str
    epochs: Sequence[float]
    rates: Sequence[float]


def curve(
    label: str, factor: "Factor", *, lr: float, steps: int, steps_per_epoch: float, evaluate_every: float = 1.0
) -> Curve:
    """The rates of updates 0..steps-1 (of long runs some 4000 of them, evenly spread), closed at the end of the last.

    A schedule that follows a validation figure is told every `evaluate_every` epochs that nothing has improved: the
    figure of the first evaluation, again and again.
    """
    component: Any = getattr(factor, "component", factor)
    stride = math.ceil(steps / _POINTS)
    between = max(round(evaluate_every * steps_per_epoch), 1)
    epochs, rates, evaluations = [], [], 0
    for t in range(0, steps, stride):
        while hasattr(component, "update") and (evaluations + 1) * between <= t:
            component.update({component.monitor: 0.5})
            evaluations += 1
        epochs.append(t / steps_per_epoch)
        rates.append(lr * factor(t))
    return Curve(label, [*epochs, steps / steps_per_epoch], [*rates, rates[-1]])


def draw(curves: Sequence[Curve], *, title: str, subtitle: str = "", steps_per_epoch: float, log_y: bool) -> "Figure":
    """All curves in one picture; on the logarithmic axis rates of zero are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, each in enumerate(curves):
        axes.plot(
            each.epochs,
            each.rates,
            label=each.label,
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
            linewidth=3.0 - 1.6 * i / max(len(curves) - 1, 1),  # what lies below another curve shows at its sides
            drawstyle="steps-post",
        )
    axes.set_title("\n".join([title, *textwrap.wrap(subtitle, 90)]), fontsize=11)
    axes.set_xlabel(f"epoch ({steps_per_epoch:g} updates each)")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, max(each.epochs[-1] for each in curves))
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        top = max(max(each.rates) for each in curves)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], top * 1e-6))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
