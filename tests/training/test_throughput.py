"""Tests of throughput, utilization and memory without a GPU: with the names that torch reports for GPUs."""

import math
from itertools import count
from typing import Any

import pytest
import torch

from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import known_direction, tag_of
from dlopt.metrics.sums import MetricSum
from dlopt.training import progress
from dlopt.training.builders.precision import Precision
from dlopt.training.progress import Clock, Progress
from dlopt.training.throughput import Throughput, nominal_flops
from tests.support.tasks import CLASSIFICATION


@pytest.mark.parametrize(
    ("card", "bf16", "fp16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 66.9), ("NVIDIA H100 PCIe", 756, 756, 51.2),
        ("NVIDIA H100 NVL", 835.5, 835.5, 60), ("NVIDIA H200", 989.4, 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 989.4, 66.9), ("NVIDIA B200", 2250, 2250, 75),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 19.5), ("NVIDIA A100 80GB PCIe", 312, 312, 19.5),
        ("NVIDIA A10", 125, 125, 31.2), ("NVIDIA L40S", 362, 362, 91.6), ("NVIDIA L4", 121, 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6), ("NVIDIA GeForce RTX 3090", 71, 71, 35.6),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7), ("Tesla V100-PCIE-32GB", None, 112, 14), ("Tesla T4", None, 65, 8.1),
        ("NVIDIA A10G", None, None, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None), ("AMD Instinct MI300X", None, None, None),
    ],
)  # fmt: skip
def test_nominal_rates(card: str, bf16: float | None, fp16: float | None, fp32: float | None) -> None:
    for precision, expected in {"bf16": bf16, "bf16_pure": bf16, "fp16": fp16, "fp32": fp32, "fp64": None}.items():
        rate = nominal_flops(card, precision)
        assert rate == (None if expected is None else pytest.approx(expected * 1e12)), precision


def on_gpu(monkeypatch: pytest.MonkeyPatch, card: str = "NVIDIA A100-SXM4-80GB", **changed: Any) -> Throughput:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 29)
    arguments = {"tokens": None, "flops": 3.12e9, "processes": 1, **changed}
    return Throughput.on(Precision("bf16", torch.device("cuda")), **arguments)


def test_metrics_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one = on_gpu(monkeypatch)
    expected = {"samples_per_second": 50_000, "utilization": 0.5, "gpu_memory_gib": 1.5}
    assert one.metrics(100_000, 2.0) == pytest.approx(expected)
    assert one.note is not None and "of 312 TFLOP/s (NVIDIA A100-SXM4-80GB, bf16, dense)" in one.note
    two = on_gpu(monkeypatch, processes=2, tokens=1024)
    expected = {"tokens_per_second": 50_000 * 1024, "utilization": 0.25, "gpu_memory_gib": 1.5}
    assert two.metrics(100_000, 2.0) == pytest.approx(expected)
    for unknown in (on_gpu(monkeypatch, card="NVIDIA X1"), on_gpu(monkeypatch, flops=None)):
        assert set(unknown.metrics(10, 2.0)) == {"samples_per_second", "gpu_memory_gib"} and unknown.note is None


def test_metrics_of_a_cpu() -> None:
    cpu = Throughput.on(Precision("bf16", torch.device("cpu")), tokens=None, flops=None, processes=1)
    assert cpu.metrics(10, 2.0) == {"samples_per_second": 5} and cpu.note is None
    assert math.isnan(cpu.metrics(0, 2.0)["samples_per_second"])


def test_evaluations_and_checkpoints_are_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of the clock takes a second."""
    seconds = count()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(seconds)))
    metrics, run = MetricSum(CLASSIFICATION), Progress()
    clock = Clock(run, metrics, None, Throughput())
    metrics.count += 30
    clock.stop()  # 1 s of training
    clock.stop(training=False)  # a checkpoint
    metrics.count += 30
    assert clock.metrics({"lr": 0.1}, None)["throughput/samples_per_second"] == 30  # a second since the checkpoint
    clock.stop()  # 2 s of training
    assert clock.epoch_metrics() == {"samples_per_second": 20}
    metrics.clear()
    clock.stop(training=False)  # an evaluation
    metrics.count += 30
    clock.stop()
    assert clock.epoch_metrics() == {"samples_per_second": 30} and run.seconds == 6


def test_names_are_one_from_the_file_to_the_report() -> None:
    columns = [name for name, each in MEASURES.items() if each.of_training is not None]
    assert columns == ["samples_per_second", "tokens_per_second", "utilization", "gpu_memory_gib"]
    assert [tag_of(column) for column in columns] == [f"throughput/{column}" for column in columns]
    assert [known_direction(column) for column in columns] == ["max", "max", "max", "min"]
