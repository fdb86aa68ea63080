"""Multi-layer perceptrons: the plain one, and one with the simplest skip."""

from collections import OrderedDict
from math import prod
from typing import Unpack

from torch import Tensor, nn

from dlopt.models.layers import Activation, Norm, NormKeys, activation
from dlopt.ranges import Count, Fraction, Natural


class MLP(nn.Sequential):
    """Fully connected layers of the given `widths`, each followed by normalization, activation and dropout.

    Takes samples of any shape [B, ...], returns [B, classes]. Without widths (`widths=[]`) it is the linear model.

    Errors: UserError for `norm=instance`, which has no meaning for vectors.
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
        normalize = Norm.of(**norm)
        parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = prod(input_shape)
        for index, width in enumerate(widths):
            parts[f"layer{index + 1}"] = _layer(inputs, width, activation, dropout, normalize)
            inputs = width
        parts["head"] = nn.Linear(inputs, classes)
        super().__init__(parts)


class ResidualMLP(nn.Sequential):
    """A first layer to `width` features, then blocks x + layer(layer(x)), then the classifier.

    A layer is linear, normalization, activation: the block is the simplest form of a skip. `residual=false` takes
    the skips away and leaves the same layers. Takes samples of any shape [B, ...], returns [B, classes].

    Errors: UserError for `norm=instance`, which has no meaning for vectors.
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
        normalize = Norm.of(**norm)
        parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        parts["stem"] = _layer(prod(input_shape), width, activation, 0.0, normalize)
        for index in range(blocks):
            parts[f"block{index + 1}"] = ResidualPair(width, residual, activation, dropout, normalize)
        parts["head"] = nn.Linear(width, classes)
        super().__init__(parts)


class ResidualPair(nn.Module):
    """x + layer(dropout(layer(x))) on [B, width]; without `residual` the two layers alone.

    It has no way to start at zero: behind the last activation a zero would cut the gradient of a ReLU for ever.
    """

    def __init__(self, width: int, residual: bool, activation: Activation, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.layer1 = _layer(width, width, activation, dropout, norm)
        self.layer2 = _layer(width, width, activation, 0.0, norm)
        self.residual = residual

    def forward(self, vectors: Tensor) -> Tensor:
        branch = self.layer2(self.layer1(vectors))
        return vectors + branch if self.residual else branch

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


def _layer(inputs: int, outputs: int, kind: Activation, dropout: float, norm: Norm) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(inputs, outputs, bias=norm.bias))
    parts["norm"] = norm.vectors(outputs)
    parts["activation"] = activation(kind)
    parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)
