"""Drives Tracking as the engine does: `python drive.py FOLDER [EPOCHS [SECONDS_PER_STEP]]`; run by the tests."""

import logging
import os
import sys
import time
from pathlib import Path

from dlopt.tracking.tracking import Tracking
from tests.support.lengths import constant

STEPS = 10
CONFIG = {
    "name": "digits",
    "seed": 0,
    "epochs": 3,
    "resume": None,
    "data": {"_target_": "dlopt.data.images.digits", "batch_size": 128, "val_split": 0.1, "memory": "auto"},
    "model": {"_target_": "dlopt.models.resnet", "depth": 20, "norm": "batch", "widths": [16, 32, 64]},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "clip": None,
}
CHOICES = {"data": "digits", "model": "resnet20", "optimizer": "sgd", "clip": "none"}
MACHINE = {"samples_per_second": 1500.0, "utilization": 0.417, "gpu_memory_gib": 3.0}
FACTS = {"parameters": 272474, "train": 1437, "val": 160, "test": 360, "device": "cpu", "threads": 2}


def drive(folder: Path, epochs: int = 3, seconds: float = 0.0) -> None:
    with Tracking(folder, sinks=["tensorboard"], console=True, log_every_steps=5) as tracking:
        tracking.begin(CONFIG, FACTS, constant(epochs * STEPS, STEPS), choices=CHOICES)
        for step in range(1, epochs * STEPS + 1):
            time.sleep(seconds)
            tracking.advance(step)
            loss = 2.3 / step
            if step % 5 == 0:
                tracking.step(
                    step, {"train/loss": loss, "lr": 0.1, **{f"throughput/{key}": MACHINE[key] for key in MACHINE}}
                )
            if step == 12:
                tracking.message("said to the user")
                logging.getLogger("a.package").warning("a library's warning")
            if step % STEPS == 0:
                tracking.evaluating(1, 1)
                values = {"train_loss": loss, "train_accuracy": 0.9, "val_loss": loss + 0.1, "val_accuracy": 0.875}
                line = {"epoch": step // STEPS, "step": step, "lr": 0.1, **values, "seconds": 1.5 * step / STEPS}
                line |= MACHINE
                tracking.epoch(line, improved=True)
        values = {"best_val_loss": 0.2, "best_val_accuracy": 0.875, "test_loss": 0.3, "test_accuracy": 0.9778}
        tracking.finish(
            {"status": "finished", "epochs": epochs, "steps": step, "best_epoch": epochs, **values, "seconds": 4.2}
        )


if __name__ == "__main__":
    if os.environ.get("DRIVE_WITHOUT_STDOUT"):
        sys.stdout = None
    drive(Path(sys.argv[1]), *(int(sys.argv[2]), float(sys.argv[3])) if len(sys.argv) > 3 else ())
