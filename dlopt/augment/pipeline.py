"""The augmentation pipeline: draws parameters for the global batch, composes steps, applies them to a shard."""

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from dlopt.augment.colour import Colour
from dlopt.augment.crops import CropReader, ResizingCrop
from dlopt.augment.erasing import RandomErase
from dlopt.augment.operation import DrawnStep, Draws, MixingStep, Operation, PixelStep, Warp, image_shape, leaves
from dlopt.augment.warp import Border, warp
from dlopt.basics.errors import UserError
from dlopt.data.batches import Position
from dlopt.data.samples import Samples


class Pipeline:
    """Augments batches of images by a list of operations, with independent parameters for each sample.

    Parameters are drawn for the whole global batch, in a fixed order and independently of the data. Every sharding of a
    batch therefore gives the same samples (mixing: every sharding with even bounds).

    Regardless of their order in the list, geometric operations run first, as one warp; then colour and tone (adjacent
    colour operations as one transform), noise, erasing, mixing. Pipelines of flips, whole-pixel crops, erasing and
    CutMix copy pixels exactly and keep the dtype; all others return float32 in 0..255, clamped and not rounded.

    Args:
        operations: applied in this order within each kind.
        border: pixels outside the image in a warp: black, or the image mirrored at its outermost pixels.
        input_shape: shape of one sample, [C, H, W].
        train: the training samples, if their values are to be checked.

    Raises:
        UserError: an entry is not an `Operation`, the samples are not images, an operation needs values in 0..255
            and those of the samples are others, or `RandomErase` precedes an operation that changes the image size.
    """

    def __init__(
        self, *, operations: list[Operation], border: Border, input_shape: tuple[int, ...], train: Samples | None = None
    ) -> None:
        in_grey_levels = train is None or train.white() == 255
        erases = False
        for i, operation in enumerate(operations):
            if not isinstance(operation, Operation):
                raise UserError(f"augmentation.operations.{i}: {operation!r} is not an operation; see dlopt.augment")
            shape = image_shape(input_shape)
            input_shape = operation.output_shape(shape)
            if erases and input_shape != shape:
                raise UserError(
                    f"augmentation.operations.{i}: {type(operation).__name__} changes the image size; list it before "
                    "RandomErase, whose boxes depend on the size"
                )
            for each in leaves(operation, shape):
                erases |= isinstance(each, RandomErase)
                if each.in_grey_levels and not in_grey_levels:
                    raise UserError(
                        f"augmentation.operations.{i}: {type(each).__name__} needs images with values 0..255, but the "
                        "data set returns other floating-point values; return uint8 images"
                    )
        self.operations = operations
        self.border: Border = border
        self.output_shape = tuple(input_shape)
        """[C, H, W] of an augmented sample."""

    def __call__(self, inputs: Tensor, targets: Tensor, **position: Unpack[Position]) -> tuple[Tensor, Tensor]:
        """Augments `inputs` [b, C, H, W], a contiguous shard of a global batch.

        Args:
            inputs: uint8, or float in 0..255.
            targets: [b] class indices, or [b, ...] regression targets.

        Returns:
            Inputs and targets of the same batch size. Mixed class targets are float probabilities [b, classes].
        """
        if not self.operations:
            return inputs, targets
        total, shard = position["total"], position["shard"]
        if len(range(*shard.indices(total))) != len(inputs):
            raise ValueError(f"{len(inputs)} samples do not fill {shard} of a batch of {total}")
        return self.render(inputs, targets, self.plan(inputs.shape[1:], **position))

    def apply(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augments a whole batch with the given draws."""
        return self.render(images, targets, self._plan(images.shape[1:], draws, slice(None)))

    def plan(self, sample_shape: Sequence[int], **position: Unpack[Position]) -> list[DrawnStep]:
        """Draws all parameters for samples of that shape."""
        total, shard, indices = position["total"], position["shard"], position.get("indices")
        if indices is not None:
            all_indices = indices.new_zeros(total)
            all_indices[shard] = indices
            indices = all_indices
        draws = Draws(position["generator"], total, indices=indices, epoch=position.get("epoch"))
        return self._plan(sample_shape, draws, shard)

    def _plan(self, sample_shape: Sequence[int], draws: Draws, shard: slice) -> list[DrawnStep]:
        shape = image_shape(sample_shape)
        steps: list[DrawnStep] = []
        for operation in self.operations:
            steps += operation.plan(draws, shape)
            shape = operation.output_shape(shape)
        if shard.indices(draws.total) != (0, draws.total, 1):
            steps = [step.shard(shard) for step in steps]
        return steps

    def render(self, images: Tensor, targets: Tensor, steps: Sequence[DrawnStep]) -> tuple[Tensor, Tensor]:
        """Applies the steps. A function of tensors only (compilable), except that noise is drawn here."""
        warps = [step for step in steps if isinstance(step, Warp)]
        if warps:
            images = warp(images, warps, self.border)
        for pixel_step in _compose([step for step in steps if isinstance(step, PixelStep)]):
            images = pixel_step.apply(images if pixel_step.keeps_dtype else images.float())
        for step in steps:
            if isinstance(step, MixingStep):
                images, targets = step.mix(images, targets)
        return images, targets


def _compose(steps: list[PixelStep]) -> list[PixelStep]:
    result: list[PixelStep] = []
    for step in sorted(steps, key=lambda step: step.phase):
        if isinstance(step, Colour) and result and isinstance(result[-1], Colour):
            result[-1] = result[-1].compose(step)
        else:
            result.append(step)
    return result


def crop_when_reading(
    pipeline: Pipeline | None, samples: Samples, seed: int
) -> tuple[CropReader | None, Pipeline | None]:
    """Returns a reader that applies the random crop of the pipeline to whole image files, and the other operations.

    Without a crop, or if the samples show the whole images, returns None and the pipeline.

    Raises `UserError` if the crop is not the first operation.
    """
    if pipeline is None or not samples.is_cut:
        return None, pipeline
    first = next((each for each in pipeline.operations if isinstance(each, ResizingCrop)), None)
    if first is None:
        return None, pipeline
    crop, *others = pipeline.operations
    if not isinstance(crop, ResizingCrop):
        raise UserError(
            f"augmentation.operations.{pipeline.operations.index(first)}: {type(first).__name__} must be the first "
            "operation, because it crops whole image files while they are read"
        )
    shape = image_shape(samples.shape)
    after = crop.output_shape(shape)
    rest = Pipeline(operations=others, border=pipeline.border, input_shape=after) if others else None
    return CropReader(samples, crop, shape, seed), rest


class CentreCrop:
    """Crops the centre of `output_shape` [C, H, W] from larger images; not random."""

    def __init__(self, output_shape: tuple[int, ...]) -> None:
        self.size = output_shape[1:]

    def __call__(self, inputs: Tensor, targets: Tensor, **position: Any) -> tuple[Tensor, Tensor]:
        return self.crop(inputs), targets

    def crop(self, images: Tensor) -> Tensor:
        """Returns the centres of `images` [N, C, H, W]."""
        height, width = self.size
        top, left = self.corner(*images.shape[2:])
        return images[:, :, top : top + height, left : left + width]

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Returns (top, left) of the crop of an image of this size. Raises `UserError` if the image is smaller."""
        top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
        if top < 0 or left < 0:
            raise UserError(
                f"augmentation: trains on {self.size[0]}x{self.size[1]} crops, but the test images have only "
                f"{height}x{width} pixels; set data.image_size={max(self.size)} or larger"
            )
        return top, left
