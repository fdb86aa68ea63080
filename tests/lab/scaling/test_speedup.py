"""Limits of data parallelism: Amdahl's law, and the slowest device against closed forms."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dlopt.lab.scaling import speedup
from dlopt.lab.scaling.cluster import Cluster
from dlopt.lab.scaling.layers import Layer
from dlopt.lab.scaling.simulation import all_reduce, optimizer_step, parameters, single
from dlopt.lab.scaling.speedup import Delay, amdahl, expected_slowest, serial_fraction, simulated_slowest, speedups
from tests.support.line import dlopt

LAYER = Layer(
    name="x", block=None, role="alone", kind="convolution", operations=1e9, parameters=10**6, inputs=10**4,
    outputs=10**4, units=64, rows=32, halo=0,
)  # fmt: skip
CHAIN = [replace(LAYER, name=f"{i}") for i in range(16)]
REAL = Cluster(tflops=100.0)
IDEAL = replace(
    REAL, memory_bandwidth=1e9, bandwidth_within=1e12, latency_within=1e-9, bandwidth_between=1e12,
    latency_between=1e-9, variation=0.0,
)  # fmt: skip


def test_amdahl_starts_at_one_and_ends_at_the_limit() -> None:
    assert amdahl(0.1, 1) == 1 and amdahl(0.1, 9) == pytest.approx(5) and amdahl(0.0, 64) == 64
    assert amdahl(0.1, 10**9) == pytest.approx(10)


def test_serial_fraction_is_that_of_the_optimizer_and_the_all_reduce() -> None:
    """On 16 servers of one device each, all gradients cross between the servers."""
    cluster = replace(REAL, per_server=1)
    size = 4 * parameters(CHAIN)
    serial = optimizer_step(parameters(CHAIN), cluster) + all_reduce(size, 16, cluster.between)
    assert serial_fraction(CHAIN, 512, 16, cluster) == pytest.approx(serial / single(CHAIN, 512, cluster))


def test_without_communication_and_delays_the_speedup_is_ideal() -> None:
    found = speedups(CHAIN, 512, [1, 8, 64], IDEAL)
    assert [each.speedup for each in found] == pytest.approx([1, 8, 64], rel=1e-3)
    assert [each.amdahl for each in found] == pytest.approx([1, 8, 64], rel=1e-3)


def test_with_communication_the_speedup_stays_below_its_limit() -> None:
    """Computation hides communication only while there is enough of it."""
    devices = [2**i for i in range(10)]
    found = speedups(CHAIN, 512, devices, replace(REAL, variation=0.0))
    serial = serial_fraction(CHAIN, 512, 512, REAL)
    gains = [after.speedup / before.speedup for before, after in pairwise(found)]
    assert gains[0] > 1.8 and gains[-1] < 1.1 and found[-1].speedup < 1 / serial


@pytest.mark.parametrize("delay", ["normal", "exponential"])
@pytest.mark.parametrize("devices", [1, 2, 64])
def test_the_slowest_device_takes_the_time_of_the_closed_form(delay: Delay, devices: int) -> None:
    expected = expected_slowest(delay, devices, 0.1)
    assert simulated_slowest(delay, devices, 0.1, updates=4000) == pytest.approx(expected, abs=0.008)


def test_closed_forms_of_two_devices() -> None:
    """E max of two standard normals: 1 / sqrt(pi); of two exponentials: 1 + 1/2."""
    assert expected_slowest("normal", 2, 1.0) == pytest.approx(1 + 1 / math.sqrt(math.pi))
    assert expected_slowest("exponential", 2, 1.0) == 1.5


@pytest.mark.drawn
def test_command(tmp_path: Path) -> None:
    typed = ("scaling", "speedup=true", "devices=[1,8]", "batch=64", "variation=0.1", "output=out")
    result = dlopt(tmp_path, *typed)
    assert result.code == 0, result.err
    saved = json.loads((tmp_path / "out/speedup.json").read_text())
    assert [each["devices"] for each in saved["points"]] == [1, 8] and saved["points"][0]["amdahl"] == 1
    assert (tmp_path / "out/speedup.png").stat().st_size > 10_000 and "serial fraction" in result.out


def test_plot_shows_simulation_and_closed_forms() -> None:
    found = speedups(CHAIN, 512, [1, 8], REAL)
    left, right = speedup.draw(found, 0.1, title="t", subtitle="s").axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in (*left.lines, *right.lines)}  # type: ignore[arg-type]
    assert lines["simulated"] == [each.speedup for each in found] and lines["Amdahl's limit"] == [10, 10]
    assert lines["normal delays, closed form"] == [each.expected["normal"] for each in found]
