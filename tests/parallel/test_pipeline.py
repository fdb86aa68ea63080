"""Pipelined runs against runs of one process."""

from pathlib import Path

from tests.parallel.equality import MLP, RESNET, Cases, compare

PIPELINE = ["parallel=pipeline"]

CASES: Cases = {
    "accumulation": (
        [*RESNET, "data.batch_size=35", "accumulate=3", "steps=5", "clip=norm", "clip.max_norm=0.5"],
        [*PIPELINE, "parallel.split=[stage2]"],
    ),
    "gpipe, one by one": (
        [*MLP, "model.norm=none", "data.batch_size=19", "epochs=2", "accumulate=4", "augmentation=cutmix"],
        [*PIPELINE, "parallel.schedule=gpipe"],
    ),
    "average, adaptive clipping": (
        [*MLP, "ema=0.9", "clip=adaptive", "clip.clipping=0.02", "data.batch_size=32", "epochs=2"],
        PIPELINE,
    ),
    "exact statistics": ([*MLP, "norm_statistics=exact", "data.batch_size=32", "accumulate=2", "epochs=2"], PIPELINE),
    "two points": ([*MLP, "optimizer=schedule_free_adamw", "data.batch_size=32", "epochs=2"], PIPELINE),
}


def test_two_stages_equal_one_process(tmp_path: Path) -> None:
    compare(tmp_path, 2, CASES)
