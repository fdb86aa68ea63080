"""Training batches without end, for measurements that count updates."""

from collections.abc import Iterator

from torch import Tensor

from dlopt.training.trainer import Trainer


def endless_batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches that follow the trainer's progress, epoch after epoch."""
    progress = trainer.progress
    epoch, position, step = progress.epoch, progress.position, progress.step
    while True:
        for batch in trainer.batches.epoch(epoch, position, step):
            yield batch
            step += 1
        epoch, position = epoch + 1, 0
