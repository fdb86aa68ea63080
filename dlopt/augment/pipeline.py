"""The pipeline: draws for the global batch, composes what composes, applies it to the own part."""

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from dlopt.augment.colour import Colour
from dlopt.augment.operation import Draws, MixingStep, Operation, PixelStep, Step, Warp, image_shape
from dlopt.augment.warp import Border, warp
from dlopt.errors import UserError


class Pipeline:
    """Augments batches of images with the operations of a list, every sample with parameters of its own.

    Parameters are drawn in a fixed order from the generator handed to each call, for the whole global batch, and
    never depend on the data: any sharding of a batch gives the same samples (mixing: any even one).

    Whatever their places in the list, geometric operations run first, as one warp; then colour and tone (neighbouring
    colour operations as one transform), noise, erasing, mixing. Pipelines of flips, whole-pixel crops, erasing and
    CutMix copy pixels exactly and keep the dtype; all others return float32 in 0..255, clamped and not rounded.

    Args:
        operations: applied in this order within each kind.
        border: what a warp sees outside the image: black, or the image mirrored at its outermost pixels.
        input_shape: shape of one sample, [C, H, W].

    Raises:
        UserError: there are operations, but the samples are no images.
    """

    def __init__(self, *, operations: list[Operation], border: Border, input_shape: tuple[int, ...]) -> None:
        for i, operation in enumerate(operations):
            if not isinstance(operation, Operation):
                raise UserError(f"augmentation.operations.{i}: {operation!r} is no operation; see dlopt.augment")
            input_shape = operation.output_shape(image_shape(input_shape))
        self.operations = operations
        self.border: Border = border
        self.output_shape = tuple(input_shape)
        """[C, H, W] of an augmented sample."""

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        generator: Generator,
        total: int,
        part: slice,
        indices: Tensor | None = None,
        epoch: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augments `inputs` [b, C, H, W], which are the samples `part` of a global batch of `total` samples.

        Args:
            inputs: uint8, or float in 0..255.
            targets: [b] class indices, or [b, ...] numbers to be predicted.
            generator: on the inputs' device, freshly seeded for the step, equal on all ranks.
            total: samples in the global batch.
            part: contiguous positions of `inputs` in the global batch.
            indices: [b] positions of the samples in the training set (`AlternatingFlip` needs them).
            epoch: from 0 (`AlternatingFlip` needs it).

        Returns:
            Inputs and targets of the same batch size. Mixed class targets are float probabilities [b, classes].
        """
        if not self.operations:
            return inputs, targets
        if len(range(*part.indices(total))) != len(inputs):
            raise ValueError(f"{len(inputs)} samples do not fill {part} of a batch of {total}")
        steps = self.plan(inputs.shape[1:], generator=generator, total=total, part=part, indices=indices, epoch=epoch)
        return self.render(inputs, targets, steps)

    def apply(self, images: Tensor, targets: Tensor, draws: Draws, part: slice) -> tuple[Tensor, Tensor]:
        """The same with draws of the caller's."""
        return self.render(images, targets, self._plan(images.shape[1:], draws, part))

    def plan(
        self,
        sample_shape: Sequence[int],
        *,
        generator: Generator,
        total: int,
        part: slice,
        indices: Tensor | None = None,
        epoch: int | Tensor | None = None,
    ) -> list[Step]:
        """What is to be done with samples of that shape: all parameters, drawn here. Arguments as for a call."""
        if indices is not None:
            all_indices = indices.new_zeros(total)
            all_indices[part] = indices
            indices = all_indices
        return self._plan(sample_shape, Draws(generator, total, indices=indices, epoch=epoch), part)

    def _plan(self, sample_shape: Sequence[int], draws: Draws, part: slice) -> list[Step]:
        shape = image_shape(sample_shape)
        steps: list[Step] = []
        for operation in self.operations:
            steps += operation.plan(draws, shape)
            shape = operation.output_shape(shape)
        if part.indices(draws.total) != (0, draws.total, 1):
            steps = [step.take(part) for step in steps]
        return steps

    def render(self, images: Tensor, targets: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        """Does what was planned: a function of tensors alone, but for noise, which is drawn as it is added."""
        warps = [step for step in steps if isinstance(step, Warp)]
        if warps:
            images = warp(images, warps, self.border)
        for pixels in _composed([step for step in steps if isinstance(step, PixelStep)]):
            images = pixels.apply(images if pixels.keeps_dtype else images.float())
        for mixing in steps:
            if isinstance(mixing, MixingStep):
                images, targets = mixing.mix(images, targets)
        return images, targets


def _composed(steps: list[PixelStep]) -> list[PixelStep]:
    result: list[PixelStep] = []
    for step in sorted(steps, key=lambda step: step.phase):
        if isinstance(step, Colour) and result and isinstance(result[-1], Colour):
            result[-1] = result[-1].then(step)
        else:
            result.append(step)
    return result


class CentreCrop:
    """Cuts the centre of `output_shape` [C, H, W] out of larger images; it draws nothing."""

    def __init__(self, output_shape: tuple[int, ...]) -> None:
        self.size = output_shape[1:]

    def __call__(self, inputs: Tensor, targets: Tensor, **position: Any) -> tuple[Tensor, Tensor]:
        height, width = self.size
        top, left = (inputs.shape[2] - height) // 2, (inputs.shape[3] - width) // 2
        if top < 0 or left < 0:
            raise UserError(
                f"augmentation: it trains on windows of {height}x{width}, and the images to test have only "
                f"{inputs.shape[2]}x{inputs.shape[3]}; give them more by data.image_size={max(height, width)}"
            )
        return inputs[:, :, top : top + height, left : left + width], targets
