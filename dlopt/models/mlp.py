"""Multi-layer perceptrons, plain and residual; autoencoders with the same layers; polynomials of one variable."""

from collections import OrderedDict
from math import prod
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Fraction, Natural
from dlopt.models.layers import Activation, Norm, NormKeys, activation
from dlopt.models.linear import Linear

Basis = Literal["monomial", "legendre", "chebyshev"]


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
        modules["head"] = Linear(inputs, classes)
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
        modules["head"] = Linear(width, classes)
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


class Autoencoder(nn.Sequential):
    """Encodes an image as `code` numbers and decodes them: layers of `widths`, a linear code, the widths in reverse.

    Images [B, C, H, W] -> [B, classes], where `classes` is the number of values of an image. The targets are the images
    themselves, with pixels in 0..1. Source: Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with
    Neural Networks".

    Args:
        output: `identity`; `sigmoid`: the outputs are in 0..1, as the logistic units of the paper (with loss=mse;
            loss=pixel_cross_entropy applies the sigmoid).

    Errors: UserError for `norm=instance`, which is undefined for vectors.
    """

    reconstructs: ClassVar = True  # see `dlopt.tasks.kinds.chosen`

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
        modules["code"] = Linear(inputs, code)
        inputs = code
        for index, width in enumerate(reversed(widths)):
            modules[f"decoder{index + 1}"] = layer(inputs, width, activation, dropout, normalize)
            inputs = width
        modules["head"] = Linear(inputs, classes)
        modules["output"] = nn.Sigmoid() if output == "sigmoid" else nn.Identity()
        super().__init__(modules)


def layer(inputs: int, outputs: int, kind: Activation, dropout: float, norm: Norm) -> nn.Sequential:
    linear = Linear(inputs, outputs, bias=norm.bias)
    modules = OrderedDict(
        linear=linear, norm=norm.vectors(outputs), activation=activation(kind), dropout=nn.Dropout(dropout)
    )
    return nn.Sequential(modules)


class Polynomials(nn.Module):
    """x [B, 1] -> [B, degree]: the basis polynomials of degree 1 to `degree` (the constant is the head's bias)."""

    def __init__(self, degree: int, basis: Basis) -> None:
        super().__init__()
        self.degree, self.basis = degree, basis

    def forward(self, x: Tensor) -> Tensor:
        terms = [torch.ones_like(x), x]
        for n in range(1, self.degree):
            match self.basis:
                case "monomial":
                    terms.append(x * terms[n])
                case "legendre":  # Bonnet's recursion
                    terms.append(((2 * n + 1) * x * terms[n] - n * terms[n - 1]) / (n + 1))
                case "chebyshev":
                    terms.append(2 * x * terms[n] - terms[n - 1])
        return torch.cat(terms[1:], 1)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, basis={self.basis}"


class Polynomial(nn.Sequential):
    """A polynomial of the given degree with learned coefficients: [B, 1] -> [B, classes].

    Being linear in its coefficients, it is a minimal model to show overfitting.
    All bases span the same functions. On [-1, 1] the second-moment matrix of the monomials is so ill-conditioned that
    gradient descent hardly changes the high degrees; Legendre polynomials are orthogonal there.
    Errors: UserError if a sample is not one number.
    """

    def __init__(self, *, input_shape: tuple[int, ...], classes: int, degree: Count, basis: Basis) -> None:
        if input_shape != (1,):
            raise UserError(
                f"model=polynomial: samples must be single numbers, but have the shape {list(input_shape)}; "
                "use data=polynomial or another model"
            )
        super().__init__(OrderedDict(powers=Polynomials(degree, basis), head=Linear(degree, classes)))
