"""Small runs of the benchmarks in scripts/bench."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


def run(*command: str, folder: Path, timeout: int = 900) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHON": sys.executable},
    )  # fmt: skip


SPLIT = ("set-up", "CUDA graphs captured", "steady updates", "one steady update", "evaluation")


@pytest.mark.slow
def test_gpu_benchmarks_rehearse_on_a_cpu(tmp_path: Path) -> None:
    result = run(str(BENCH / "gpu.sh"), "--rehearse", "--out", "out", folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = json.loads((tmp_path / "out/gpu.json").read_text())
    names = " ".join(each["name"] for each in measured["rows"])
    parts = ("matrix product", "ResNet-20, batch 128: dlopt", "speed recipe, mean accuracy", "data path", "peers:")
    split = (f"{name}, split: {part}" for name in ("speed recipe", "speed recipe in bf16_pure") for part in SPLIT)
    for part in (*parts, *split):
        assert part in names
    assert all(each["value"] is not None and each["value"] >= 0 for each in measured["rows"])
    assert (tmp_path / "out/gpu.png").stat().st_size > 1000


@pytest.mark.slow
def test_gpu_benchmarks_require_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    result = run(str(BENCH / "gpu.sh"), "--data", "nowhere", folder=tmp_path)
    assert result.returncode == 1 and "no CUDA device found" in result.stderr


@pytest.mark.slow
def test_rejects_unknown_benchmark(tmp_path: Path) -> None:
    result = run(str(BENCH / "gpu.sh"), "--only", "card,moon", folder=tmp_path)
    assert result.returncode == 2 and "--only moon: unknown; allowed: card,step," in result.stderr


@pytest.mark.slow
def test_peers_measures_installed_trainers_and_reports_missing_ones(tmp_path: Path) -> None:
    keys = ("--rounds", "1", "--steps", "8", "--batch", "8", "--json", "peers.json", "--plot", "peers.png")
    only = ("--only", "by hand,dlopt,composer", "--precisions", "fp32")
    result = run(sys.executable, str(BENCH / "peers.py"), *keys, *only, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    actual = json.loads((tmp_path / "peers.json").read_text())
    assert set(actual["samples_per_second"]) == {"by hand fp32", "dlopt fp32"}
    assert "composer" in actual["missing"]["composer fp32"]
    assert (tmp_path / "peers.png").stat().st_size > 1000


@pytest.mark.slow
def test_peers_rejects_too_few_steps(tmp_path: Path) -> None:
    result = run(sys.executable, str(BENCH / "peers.py"), "--steps", "5", folder=tmp_path)
    assert result.returncode == 2 and "--steps 5: must be >= 7" in result.stderr


def first_update(at_its_end: str, *words: str, folder: Path, before: str = "pass") -> str:
    """Returns stdout of a process that exits after the first update; `at_its_end` and `before` are lines of Python."""
    spec = importlib.util.spec_from_file_location("startup", BENCH / "startup.py")
    assert spec is not None and spec.loader is not None
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    script = startup.FIRST_UPDATE.replace("def report():", f"{before}\ndef report():\n    {at_its_end}", 1)
    result = subprocess.run(
        [sys.executable, "-c", script, "train", "device=cpu", "threads=1", *words], cwd=folder, capture_output=True,
        text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return result.stdout


@pytest.mark.slow
def test_first_update(tmp_path: Path) -> None:
    """Prints CPU and wall seconds, imports no slow optional package, and composes the config once."""
    heavy = ("matplotlib", "sklearn", "scipy", "pandas", "optuna", "mlflow", "torchvision")
    counting = (
        "from dlopt.config.compose import Composer as C; f = C._compose; count = []; "
        "C._compose = lambda *a, **k: (count.append(1), f(*a, **k))[1]"
    )
    said = (
        f"import sys; found = [name for name in {heavy} if name in sys.modules]; "
        "sys.__stdout__.write(f'imported {found} composed {len(count)}' + chr(10))"
    )
    lines = first_update(said, folder=tmp_path, before=counting).strip().splitlines()
    assert "imported [] composed 1" in lines
    cpu, wall = map(float, lines[-1].split())
    assert cpu > 0 and wall > 0
