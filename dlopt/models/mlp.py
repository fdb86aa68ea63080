"""Multi-layer perceptrons, plain and residual."""

from collections import OrderedDict
from math import prod
from typing import Unpack

from torch import Tensor, nn

from dlopt.models.layers import Activation, Norm, NormKeys, activation
from dlopt.ranges import Count, Fraction, Natural


class MLP(nn.Sequential):
    """Fully connected layers of the given `widths`, each followed by normalization, activation and dropout.

    Samples of any shape [B, ...] -> [B, classes]. `widths=[]` is the linear model.

    Errors: UserError for `norm=instance`, which is undefined for vectors.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        widths: tuple[Count, ...],
        activation: Activation,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        normalize = Norm(**norm)
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = prod(input_shape)
        for index, width in enumerate(widths):
            modules[f"layer{index + 1}"] = layer(inputs, width, activation, dropout, normalize)
            inputs = width
        modules["head"] = nn.Linear(inputs, classes)
        super().__init__(modules)


class ResidualMLP(nn.Sequential):
    """A first layer to `width` features, then blocks x + layer(layer(x)), then the classifier.

    A layer is linear, normalization, activation. `residual=false` removes the skip connections and keeps the layers.
    Samples of any shape [B, ...] -> [B, classes].

    Errors: UserError for `norm=instance`, which is undefined for vectors.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, ...],
        classes: int,
        width: Count,
        blocks: Natural,
        residual: bool,
        activation: Activation,
        dropout: Fraction,
        **norm: Unpack[NormKeys],
    ) -> None:
        normalize = Norm(**norm)
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        modules["stem"] = layer(prod(input_shape), width, activation, 0.0, normalize)
        for index in range(blocks):
            modules[f"block{index + 1}"] = ResidualPair(width, residual, activation, dropout, normalize)
        modules["head"] = nn.Linear(width, classes)
        super().__init__(modules)


class ResidualPair(nn.Module):
    """x + layer(dropout(layer(x))) on [B, width]; without `residual`, only the two layers.

    Has no `zero_init_last`: with zero weights before its last ReLU, the branch would never receive a gradient.
    """

    def __init__(self, width: int, residual: bool, activation: Activation, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.layer1 = layer(width, width, activation, dropout, norm)
        self.layer2 = layer(width, width, activation, 0.0, norm)
        self.residual = residual

    def forward(self, vectors: Tensor) -> Tensor:
        branch = self.layer2(self.layer1(vectors))
        return vectors + branch if self.residual else branch

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


def layer(inputs: int, outputs: int, kind: Activation, dropout: float, norm: Norm) -> nn.Sequential:
    linear = nn.Linear(inputs, outputs, bias=norm.bias)
    modules = OrderedDict(
        linear=linear, norm=norm.vectors(outputs), activation=activation(kind), dropout=nn.Dropout(dropout)
    )
    return nn.Sequential(modules)
