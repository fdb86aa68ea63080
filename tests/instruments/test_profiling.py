"""Profile of some updates: its parts add up, and the training is unchanged."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dlopt.basics.errors import UserError
from dlopt.instruments.profiling import Profile, ProfiledOperation, collective_times, covered, state_bytes, table
from tests.support.runs import SMALL, at_update, result, resume, run_config, same, start, terminate

PROFILED = ["profile=true", "profile_steps=[1,5]", "epochs=2"]


def test_profiling_does_not_change_training(tmp_path: Path) -> None:
    start(tmp_path / "plain", *SMALL, "epochs=2", "optimizer=adamw")
    start(tmp_path / "profiled", *SMALL, *PROFILED, "optimizer=adamw")
    assert same(result(tmp_path / "plain"), result(tmp_path / "profiled"))
    assert not (tmp_path / "plain" / "profile").exists()
    actual = json.loads((tmp_path / "profiled" / "profile" / "profile.json").read_text())
    assert actual["updates"] == 3  # 2, 3, 4: the first one measures memory
    assert set(actual["parts"]) == {"data", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in actual["parts"].values())
    assert sum(actual["parts"].values()) <= actual["seconds"]
    assert 1 <= len(actual["operations"]) <= 10 and actual["communication"] == 0
    names = {each["name"] for each in actual["operations"]}
    assert not any(name.startswith("dlopt: ") for name in names)
    times = [each["seconds"] for each in actual["operations"]]
    assert times == sorted(times, reverse=True) and sum(times) <= actual["seconds"]
    parameters = 64 * 12 + 12 + 12 + 12 * 10 + 10  # batch norm instead of a bias
    memory = actual["memory"]
    assert memory["weights"] == memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 2 * 4 * parameters + 5 * 4  # two averages, and the steps of five tensors
    assert memory["batch"] == 25 * (64 * 4 + 8)
    trace = json.loads((tmp_path / "profiled" / "profile" / "updates.pt.trace.json").read_text())
    spans = {event.get("name") for event in trace["traceEvents"]}
    assert {"dlopt: data", "dlopt: forward", "dlopt: forward and backward", "dlopt: update"} <= spans
    log = (tmp_path / "profiled" / "train.log").read_text()
    assert "top operations" in log and "memory: weights" in log


def test_optimizer_memory_includes_tensors_in_lists() -> None:
    weights = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.LBFGS([weights], max_iter=5)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (weights.pow(4) * torch.arange(1.0, 11.0)).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    state = optimizer.state[weights]
    history = sum(each.nbytes for each in [*state["old_dirs"], *state["old_stps"]])
    assert history > 0 and state_bytes(optimizer) >= history + state["d"].nbytes


def test_profiles_a_resumed_run(tmp_path: Path) -> None:
    with at_update(5, terminate):
        start(tmp_path, *SMALL, "epochs=3")
    resume(tmp_path, *SMALL, *PROFILED)
    assert "only 3 updates are left, too few for profile_steps" in (tmp_path / "train.log").read_text()
    resume(tmp_path, *SMALL, *PROFILED, "epochs=4", "schedule_epochs=4")
    assert "profile of 3 updates" in (tmp_path / "train.log").read_text()


def test_rejects_profile_steps_after_the_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile_steps=\[3,40\]: the run has only 8 updates"):
        start(tmp_path, *SMALL, "profile=true", "profile_steps=[3,40]", "epochs=2")
    with pytest.raises(UserError, match=r"profile_steps=\[3,4\]: too short"):
        run_config(*SMALL, "profile_steps=[3,4]")


def test_table_lists_parts_and_top_operations() -> None:
    result = Profile(
        updates=2,
        seconds=0.01,
        parts={"data": 0.001, "forward": 0.003, "backward": 0.005, "optimizer": 0.001},
        communication=0.002,
        operations=[ProfiledOperation("aten::mm", 7, 0.004)],
        memory={"weights": 2**20},
        peaks={"optimizer": 2**21},
    )
    lines = table(result, Path("run/profile"))
    assert lines[0] == "profile of 2 updates: 10.00 ms each, under the profiler"
    assert lines[1] == "  data 10%, forward 30%, backward 50%, optimizer 10%, other 0%"
    assert lines[2].endswith("20%")
    assert lines[4].split() == ["aten::mm", "7", "4.000", "40.0%"]
    assert "weights 1 MiB" in lines[5] and "optimizer 2 MiB" in lines[6]


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=DeviceType.CPU)


def test_union_and_length_of_intervals() -> None:
    assert covered([(4, 6), (0, 2), (1, 3), (6, 7)]) == 6
    assert covered([(0, 5), (1, 2), (4, 6)]) == 6
    assert covered([]) == 0


def test_waiting_excludes_overlapping_computation() -> None:
    """A transfer of 10 µs that overlaps with 4 µs of computation; c10d's library call does not count as computation."""
    events = [
        event("gloo:all_reduce", 10, 20), event("gloo:all_reduce", 12, 18), event("c10d::allreduce_", 10, 11),
        event("aten::mm", 5, 13), event("aten::add_", 19, 25), event("DistributedDataParallel.forward", 0, 30),
    ]  # fmt: skip
    communicating, waiting = collective_times(events, torch.device("cpu"))
    assert (communicating, waiting) == pytest.approx((10e-6, 6e-6))
