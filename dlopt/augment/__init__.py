"""Batch augmentation on the training device: `Pipeline` and its operations."""

from dlopt.augment.choice import RandAugment, RandomMix, TrivialAugment
from dlopt.augment.colour import Brightness, Contrast, PCAColour, Saturation
from dlopt.augment.crops import RandomCrop, RandomResizedCrop, RandomScaleCrop
from dlopt.augment.erasing import Erase, RandomErase
from dlopt.augment.geometry import (
    AlternatingFlip,
    HorizontalFlip,
    Lens,
    PadCrop,
    Rotate,
    Scale,
    ShearX,
    ShearY,
    Stretch,
    TranslateX,
    TranslateY,
)
from dlopt.augment.mixing import CutMix, Mixup
from dlopt.augment.operation import Draws, Operation
from dlopt.augment.pipeline import Pipeline
from dlopt.augment.tone import AutoContrast, Equalize, GaussianNoise, Posterize, Sharpness, Solarize
