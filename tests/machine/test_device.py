"""GPUs, CPU threads, main memory and the memory allocator."""

import os
import resource
from pathlib import Path

import pytest
import torch

from dlopt.machine.device import prefers_onednn, visible_gpus
from dlopt.machine.memory import available_memory, installed_memory, keep_freed_memory
from dlopt.machine.threads import set_threads, usable_cores


def test_visible_gpus() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-x"}) == ["2", "GPU-x"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
        set_threads("auto")
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        set_threads("auto", sharing=10_000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.set_num_threads slows attention, even with the present number of threads."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail(f"set to {number}"))
    set_threads(torch.get_num_threads())


@pytest.mark.parametrize(
    "limit, cores", [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 8)]
)
def test_cores_of_a_container_with_a_limit(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr("dlopt.machine.threads.CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_memory_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = installed_memory()
    assert installed is not None and 2**26 < available_memory() <= installed < 2**50
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))  # another system
    assert installed_memory() is None
    assert 2**26 < available_memory() <= 4 << 30


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="other systems have another allocator")
def test_reuses_freed_blocks() -> None:
    keep_freed_memory()

    def faults(rounds: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            torch.ones(4 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(3)
    assert faults(50) < 50 * 1024 / 4  # a block of 4 MiB has 1024 pages


@pytest.mark.parametrize(
    ("vendor", "family", "preferred"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 6, False), (None, None, False)],
)
def test_onednn_is_preferred_on_zen5(
    vendor: str | None, family: int | None, preferred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second core of the file differs: only the first one counts."""
    lines = [] if vendor is None else [f"vendor_id\t: {vendor}\n", f"cpu family\t: {family}\n", "flags\t\t:\n"]
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + "".join(lines) + "\nprocessor\t: 1\nvendor_id\t: Other\n")
    monkeypatch.setattr("dlopt.machine.device.CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: True)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert prefers_onednn() == preferred
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    assert not prefers_onednn()


def test_onednn_is_not_preferred_on_systems_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.machine.device.CPU_INFO", tmp_path / "missing")
    assert not prefers_onednn()
