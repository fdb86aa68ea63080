"""DDP runs against single-process runs, in fp64."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batch
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from tests.support.choices import names
from tests.support.equality import Cases, compare, metric_values, run_distributed
from tests.support.modes import DDP, SYNC_DDP, build_mode
from tests.support.ranks import run_ranks
from tests.support.runs import at_update, metrics, resume, run_config, run_job, start, terminate
from tests.support.sizes import BASE, MLP, RESNET

CUSTOM = [*BASE, "model=custom", "allow_packages=[tests]", "data.batch_size=19", "epochs=2"]
OWN = "model._target_=tests.support.user_parts"
CASES: Cases = {
    "last batch of two": ([*RESNET, "data.batch_size=47", "steps=6"], SYNC_DDP),
    "accumulation": ([*RESNET, "data.batch_size=35", "accumulate=3", "steps=5"], SYNC_DDP),
    "mixing": ([*MLP, "augmentation=cutmix", "data.batch_size=37", "accumulate=3", "epochs=2"], SYNC_DDP),
    "no norm, empty shards": ([*MLP, "model.norm=none", "data.batch_size=19", "epochs=3"], DDP),
    "custom model that fails on an empty shard": ([*CUSTOM, f"{OWN}.ViewNet"], DDP),
    "custom model with batch norm, empty shards": ([*CUSTOM, f"{OWN}.FlattenNet", "+model.norm=true"], SYNC_DDP),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2"], SYNC_DDP),
    "average, clipping": (
        [*MLP, "ema=0.9", "clip=norm", "clip.max_norm=0.1", "data.batch_size=32", "epochs=2"],
        SYNC_DDP,
    ),
    "hard examples": ([*MLP, "sampler=hard_examples", "data.batch_size=30", "accumulate=2", "epochs=4"], SYNC_DDP),
    "activation checkpointing": (
        [*RESNET, "data.batch_size=35", "accumulate=2", "steps=4"],
        [*SYNC_DDP, "activation_checkpointing=all"],
    ),
    "many evaluations": ([*MLP, "optimizer=sam", "data.batch_size=32", "epochs=2"], SYNC_DDP),
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_four_processes_equal_one_with_empty_shards(tmp_path: Path) -> None:
    names = ["last batch of two", "no norm, empty shards"]
    compare(tmp_path, 4, {name: CASES[name] for name in names})


CHOICES = names("optimizer")
CURVATURE = {"newton", "newton_cg", "newton_undamped", "sophia"}


def hessian_vector_products(folder: str) -> None:
    """Called on all ranks."""
    for choice in sorted(CURVATURE & set(CHOICES)):
        with pytest.raises(
            UserError, match=r"^parallel=ddp: \w+ needs Hessian-vector products, .*; use parallel=single"
        ):
            start(Path(folder) / choice, *MLP, *DDP, "model.norm=none", f"optimizer={choice}", "steps=1")
        rendezvous.leave()


@pytest.mark.slow
def test_every_optimizer(tmp_path: Path) -> None:
    """Without batch norm: some gradients before it are zero up to rounding, and some optimizers follow their sign."""
    both = [*MLP, "model.norm=none", "model.dropout=0", "data.batch_size=35", "epochs=1"]
    rate = {choice: [f"optimizer={choice}", "optimizer.lr=0.01"] for choice in CHOICES}
    cases: Cases = {choice: ([*both, *rate[choice]], DDP) for choice in CHOICES if choice not in CURVATURE}
    compare(tmp_path, 2, cases)
    run_ranks("tests.parallel.test_ddp:hessian_vector_products", 2, tmp_path / "refused", str(tmp_path / "refused"))


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["bf16", "powersgd"])
def test_compressed_gradients_train(tmp_path: Path, compression: str) -> None:
    case = [*MLP, "model.dropout=0", "data.batch_size=32", "epochs=8", "precision=fp32"]
    both = (case, [*SYNC_DDP, f"parallel.compression={compression}", "parallel.static_graph=true"])
    run_distributed(2, tmp_path, {"run": both})
    losses = [line["train_loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


def interrupt_and_resume(folder: str, left_by_one: str, overrides: list[str]) -> None:
    """Called on all ranks: a run that only rank 1 is requested to stop, then the run that a single process left."""
    lines = [*overrides, *SYNC_DDP]
    rank = int(os.environ["DLOPT_RANK"])
    with at_update(5, terminate if rank == 1 else lambda: None):
        summary = start(Path(folder), *lines)
    assert (summary["status"], summary["steps"]) == ("interrupted", 6)  # synchronized with the next loss
    rendezvous.leave()
    state = Checkpoints(Path(left_by_one) / "checkpoints").load_newest() if rank == 0 else None
    run_job(TrainingRun(run_config(*lines), Path(left_by_one), state))
    rendezvous.leave()


def test_ranks_stop_together_and_runs_resume_in_the_other_mode(tmp_path: Path) -> None:
    case = [*MLP, "augmentation=crop_flip", "data.batch_size=35", "epochs=4", "ema=0.9"]
    start(tmp_path / "whole", *case)
    with at_update(5, terminate):
        start(tmp_path / "one", *case)
    both = str(tmp_path / "two"), str(tmp_path / "one")
    run_ranks("tests.parallel.test_ddp:interrupt_and_resume", 2, tmp_path, *both, case)
    resume(tmp_path / "two", *case)
    for folder, step in zip(both, (6, 5), strict=True):
        for a, b in zip(metrics(tmp_path / "whole"), metrics(Path(folder)), strict=True):
            assert metric_values(b) == pytest.approx(metric_values(a), rel=1e-9)
        assert json.loads((Path(folder) / "summary.json").read_text())["resumed_from"] == [step]


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs)
        return outputs


def leave_parameters_unused() -> None:
    """Called on all ranks."""
    mode = build_mode("ddp")
    model = mode.place(HalfUsed(), (3,)).model

    def backward() -> None:
        [part] = mode.split.micro_batches(Batch(torch.ones(2, 3), torch.ones(2), 4), 1)
        with mode.micro_batch(part):
            model(part.inputs).sum().backward()

    backward()
    with pytest.raises(UserError, match=r"^parallel\.find_unused_parameters=false: the model did not use all param"):
        backward()


def test_unused_parameters_raise_one_line(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_ddp:leave_parameters_unused", 2, tmp_path)


@pytest.mark.slow
def test_shard_of_one_sample_without_synchronized_batch_norm_is_refused(tmp_path: Path) -> None:
    case: Cases = {"run": ([*MLP, "model.norm=batch", "data.batch_size=19", "epochs=1"], DDP)}  # a last batch of one
    with pytest.raises(AssertionError, match=r"parallel\.sync_batchnorm=true"):
        run_distributed(2, tmp_path, case)
