"""DDP runs against single-process runs, in fp64."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batch
from dlopt.parallel.modes.ddp import Compression
from dlopt.parallel.processes import rendezvous
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.progress import TrainingRun
from tests.support.choices import names
from tests.support.equality import Cases, compare, metric_values, run_distributed
from tests.support.further import AGED, PEOPLE, WEIGHTED
from tests.support.modes import DDP, SYNC_DDP, build_mode
from tests.support.ranks import run_ranks
from tests.support.runs import at_update, metrics, resume, run_config, run_job, start, terminate
from tests.support.sizes import BASE, MLP, RESNET

Array = np.ndarray[Any, Any]
CUSTOM = [*BASE, "model=custom", "allow_packages=[tests]", "data.batch_size=19", "epochs=2"]
OWN = "model._target_=tests.support.user_parts"
WIDE = ["model.norm=none", "model.widths=[100]"]  # more units than samples in a batch
CASES: Cases = {
    "last batch of two": ([*RESNET, "data.batch_size=47", "steps=6"], SYNC_DDP),
    "a batch that grows": ([*RESNET, "data.batch_size=20", "accumulate={micro_batches:[2,4],steps:[3]}",
        "scale_lr=sqrt", "epochs=2"], SYNC_DDP),
    "accumulation": ([*RESNET, "data.batch_size=35", "accumulate=3", "steps=5"], SYNC_DDP),
    "mixing": ([*MLP, "augmentation=cutmix", "data.batch_size=37", "accumulate=3", "epochs=2"], SYNC_DDP),
    "soap, gradients of low rank": ([*MLP, *WIDE, "optimizer=soap", "data.batch_size=19", "epochs=2"], DDP),
    "distributed_shampoo": ([*MLP, *WIDE, "optimizer=distributed_shampoo", "data.batch_size=19", "epochs=2"], DDP),
    "no norm, empty shards": ([*MLP, "model.norm=none", "data.batch_size=19", "epochs=3"], DDP),
    "custom model that fails on an empty shard": ([*CUSTOM, f"{OWN}.ViewNet"], DDP),
    "custom model with batch norm, empty shards": ([*CUSTOM, f"{OWN}.FlattenNet", "+model.norm=true"], SYNC_DDP),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2"], SYNC_DDP),
    "average, clipping": ([*MLP, "ema=0.9", "clip=norm", "clip.max_norm=0.1", "data.batch_size=32", "epochs=2"],
        SYNC_DDP),
    "hard examples": ([*MLP, "sampler=hard_examples", "data.batch_size=30", "accumulate=2", "epochs=4"], SYNC_DDP),
    "activation checkpointing": ([*RESNET, "data.batch_size=35", "accumulate=2", "steps=4"], [*SYNC_DDP,
        "activation_checkpointing=all"]),
    "many evaluations": ([*MLP, "optimizer=sam", "data.batch_size=32", "epochs=2"], SYNC_DDP),
    "weights of the samples, empty shards": ([*PEOPLE, WEIGHTED, "accumulate=2"], DDP),
    "a loss of further tensors, weighted": ([*PEOPLE, WEIGHTED, AGED, "validation.other.use=test"], DDP),
}  # fmt: skip


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


WARM_UP = 10  # updates without compression (powersgd)
ROWS, FIRST = 5, 2  # samples of an update, and of them on rank 0


def bf16(values: Array) -> Array:
    """Rounds fp32 to the nearest bf16, ties to even: the upper half of its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def fp16(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def compressed_updates(mode: Any, dtype: torch.dtype, updates: list[tuple[Array, Array]]) -> Iterator[Array]:
    """Yields the gradient of the mean over (inputs [5, K], derivatives of the outputs [5, M]) for each update."""
    model = nn.Linear(8, 6, bias=False, dtype=dtype)
    placed = mode.place(model, (8,)).model
    for inputs, slopes in updates:
        model.weight.grad = None
        parts = [torch.from_numpy(each).to(dtype).tensor_split([FIRST])[mode.ranks.rank] for each in (inputs, slopes)]
        [part] = mode.split.micro_batches(Batch(*parts, ROWS), 1)
        with mode.micro_batch(part):
            (part.weight * (placed(part.inputs) * part.targets).sum(1).mean()).backward()
        assert model.weight.grad is not None
        yield model.weight.grad.double().numpy().copy()


def exact_shards(inputs: Array, slopes: Array) -> tuple[Array, Array]:
    """Returns what each of the two ranks contributes to the gradient of the mean over all rows."""
    first, second = (slopes[rows].T @ inputs[rows] * 2 / ROWS for rows in (slice(FIRST), slice(FIRST, None)))
    return first, second


def compare_compressions() -> None:
    """Called on both ranks."""
    draw = np.random.default_rng(0)
    any_rank = [(draw.normal(size=(ROWS, 8)), draw.normal(size=(ROWS, 6))) for _ in range(WARM_UP)]
    matrices = [exact_shards(*each) for each in any_rank]
    for dtype, precise in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for compression in get_args(Compression):
            mode = build_mode("ddp", compression=compression)
            updates = any_rank
            if compression == "powersgd":
                row, column = draw.normal(size=(1, 8)), draw.normal(size=(1, 6))
                rank_one = [(draw.normal(size=(ROWS, 1)) * row, np.ones((ROWS, 1)) * column) for _ in range(3)]
                updates = [*any_rank, *rank_one, *[any_rank[0]] * 40]
            found = list(compressed_updates(mode, dtype, updates))
            for (first, second), gradient in zip(matrices, found, strict=False):
                mean = (first + second) / 2
                scale = abs(mean).max()
                if compression in ("none", "powersgd"):
                    assert abs(gradient - mean).max() < precise * scale, compression
                else:
                    # Each rank rounds its gradient and half of it; their sum is rounded once more.
                    rounded = {"bf16": bf16, "fp16": fp16}[compression]
                    halves = [rounded(rounded(each) / 2) for each in (first, second)]
                    gap, ulp = abs(gradient - rounded(halves[0] + halves[1])), {"bf16": 2**-8, "fp16": 2**-11}
                    # Products in fp32 may round to the neighbouring value.
                    assert (gap <= 4 * ulp[compression] * (abs(first) + abs(second))).all(), compression
                    assert np.median(gap) == 0, compression
                    assert abs(gradient - mean).max() > 0.1 * ulp[compression] * scale, compression
            if compression == "powersgd":
                for each, gradient in zip(rank_one, found[WARM_UP:], strict=False):
                    mean = sum(exact_shards(*each)) / 2
                    assert abs(gradient - mean).max() < max(precise, 1e-6) * abs(mean).max(), "of rank one"
                # Of full rank: an update alone is far from the mean, and what is left out is made up for later.
                mean, later = sum(matrices[0]) / 2, np.stack(found[WARM_UP + 3 :])
                assert np.linalg.norm(later[0] - mean) > 0.3 * np.linalg.norm(mean)
                assert np.linalg.norm(later.mean(0) - mean) < 0.1 * np.linalg.norm(mean)
            rendezvous.leave()


def test_compressed_gradients_equal_the_exact_mean_up_to_their_rounding(tmp_path: Path) -> None:
    run_ranks("tests.parallel.test_ddp:compare_compressions", 2, tmp_path)


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
