"""What must hold on a GPU: `scripts/test -m gpu`. Each test also runs on the CPU, which shows that its body is right.

Parallel modes run with one process: NCCL refuses two ranks on one GPU, and dlopt refuses them by name.
"""

import contextlib
import functools
import gc
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed, nn

from dlopt.basics.errors import UserError
from dlopt.machine.cuda_graphs import GraphedFunction, Recorder
from dlopt.machine.world import World
from dlopt.parallel.mode import Mode
from dlopt.parallel.processes.launch import count_processes
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from dlopt.training.graphed_update import GraphedUpdate
from dlopt.training.loop import Trainer
from dlopt.training.nonfinite import NonFiniteCheck
from tests.support.recorded import SimulatedRecorder
from tests.support.runs import SMALL, at_update, metrics, result, resume, run_config, same, start, terminate

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = sorted(file.stem for file in (ROOT / "conf/optimizer").glob("[!_]*.yaml") if file.stem != "custom")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def trained(folder: Path, device: str, *overrides: str, updates: int, parallel: Mode | None = None) -> Trainer:
    """Makes the first updates of a run; returns its trainer."""
    chosen = run_config(*SMALL, *overrides, f"device={device}")
    trainer = probe_trainer(build_workload(chosen, parallel=parallel), folder)
    trainer.module.train()
    number, epoch = 0, 0
    while number < updates:
        for batch in trainer.batches.epoch(epoch, 0, number):
            if number == updates:
                break
            trainer.run_update(batch, number)
            number += 1
        epoch += 1
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in trainer.module.parameters()])


# The fraction of two updates by which they may differ from those in fp64 on the CPU. Methods that use the signs of the
# gradients may move a few of the 900 weights the other way; a wrong update differs by about its own size.
TOLERANCE = 0.1
# newton_undamped diverges, in fp64, too. The preconditioners of soap are singular here (25 samples, 64 inputs): which
# of their eigenvectors it finds depends on rounding.
EXCLUDED = {"newton_undamped", "soap"}
# One of each kind, for the CPU: a vector or a matrix at a time, one or several evaluations, two points.
KINDS = ("adamw", "kron", "lbfgs", "lion", "muon", "newton_cg", "sam", "schedule_free_adamw", "sgd")


@pytest.mark.parametrize(
    ("device", "optimizer"),
    [("cpu", name) for name in KINDS]
    + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in OPTIMIZERS if name not in EXCLUDED],
)
def test_two_updates_of_every_optimizer_equal_those_on_the_cpu(tmp_path: Path, device: str, optimizer: str) -> None:
    # Without batch norm, after which a bias has a gradient of exactly zero, and its sign is that of a rounding error.
    keys = ("model.norm=none", "schedule=constant", "schedule.warmup_epochs=0")
    before = initial_weights(*keys, "precision=fp64")
    keys = (*keys, f"optimizer={optimizer}")
    expected = weights(trained(tmp_path, "cpu", *keys, "precision=fp64", updates=2)) - before
    actual = weights(trained(tmp_path, device, *keys, "precision=fp32", updates=2)) - before
    assert (actual - expected).norm() <= TOLERANCE * expected.norm()


@functools.cache
def initial_weights(*keys: str) -> Tensor:
    """Returns the weights before the first update, which do not depend on the optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        return weights(trained(Path(folder), "cpu", *keys, updates=0))


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
    simulated = patch("dlopt.training.builders.step.Recorder", SimulatedRecorder)
    with patch("dlopt.training.graphed_update.obstacle", return_value=None), simulated:
        yield


@on_each_device
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_replayed_updates_are_bitwise_identical(tmp_path: Path, device: str, optimizer: str, precision: str) -> None:
    keys = (
        "data.drop_last=true", "model.norm=batch", f"precision={precision}", f"optimizer={optimizer}",
        # A graph keeps the rate in a tensor of fp32, which represents these numbers.
        "optimizer.lr=0.125", "optimizer.weight_decay=0.0009765625", "schedule=constant", "schedule.warmup_epochs=0",
        "deterministic=true", *(("optimizer.rest_lr=0.0078125",) if optimizer == "muon" else ()),
    )  # fmt: skip
    eager = trained(tmp_path, device, *keys, "cuda_graphs=false", updates=9)
    with graphs(device):
        replayed = trained(tmp_path, device, *keys, updates=9)
    assert isinstance(replayed.run_update, GraphedUpdate) and not isinstance(eager.run_update, GraphedUpdate)
    assert replayed.run_update._graphed._replay is not None
    states = [trainer.module.state_dict() for trainer in (eager, replayed)]
    assert same(*states)


# The crops of alexnet are larger than the images; custom has no operation.
AUGMENTATIONS = {file.stem for file in (ROOT / "conf/augmentation").glob("[!_]*.yaml")} - {"alexnet", "custom"}


@pytest.mark.parametrize(
    ("device", "name", "deterministic"),
    [("cpu", name, "false") for name in sorted(AUGMENTATIONS)]
    + [
        pytest.param("cuda", name, deterministic, marks=pytest.mark.gpu)
        for name in sorted(AUGMENTATIONS)
        for deterministic in ("false", "true")
    ],
)
def test_the_data_path_is_recorded(
    tmp_path: Path, device: str, name: str, deterministic: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("data.drop_last=true", f"augmentation={name}", f"deterministic={deterministic}")
    with graphs(device):
        trained(tmp_path, device, *keys, updates=6)
    assert "could not be captured" not in caplog.text


@on_each_device
def test_dropout_draws_beside_a_recorded_data_path(tmp_path: Path, device: str) -> None:
    with graphs(device):
        trainer = trained(tmp_path, device, "augmentation=crop_flip", "model.dropout=0.3", "check=step", updates=9)
    assert not isinstance(trainer.run_update, GraphedUpdate) or device == "cpu"  # the simulation has no obstacles


@pytest.mark.gpu
def test_generators_draw_after_a_capture_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    own, recorder = torch.Generator("cuda"), Recorder()

    def unrecordable() -> Tensor:
        return torch.rand(3, device="cuda", generator=own) + torch.rand(3, device="cuda").sum().item()

    function = GraphedFunction("the test", unrecordable, recorder, [own])
    for _ in range(4):
        torch.manual_seed(5)
        own.manual_seed(6)
        eager = function()
    assert "the test could not be captured" in caplog.text
    torch.manual_seed(5)
    own.manual_seed(6)
    assert torch.equal(eager, unrecordable())
    recordable = GraphedFunction("another", lambda: torch.rand(3, device="cuda", generator=own), recorder, [own])
    drawn = []
    for _ in range(5):
        own.manual_seed(6)
        drawn.append(recordable().clone())
    assert recordable._replay is not None and all(torch.equal(each, drawn[0]) for each in drawn)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_that_is_not_finite_sets_the_flag(device: str, dtype: torch.dtype) -> None:
    parameters = [torch.zeros(size, device=device, dtype=dtype, requires_grad=True) for size in (3, 2000)]
    check = NonFiniteCheck(parameters, immediate=False, locate=lambda _: "")
    for value, expected in ((3e38, 0.0), (math.inf, 1.0), (-math.inf, 1.0), (math.nan, 1.0)):
        for each in parameters:
            each.grad = torch.ones_like(each)
        parameters[1].grad[1234] = value  # type: ignore[index]
        flag = torch.zeros((), device=device)
        check.flag_nonfinite(flag)
        assert flag.item() == expected


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
    gc.collect()
    gc.freeze()  # else each measurement passes through all that the tests before have left
    trainer = trained(tmp_path, device, "data.drop_last=true", typed, updates=8)
    trainer.train_metrics.clear()
    before, peaks, number = bytes_in_use(device), [], 8
    for epoch in range(2, 6):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for batch in trainer.batches.epoch(epoch, 0, number):
            trainer.run_update(batch, number)
            number += 1
        trainer.step.check_updates()
        trainer.train_metrics.clear()
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


@contextlib.contextmanager
def group_of_one(device: str, *overrides: str) -> Iterator[Mode]:
    """Context with the mode of a process group of one rank, which dlopt itself does without."""
    chosen = run_config(*SMALL, *overrides, f"device={device}")
    alone = patch("dlopt.parallel.processes.process_group.current", lambda: World("dlopt", 0, 1, 0, 1))
    store = patch("dlopt.parallel.processes.process_group.join_store", lambda *_, **__: distributed.HashStore())
    with alone, store:
        mode = chosen.parallel.build(
            device=torch.device(device), accumulate=1, batch_size=25, precision="fp64", threads=1
        )
    try:
        yield mode
    finally:
        distributed.destroy_process_group()


@on_each_device
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "filter"])
def test_a_group_of_one_process_computes_the_same_as_no_group(tmp_path: Path, device: str, mode: str) -> None:
    """With gloo on a CPU, and NCCL on a GPU."""
    keys = ("model.norm=none", "precision=fp64", "cuda_graphs=false")
    expected = weights(trained(tmp_path, device, *keys, updates=3))
    with group_of_one(device, *keys, f"parallel={mode}") as group:
        trainer = trained(tmp_path, device, *keys, f"parallel={mode}", updates=3, parallel=group)
        state = group.sharding.full(trainer.module.state_dict())
        names = [name for name, _ in trainer.module.named_parameters()]
        actual = torch.cat([state[name].detach().double().cpu().flatten() for name in names])
        del trainer, state
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"parallel\.processes={count + 1}: this machine has {count} GPUs"):
        count_processes({"processes": count + 1}, "cuda")
