"""The pipeline: draws for the global batch, composes what composes, applies it to the own part."""

from torch import Generator, Tensor

from dlopt.augment.geometry import Affine, Border, compose, shift_exactly
from dlopt.augment.operation import Draws, Operation, Step
from dlopt.errors import UserError


class Pipeline:
    """Augments batches of images with the operations of a list, every sample with parameters of its own.

    Parameters are drawn in a fixed order from the generator handed to each call, for the whole global batch, and
    never depend on the data: any sharding of a batch gives the same samples. All geometric operations become one
    warp. Pipelines of flips and whole-pixel crops copy pixels exactly and keep the dtype.

    Args:
        operations: applied in this order within each kind.
        border: what a warp sees outside the image: black, or the image mirrored at its outermost pixels.
        input_shape: shape of one sample, [C, H, W].

    Raises:
        UserError: there are operations, but the samples are no images.
    """

    def __init__(self, *, operations: list[Operation], border: Border, input_shape: tuple[int, ...]) -> None:
        if operations and len(input_shape) != 3:
            raise UserError(
                f"augmentation: works on images [channels, height, width], but this dataset's samples have the shape "
                f"{list(input_shape)}; use augmentation=none"
            )
        for i, operation in enumerate(operations):
            if not isinstance(operation, Operation):
                raise UserError(f"augmentation.operations.{i}: {operation!r} is no operation; see dlopt.augment")
        self.operations = operations
        self.border: Border = border
        self.output_shape = input_shape

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        generator: Generator,
        total: int,
        part: slice,
        indices: Tensor | None = None,
        epoch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augments `inputs` [b, C, H, W], which are the samples `part` of a global batch of `total` samples.

        Args:
            inputs: uint8, or float in 0..255.
            targets: [b, ...].
            generator: on the inputs' device, freshly seeded for the step, equal on all ranks.
            total: samples in the global batch.
            part: contiguous positions of `inputs` in the global batch.
            indices: [b] positions of the samples in the training set.
            epoch: from 0.

        Returns:
            Inputs and targets of the same batch size.
        """
        if not self.operations:
            return inputs, targets
        if len(range(*part.indices(total))) != len(inputs):
            raise ValueError(f"{len(inputs)} samples do not fill {part} of a batch of {total}")
        if indices is not None:
            everyones = indices.new_zeros(total)
            everyones[part] = indices
            indices = everyones
        draws = Draws(generator, total, indices=indices, epoch=epoch)
        size = (inputs.shape[2], inputs.shape[3])
        steps: list[Step] = []
        for operation in self.operations:
            for step in operation.plan(draws, size):
                steps.append(step.take(part))
                if isinstance(step, Affine):
                    size = step.size
        return self._apply(inputs, steps), targets

    def _apply(self, images: Tensor, steps: list[Step]) -> Tensor:
        warp = compose([step for step in steps if isinstance(step, Affine)])
        return shift_exactly(images, warp, self.border)
