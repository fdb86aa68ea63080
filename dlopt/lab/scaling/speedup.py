"""Speed-up of data parallelism at a fixed global batch, and the wait for the slowest device, with closed forms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dlopt.lab.scaling.cluster import Cluster
from dlopt.lab.scaling.layers import Layer, parameters
from dlopt.lab.scaling.simulation import GRADIENT, ddp, optimizer_step, single, slowed, two_level_all_reduce
from dlopt.results import drawing
from dlopt.results.drawing import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Delay = Literal["normal", "exponential"]


@dataclass(frozen=True)
class Speedup:
    """Speed-up over one device on the same global batch.

    Args:
        devices: number of devices.
        step: simulated seconds per update: buckets of gradients are averaged during the backward.
        speedup: simulated.
        amdahl: 1 / (s + (1 - s) / p) for the serial fraction s (see `serial_fraction`): no communication overlaps.
        slowest: mean factor by which the slowest device is slower than the mean one, by kind of delay, simulated.
        expected: the same in closed form.
    """

    devices: int
    step: float
    speedup: float
    amdahl: float
    slowest: dict[Delay, float]
    expected: dict[Delay, float]


def serial_fraction(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster) -> float:
    """Returns the fraction of one device's update that does not shrink with the number of devices.

    The optimizer step and an all-reduce of all gradients over `devices` devices.
    """
    servers = math.ceil(devices / cluster.per_server)
    size = parameters(layers) * GRADIENT
    reduce = two_level_all_reduce(size, min(devices, cluster.per_server), servers, cluster.within, cluster.between)
    return (optimizer_step(parameters(layers), cluster) + reduce) / single(layers, batch, cluster)


def amdahl(serial: float, devices: int) -> float:
    """1 / (s + (1 - s) / p) (Amdahl 1967), at most 1 / s."""
    return 1 / (serial + (1 - serial) / devices)


def expected_slowest(delay: Delay, devices: int, variation: float) -> float:
    """Returns the expected maximum of `devices` times of mean 1 and standard deviation `variation`.

    normal: see `simulation.expected_maximum`. exponential: 1 - variation plus an exponential delay of mean `variation`,
    whose maximum has the mean variation (1 + 1/2 + ... + 1/p) (Rényi 1953).
    """
    if delay == "normal":
        return slowed(devices, variation)
    return 1 - variation + variation * sum(1 / k for k in range(1, devices + 1))


def simulated_slowest(delay: Delay, devices: int, variation: float, updates: int = 1000) -> float:
    """Returns the mean over `updates` updates of the longest of `devices` random times."""
    rng = np.random.default_rng([0, devices])
    slowest = []
    for _ in range(updates):
        draws = rng.standard_normal(devices) if delay == "normal" else rng.exponential(size=devices) - 1
        slowest.append(1 + variation * draws.max())
    return float(np.mean(slowest))


def speedups(layers: Sequence[Layer], batch: float, devices: Sequence[int], cluster: Cluster) -> list[Speedup]:
    """Simulates data parallelism with `batch` samples over all devices.

    The closed form has the serial fraction of the most devices.
    """
    serial = serial_fraction(layers, batch, max(devices), cluster)
    alone = single(layers, batch, cluster)
    kinds: tuple[Delay, ...] = ("normal", "exponential")
    found = []
    for count in sorted(set(devices)):
        step = ddp(layers, batch / count, count, cluster).step
        slowest = {kind: simulated_slowest(kind, count, cluster.variation) for kind in kinds}
        expected = {kind: expected_slowest(kind, count, cluster.variation) for kind in kinds}
        found.append(Speedup(count, step, alone / step, amdahl(serial, count), slowest, expected))
    return found


def draw(found: Sequence[Speedup], serial: float, *, title: str, subtitle: str) -> "Figure":
    """Plots the speed-up (left) and the wait for the slowest device (right) against the number of devices."""
    figure = drawing.figure(9.6, 5.4, drawing.title_with_subtitle(title, subtitle, 95))
    left, right = figure.subplots(1, 2)
    devices = [each.devices for each in found]
    left.plot(devices, devices, color="0.6", linewidth=1.5, label="ideal")
    left.plot(devices, [each.amdahl for each in found], **style(1, linewidth=2.2), label="Amdahl, closed form")
    left.plot(devices, [each.speedup for each in found], "o", color=drawing.COLOURS[0], markersize=9, label="simulated")
    left.axhline(1 / serial, color=drawing.COLOURS[1], linewidth=1, linestyle=":", label="Amdahl's limit")
    left.set_yscale("log")
    left.set_ylim(0.8, 4 * max(1 / serial, *(each.speedup for each in found)))
    left.set_ylabel("speed-up over one device", fontsize=13)
    for i, (kind, marker) in enumerate((("normal", "o"), ("exponential", "s"))):
        colour = drawing.COLOURS[2 + i]
        simulated, expected = [each.slowest[kind] for each in found], [each.expected[kind] for each in found]  # type: ignore[index]
        right.plot(devices, expected, **style(2 + i, linewidth=2.2), label=f"{kind} delays, closed form")
        right.plot(devices, simulated, marker, color=colour, markersize=9, label=f"{kind} delays, simulated")
    right.set_ylabel("time of the slowest device / mean time", fontsize=13)
    for axes in (left, right):
        drawing.powers_of_two(axes, devices if len(devices) < 8 else devices[::2])
        axes.set_xlabel("devices", fontsize=13)
        axes.legend(frameon=False, fontsize=11, loc="upper left")
    right.set_ylim(top=right.get_ylim()[0] + 1.35 * (right.get_ylim()[1] - right.get_ylim()[0]))
    drawing.clean_axes(left, right)
    return figure
