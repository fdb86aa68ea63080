"""Pipeline-parallel runs against single-process runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlopt.parallel.modes.pipeline import PipelineMode
from tests.support.equality import Cases, compare
from tests.support.modes import PIPELINE
from tests.support.sizes import MLP, RESNET

TWO_LAYERS = ["model.widths=[12,8]"]  # dropout and batch norm on both stages

CASES: Cases = {
    "accumulation": ([*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*PIPELINE, "parallel.split=[stage2]"]),
    "gpipe, one by one": ([*MLP, "model.norm=none", "data.batch_size=19", "epochs=2", "accumulate=4",
        "augmentation=cutmix"], [*PIPELINE, "parallel.schedule=gpipe"]),
    "average, adaptive clipping": ([*MLP, *TWO_LAYERS, "ema=0.9", "clip=adaptive", "clip.clipping=0.02",
        "data.batch_size=32", "epochs=2"], PIPELINE),
    "exact statistics": ([*MLP, *TWO_LAYERS, "norm_statistics=exact", "data.batch_size=32", "accumulate=2",
        "epochs=2"], PIPELINE),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], PIPELINE),
}  # fmt: skip


def test_two_stages_equal_one_process(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_four_stages_and_fewer_micro_batches_than_stages(tmp_path: Path) -> None:
    case = [*MLP, "data.batch_size=35", "accumulate=2", "steps=4", "optimizer=lamb"]
    compare(tmp_path, 4, {"lamb": (case, PIPELINE)})


@pytest.mark.parametrize(("threads", "device", "chosen"), [("auto", "cpu", [6]), (2, "cpu", []), ("auto", "cuda", [])])
def test_stages_of_a_machine_divide_its_cores(
    threads: int | str, device: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 of three, whose machine runs the last two stages, has three quarters of that machine's work."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    group = SimpleNamespace(rank=2, world=SimpleNamespace(local_rank=1))
    ranks = SimpleNamespace(local_processes=2)
    mode: Any = SimpleNamespace(threads=threads, device=torch.device(device), ranks=ranks, group=group)
    PipelineMode._set_threads(mode, [0.5, 0.125, 0.375])
    assert numbers == chosen
