"""Autoencoders (Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks")."""

from collections import OrderedDict
from math import prod
from typing import ClassVar, Literal, Unpack

from torch import nn

from dlopt.models.layers import Activation, Norm, NormKeys
from dlopt.models.mlp import layer
from dlopt.ranges import Count, Fraction


class Autoencoder(nn.Sequential):
    """Encodes an image as `code` numbers and decodes them: layers of `widths`, a linear code, the widths in reverse.

    Images [B, C, H, W] -> [B, classes], where `classes` is the number of values of an image. The targets are the images
    themselves, with pixels in 0..1.

    Args:
        output: `identity`; `sigmoid`: the outputs are in 0..1, as the logistic units of the paper (with loss=mse;
            loss=pixel_cross_entropy applies the sigmoid).

    Errors: UserError for `norm=instance`, which is undefined for vectors.
    """

    reconstructs: ClassVar = True  # see `dlopt.training.build.with_task`

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        widths: tuple[Count, ...],
        code: Count,
        activation: Activation,
        output: Literal["identity", "sigmoid"],
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        normalize = Norm(**norm)
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = prod(input_shape)
        for index, width in enumerate(widths):
            modules[f"encoder{index + 1}"] = layer(inputs, width, activation, dropout, normalize)
            inputs = width
        modules["code"] = nn.Linear(inputs, code)
        inputs = code
        for index, width in enumerate(reversed(widths)):
            modules[f"decoder{index + 1}"] = layer(inputs, width, activation, dropout, normalize)
            inputs = width
        modules["head"] = nn.Linear(inputs, classes)
        modules["output"] = nn.Sigmoid() if output == "sigmoid" else nn.Identity()
        super().__init__(modules)
