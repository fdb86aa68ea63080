"""The profile of some updates: its parts add up, and the training is the same."""

import json
from pathlib import Path

import pytest

from dlopt.analysis.profiling import Operation, Profile, table
from dlopt.errors import UserError
from tests.training.runs import SMALL, experiment, result, same, start

PROFILED = ["profile=true", "profile_steps=[1,5]", "epochs=2"]


def test_a_profiled_training_is_the_same_and_leaves_its_profile(tmp_path: Path) -> None:
    start(tmp_path / "plain", *SMALL, "epochs=2", "optimizer=adamw")
    start(tmp_path / "profiled", *SMALL, *PROFILED, "optimizer=adamw")
    assert same(result(tmp_path / "plain"), result(tmp_path / "profiled"))
    assert not (tmp_path / "plain" / "profile").exists()
    found = json.loads((tmp_path / "profiled" / "profile" / "profile.json").read_text())
    assert found["updates"] == 3  # 2, 3, 4: the first is for the memory
    assert set(found["parts"]) == {"data", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in found["parts"].values())
    assert sum(found["parts"].values()) <= found["seconds"]
    assert 1 <= len(found["operations"]) <= 10 and found["communication"] == 0
    names = {each["name"] for each in found["operations"]}
    assert not any(name.startswith("dlopt: ") for name in names)
    times = [each["seconds"] for each in found["operations"]]
    assert times == sorted(times, reverse=True) and sum(times) <= found["seconds"]
    parameters = 64 * 12 + 12 + 12 + 12 * 10 + 10  # batch norm instead of a bias
    memory = found["memory"]
    assert memory["weights"] == memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 2 * 4 * parameters + 5 * 4  # two averages, and the steps of five tensors
    assert memory["batch"] == 25 * (64 * 4 + 8)
    trace = json.loads((tmp_path / "profiled" / "profile" / "updates.pt.trace.json").read_text())
    spans = {event.get("name") for event in trace["traceEvents"]}
    assert {"dlopt: data", "dlopt: forward", "dlopt: forward and backward", "dlopt: update"} <= spans
    log = (tmp_path / "profiled" / "train.log").read_text()
    assert "top operations" in log and "memory: weights" in log


def test_updates_that_never_come_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile_steps=\[3,40\]: the run has only 8 updates"):
        start(tmp_path, *SMALL, "profile=true", "profile_steps=[3,40]", "epochs=2")
    with pytest.raises(UserError, match=r"profile_steps=\[3,4\]: too short"):
        experiment(*SMALL, "profile_steps=[3,4]")


def test_the_lines_name_the_split_and_the_costliest_operations() -> None:
    found = Profile(
        updates=2,
        seconds=0.01,
        parts={"data": 0.001, "forward": 0.003, "backward": 0.005, "optimizer": 0.001},
        communication=0.002,
        operations=[Operation("aten::mm", 7, 0.004)],
        memory={"weights": 2**20},
        peaks={"optimizer": 2**21},
    )
    lines = table(found, Path("run/profile"))
    assert lines[0] == "profile of 2 updates: 10.00 ms each, under the profiler"
    assert lines[1] == "  data 10%, forward 30%, backward 50%, optimizer 10%, other 0%"
    assert lines[2].endswith("20%")
    assert lines[4].split() == ["aten::mm", "7", "4.000", "40.0%"]
    assert "weights 1 MiB" in lines[5] and "optimizer 2 MiB" in lines[6]
