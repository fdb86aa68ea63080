"""Three sizes of runs, as overrides: TINY for commands, SMALL for training and resuming, BASE for equality in fp64."""

# A fraction of a second and the fewest files. With tracking a run also draws its curves, which takes as long again.
TINY = ("model=mlp", "model.widths=[4]", "data.subset=40", "epochs=2", "threads=1", "tracking=[]")

# 90 training samples: batches of 25, 25, 25, 15.
SMALL = [
    "data.subset=120", "data.val_split=0.25", "data.batch_size=25", "data.workers=0", "model=mlp", "model.widths=[12]",
    "tracking=[]", "threads=1", "device=cpu",
]  # fmt: skip
STEPS_PER_EPOCH = 4
# With all states that resuming restores: momentum, EMA, dropout, augmentation.
RICH = [*SMALL, "augmentation=crop_flip", "model.dropout=0.3", "ema=0.9", "epochs=4"]
# A run whose learning rate is constant.
RUN = [*SMALL, "model.norm=none", "epochs=4", "schedule=constant", "optimizer.lr=0.08"]

# 96 training samples.
BASE = [
    "data.subset=120", "data.val_split=0.2", "data.workers=0", "tracking=[]", "threads=1", "device=cpu",
    "precision=fp64", "schedule=constant", "optimizer.lr=0.05", "log_every_steps=3",
]  # fmt: skip
RESNET = [
    *BASE, "model=resnet20", "model.depth=8", "model.dropout=0.2", "augmentation=crop_flip",
    "optimizer.momentum=0.9", "optimizer.weight_decay=0.001",
]  # fmt: skip
MLP = [*BASE, "model=mlp", "model.widths=[12]", "model.dropout=0.3"]


def without(lines: list[str], *groups: str) -> list[str]:
    """Returns the overrides except those of some groups, which the caller sets to other choices."""
    return [line for line in lines if not line.startswith(groups)]
