"""Fully sharded runs against single-process runs."""

from pathlib import Path

import pytest
from torch import nn

from dlopt.parallel.modes.fsdp import fsdp_units
from tests.support.equality import Cases, compare
from tests.support.further import AGED, PEOPLE, WEIGHTED
from tests.support.modes import FSDP, SYNC_FSDP
from tests.support.sizes import MLP, RESNET

MUP = ["init=mup", "init.base_width=4"]
KEPT = "parallel.reshard_after_forward=false"

CASES: Cases = {
    "last batch of two": ([*RESNET, "data.batch_size=47", "steps=6"], SYNC_FSDP),
    "a batch that grows": ([*RESNET, "data.batch_size=20", "accumulate={micro_batches:[2,4],steps:[3]}",
        "scale_lr=sqrt", "epochs=2"], SYNC_FSDP),
    "accumulation": ([*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*SYNC_FSDP, KEPT]),
    "no norm, empty shards": ([*MLP, "model.norm=none", "data.batch_size=19", "epochs=3", "accumulate=2", "clip=value",
        "clip.max_value=0.01"], [*FSDP, "parallel.sync_every_micro_batch=true"]),
    "average, adaptive clipping": ([*MLP, "ema=0.9", "clip=adaptive", "clip.clipping=0.02", "data.batch_size=32",
        "epochs=2"], [*SYNC_FSDP, KEPT]),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2"], SYNC_FSDP),
    "activation checkpointing": ([*RESNET, "data.batch_size=35", "accumulate=2", "steps=4"],
        [*SYNC_FSDP, "activation_checkpointing=blocks"]),
    "muon, muP": ([*MLP, *MUP, "optimizer=muon", "data.batch_size=35", "accumulate=2", "steps=5"], SYNC_FSDP),
    "soap, muP, average": ([*MLP, *MUP, "optimizer=soap", "clip=norm", "ema=0.9", "data.batch_size=32", "epochs=2"],
        [*SYNC_FSDP, KEPT]),
    "soap, gradients of low rank": ([*MLP, "model.norm=none", "model.widths=[100]", "optimizer=soap",
        "data.batch_size=19", "epochs=2"], FSDP),
    "shampoo, muP": ([*MLP, *MUP, "model.norm=none", "optimizer=shampoo", "data.batch_size=19", "epochs=2"], FSDP),
    "scion, muP": ([*MLP, *MUP, "model.norm=none", "optimizer=scion", "data.batch_size=19", "epochs=2"], FSDP),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], [*SYNC_FSDP, KEPT]),
    "weights of the samples, empty shards": ([*PEOPLE, WEIGHTED, "accumulate=2"], FSDP),
    "a loss of further tensors, weighted": ([*PEOPLE, WEIGHTED, AGED, "validation.other.use=test"], FSDP),
}  # fmt: skip


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)


@pytest.mark.slow
def test_four_processes_with_two_replicas(tmp_path: Path) -> None:
    case = [*RESNET, "data.batch_size=18", "accumulate=2", "steps=4"]
    muon = [*MLP, "optimizer=muon", "data.batch_size=35", "steps=5"]
    replicas = [*SYNC_FSDP, "parallel.shards=2"]
    compare(tmp_path, 4, {"two replicas": (case, replicas), "owners": (muon, replicas), "four": (muon, SYNC_FSDP)})


def test_fsdp_units_skip_small_and_tied_blocks() -> None:
    tied = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)),
        nn.ModuleList([tied]),
        nn.TransformerEncoderLayer(4, 1),
    )
    model.again = tied
    assert fsdp_units(model, 20) == [model[0][0], model[2]]  # type: ignore[index]
    assert fsdp_units(model, 1) == [model[0][0], model[0][2], model[2]]  # type: ignore[index]
