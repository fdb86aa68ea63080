"""What communication, pipelines and stragglers cost: closed forms.

n bytes, p ranks, alpha seconds of latency per message, beta bytes per second that a rank sends; times in seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def pipeline(forward: Sequence[float], backward: Sequence[float], micro_batches: int) -> float:
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
    x = np.linspace(-9.0, 9.0, 7201)
    below = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(np.sum(x * count * density * below ** (count - 1)) * (x[1] - x[0])) if count > 1 else 0.0


def slowed(devices: int, variation: float, meetings: int = 1) -> float:
    """Factor on the time of `devices` that all wait for the slowest, `meetings` times in an update.

    A device's time for an update varies by `variation` (standard deviation over mean), independently of the others and
    from one part of the update to the next: a part between two of k meetings has 1/k of the variance, so that the sum
    over k maxima is mu + sigma sqrt(k) E[max].
    """
    return 1 + variation * math.sqrt(meetings) * expected_maximum(devices)
