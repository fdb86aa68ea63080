"""Simulated clusters with known results: without latency, without stragglers, with equal layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.lab.scaling import modes, simulation
from dlopt.lab.scaling.cluster_command import MODELS
from dlopt.lab.scaling.contention import fit_link, scale_to
from dlopt.lab.scaling.layers import Layer, layers_of, operations, parameters, timed
from dlopt.lab.scaling.modes import validate
from dlopt.lab.scaling.simulation import Cluster, ddp, draw, fsdp, pipeline, single, spatial
from dlopt.lab.scaling.simulation import filter_parallel as filters

IDEAL = Cluster(
    per_server=8, tflops=100.0, memory_bandwidth=1e9, memory=80.0, bandwidth_within=1e12, latency_within=1e-9,
    bandwidth_between=1e12, latency_between=1e-9, variation=0.0, value_bytes=2, micro_batches=24, bucket_mb=25.0,
)  # fmt: skip
REAL = replace(
    IDEAL, memory_bandwidth=3000.0, bandwidth_within=300.0, latency_within=5.0, bandwidth_between=50.0,
    latency_between=10.0, variation=0.02,
)  # fmt: skip


def layer(**fields: Any) -> Layer:
    counts = {"operations": 1e9, "parameters": 10**6, "inputs": 10**4, "outputs": 10**4, "units": 64, "rows": 32}
    return Layer(**{"name": "x", "block": None, "role": "alone", "kind": "convolution", "halo": 0, **counts, **fields})


CHAIN = [layer(name=f"{i}") for i in range(16)]


def efficiency(cost: simulation.ModeCost, layers: Sequence[Layer] = CHAIN, cluster: Cluster = IDEAL) -> float:
    return single(layers, 64, cluster) / cost.step


def test_reports_which_part_of_an_update_the_operations_take() -> None:
    """16 layers of 1 GFLOP, and as many that only move 1 GB in and out, at 100 TFLOP/s and 2 TB/s."""
    memory_bound = [layer(operations=0.0, inputs=2.5e8, outputs=2.5e8, parameters=0) for _ in range(16)]
    cluster = replace(IDEAL, memory_bandwidth=2000.0)
    computes = 16 * 3 * 1e9 * 64 / 100e12  # forward and backward
    moves = 16 * 3 * 64 * 5e8 * 2 / 2e12 + 5 * 16 * 10**6 * 4 / 2e12  # and the optimizer: five floats per parameter
    said = simulation.of_one_device([*CHAIN, *memory_bound], 64, cluster)
    assert said.startswith(f"one device: {1e3 * (computes + moves):.1f} ms per update, where the FLOPs alone take ")
    assert f"take {1e3 * computes:.1f} ms" in said


@pytest.mark.parametrize(
    ("model", "millions", "gmacs"),
    [
        ("wrn_28_10", 36.5, 5.2),  # Zagoruyko & Komodakis 2016, table 5
        ("resnet50", 25.6, 4.1),  # torchvision's table of weights: GFLOPS that count multiply-adds
        ("resnet101", 44.5, 7.8),
    ],
)
def test_counts_match_published_models(model: Any, millions: float, gmacs: float) -> None:
    overrides, shape, classes, _ = MODELS[model]
    run_config = parse(to_plain(Composer().compose(overrides))[0])
    result = layers_of(lambda: run_config.model.build(input_shape=shape, classes=classes), shape)
    assert parameters(result) / 1e6 == pytest.approx(millions, abs=0.06)
    assert operations(result) / 2e9 == pytest.approx(gmacs, rel=0.02)
    assert [each.role for each in result].count("first") == [each.role for each in result].count("last") > 10


def test_layers_of_a_small_network() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4))

    convolution, relu, pool, _, linear = layers_of(make, (3, 8, 8))
    assert (convolution.operations, convolution.parameters, convolution.units) == (2 * 8 * 64 * 75, 8 * 76, 8)
    assert convolution.halo == 2 * 3 * 8 and relu.halo == pool.halo == 0 and convolution.rows == 8
    assert (linear.operations, linear.kind, linear.rows) == (2 * 128 * 4, "linear", 1)
    measured = timed(make(), torch.randn(4, 3, 8, 8))
    assert [replace(each, forward=0.0, backward=0.0) for each in measured] == layers_of(make, (3, 8, 8))
    assert all(each.forward > 0 and each.backward > 0 for each in measured)


@pytest.mark.parametrize("devices", [8, 64])
def test_efficiency_is_one_without_latency_and_stragglers(devices: int) -> None:
    assert efficiency(ddp(CHAIN, 64, devices, IDEAL)) == pytest.approx(1)
    assert efficiency(fsdp(CHAIN, 64, devices, IDEAL, devices)) == pytest.approx(1)
    assert efficiency(filters(CHAIN, 64, devices, IDEAL, 8)) == pytest.approx(1)
    assert efficiency(spatial(CHAIN, 64, devices, IDEAL, 8)) == pytest.approx(1)
    # only the pipeline bubble remains
    assert efficiency(pipeline(CHAIN, 64, devices, IDEAL, 8)) == pytest.approx(24 / (24 + 7))


def test_indivisible_units_leave_devices_idle() -> None:
    assert efficiency(filters([layer(units=9)], 64, 8, IDEAL, 8), [layer()]) == pytest.approx(9 / (8 * 2))
    assert efficiency(spatial([layer(rows=12)], 64, 8, IDEAL, 8), [layer()]) == pytest.approx(12 / (8 * 2))


def test_ddp_matches_manual_calculation() -> None:
    # all gradients except those of the last layer (DDP's first bucket) are reduced at once after the backward
    slow = replace(REAL, bucket_mb=1e6, variation=0.0)
    reduced = simulation.two_level_all_reduce(4 * 15e6, 8, 8, slow.within, slow.between)
    assert ddp(CHAIN, 64, 64, slow).step == pytest.approx(single(CHAIN, 64, slow) + reduced)
    overlapped = ddp(CHAIN, 64, 64, replace(slow, bucket_mb=1.0)).step
    assert single(CHAIN, 64, slow) < overlapped < single(CHAIN, 64, slow) + reduced / 4


def test_ddp_averages_running_statistics_after_the_update() -> None:
    norm = layer(name="norm", kind="other", operations=0.0, inputs=0, outputs=0, parameters=256)
    slow = replace(REAL, variation=0.0, latency_within=1e4, latency_between=1e4)
    more = ddp([*CHAIN, norm], 64, 8, slow).step - ddp(CHAIN, 64, 8, slow).step
    assert more == pytest.approx(simulation.two_level_all_reduce(4 * 256, 8, 1, slow.within, slow.between), rel=1e-3)


def test_gathered_outputs_are_normalized_by_all_devices() -> None:
    """In a block, the outputs of the first convolution are sharded and those of the last one are gathered."""
    first, last = layer(name="a", block="b", role="first"), layer(name="c", block="b", role="last")
    norm = layer(name="n", block="b", kind="other", parameters=0)
    plain = filters([first, last], 64, 8, IDEAL, 8).step
    alone = single([norm], 512, IDEAL)
    assert filters([first, norm, last], 64, 8, IDEAL, 8).step - plain == pytest.approx(alone / 8, rel=1e-3)
    assert filters([first, last, norm], 64, 8, IDEAL, 8).step - plain == pytest.approx(alone, rel=1e-3)


def test_update_waits_for_the_slowest_device() -> None:
    varied = replace(IDEAL, variation=0.1)
    factor = 1 + 0.1 * simulation.expected_maximum(64)
    assert efficiency(ddp(CHAIN, 64, 64, varied)) == pytest.approx(1 / factor, rel=1e-3)
    assert efficiency(filters(CHAIN, 64, 64, varied, 8)) < 1 / factor  # a barrier in every layer


@pytest.mark.parametrize(("devices", "group", "barriers"), [(64, 8, 16), (24, 4, 32), (16, 16, 9), (32, 1, 4)])
def test_groups_wait_for_their_slowest_device_at_every_barrier(devices: int, group: int, barriers: int) -> None:
    shape = 400, devices // group, barriers, group
    intervals = np.random.default_rng(0).normal(1 / barriers, 0.02 / barriers**0.5, shape)
    simulated = intervals.max(-1).sum(-1).max(-1).mean()
    assert simulation.slowed(devices, 0.02, barriers, group) - 1 == pytest.approx(simulated - 1, rel=0.03)


def test_measured_layers_cost_in_every_mode_what_counted_ones_do() -> None:
    """Modes process the batches of whole groups at once, or micro-batches; the times are for one sample."""
    measured = [replace(each, forward=1e-5, backward=2e-5) for each in CHAIN]
    for devices in (8, 64):
        for counted, again in zip(
            *(simulation.estimates(layers, 64, devices, REAL) for layers in (CHAIN, measured)), strict=True
        ):
            assert (again.step, again.efficiency) == pytest.approx((counted.step, counted.efficiency)), again.mode


def test_modes_of_few_or_indivisible_devices() -> None:
    def steps(devices: int, batch: float = 64) -> dict[str, float]:
        return {each.mode: each.step for each in simulation.estimates(CHAIN, batch, devices, REAL)}

    within = steps(6)  # all on one server
    assert within["fsdp × ddp"] == within["fsdp"] and within["filter × ddp"] == within["filter"]
    assert set(steps(9)) == {"ddp", "fsdp", "filter"}  # 9 devices on servers of 8 have no equal groups
    assert set(steps(8)) - set(steps(8, batch=2)) == {"pipeline × ddp"}  # 16 samples in 24 micro-batches


def test_pipeline_does_not_compute_in_its_bubble() -> None:
    result = pipeline(CHAIN, 64, 8, IDEAL, 8)
    assert result.compute / result.step == pytest.approx(24 / (24 + 7))


def test_residual_block_needs_one_all_reduce_forward_and_backward() -> None:
    block = [layer(name="a", block="b", role="first"), layer(name="c", block="b", role="last")]
    lone = [layer(name="a"), layer(name="c")]
    quick = replace(IDEAL, bandwidth_within=1.0)  # an all-gather costs half an all-reduce
    sums = 2 * simulation.all_reduce(10**4 * 64 * 8 * 2, 8, quick.within)
    # the first layer has no input gradient
    block, lone = [layer(name="stem", kind="other"), *block], [layer(name="stem", kind="other"), *lone]
    at_rest = filters(block, 64, 8, IDEAL, 8).step
    assert filters(block, 64, 8, quick, 8).step - at_rest == pytest.approx(sums, rel=1e-3)
    assert filters(lone, 64, 8, quick, 8).step - at_rest == pytest.approx(1.5 * sums, rel=1e-3)


def test_memory() -> None:
    assert ddp(CHAIN, 64, 8, IDEAL).memory == 3 * 4 * 16e6 + 16 * 10**4 * 64 * 2
    assert fsdp(CHAIN, 64, 8, IDEAL, 8).memory < ddp(CHAIN, 64, 8, IDEAL).memory
    small = replace(IDEAL, memory=0.2)
    assert [simulation.estimates(CHAIN, 64, 8, cluster)[0].fits for cluster in (small, IDEAL)] == [False, True]


def test_fits_link_to_all_reduce_times() -> None:
    link = simulation.Link(2e-5, 3e9)
    times = {size: simulation.ring_all_reduce(size, 4, link) for size in (64, 10**5, 10**7)}
    result = fit_link(times, 4)
    assert (result.latency, result.bandwidth) == pytest.approx((2e-5, 3e9))


def test_scales_layer_times_to_the_update() -> None:
    parts = scale_to(6.0, [layer(forward=1.0, backward=2.0), layer(forward=0.5, backward=0.5)])
    assert [(each.forward, each.backward) for each in parts] == [(1.5, 3.0), (0.75, 0.75)]


@pytest.mark.slow
def test_validates_simulation_against_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "BATCH", 16)  # a quarter: the updates are as many
    points = validate([1, 2])
    assert [(each.mode, each.processes) for each in points] == [("ddp", 2), ("filter", 2)]
    assert all(0 < each.calculated < 10 and 0 < each.measured < 10 for each in points)


def test_efficiency_falls_with_cluster_size_in_every_mode() -> None:
    result = [each for devices in (8, 64, 512) for each in simulation.estimates(CHAIN, 8, devices, REAL)]
    assert {each.mode for each in result} >= {"ddp", "fsdp", "filter × ddp", "spatial × ddp", "pipeline × ddp"}
    for mode in {each.mode for each in result}:
        efficiencies = [each.efficiency for each in result if each.mode == mode]
        assert all(0 < each < 1 for each in efficiencies)
        assert efficiencies == sorted(efficiencies, reverse=True), mode
    figure = draw({"chain": result}, REAL, title="t", subtitle="s")
    assert len(figure.axes) == 2
