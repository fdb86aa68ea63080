"""`dlopt scaling allreduce=[...]` in gloo processes."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.interruption import Interruption
from dlopt.lab.scaling.command import scaling
from dlopt.lab.scaling.communication import Bandwidth, measure_all_reduce
from dlopt.parallel.processes import launch
from dlopt.training.builders.workload import build_mode
from tests.support.line import dlopt, refused
from tests.support.ranks import run_ranks
from tests.support.runs import run_config


def rank() -> None:
    """An all-reduce takes 1 s on rank 0 and 2 s on rank 1, by their own clocks."""
    mode = build_mode(run_config("parallel=ddp", "device=cpu", "threads=1"))
    with pytest.raises(RunError, match=r"^allreduce: 1\.09951e\+12 MiB cannot be allocated \("):
        next(measure_all_reduce([1 << 60], torch.device("cpu")))
    times = itertools.count(step=mode.ranks.rank + 1)
    [row] = measure_all_reduce([4_000_000], torch.device("cpu"), clock=lambda device: float(next(times)))
    print(row.size, row.ranks, row.seconds, row.algorithm, row.bus, file=sys.stderr)


def command() -> None:
    with pytest.raises(UserError, match="processes=3: dlopt started 2 processes"):
        scaling(["allreduce=[1]", "processes=3"])
    scaling(["allreduce=[0.25,1]", "device=cpu"])  # ends the process with the exit code


@pytest.mark.slow
def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    for output in run_ranks(f"{__name__}:rank", 2, tmp_path):
        assert output.split() == ["4000000", "2", "2.0", "2000000.0", "2000000.0"]


def test_ring_bandwidth() -> None:
    assert Bandwidth(size=800, ranks=8, seconds=2.0).bus == 2 * 7 / 8 * 400


def test_command(tmp_path: Path) -> None:
    first, second = run_ranks(f"{__name__}:command", 2, tmp_path)
    lines = [line.split() for line in first.splitlines()]
    assert "all-reduce on cpu: 2 processes, 2 per node" in first and ["MiB", "ms", "GB/s", "bus", "GB/s"] in lines
    rows = [line for line in lines if len(line) == 4 and line[0] in ("0.25", "1")]
    assert len(rows) == 2 and all(float(value) > 0 for row in rows for value in row)
    assert second == ""


def test_a_killed_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_processes", lambda *_: ([1, -9], set(), Interruption()))
    result = dlopt(tmp_path, "scaling", "allreduce=[1]")
    assert (result.code, result.err) == (1, "dlopt: rank 1 was killed by SIGKILL (out of memory?)\n")


def test_errors(tmp_path: Path) -> None:
    assert "processes=100000: this machine has" in refused(tmp_path, "scaling", "allreduce=[1]", "processes=100000")
    assert "model=mlp: unknown key of dlopt scaling" in refused(tmp_path, "scaling", "allreduce=[1]", "model=mlp")
