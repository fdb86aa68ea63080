"""The window at which a model is tested that was trained on smaller windows than the images are."""

from typing import Any

from torch import Tensor

from dlopt.errors import UserError


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
