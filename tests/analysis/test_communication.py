"""Intervals of communication and computation; tests/lab/bench/test_command.py checks the bytes."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dlopt.analysis.communication import _fraction_sent, collective_times, covered


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=DeviceType.CPU)


def test_union_and_length_of_intervals() -> None:
    assert covered([(4, 6), (0, 2), (1, 3), (6, 7)]) == 6
    assert covered([(0, 5), (1, 2), (4, 6)]) == 6
    assert covered([]) == 0


def test_waiting_excludes_overlapping_computation() -> None:
    """A transfer of 10 µs that overlaps with 4 µs of computation; c10d's library call does not count as computation."""
    events = [
        event("gloo:all_reduce", 10, 20), event("gloo:all_reduce", 12, 18), event("c10d::allreduce_", 10, 11),
        event("aten::mm", 5, 13), event("aten::add_", 19, 25), event("DistributedDataParallel.forward", 0, 30),
    ]  # fmt: skip
    communicating, waiting = collective_times(events, torch.device("cpu"))
    assert (communicating, waiting) == pytest.approx((10e-6, 6e-6))


def test_fraction_sent_by_collective() -> None:
    assert _fraction_sent("allreduce_", 4) == _fraction_sent("all_reduce", 4) == 1.5
    assert _fraction_sent("_allgather_base_", 4) == _fraction_sent("reduce_scatter_tensor", 4) == 0.75
    assert (_fraction_sent("send", 4), _fraction_sent("recv_", 4), _fraction_sent("barrier", 4)) == (1.0, 0.0, 0.0)
    assert _fraction_sent("wait_tensor", 4) == 0
