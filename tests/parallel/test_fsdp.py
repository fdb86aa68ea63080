"""Fully sharded runs against runs of one process."""

from pathlib import Path

from tests.parallel.equality import MLP, RESNET, Cases, compare

FSDP = ["parallel=fsdp", "parallel.unit_parameters=100"]
SYNC_FSDP = [*FSDP, "parallel.sync_batchnorm=true"]
KEPT = "parallel.reshard_after_forward=false"

CASES: Cases = {
    "last batch of two": ([*RESNET, "data.batch_size=47", "steps=6"], SYNC_FSDP),
    "accumulation": (
        [*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*SYNC_FSDP, KEPT],
    ),
    "no norm, empty shares": (
        [
            *MLP,
            "model.norm=none",
            "data.batch_size=19",
            "epochs=3",
            "accumulate=2",
            "clip=value",
            "clip.max_value=0.01",
        ],
        [*FSDP, "parallel.sync_every_micro_batch=true"],
    ),
    "average, adaptive clipping": (
        [*MLP, "ema=0.9", "clip=adaptive", "clip.clipping=0.02", "data.batch_size=32", "epochs=2"],
        [*SYNC_FSDP, KEPT],
    ),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "epochs=2"], SYNC_FSDP),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], [*SYNC_FSDP, KEPT]),
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)
