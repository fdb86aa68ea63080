"""The simulated cluster; without torch, because the help of `dlopt scaling` shows its keys."""

from dataclasses import dataclass
from typing import Annotated

from dlopt.extend import Count, NonNegative, Positive


@dataclass(frozen=True)
class Link:
    """Interconnect with a latency per message (seconds) and a bandwidth (bytes per second)."""

    latency: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hardware and schedule of the simulated cluster; 1 GB is 1e9 bytes."""

    per_server: Annotated[Count, "N: devices per server"] = 8
    tflops: Annotated[Positive, "X: achieved TFLOP/s of a device in large layers"] = 300.0
    memory_bandwidth: Annotated[Positive, "X: achieved memory bandwidth of a device, GB/s"] = 3000.0
    memory: Annotated[Positive, "X: memory of a device, GB"] = 80.0
    bandwidth_within: Annotated[Positive, "X: GB/s between two devices of a server"] = 300.0
    latency_within: Annotated[Positive, "X: latency within a server, microseconds"] = 5.0
    bandwidth_between: Annotated[Positive, "X: GB/s per server"] = 50.0
    latency_between: Annotated[Positive, "X: latency between servers, microseconds"] = 10.0
    variation: Annotated[NonNegative, "X: standard deviation / mean of a device's time per update"] = 0.02
    value_bytes: Annotated[Count, "N: bytes per activation value"] = 2
    micro_batches: Annotated[Count, "N: micro-batches of the pipeline"] = 32
    bucket_mb: Annotated[Positive, "X: gradient bucket size of DDP, MB"] = 25.0

    @property
    def within(self) -> Link:
        return Link(self.latency_within * 1e-6, self.bandwidth_within * 1e9)

    @property
    def between(self) -> Link:
        return Link(self.latency_between * 1e-6, self.bandwidth_between * 1e9)

    def link(self, devices: int) -> Link:
        """Returns the slowest link of a ring over `devices` neighbouring devices."""
        return self.within if devices <= self.per_server else self.between
