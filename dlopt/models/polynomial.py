"""Polynomial regression of one variable: a linear model to show overfitting."""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from dlopt.errors import UserError
from dlopt.ranges import Count

Basis = Literal["monomial", "legendre", "chebyshev"]


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
        super().__init__(OrderedDict(powers=Polynomials(degree, basis), head=nn.Linear(degree, classes)))
