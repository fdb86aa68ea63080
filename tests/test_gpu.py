"""What must hold on a GPU: `scripts/test -m gpu`. Each test also runs on the CPU, which shows that its body is right.

Parallel modes run with one process: NCCL refuses two ranks on one GPU, and dlopt refuses them by name.
"""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.parallel.launch import count_processes
from dlopt.training.build import build_workload
from dlopt.training.cuda_graphs import GraphedStep
from dlopt.training.trainer import Trainer, probe_trainer
from tests.support.recorded import SimulatedRecorder
from tests.support.runs import SMALL, at_update, experiment, metrics, result, resume, same, start, terminate

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = sorted(file.stem for file in (ROOT / "conf/optimizer").glob("[!_]*.yaml") if file.stem != "custom")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def trained(folder: Path, device: str, *overrides: str, updates: int) -> Trainer:
    """Makes the first updates of a run; returns its trainer."""
    trainer = probe_trainer(build_workload(experiment(*SMALL, *overrides, f"device={device}")), folder)
    trainer.module.train()
    number, epoch = 0, 0
    while number < updates:
        for batch in trainer.batches.epoch(epoch, 0, number):
            if number == updates:
                break
            trainer.update(batch, number)
            number += 1
        epoch += 1
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in trainer.module.parameters()])


# The fraction of an update by which it may differ from that in fp64 on the CPU: Newton-Schulz iterations run in bf16,
# and a sign of a gradient near zero may flip.
TOLERANCE = {"muon": 0.05, "dmuon": 0.05, "scion": 0.05}


@on_each_device
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_update_of_every_optimizer_equals_that_on_the_cpu(tmp_path: Path, device: str, optimizer: str) -> None:
    keys = (f"optimizer={optimizer}", "schedule=constant", "schedule.warmup_epochs=0")
    before = weights(trained(tmp_path, "cpu", *keys, "precision=fp64", updates=0))
    expected = weights(trained(tmp_path, "cpu", *keys, "precision=fp64", updates=1)) - before
    actual = weights(trained(tmp_path, device, *keys, "precision=fp32", updates=1)) - before
    assert (actual - expected).norm() <= TOLERANCE.get(optimizer, 0.01) * expected.norm()


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", name) for name in ("fp32", "bf16", "bf16_pure", "fp64")]
    + [
        pytest.param("cuda", name, marks=pytest.mark.gpu)
        for name in ("fp32", "tf32", "bf16", "bf16_pure", "fp16", "fp64")
    ],
)
@pytest.mark.parametrize("model", ["mlp", "airbench94"])
def test_the_loss_falls_in_every_precision(tmp_path: Path, device: str, precision: str, model: str) -> None:
    keys = ["model.widths=[4,4,8]", "init=whitening_dirac"] if model == "airbench94" else []
    start(tmp_path, *SMALL, f"model={model}", *keys, f"device={device}", f"precision={precision}", "epochs=6")
    losses = [line["train_loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.95 * losses[0]


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_a_resumed_run_is_bitwise_identical(tmp_path: Path, device: str, precision: str) -> None:
    keys = [*SMALL, "epochs=4", "model.dropout=0.3", "augmentation=crop_flip", "deterministic=true"]
    keys += [f"device={device}", f"precision={precision}"]
    start(tmp_path / "whole", *keys)
    with at_update(7, terminate):
        start(tmp_path / "resumed", *keys)
    resume(tmp_path / "resumed", *keys)
    assert same(result(tmp_path / "whole"), result(tmp_path / "resumed"))


@contextlib.contextmanager
def graphs(device: str) -> Iterator[None]:
    """Context in which updates are replayed: on a CPU from simulated graphs."""
    if device == "cuda":
        yield
        return
    simulated = patch("dlopt.training.optimizer.Recorder", SimulatedRecorder)
    with patch("dlopt.training.cuda_graphs.obstacle", return_value=None), simulated:
        yield


@on_each_device
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_replayed_updates_are_bitwise_identical(tmp_path: Path, device: str, optimizer: str, precision: str) -> None:
    keys = (
        "data.drop_last=true", "model.norm=batch", f"precision={precision}", f"optimizer={optimizer}",
        # A graph keeps the rate in a tensor of fp32, which represents these numbers.
        "optimizer.lr=0.125", "optimizer.weight_decay=0.0009765625", "schedule=constant", "schedule.warmup_epochs=0",
        "deterministic=true",
    )  # fmt: skip
    eager = trained(tmp_path, device, *keys, "cuda_graphs=false", updates=9)
    with graphs(device):
        replayed = trained(tmp_path, device, *keys, updates=9)
    assert isinstance(replayed.step, GraphedStep) and not isinstance(eager.step, GraphedStep)
    assert replayed.step._graphed_update._replay is not None
    states = [trainer.module.state_dict() for trainer in (eager, replayed)]
    assert same(*states)


def bytes_in_use(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu")
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@on_each_device
@pytest.mark.parametrize("typed", ["cuda_graphs=false", "cuda_graphs=auto"])
def test_memory_does_not_grow_with_the_updates(tmp_path: Path, device: str, typed: str) -> None:
    trainer = trained(tmp_path, device, "data.drop_last=true", typed, updates=8)
    trainer.train_metrics = trainer.train_metrics.fresh()
    before, peaks, number = bytes_in_use(device), [], 8
    for epoch in range(2, 6):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for batch in trainer.batches.epoch(epoch, 0, number):
            trainer.update(batch, number)
            number += 1
        trainer.step.check_updates()
        trainer.train_metrics = trainer.train_metrics.fresh()
        peaks.append(torch.cuda.max_memory_allocated() if device == "cuda" else bytes_in_use(device))
    del batch
    assert bytes_in_use(device) <= before + 64 * 1024  # rounding of the allocator, and a batch
    assert max(peaks[1:]) <= peaks[0] + 64 * 1024


@pytest.mark.parametrize(
    ("device", "mode"),
    [pytest.param("cpu", mode, marks=pytest.mark.slow) for mode in ("true", "max-autotune")]
    + [
        pytest.param("cuda", mode, marks=pytest.mark.gpu)
        for mode in ("true", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    ],
)
def test_compiled_runs_have_the_losses_of_eager_ones(tmp_path: Path, device: str, mode: str) -> None:
    keys = [*SMALL, "epochs=3", "model.norm=batch", f"device={device}", "data.drop_last=true"]
    start(tmp_path / "eager", *keys)
    start(tmp_path / "compiled", *keys, f"compile={mode}")
    eager, compiled = ([line["train_loss"] for line in metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


MODES = ("ddp", "fsdp", "filter", "spatial", "hybrid", "pipeline")


@pytest.mark.parametrize(
    ("device", "mode"),
    [pytest.param("cpu", mode, marks=pytest.mark.slow) for mode in MODES]
    + [pytest.param("cuda", mode, marks=pytest.mark.gpu) for mode in MODES],
)
def test_one_process_of_every_mode_has_the_losses_of_a_run_without_processes(
    tmp_path: Path, device: str, mode: str
) -> None:
    """With gloo on a CPU, and NCCL on a GPU."""
    model = ["model=resnet20"] if mode == "spatial" else []
    keys = [*SMALL, *model, "data.subset=40", "epochs=2", "model.norm=none", f"device={device}", "precision=fp64"]
    start(tmp_path / "single", *keys)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "dlopt"]
    done = subprocess.run(
        [*command, "train", *keys, f"parallel={mode}", f"hydra.run.dir={tmp_path / 'group'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    single, group = ([line["train_loss"] for line in metrics(tmp_path / name)] for name in ("single", "group"))
    assert group == pytest.approx(single, rel=1e-9)


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"parallel\.processes={count + 1}: this machine has {count} GPUs"):
        count_processes({"processes": count + 1}, "cuda")
