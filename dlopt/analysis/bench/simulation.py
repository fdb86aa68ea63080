"""Estimates what a cluster would make of a model: time per update, efficiency, memory under each parallel mode.

First the closed forms of what communication, pipelines and stragglers cost, with n bytes, p ranks, alpha seconds of
latency per message, beta bytes per second that a rank sends; then the modes; then the picture. Times are in seconds.
Every mode works on the same global batch, `batch` samples per device, and is compared with one device that works on
`batch` samples alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np

from dlopt.analysis import drawing
from dlopt.analysis.model_summary import Layer, operations, parameters
from dlopt.parallel.chain import balanced
from dlopt.ranges import Count, NonNegative, Positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Link:
    """One kind of connection: seconds that a message takes to start, and bytes per second after that."""

    latency: float
    bandwidth: float


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
    """The faster of ring and trees: trees win where messages are small or ranks are many."""
    return min(ring_all_reduce(size, ranks, link), tree_all_reduce(size, ranks, link))


def two_level_all_reduce(size: float, per_server: int, servers: int, within: Link, between: Link) -> float:
    """Reduce-scatter within each server, all-reduce of the parts between servers, all-gather within.

    The g parts of n/g bytes cross at the same time and share the server's connection, whose bandwidth `between` has:
    together they take as long as n bytes of one. Jia et al. 2018, "Highly scalable deep learning training system with
    mixed-precision", section 3.2.
    """
    return 2 * ring_gather(size, per_server, within) + (all_reduce(size, servers, between) if servers > 1 else 0.0)


def two_level_gather(size: float, per_server: int, servers: int, within: Link, between: Link) -> float:
    """An all-gather that ends with n bytes everywhere, or a reduce-scatter that begins with them.

    Parts of n/g bytes are gathered between servers, all g at once over the server's connection, then within.
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
    """When the last of several transfers ends that go one after the other, each no sooner than it is ready."""
    end = 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(end, start) + duration
    return end


def expected_maximum(count: int) -> float:
    """Of `count` independent standard normals: the integral of x n phi(x) Phi(x)^(n-1) dx; 0 for one.

    So many devices wait for the slowest: mu + sigma times this. David & Nagaraja 2003, "Order statistics", section 3.1.
    """
    from scipy.special import ndtr

    x = np.linspace(-9.0, 9.0, 7201)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(x * count * density * ndtr(x) ** (count - 1)) * (x[1] - x[0])) if count > 1 else 0.0


def slowed(devices: int, variation: float, meetings: int = 1) -> float:
    """Factor on the time of `devices` that all wait for the slowest, `meetings` times in an update.

    A device's time for an update varies by `variation` (standard deviation over mean), independently of the others and
    from one part of the update to the next: a part between two of k meetings has 1/k of the variance, so that the sum
    over k maxima is mu + sigma sqrt(k) E[max].
    """
    return 1 + variation * math.sqrt(meetings) * expected_maximum(devices)


# -- the parallel modes

GRADIENT = 4  # bytes of a gradient, a weight, a momentum, a running statistic
_FIRST_BUCKET = 2.0**20  # bytes at most: DDP starts to talk early
_BACKWARD = 2  # operations of a backward per operation of the forward: by the inputs and by the weights


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Servers with `per_server` devices each; gigabytes are 1e9 bytes."""

    per_server: Count
    tflops: Positive  # that a device computes of a large layer
    memory_bandwidth: Positive  # of a device, GB/s
    memory: Positive  # of a device, GB
    bandwidth_within: Positive  # between two devices of a server, GB/s
    latency_within: Positive  # microseconds
    bandwidth_between: Positive  # of a server, GB/s
    latency_between: Positive  # microseconds
    variation: NonNegative  # standard deviation over mean of a device's time per update
    value_bytes: Count  # of an activation
    micro_batches: Count  # of the pipeline
    bucket_mb: Positive  # of gradients that are reduced together

    @property
    def within(self) -> Link:
        return Link(self.latency_within * 1e-6, self.bandwidth_within * 1e9)

    @property
    def between(self) -> Link:
        return Link(self.latency_between * 1e-6, self.bandwidth_between * 1e9)

    def link(self, devices: int) -> Link:
        """The connection that limits a ring over so many neighbouring devices."""
        return self.within if devices <= self.per_server else self.between


@dataclass(frozen=True)
class Estimate:
    """Of one mode; seconds per update, bytes of memory of a device."""

    mode: str
    devices: int
    step: float
    compute: float  # seconds in which the slowest device computes
    memory: float
    efficiency: float
    fits: bool


def seconds(layer: Layer, samples: float, cluster: Cluster) -> tuple[float, float]:
    """Of forward and backward: measured ones where there are any, else the longer of computing and moving data.

    Measured seconds are those of `samples` samples already. The longer of the two: Williams, Waterman & Patterson 2009,
    "Roofline", for `tflops` and `memory_bandwidth`.
    """
    if layer.forward:
        return layer.forward, layer.backward
    compute = layer.operations * samples / (cluster.tflops * 1e12)
    moved = (layer.inputs + layer.outputs) * samples * cluster.value_bytes + layer.parameters * GRADIENT
    move = moved / (cluster.memory_bandwidth * 1e9)
    return max(compute, move), _BACKWARD * max(compute, move)


def single(layers: Sequence[Layer], batch: float, cluster: Cluster) -> float:
    """Seconds of an update on one device."""
    return sum(sum(seconds(layer, batch, cluster)) for layer in layers) + _update(parameters(layers), cluster)


def _update(values: float, cluster: Cluster) -> float:
    """The optimizer reads weights, gradients and momenta, and writes two of them."""
    return 5 * values * GRADIENT / (cluster.memory_bandwidth * 1e9)


def _states(values: float) -> float:
    return 3 * values * GRADIENT


def _activations(layers: Sequence[Layer], samples: float, cluster: Cluster) -> float:
    """What the backward needs: every layer's output once."""
    return sum(layer.outputs for layer in layers) * samples * cluster.value_bytes


def _servers(devices: int, cluster: Cluster) -> tuple[int, int]:
    """Devices per server, and servers."""
    per_server = min(devices, cluster.per_server)
    return per_server, math.ceil(devices / per_server)


def _reduced(
    layers: Sequence[Layer], times: Sequence[float], start: float, shards: int, devices: int, cluster: Cluster
) -> float:
    """When the gradients of 1/`shards` of the model are averaged over `devices` devices, a backward from `start` on.

    Layer by layer from the last one, gradients become ready; a bucket of them is reduced as soon as it is full.
    """
    # All shards of a server go between servers at the same time.
    per_server, servers = (1, devices) if shards > 1 else _servers(devices, cluster)
    clock, filled = start, 0.0
    ready, durations = list[float](), list[float]()
    for i in reversed(range(len(layers))):
        clock += times[i]
        filled += layers[i].parameters * GRADIENT / shards
        if filled and (i == 0 or filled >= min(cluster.bucket_mb * 1e6, math.inf if ready else _FIRST_BUCKET)):
            ready.append(clock)
            durations.append(
                two_level_all_reduce(filled * shards, per_server, servers, cluster.within, cluster.between)
            )
            filled = 0.0
    return max(clock, overlapped(ready, durations)) if devices > 1 else clock


def _aligned(layers: Sequence[Layer], devices: int, cluster: Cluster) -> float:
    """Running statistics are averaged after the update; norms have two values a channel, as they have parameters."""
    per_server, servers = _servers(devices, cluster)
    size = sum(layer.parameters for layer in layers if layer.kind == "other") * GRADIENT
    return two_level_all_reduce(size, per_server, servers, cluster.within, cluster.between) if size else 0.0


@dataclass(frozen=True)
class _Case:
    """What is estimated; `batch` samples per device."""

    mode: str
    layers: Sequence[Layer]
    batch: float
    devices: int
    cluster: Cluster

    def estimate(self, step: float, compute: float, memory: float) -> Estimate:
        efficiency = single(self.layers, self.batch, self.cluster) / step
        fits = memory <= self.cluster.memory * 1e9
        return Estimate(self.mode, self.devices, step, compute, memory, efficiency, fits)

    def split(
        self, forward: float, backward: Sequence[float], talk: float, meetings: int, kept: float, shards: int
    ) -> Estimate:
        """Of layers whose work is split: they talk for `talk` seconds, which nothing hides, and wait for each other
        `meetings` times. Each device has 1/`shards` of the weights and `kept` bytes of activations."""
        slow = slowed(self.devices, self.cluster.variation, max(meetings, 1))
        forward, backward = slow * forward + talk, [slow * each for each in backward]
        update = _update(parameters(self.layers) / shards, self.cluster)
        step = _reduced(self.layers, backward, forward, shards, self.devices // shards, self.cluster) + update
        memory = _states(parameters(self.layers) / shards) + kept
        return self.estimate(step, forward - talk + sum(backward) + update, memory)


def ddp(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster) -> Estimate:
    """Gradients averaged beside the backward; the slowest device sets the pace."""
    slow = slowed(devices, cluster.variation)
    times = [seconds(layer, batch, cluster) for layer in layers]
    forward, backward = slow * sum(f for f, _ in times), [slow * b for _, b in times]
    update = _update(parameters(layers), cluster)
    step = _reduced(layers, backward, forward, 1, devices, cluster) + update + _aligned(layers, devices, cluster)
    memory = _states(parameters(layers)) + _activations(layers, batch, cluster)
    return _Case("ddp", layers, batch, devices, cluster).estimate(step, forward + sum(backward) + update, memory)


def fsdp(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, shards: int) -> Estimate:
    """Weights are gathered before they are needed, forward and backward, and gradients scattered, all beside computing.

    Over `shards` devices; gradients of a shard are then averaged over the groups of these, behind the backward. The
    first gathering and the last scattering have nothing to hide behind. Zhao et al. 2023, "PyTorch FSDP", section 3.
    """
    slow = slowed(devices, cluster.variation)
    per_server, servers = _servers(shards, cluster)
    groups = devices // shards
    times = [seconds(layer, batch, cluster) for layer in layers]
    units = [list(each) for _, each in groupby(layers, key=lambda layer: layer.block or layer.name.partition(".")[0])]
    gathers = [
        two_level_gather(parameters(unit) * GRADIENT, per_server, servers, cluster.within, cluster.between)
        for unit in units
        if parameters(unit)
    ]
    forward, backward = slow * sum(f for f, _ in times), slow * sum(b for _, b in times)
    update = _update(parameters(layers) / shards, cluster)
    step = gathers[0] + max(forward, sum(gathers[1:])) + max(backward, 2 * sum(gathers)) + gathers[0] + update
    if groups > 1:  # all shards of a server at once
        step += all_reduce(parameters(layers) * GRADIENT, groups, cluster.between)
    largest = max(parameters(unit) for unit in units)
    memory = _states(parameters(layers) / shards) + 2 * largest * GRADIENT + _activations(layers, batch, cluster)
    return _Case("fsdp", layers, batch, devices, cluster).estimate(step, forward + backward + update, memory)


def filter_parallel(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, degree: int) -> Estimate:
    """Each layer's units split over `degree` devices, data parallel over groups of these.

    A device has ceil(N / degree) of N units. A residual block needs one all-reduce forward (its last convolution is
    split by inputs) and one backward (the gradient by the input of its first); within a bottleneck and outside of
    blocks outputs are gathered, and input gradients summed. Nothing hides these. Devices of a group meet at each of
    them.
    """
    samples, link = batch * degree, cluster.link(degree)
    talk, forward, kept, meetings, is_whole, backward = 0.0, 0.0, 0.0, 0, True, list[float]()
    for number, layer in enumerate(layers):
        is_split = layer.kind != "other"
        share = math.ceil(layer.units / degree) / layer.units if is_split or not is_whole else 1.0
        f, b = (share * each for each in seconds(layer, samples, cluster))
        out = layer.outputs * samples * cluster.value_bytes
        into = layer.inputs * samples * cluster.value_bytes if number else 0.0  # nobody asks for the images' gradient
        reduces = (layer.role == "last") + (layer.role == "first")  # its outputs, and its input's gradient
        gathers = is_split and layer.role in ("alone", "inner")
        if is_split:
            is_whole = layer.role == "last" or gathers  # then normed and rectified by all
        if is_split and degree > 1:
            size = out if layer.role == "last" else into
            talk += reduces * all_reduce(size, degree, link)
            talk += gathers * (ring_gather(out, degree, link) + all_reduce(into, degree, link))
            meetings += reduces + 2 * gathers
        forward, backward = forward + f, [*backward, b]
        kept += out if is_whole else out * share
    return _Case("filter", layers, batch, devices, cluster).split(forward, backward, talk, meetings, kept, degree)


def spatial(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, degree: int) -> Estimate:
    """Maps in `degree` strips of rows, data parallel over groups: rows at the boundaries are exchanged, weights whole.

    A device has ceil(H / degree) of H rows; layers without a map are computed by all. Gradients are summed over all
    devices.
    """
    samples, link = batch * degree, cluster.link(degree)
    talk, forward, kept, meetings, backward = 0.0, 0.0, 0.0, 0, list[float]()
    for layer in layers:
        share = math.ceil(layer.rows / degree) / layer.rows if layer.rows > 1 else 1.0
        f, b = (share * each for each in seconds(layer, samples, cluster))
        if layer.halo and degree > 1:
            talk += 2 * 2 * send(layer.halo * samples * cluster.value_bytes, link)  # up and down; and gradients
            meetings += 2
        forward, backward = forward + f, [*backward, b]
        kept += share * layer.outputs * samples * cluster.value_bytes
    return _Case("spatial", layers, batch, devices, cluster).split(forward, backward, talk, meetings, kept, 1)


def pipeline(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster, stages: int) -> Estimate:
    """Layers in `stages` parts of nearly equal time, 1F1B over micro-batches, data parallel over groups.

    A boundary's activation and its gradient are sent once per micro-batch. A stage keeps the activations of as many
    micro-batches as there are stages from it to the last.
    """
    groups, micro = devices // stages, batch * stages / cluster.micro_batches
    times = [seconds(layer, micro, cluster) for layer in layers]
    bounds = list(pairwise([*balanced([f + b for f, b in times], stages), len(layers)]))
    link = cluster.link(stages)
    slow = slowed(devices, cluster.variation, cluster.micro_batches)
    forwards, backwards, memory = [], [], 0.0
    for stage, (start, stop) in enumerate(bounds):
        sent = send(layers[stop - 1].outputs * micro * cluster.value_bytes, link) if stop < len(layers) else 0.0
        forwards.append(slow * sum(f for f, _ in times[start:stop]) + sent)
        backwards.append(slow * sum(b for _, b in times[start:stop]) + sent)
        in_flight = min(stages - stage, cluster.micro_batches)
        own = _states(parameters(layers[start:stop]))
        memory = max(memory, own + in_flight * _activations(layers[start:stop], micro, cluster))
    step = pipelined(forwards, backwards, cluster.micro_batches)
    update = _update(max(parameters(layers[start:stop]) for start, stop in bounds), cluster)
    compute = step + update
    if groups > 1:  # all stages of a server at once, behind the last micro-batch
        step += all_reduce(parameters(layers) * GRADIENT, groups, cluster.between)
    return _Case("pipeline", layers, batch, devices, cluster).estimate(step + update, compute, memory)


def estimates(layers: Sequence[Layer], batch: float, devices: int, cluster: Cluster) -> list[Estimate]:
    """Every mode on so many devices; model parallelism within a server, data parallelism between, and filter over all.

    Modes that cannot use so many devices are left out.
    """
    degree = math.gcd(devices, cluster.per_server)
    kernels = [layer for layer in layers if layer.kind != "other"]
    modes = {
        "fsdp": (fsdp, devices, True),
        "fsdp × ddp": (fsdp, degree, True),
        "filter": (filter_parallel, devices, devices <= max(layer.units for layer in kernels)),
        "filter × ddp": (filter_parallel, degree, True),
        "spatial × ddp": (spatial, degree, True),
        "pipeline × ddp": (pipeline, degree, degree <= len(kernels)),
    }
    found = [ddp(layers, batch, devices, cluster)]
    for mode, (estimate, parts, is_possible) in modes.items():
        if is_possible:
            found.append(replace(estimate(layers, batch, devices, cluster, parts), mode=mode))
    return found


def size(layers: Sequence[Layer]) -> str:
    """Parameters and operations of a training step, to be shown."""
    return f"{parameters(layers) / 1e6:.1f} M parameters, {3 * operations(layers) / 1e9:.1f} GFLOP per sample"


# -- the picture: efficiency and memory of a device against the number of devices

_MARKS = "os^Dv*P"


def draw(models: Mapping[str, Sequence[Estimate]], cluster: Cluster, *, title: str, subtitle: str) -> "Figure":
    """A column per model: efficiency above, memory below. What does not fit into a device's memory is hollow."""
    figure = drawing.figure(4.3 * len(models) + 1.6, 7.4, f"{title}\n{subtitle}", fontsize=10)
    panels = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row")
    drawing.plain(*panels.flat)
    modes = list(dict.fromkeys(each.mode for found in models.values() for each in found))
    lines = {mode: drawing.style(i, label=mode) for i, mode in enumerate(modes)}
    marks = dict(zip(modes, _MARKS, strict=False))
    for (top, bottom), (name, found) in zip(panels.T, models.items(), strict=True):
        for mode, line in lines.items():
            own = [each for each in found if each.mode == mode]
            efficiencies, memories = [100 * each.efficiency for each in own], [each.memory / 1e9 for each in own]
            for axes, values in ((top, efficiencies), (bottom, memories)):
                axes.plot([each.devices for each in own], values, **line)
                for y, each in zip(values, own, strict=True):
                    face, colour = line["color"] if each.fits else "white", line["color"]
                    axes.plot(each.devices, y, marks[mode], color=colour, markerfacecolor=face, markersize=6)
        top.set_title(name, fontsize=10)
        bottom.axhline(cluster.memory, color="0.4", linewidth=1, linestyle=":")
        bottom.set_xlabel("devices")
        drawing.powers_of_two(top, sorted({each.devices for each in found}))
        bottom.set_yscale("log")
    panels[0][0].set_ylim(0, 105)
    panels[0][0].set_ylabel("efficiency in %")
    panels[1][0].set_ylabel("memory of a device in GB (dotted: what it has)")
    handles = [panels[0][0].plot([], [], marker=marks[mode], **line)[0] for mode, line in lines.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
