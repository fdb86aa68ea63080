"""Augmentation of whole batches on the training device: `Pipeline` and its operations."""

from dlopt.augment.geometry import HorizontalFlip, PadCrop
from dlopt.augment.operation import Draws, Operation
from dlopt.augment.pipeline import Pipeline

__all__ = ["Draws", "HorizontalFlip", "Operation", "PadCrop", "Pipeline"]
