"""The picture of a simulated cluster: efficiency and memory of a device against the number of devices."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dlopt.analysis.bench.simulation import Cluster, Estimate
from dlopt.analysis.drawing import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = "os^Dv*P"


def draw(models: Mapping[str, Sequence[Estimate]], cluster: Cluster, *, title: str, subtitle: str) -> "Figure":
    """A column per model: efficiency above, memory below. What does not fit into a device's memory is hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(models) + 1.6, 7.4), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10)
    panels = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row")
    modes = list(dict.fromkeys(each.mode for found in models.values() for each in found))
    for column, (name, found) in enumerate(models.items()):
        top, bottom = panels[0][column], panels[1][column]
        for i, mode in enumerate(modes):
            own = [each for each in found if each.mode == mode]
            devices = [each.devices for each in own]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "label": mode}
            for axes, values in (
                (top, [100 * each.efficiency for each in own]),
                (bottom, [each.memory / 1e9 for each in own]),
            ):
                axes.plot(devices, values, **style)
                for x, y, each in zip(devices, values, own, strict=True):
                    face = style["color"] if each.fits else "white"
                    axes.plot(x, y, _MARKS[i % len(_MARKS)], color=style["color"], markerfacecolor=face, markersize=6)
        top.set_title(name, fontsize=10)
        bottom.axhline(cluster.memory, color="0.4", linewidth=1, linestyle=":")
        bottom.set_xlabel("devices")
        ticks = sorted({each.devices for each in found})
        top.set_xscale("log", base=2)
        top.set_xticks(ticks, [str(tick) for tick in ticks])
        top.minorticks_off()
        bottom.set_yscale("log")
        for axes in (top, bottom):
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(0, 105)
    panels[0][0].set_ylabel("efficiency in %")
    panels[1][0].set_ylabel("memory of a device in GB (dotted: what it has)")
    handles = [
        figure.axes[0].plot([], [], color=COLOURS[i], linestyle=DASHES[i % len(DASHES)], marker=_MARKS[i], label=mode)[
            0
        ]
        for i, mode in enumerate(modes)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
