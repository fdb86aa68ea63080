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


# What the peers print: nanoGPT's train.py after an update; airbench94_muon.py after a run, of which the first compiles.
NANOGPT = """
for number in range(6):
    print(f"iter {number}: loss {6 - number / 10:.4f}, time {30 - number:.2f}ms, mfu -100.00%")
"""
AIRBENCH = """
for run in ["warmup", *range(200)]:
    print(f"|  {run!s:>6}  |      1  |     0.9000  |   0.9000  |               |                |")
    print(f"|          |   eval  |     0.9000  |   0.9000  |       0.9400  |        {2 - (run != 'warmup'):.4f}  |")
"""
PROGRAMS = ("dlopt", "nanoGPT")
SPLIT = ("set-up", "CUDA graphs captured", "steady updates", "one steady update", "evaluation")


@pytest.mark.slow
def test_gpu_benchmarks_rehearse_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/train.py").write_text(NANOGPT)
    (tmp_path / "peer/airbench.py").write_text(AIRBENCH)
    peers = ("--nanogpt", "peer", "--airbench", "peer/airbench.py")
    line = (str(BENCH / "gpu.sh"), "--rehearse", "--out", "out", "--minutes", "14", *peers)
    result = run(*line, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    measured = json.loads((tmp_path / "out/gpu.json").read_text())["benchmarks"]
    order = ["card", "nanogpt", "gpt2", "nanogpt_eager", "gpt2_eager", "vit", "wrn", "airbench", "speed", "resnet50"]
    order += ["log", "resnet20", "pure"]
    assert list(measured) == order
    assert {each["state"] for each in measured.values()} == {"done"}
    values = {row["name"]: row["value"] for each in measured.values() for row in each["rows"]}
    names = " ".join(values)
    labels = ["matrix product", "speed recipe: mean accuracy", "data path", "ResNet-20 recipe: test error", "ViT-S/16"]
    labels += ["WRN", "throughput from JPEGs", "the loader alone", "log of a run on text: tokens_per_second"]
    split = (f"{name}, split: {part}" for name in ("speed recipe", "speed recipe in bf16_pure") for part in SPLIT)
    for part in (*labels, *split):
        assert part in names
    assert values["GPT-2 small, nanoGPT: an update of 4 x 16 tokens"] == pytest.approx(26.5)  # without the first two
    assert values["GPT-2 small, nanoGPT: losses, means of 2 updates"] == pytest.approx([5.95, 5.75, 5.55])
    assert len(values["GPT-2 small, dlopt: losses, means of 2 updates"]) == 3
    for name in ("GPT-2 small", "GPT-2 small, not compiled"):
        ours, theirs = (f"{name.replace('small', f'small, {each}')}: an update of 4 x 16 tokens" for each in PROGRAMS)
        relative = f"{name}: an update of 4 x 16 tokens, relative to nanoGPT"
        assert values[relative] == pytest.approx(values[ours] / values[theirs])
    assert values["GPT-2 small: loss of the second half, minus nanoGPT's"] == pytest.approx(
        sum(values["GPT-2 small, dlopt: losses, means of 2 updates"][1:]) / 2 - (5.75 + 5.55) / 2
    )
    assert (values["airbench94_muon: mean time"], values["airbench94_muon: runs"]) == (1, 2)
    assert all(value >= 0 for value in values.values() if not isinstance(value, list))
    assert result.stdout.partition("\ncpu, torch ")[2].count("GPT-2 small") > 4
    again = run(*line, folder=tmp_path)
    assert again.returncode == 0 and again.stdout.count(": measured before") == len(order)


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
    assert result.returncode == 2 and "--only moon: unknown; allowed: card,nanogpt," in result.stderr


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "augment.py --threads 1 --rounds 1 --batches 1",
        "data.py --images 200 --rounds 1 --round-images 20 --memory-images 20 --steps 1 --batch 4 --size 32",
        "normalization.py --rounds 1 --batch 8 --models mlp",
        "parallel.py --updates 2 --only overlap --folder plots",
        "startup.py --rounds 1",
        "step.py --rounds 1 --only overhead,synchronization",
        "text.py --rounds 1 --steps 2 --threads 1",
        "workers.py --rounds 1 --jobs 2",
    ],
    ids=lambda line: line.partition(".")[0],
)
def test_small_runs(line: str, tmp_path: Path) -> None:
    script, *keys = line.split()
    result = run(sys.executable, str(BENCH / script), *keys, folder=tmp_path)
    assert result.returncode == 0 and result.stdout, result.stdout[-1000:] + result.stderr[-2000:]


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
