"""Benchmarks a device: floating-point throughput against the size of matrix products and convolutions."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dlopt.machine.device import synchronized_time
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BATCH, PIXELS = 32, 32  # of the convolutions' inputs


@dataclass(frozen=True)
class DeviceSpeed:
    """One measurement: `flops` in operations per second; `size` is the rows of the matrices, or the channels."""

    device: str
    precision: str
    kind: str  # matrix product | convolution
    size: int
    flops: float


def throughput(
    device: torch.device, precision: str, *, sizes: Sequence[int], channels: Sequence[int], seconds: float
) -> list[DeviceSpeed]:
    """Times square matrix products, and 3x3 convolutions of 32 maps of 32x32 pixels forward and backward.

    Each repeats for `seconds`. A multiply-add counts as two operations: 2 n^3 for a product of n x n matrices,
    2 * 9 c^2 per pixel for a convolution of c to c channels, and twice that for its backward.
    """
    points = []
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
        flops = 2 * n**3 / _seconds(lambda a=a, b=b: a @ b, device, seconds)  # type: ignore[misc]
        points.append(DeviceSpeed(str(device), precision, "matrix product", n, flops))
    for c in channels:
        maps = torch.randn(BATCH, c, PIXELS, PIXELS, device=device).to(DTYPES[precision])
        maps = maps.to(memory_format=torch.channels_last).requires_grad_()
        kernel = torch.randn(c, c, 3, 3, device=device).to(DTYPES[precision]).requires_grad_()
        upstream = torch.ones_like(maps)

        def step(maps: Tensor = maps, kernel: Tensor = kernel, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(functional.conv2d(maps, kernel, padding=1), (maps, kernel), upstream)

        work = 3 * 2 * 9 * c * c * BATCH * PIXELS * PIXELS
        points.append(DeviceSpeed(str(device), precision, "convolution", c, work / _seconds(step, device, seconds)))
    return points


def _seconds(compute: Callable[[], object], device: torch.device, budget: float) -> float:
    """Returns the seconds of one call: the lowest mean over rounds, as other processes can only slow a round down."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            compute()
        return (synchronized_time(device) - start) / calls

    timed(2)
    calls = max(int(budget / 5 / timed(1)), 1)
    return min(timed(calls) for _ in range(5)) if calls > 1 else min(timed(1) for _ in range(2))


def draw(points: Sequence[DeviceSpeed], title: str) -> "Figure":
    """Plots throughput against size: one panel per kind of operation, one line per device and precision."""
    figure = drawing.figure(11, 4.5, title)
    lines = list(dict.fromkeys((p.device, p.precision) for p in points))
    labels = {
        "matrix product": "n, of n × n matrices",
        "convolution": f"channels, 3 × 3, {BATCH} maps of {PIXELS} × {PIXELS}",
    }
    for axes, (kind, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        of_kind = [p for p in points if p.kind == kind]
        for i, line in enumerate(lines):
            of_line = [p for p in of_kind if (p.device, p.precision) == line]
            style = drawing.style(i, marker="o", label=", ".join(line))
            axes.plot([p.size for p in of_line], [p.flops / 1e9 for p in of_line], **style)
        drawing.powers_of_two(axes, sorted({p.size for p in of_kind}), fontsize=8)
        axes.set_yscale("log")
        top = max((p.flops for p in of_kind), default=1e9)
        axes.set_ylim(top=10 ** (math.ceil(4 * math.log10(top / 1e9) + 0.5) / 4))
        axes.set_title(f"{kind}s", fontsize=10)
        axes.set(xlabel=label, ylabel="GFLOP/s")
        drawing.clean_axes(axes, which="both")
    axes.legend(frameon=False)
    return figure
