"""Simulates training on a cluster: time per update, efficiency and memory of each parallel mode.

Starts with closed forms for collectives, pipelines and stragglers: n bytes, p ranks, alpha seconds of latency per
message, beta bytes per second that a rank sends. Then follow the modes and the plot. Times are in seconds. All modes
have the same global batch, `batch` samples per device; efficiency compares with one device on `batch` samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlopt.lab.scaling.cluster import Cluster, Link
from dlopt.lab.scaling.layers import Layer, operations, parameters
from dlopt.parallel.modes.chain import balance
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """2 (p-1) alpha + 2 (p-1)/p n/beta: p-1 steps scatter the sums of n/p bytes each, p-1 gather them.

    Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
    """
    return 2 * ring_gather(size, ranks, link)


def ring_gather(size: float, ranks: int, link: Link) -> float:
    """(p-1) alpha + (p-1)/p n/beta: an all-gather that ends with n bytes, or a reduce-scatter that begins with them.

    Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.1.
    """
    return (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """2 ceil(log2 p) alpha + 2 n/beta: two binary trees, each reducing and broadcasting a half, pipelined.

    Sanders, Speck & Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan".
    """
    return 0.0 if ranks == 1 else 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth


def all_reduce(size: float, ranks: int, link: Link) -> float:
    """The faster of ring and trees: trees win for small messages and many ranks."""
    return min(ring_all_reduce(size, ranks, link), tree_all_reduce(size, ranks, link))


def two_level_all_reduce(size: float, per_server: int, servers: int, within: Link, between: Link) -> float:
    """Reduce-scatter within each server, all-reduce of the shards between servers, all-gather within.

    The g shards of n/g bytes cross at the same time over the server's connection `between`, and take as long as n bytes
    of one. Jia et al. 2018, "Highly scalable deep learning training system with mixed-precision", section 3.2.
    """
    return 2 * ring_gather(size, per_server, within) + (all_reduce(size, servers, between) if servers > 1 else 0.0)


def two_level_gather(size: float, per_server: int, servers: int, within: Link, between: Link) -> float:
    """An all-gather that ends with n bytes everywhere, or a reduce-scatter that begins with them.

    Gathers shards of n/g bytes between servers, all g at once over the server's connection, then within each server.
    """
    across = ring_gather(size, servers, between) if servers > 1 else 0.0
    return across + ring_gather(size, per_server, within)


def send(size: float, link: Link) -> float:
    return link.latency + size / link.bandwidth


def pipelined(forward: Sequence[float], backward: Sequence[float], micro_batches: int) -> float:
    """(m + S - 1) (f + b): 1F1B over S stages and m micro-batches, f and b the slowest stage's seconds per micro-batch.

    The bubble is (S - 1) of the m + S - 1 slots. Exact where all stages are equal, an upper bound otherwise.
    Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using Megatron-LM",
    section 2.2.1.
    """
    return (micro_batches + len(forward) - 1) * max(f + b for f, b in zip(forward, backward, strict=True))


def overlapped(ready: Sequence[float], durations: Sequence[float]) -> float:
    """Returns the end of the last of several sequential transfers; none starts before its data is ready."""
    end = 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(end, start) + duration
    return end


def expected_maximum(count: int) -> float:
    """Expected maximum of `count` independent standard normals: integral of x n phi(x) Phi(x)^(n-1) dx; 0 for one.

    `count` devices that wait for the slowest take mu + sigma times this. David & Nagaraja 2003, "Order statistics",
    section 3.1.
    """
    return _moment_of_maximum(count, 1) if count > 1 else 0.0


def _moment_of_maximum(count: int, power: int) -> float:
    from scipy.special import ndtr

    x = np.linspace(-9.0, 9.0, 7201)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(x**power * count * density * ndtr(x) ** (count - 1)) * (x[1] - x[0]))


def slowed(devices: int, variation: float, barriers: int = 1, group: int | None = None) -> float:
    """Straggler slowdown of `devices` in groups of `group` devices (None for one group).

    The devices of a group wait for its slowest one `barriers` times per update, the groups for the slowest group once.
    The time of an update varies by `variation` (standard deviation over mean), independently between devices and
    between the k intervals from barrier to barrier. An interval has 1/k of the variance, so the sum over k maxima has
    mean mu + sigma sqrt(k) E[max] and standard deviation sigma SD[max], and the slowest group takes E[max over groups]
    of the latter longer.
    """
    group = devices if group is None else group
    mean = expected_maximum(group)
    deviation = math.sqrt(_moment_of_maximum(group, 2) - mean**2)
    return 1 + variation * (math.sqrt(barriers) * mean + deviation * expected_maximum(devices // group))


# -- the parallel modes

GRADIENT = 4  # bytes of a gradient, a weight, a momentum, a running statistic
_FIRST_BUCKET = 2.0**20  # bytes at most: DDP's first bucket is small to start communication early
_BACKWARD = 2  # operations of the backward per operation of the forward: gradients of inputs and of weights


class ModeCost(NamedTuple):
    step: float  # seconds per update
    compute: float  # seconds of computation on the slowest device
    memory: float  # bytes per device


@dataclass(frozen=True)
class ModeEstimate:
    """Estimate of one mode, with the units of `ModeCost`."""

    mode: str
    devices: int
    step: float
    compute: float
    memory: float
    efficiency: float
    fits: bool


def seconds(layer: Layer, samples: float, cluster: Cluster) -> tuple[float, float]:
    """Returns the seconds of forward and backward for `samples` samples.

    A timed layer has its seconds per sample. Otherwise the larger of compute and memory time (Williams, Waterman &
    Patterson 2009, "Roofline"), from `tflops` and `memory_bandwidth`.
    """
    if layer.forward:
        return layer.forward * samples, layer.backward * samples
    compute = layer.operations * samples / (cluster.tflops * 1e12)
    moved = (layer.inputs + layer.outputs) * samples * cluster.value_bytes + layer.parameters * GRADIENT
    move = moved / (cluster.memory_bandwidth * 1e9)
    return max(compute, move), _BACKWARD * max(compute, move)


def single(layers: Sequence[Layer], batch: float, cluster: Cluster) -> float:
    """Seconds of an update on one device."""
    return sum(sum(seconds(layer, batch, cluster)) for layer in layers) + optimizer_step(parameters(layers), cluster)


def optimizer_step(values: float, cluster: Cluster) -> float:
    """Seconds of SGD with momentum: reads weights, gradients and momenta, writes weights and momenta."""
    return 5 * values * GRADIENT / (cluster.memory_bandwidth * 1e9)


def _state_bytes(values: float) -> float:
    return 3 * values * GRADIENT


def _activations(layers: Sequence[Layer], samples: float, cluster: Cluster) -> float:
    """Bytes kept for the backward: every layer's output once."""
    return sum(layer.outputs for layer in layers) * samples * cluster.value_bytes


def _topology(devices: int, cluster: Cluster) -> tuple[int, int]:
    """Returns (devices per server, servers)."""
    per_server = min(devices, cluster.per_server)
    return per_server, math.ceil(devices / per_server)


def _backward_end(
    layers: Sequence[Layer], times: Sequence[float], start: float, shards: int, devices: int, cluster: Cluster
) -> float:
    """Returns the time at which the backward from `start` on and the averaging of its gradients over `devices` end.

    Each device has 1/`shards` of the gradients. They become ready from the last layer to the first, and each bucket is
    reduced as soon as it is full.
    """
    # All shards of a server cross between servers at the same time and share the server's bandwidth.
    topology = (1, devices) if shards > 1 else _topology(devices, cluster)
    clock, filled = start, 0.0
    ready, durations = list[float](), list[float]()
    for i in reversed(range(len(layers))):
        clock += times[i]
        filled += layers[i].parameters * GRADIENT / shards
        if filled and (i == 0 or filled >= min(cluster.bucket_mb * 1e6, math.inf if ready else _FIRST_BUCKET)):
            ready.append(clock)
            durations.append(two_level_all_reduce(filled * shards, *topology, cluster.within, cluster.between))
            filled = 0.0
    return max(clock, overlapped(ready, durations)) if devices > 1 else clock


def _split(
    layers: Sequence[Layer],
    devices: int,
    cluster: Cluster,
    degree: int,
    forward: float,
    backward: Sequence[float],
    communication: float,
    barriers: int,
    kept: float,
    shards: int,
) -> ModeCost:
    """Returns the cost of a mode that splits layers over groups of `degree` devices: `communication` seconds that no
    computation hides, and `barriers` per update. Each device has 1/`shards` of the weights and `kept` bytes of
    activations."""
    slowdown = slowed(devices, cluster.variation, max(barriers, 1), degree)
    forward, backward = slowdown * forward + communication, [slowdown * time for time in backward]
    update = optimizer_step(parameters(layers) / shards, cluster)
    step = _backward_end(layers, backward, forward, shards, devices // shards, cluster) + update
    memory = _state_bytes(parameters(layers) / shards) + kept
    return ModeCost(step, forward - communication + sum(backward) + update, memory)


def ddp(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster) -> ModeCost:
    """Data parallelism: averages gradients during the backward, and waits for the slowest device."""
    slowdown = slowed(devices, cluster.variation)
    times = [seconds(layer, batch, cluster) for layer in layers]
    forward, backward = slowdown * sum(f for f, _ in times), [slowdown * b for _, b in times]
    update = optimizer_step(parameters(layers), cluster)
    step = _backward_end(layers, backward, forward, 1, devices, cluster) + update
    # BatchNorm's running statistics, as many values as it has parameters, are averaged after the update.
    if buffers := sum(layer.parameters for layer in layers if layer.kind == "other") * GRADIENT:
        step += two_level_all_reduce(buffers, *_topology(devices, cluster), cluster.within, cluster.between)
    memory = _state_bytes(parameters(layers)) + _activations(layers, batch, cluster)
    return ModeCost(step, forward + sum(backward) + update, memory)


def fsdp(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, shards: int) -> ModeCost:
    """Fully sharded data parallelism over `shards` devices, and replicated over groups of them (HSDP).

    All-gathers of weights, forward and backward, and reduce-scatters of gradients overlap with the computation, except
    the first all-gather and the last reduce-scatter. Replicas average the gradients of their shards after the backward.
    Zhao et al. 2023, "PyTorch FSDP", section 3.
    """
    slowdown = slowed(devices, cluster.variation)
    topology, groups = _topology(shards, cluster), devices // shards
    times = [seconds(layer, batch, cluster) for layer in layers]
    units = [list(unit) for _, unit in groupby(layers, key=lambda layer: layer.block or layer.name.partition(".")[0])]
    gathers = [
        two_level_gather(parameters(unit) * GRADIENT, *topology, cluster.within, cluster.between)
        for unit in units
        if parameters(unit)
    ]
    forward, backward = slowdown * sum(f for f, _ in times), slowdown * sum(b for _, b in times)
    update = optimizer_step(parameters(layers) / shards, cluster)
    step = gathers[0] + max(forward, sum(gathers[1:])) + max(backward, 2 * sum(gathers)) + gathers[0] + update
    if groups > 1:  # all shards of a server share its connection
        step += all_reduce(parameters(layers) * GRADIENT, groups, cluster.between)
    largest = max(parameters(unit) for unit in units)
    memory = _state_bytes(parameters(layers) / shards) + 2 * largest * GRADIENT + _activations(layers, batch, cluster)
    return ModeCost(step, forward + backward + update, memory)


def filter_parallel(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, degree: int) -> ModeCost:
    """Tensor parallelism over channels within groups of `degree` devices, data parallelism between the groups.

    A device has ceil(N / degree) of N channels. A residual block needs one all-reduce forward (its last convolution is
    sharded by input channels) and one backward (the input gradient of its first convolution). Within a bottleneck and
    outside of blocks, outputs are gathered and input gradients summed. No computation overlaps with these collectives,
    and each is a barrier for the group.
    """
    samples, link = batch * degree, cluster.link(degree)
    communication, forward, kept, barriers, is_gathered, backward = 0.0, 0.0, 0.0, 0, True, list[float]()
    for number, layer in enumerate(layers):
        is_split = layer.kind != "other"
        fraction = math.ceil(layer.units / degree) / layer.units if is_split or not is_gathered else 1.0
        f, b = (fraction * time for time in seconds(layer, samples, cluster))
        outputs = layer.outputs * samples * cluster.value_bytes
        inputs = layer.inputs * samples * cluster.value_bytes if number else 0.0  # images need no gradient
        reduces = (layer.role == "last") + (layer.role == "first")  # all-reduce of outputs; of the input gradient
        gathers = is_split and layer.role in ("alone", "inner")
        if is_split:
            is_gathered = layer.role == "last" or gathers  # every device then computes the following layers whole
        if is_split and degree > 1:
            size = outputs if layer.role == "last" else inputs
            communication += reduces * all_reduce(size, degree, link)
            communication += gathers * (ring_gather(outputs, degree, link) + all_reduce(inputs, degree, link))
            barriers += reduces + 2 * gathers
        forward, backward = forward + f, [*backward, b]
        kept += outputs if is_gathered else outputs * fraction
    return _split(layers, devices, cluster, degree, forward, backward, communication, barriers, kept, shards=degree)


def spatial(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, degree: int) -> ModeCost:
    """Spatial parallelism: feature maps in `degree` strips of rows with halo exchange, replicated weights.

    Data parallel between groups of `degree` devices. A device has ceil(H / degree) of H rows; every device computes
    layers without a map. Gradients are summed over all devices.
    """
    samples, link = batch * degree, cluster.link(degree)
    communication, forward, kept, barriers, backward = 0.0, 0.0, 0.0, 0, list[float]()
    for layer in layers:
        fraction = math.ceil(layer.rows / degree) / layer.rows if layer.rows > 1 else 1.0
        f, b = (fraction * time for time in seconds(layer, samples, cluster))
        if layer.halo and degree > 1:
            # To both neighbours, once outputs and once gradients.
            communication += 2 * 2 * send(layer.halo * samples * cluster.value_bytes, link)
            barriers += 2
        forward, backward = forward + f, [*backward, b]
        kept += fraction * layer.outputs * samples * cluster.value_bytes
    return _split(layers, devices, cluster, degree, forward, backward, communication, barriers, kept, shards=1)


def pipeline(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, stages: int) -> ModeCost:
    """Pipeline parallelism: `stages` stages of nearly equal time, 1F1B over micro-batches, data parallel over groups.

    Activations and gradients are sent between stages once per micro-batch. A stage keeps the activations of as many
    micro-batches as there are stages from it to the last.
    """
    groups, micro = devices // stages, batch * stages / cluster.micro_batches
    times = [seconds(layer, micro, cluster) for layer in layers]
    bounds = list(pairwise([*balance([f + b for f, b in times], stages), len(layers)]))
    link = cluster.link(stages)
    slowdown = slowed(devices, cluster.variation, cluster.micro_batches, stages)
    forwards, backwards, busiest, memory = [], [], 0.0, 0.0
    for stage, (start, stop) in enumerate(bounds):
        sent = send(layers[stop - 1].outputs * micro * cluster.value_bytes, link) if stop < len(layers) else 0.0
        forward, backward = (slowdown * sum(column) for column in zip(*times[start:stop], strict=True))
        forwards.append(forward + sent)
        backwards.append(backward + sent)
        busiest = max(busiest, forward + backward)
        in_flight = min(stages - stage, cluster.micro_batches)
        states = _state_bytes(parameters(layers[start:stop]))
        memory = max(memory, states + in_flight * _activations(layers[start:stop], micro, cluster))
    step = pipelined(forwards, backwards, cluster.micro_batches)
    update = optimizer_step(max(parameters(layers[start:stop]) for start, stop in bounds), cluster)
    compute = cluster.micro_batches * busiest + update
    if groups > 1:  # all stages of a server at once, after the last micro-batch
        step += all_reduce(parameters(layers) * GRADIENT, groups, cluster.between)
    return ModeCost(step + update, compute, memory)


def estimates(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster) -> list[ModeEstimate]:
    """Estimates all modes that can use `devices` devices.

    Model parallelism is within a server and data parallelism between servers; `filter` and `fsdp` are over all devices.
    A micro-batch of the pipeline has at least one sample.
    """
    degree = devices if devices <= cluster.per_server else math.gcd(devices, cluster.per_server)
    is_mixed = degree > 1 or devices == 1  # groups of one device would be plain data parallelism
    kernels = [layer for layer in layers if layer.kind != "other"]
    is_divisible = degree <= len(kernels) and batch * degree >= cluster.micro_batches
    modes = {
        "fsdp": (fsdp, devices, True),
        "fsdp × ddp": (fsdp, degree, is_mixed),
        "filter": (filter_parallel, devices, devices <= max(layer.units for layer in kernels)),
        "filter × ddp": (filter_parallel, degree, is_mixed),
        "spatial × ddp": (spatial, degree, is_mixed),
        "pipeline × ddp": (pipeline, degree, is_mixed and is_divisible),
    }
    costs = {"ddp": ddp(layers, batch, devices, cluster)}
    for mode, (cost, group, is_possible) in modes.items():
        if is_possible:
            costs[mode] = cost(layers, batch, devices, cluster, group)
    alone = single(layers, batch, cluster)
    return [
        ModeEstimate(mode, devices, *cost, efficiency=alone / cost.step, fits=cost.memory <= cluster.memory * 1e9)
        for mode, cost in costs.items()
    ]


def size(layers: Sequence[Layer]) -> str:
    """Formats the parameters and operations of a training step."""
    return f"{parameters(layers) / 1e6:.1f} M parameters, {3 * operations(layers) / 1e9:.1f} GFLOP per sample"


def of_one_device(layers: Sequence[Layer], batch: float, cluster: Cluster) -> str:
    """Says how long an update takes on one device, and which part of it the operations would take alone."""
    computes = (1 + _BACKWARD) * operations(layers) * batch / (cluster.tflops * 1e12)
    return (
        f"one device: {1e3 * single(layers, batch, cluster):.1f} ms per update, where the FLOPs alone take "
        f"{1e3 * computes:.1f} ms: norms, activations and the optimizer wait for the memory"
    )


# -- plot: efficiency and memory per device against the number of devices

_MARKS = "os^Dv*P"


def draw(models: Mapping[str, Sequence[ModeEstimate]], cluster: Cluster, *, title: str, subtitle: str) -> "Figure":
    """Plots efficiency (top) and memory (bottom), a column per model; hollow marks do not fit into memory."""
    figure = drawing.figure(4.3 * len(models) + 1.6, 7.4, f"{title}\n{subtitle}", fontsize=10)
    panels = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row")
    drawing.clean_axes(*panels.flat)
    modes = list(dict.fromkeys(estimate.mode for estimates in models.values() for estimate in estimates))
    lines = {mode: drawing.style(i, label=mode) for i, mode in enumerate(modes)}
    marks = dict(zip(modes, _MARKS, strict=False))
    for (top, bottom), (name, estimates) in zip(panels.T, models.items(), strict=True):
        for mode, line in lines.items():
            of_mode = [estimate for estimate in estimates if estimate.mode == mode]
            efficiencies = [100 * estimate.efficiency for estimate in of_mode]
            memories = [estimate.memory / 1e9 for estimate in of_mode]
            for axes, values in ((top, efficiencies), (bottom, memories)):
                axes.plot([estimate.devices for estimate in of_mode], values, **line)
                for y, estimate in zip(values, of_mode, strict=True):
                    face, colour = line["color"] if estimate.fits else "white", line["color"]
                    axes.plot(estimate.devices, y, marks[mode], color=colour, markerfacecolor=face, markersize=6)
        top.set_title(name, fontsize=10)
        bottom.axhline(cluster.memory, color="0.4", linewidth=1, linestyle=":")
        bottom.set_xlabel("devices")
        drawing.powers_of_two(top, sorted({estimate.devices for estimate in estimates}))
        bottom.set_yscale("log")
    panels[0][0].set(ylim=(0, 105), ylabel="efficiency in %")
    panels[1][0].set_ylabel("memory per device in GB (dotted: capacity)")
    handles = [panels[0][0].plot([], [], marker=marks[mode], **line)[0] for mode, line in lines.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
