"""`dlopt scaling`: rows, results and errors."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dlopt.basics.errors import UserError
from dlopt.commands.shared.command_line import Line
from dlopt.config.compose import Composer
from dlopt.lab.scaling import device, modes, modes_command
from dlopt.lab.scaling.modes import ModeResult
from tests.support.line import dlopt, refused

SMALL = ["model=mlp", "model.widths=[8]", "model.norm=none", "data.subset=60", "data.batch_size=16", "data.workers=0"]


def rows(*overrides: str) -> list[modes_command._ModeRow]:
    return modes_command._rows(Line(Composer(), list(overrides)))


def labels(*overrides: str) -> list[str]:
    return [f"{job.label} {job.processes} {job.baseline}" for job in rows(*overrides)]


def test_rows_are_combinations_after_a_baseline() -> None:
    assert labels() == ["single 1 0", "ddp 2 0"]
    assert labels("parallel=ddp,filter", "processes=1,2,4") == [
        "single 1 0", "ddp 2 0", "ddp 4 0", "filter 2 0", "filter 4 0",
    ]  # fmt: skip
    assert labels("data.batch_size=32,64") == [
        "single, data.batch_size=32 1 0", "ddp, data.batch_size=32 2 0",
        "single, data.batch_size=64 1 2", "ddp, data.batch_size=64 2 2",
    ]  # fmt: skip


def test_skips_keys_that_a_mode_does_not_have() -> None:
    jobs = rows("parallel=ddp,filter", "parallel.bucket_cap_mb=1,25")
    assert [job.label for job in jobs] == ["single", "ddp, bucket_cap_mb=1", "ddp, bucket_cap_mb=25", "filter"]
    assert not any("bucket" in line for line in jobs[-1].overrides)


def test_threads_per_process_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert all("threads=2" in job.overrides for job in rows("processes=2,4"))
    assert all("threads=3" in job.overrides for job in rows("processes=2,4", "threads=3"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("processes=0", "processes=0: must be an integer >= 1"),
        ("processes=100000", "processes=100000: this machine has"),
        ("updates=0", "updates=0: input should be greater than or equal to 1"),
        ("parallel.processes=2", "parallel.processes=2: use processes=2 here"),
        ("parallel=single processes=2", "parallel=single processes=2: this mode has only one process"),
        ("parallel=dpp", "parallel=dpp: unknown choice; did you mean parallel=ddp?"),
        ("optimizer.lr=-1", "optimizer.lr=-1: input should be greater than 0"),
        ("device=[tpu]", 'device=["tpu"]: unknown value'),
        ("device=[cpu] lr=1", "lr=1: unknown key of dlopt scaling device=[...]; allowed: "),
        ("simulate=true models=[vgg]", 'models=["vgg"]: unknown value'),
        ("simulate=true tflops=0", "tflops=0: input should be greater than 0"),
        ("simulate=true optimizer=sgd", "optimizer=sgd: unknown key of dlopt scaling simulate=true; allowed: "),
        ("simulate=false", "simulate=false: unknown value"),
        ("speedup=true devices=[1,512] batch=256", "devices=[512]: must be <= batch=256; each device needs a sample"),
        ("speedup=true optimizer=sgd", "optimizer=sgd: unknown key of dlopt scaling speedup=true; allowed: "),
    ],
)
def test_refused(tmp_path: Path, typed: str, message: str) -> None:
    assert message in refused(tmp_path, "scaling", *typed.split())


def rank(number: int, steps: float, waiting: float, **metrics: Any) -> Mapping[str, Any]:
    common = {"rank": number, "threads": 1, "samples": 64.0, "sent_mb": 1.5, "collectives": 3.0, "communicating": 0.5}
    return {**common, "steps": [steps, steps * 9, steps], "peak_mb": 10.0 + number, "waiting": waiting, **metrics}


def test_metrics_of_a_row() -> None:
    single = modes.summarize("single", "single", [rank(0, 0.4, 0.0)])
    row = modes.with_speedup(modes.summarize("ddp", "ddp", [rank(0, 0.25, 0.4), rank(1, 0.24, 0.0)]), single)
    assert (row.step, row.samples_per_second, row.speedup, row.efficiency) == pytest.approx((0.25, 256, 1.6, 0.8))
    assert row.own == pytest.approx((0.15, 0.24)) and row.spread == pytest.approx(0.375)
    assert row.peak_mb == (10.0, 11.0) and row.waiting == pytest.approx(0.2)
    console = Console(width=200, file=io.StringIO())
    console.print(modes.table([row]))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1].split()[:4] == ["ddp", "2", "1", "250.0"]


def test_failed_row_reports_the_reason() -> None:
    problem = modes._problem([{"failed": "another process failed"}, {"failed": "out of memory"}], [1, 1])
    assert problem == "out of memory"
    row = ModeResult("ddp", "ddp", 2, problem)
    assert modes.failures([row]) == ["ddp on 2: out of memory"] and math.isnan(row.spread)
    assert modes._problem([{"rank": 0}, None], [0, -9]) == "rank 1 failed with exit code -9"
    with pytest.raises(UserError, match="out of memory"):
        modes.refuse_if_all_failed([row])
    modes.draw([row, modes.summarize("single", "single", [rank(0, 0.4, 0.0)])], title="")


@pytest.mark.slow
@pytest.mark.drawn
def test_benchmarks_two_processes(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "scaling", *SMALL, "updates=3", "warmup=1", "profiled=2", "output=out")
    assert result.code == 0, result.err
    single, ddp = json.loads((tmp_path / "out" / "modes.json").read_text())
    assert (single["processes"], ddp["processes"]) == (1, 2) and single["sent_mb"] == 0 == single["waiting"]
    weights = 64 * 8 + 8 + 8 * 10 + 10
    # a ring over two ranks sends what is reduced: gradients, and of the loss and the flag two numbers
    assert ddp["sent_mb"] * 2**20 == pytest.approx(4 * weights, abs=20)
    assert 0 < ddp["waiting"] <= ddp["communicating"] <= 1 and len(ddp["own"]) == 2 == len(ddp["peak_mb"])
    assert ddp["speedup"] == pytest.approx(2 * ddp["efficiency"]) and single["speedup"] == 1
    assert (tmp_path / "out" / "modes.png").stat().st_size > 10_000
    assert "out/modes.png" in result.out


@pytest.mark.slow
@pytest.mark.usefixtures("new_interpreters")  # a forked rank has the memory of the server, too
def test_filter_parallelism_fits_a_larger_model(tmp_path: Path) -> None:
    """An 8192 x 8192 layer: weights, gradients and momentum take 3 x 256 MiB, half of them 384 MiB."""
    wide = [*SMALL, "model.widths=[8192,8192]", "parallel=filter", "memory_limit_mb=720"]
    result = dlopt(tmp_path, "scaling", *wide, "updates=1", "warmup=0", "profiled=1", "output=out")
    assert result.code == 0, result.err
    single, filters = json.loads((tmp_path / "out" / "modes.json").read_text())
    assert "out of memory of 720 MiB" in single["problem"] and filters["problem"] is None
    assert max(filters["peak_mb"]) < 720


@pytest.mark.slow
def test_simulation_prints_the_days_of_a_named_training(tmp_path: Path) -> None:
    """On 4 devices with 64 samples each, the 600,000 updates of He et al. 2016; 90 epochs are 450,000."""
    keys = ["simulate=true", "models=[resnet101]", "devices=[4]", "output=out"]
    for typed, updates in ((), 600_000), (("training=imagenet_90",), 90 * 1_281_167 / 256):
        result = dlopt(tmp_path, "scaling", *keys, *typed)
        assert result.code == 0, result.err
        [ddp] = [line.split() for line in result.out.splitlines() if line.startswith("ddp ")]
        assert float(ddp[-1]) == pytest.approx(float(ddp[2]) * 1e-3 * updates / 86400, rel=0.01)


def test_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def seconds(compute: Any, device: object, budget: float) -> float:
        compute()
        calls.append(budget)
        return 1e-3

    monkeypatch.setattr(device, "_seconds", seconds)
    keys = ["sizes=[100,10]", "channels=[4]", "precision=[fp32]", "seconds=0.1", "output=out"]
    result = dlopt(tmp_path, "scaling", "device=[cpu,cuda]", *keys)
    assert result.code == 0 and calls[:3] == [0.1] * 3
    assert "cuda: no CUDA device available, skipped" in result.out or "cuda  fp32" in result.out
    points = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert [p["flops"] for p in points[:3]] == pytest.approx([2e6, 2e9, 3 * 2 * 9 * 16 * 32 * 32**2 * 1e3])
    assert (tmp_path / "out" / "throughput.png").exists()
