"""Tests of how scripts/bench/gpu.py runs benchmarks: limits, estimates, preliminary results, resuming, signals."""

import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTING = SimpleNamespace(options=SimpleNamespace(data=None))
ABOUT = {"device": "NVIDIA H100", "torch": "2.11", "code": "abc", "rehearsal": False}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_of_bench", ROOT / "scripts/bench/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def finishes(setting: Any, add: Any) -> None:
    for count in (1, 2):
        add("mean", float(count), "s", "<= 1")


def is_killed(setting: Any, add: Any) -> None:
    add("preliminary", 3.0, "s")
    os.kill(os.getpid(), signal.SIGKILL)


def fails(setting: Any, add: Any) -> None:
    raise ValueError("no such card")


def hangs(setting: Any, add: Any) -> None:
    signal.pause()


def states(results: Any) -> dict[str, str]:
    return {name: each["state"] for name, each in json.loads(results.path.read_text())["benchmarks"].items()}


def test_a_benchmark_leaves_its_results_however_it_ends(
    gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    benchmarks = [gpu.Benchmark(each.__name__, 0, 0, each) for each in (is_killed, fails, finishes)]
    gpu.run(benchmarks, SETTING, results, time.monotonic() + 1000, 1.0)
    assert states(results) == {
        "is_killed": "partial", "fails": "failed: ValueError: no such card", "finishes": "done"
    }  # fmt: skip
    assert (results.value("preliminary"), results.value("mean"), results.value("other")) == (3, 2, None)
    results.show()
    table = capfd.readouterr().out.partition("NVIDIA H100, torch 2.11")[2]
    assert "3 s (partial)" in " ".join(table.split()) and "fails: failed: ValueError" in table


def test_a_benchmark_ends_at_the_limit(gpu: ModuleType, tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    gpu.run([gpu.Benchmark("hangs", 0, 0, hangs)], SETTING, results, time.monotonic() + 0.3, 1.0)
    assert results.benchmarks["hangs"]["state"] == "partial"


def test_prints_the_last_value_when_a_benchmark_ends(
    gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its preliminary values are printed every ten seconds only, and the table may never come."""
    results = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    gpu.run([gpu.Benchmark("finishes", 0, 0, finishes)], SETTING, results, time.monotonic() + 100, 1.0)
    *_, last = capfd.readouterr().out.splitlines()
    assert last.split() == ["mean", "2", "s", "<=", "1"]


def test_skips_what_does_not_fit_and_what_lacks_its_option(
    gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a host that is twice as slow, 40 s of start-up and 20 s of measurement are 100 s."""
    results = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    run = functools.partial(gpu.run, setting=SETTING, results=results, factor=2.0)
    run([gpu.Benchmark("long", 40, 20, finishes)], deadline=time.monotonic() + 99)
    run([gpu.Benchmark("images", 0, 0, finishes, ("data",))], deadline=math.inf)
    output = capfd.readouterr().out
    assert "long: skipped: takes about 100 s, " in output and "images: skipped: needs --data" in output
    assert results.benchmarks == {}


def test_a_benchmark_that_is_done_corrects_the_estimates(
    gpu: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first takes no time on a host whose factor was 10: half of it is expected of the second."""
    results = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    benchmarks = [gpu.Benchmark("first", 40, 100, finishes), gpu.Benchmark("second", 100, 0, finishes)]
    gpu.run(benchmarks, SETTING, results, time.monotonic() + 600, 10.0)
    output = capfd.readouterr().out
    assert "first (about 500 of 600 s) ..." in output and "second (about 500 of " in output


@pytest.mark.parametrize("changed", [{}, {"device": "NVIDIA H200"}, {"code": "abd"}, {"rehearsal": True}])
def test_a_second_call_resumes_on_the_same_gpu_with_the_same_code(
    gpu: ModuleType, tmp_path: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = gpu.Results(tmp_path / "gpu.json", ABOUT, None)
    benchmarks = [gpu.Benchmark(each.__name__, 0, 0, each) for each in (finishes, is_killed)]
    gpu.run(benchmarks, SETTING, first, time.monotonic() + 1000, 1.0)
    second = gpu.Results(tmp_path / "gpu.json", {**ABOUT, **changed}, json.loads(first.path.read_text()))
    assert second.is_done("finishes") == (not changed) and not second.is_done("is_killed")
    assert second.value("mean") == (None if changed else 2)
    assert ("earlier results are not used" in capsys.readouterr().out) == bool(changed)
    gpu.run([gpu.Benchmark("is_killed", 0, 0, hangs)], SETTING, second, time.monotonic() + 0.3, 1.0)
    assert second.value("preliminary") == (None if changed else 3)  # until it is measured again


IMPORTS = """
import sys
sys.path.insert(0, {bench!r})
import torch

def fails(*_):
    raise SystemExit("CUDA is used")

torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = fails
import gpu_benchmarks
print(gpu_benchmarks.BENCHMARKS[0].name)
"""


def test_imports_use_no_cuda() -> None:
    """After a call of CUDA's driver in the parent, not one benchmark could use the GPU: they are forked from it."""
    code = IMPORTS.format(bench=str(ROOT / "scripts/bench"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "card\n", result.stderr


FAKE = """
import signal, sys, types
sys.path.insert(0, {bench!r})
import gpu

def hangs(setting, add):
    add("preliminary", 3.0, "s")
    signal.pause()

def calibrate(rehearse):
    return {{"device": "none", "torch": "2"}}, 0.0

fake = types.ModuleType("gpu_benchmarks")
fake.BENCHMARKS = [gpu.Benchmark("hangs", 0, 0, hangs)]
fake.calibrate = calibrate
fake.Bench = lambda options, scratch, results: types.SimpleNamespace(options=options)
sys.modules["gpu_benchmarks"] = fake
gpu.main()
"""


def test_the_table_comes_last_also_after_a_signal(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-uc", FAKE.format(bench=str(ROOT / "scripts/bench")), "--rehearse", "--out", "out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while "preliminary" not in (line := process.stdout.readline()):
            assert line, "ended before its first result"
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert rest.splitlines()[-1].endswith("3 s (partial)")
