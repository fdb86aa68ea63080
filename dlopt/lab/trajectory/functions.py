"""Functions to visualize optimizers, of two variables or of a matrix, for `dlopt trajectory function=...`.

Each maps points [..., 2] to values [...]; one of a matrix, of `shape`, takes its entries as the last dimension.
`minima` are all its global minima, `least` is their value, `start` is the initial point, `window` (left, right, bottom,
top) is the plotted region, `axes` names the coordinates, and `sample(generator)` returns the loss of one update: the
function itself, or its estimate from one batch of `samples` samples (1 for functions without data).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dlopt.data.images.digits import digits
from dlopt.extend import Count, NonNegative, Positive, UserError

Point = tuple[float, ...]
Window = tuple[float, float, float, float]
Loss = Callable[[Tensor], Tensor]
BELOW, ABOVE = 0.1, 1.1  # ends of the plot of singular values, relative to the largest one at the start
Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


class Function:
    """Base of the functions; without noise, unless a function overrides `sample`."""

    shape: tuple[int, ...] = (2,)
    minima: tuple[Point, ...]
    least: float = 0.0
    axes: tuple[str, str] = ("x", "y")
    samples: int = 1

    def __init__(self, *, start: Point, window: Window | None) -> None:
        self.start, self.window = start, window

    def __call__(self, points: Tensor) -> Tensor:
        return self.value(*points.unbind(-1))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, generator: torch.Generator) -> Loss:
        return self

    def shows(self, points: Tensor) -> bool:
        """Returns whether all points [n, 2] are in the plotted region."""
        assert self.window is not None
        left, right, bottom, top = self.window
        (x, y), tolerance = points.unbind(1), 1e-9
        inside = (x >= left - tolerance) & (x <= right + tolerance) & (y >= bottom - tolerance) & (y <= top + tolerance)
        return bool(inside.all())

    def describe(self, name: str) -> str:
        """Returns the name with what makes the function easy or hard, for a title."""
        return name


class Quadratic(Function):
    """(u^2 + condition v^2) / 2, where (u, v) are the coordinates rotated by `angle` degrees.

    With `noise`, a sample is the same bowl with its minimum displaced by a normal offset of that standard deviation in
    each direction, and an update uses the mean of `batch_size` samples: its gradient is H (theta - c), with covariance
    noise^2 H^2 / batch_size (the noisy quadratic model: Schaul et al. 2013, Zhang et al. 2019).
    """

    minima = ((0.0, 0.0),)

    def __init__(
        self, *, condition: Positive, angle: float, noise: NonNegative, batch_size: Count, start: Point, window: Window
    ) -> None:
        super().__init__(start=start, window=window)
        radians = math.radians(angle)
        self._axes = ((math.cos(radians), math.sin(radians)), (-math.sin(radians), math.cos(radians)))
        self._condition, self._std = condition, noise / math.sqrt(batch_size)
        self.samples = batch_size if noise > 0 else 1

    @property
    def curvatures(self) -> tuple[float, float] | None:
        """The smallest and the largest eigenvalue of the Hessian; None with noise."""
        return None if self._std > 0 else (min(self.hessian), max(self.hessian))

    @property
    def hessian(self) -> tuple[float, float]:
        """The curvatures along the rotated coordinates (u, v)."""
        return 1.0, self._condition

    def describe(self, name: str) -> str:
        return f"{name} (condition number {self._condition:g})"

    def coordinates(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Returns the rotated coordinates (u, v) of numbers or tensors."""
        (a, b), (c, d) = self._axes
        return a * x + b * y, c * x + d * y

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.coordinates(x, y)
        return (u**2 + self._condition * v**2) / 2

    def sample(self, generator: torch.Generator) -> Loss:
        if self._std == 0:
            return self
        displacement = self._std * torch.randn(2, generator=generator, dtype=torch.float64)
        return lambda points: self(points - displacement)


class MatrixQuadratic(Function):
    """sum_i curvature_i |W v_i|^2 / 2 of a matrix W [n, n], with orthonormal v_i.

    This is least squares for a linear layer, whose inputs have a covariance with the eigenvectors v_i and the
    eigenvalues `curvatures`. W starts at sum_i singular_value_i u_i v_i^T with orthonormal u_i: the gradient
    sum_i curvature_i singular_value_i u_i v_i^T then has the singular vectors of W, and so has every update of gradient
    descent, Muon, Shampoo and, apart from rounding, SOAP, which move each singular value on its own. With `rotated` the
    u_i and v_i are random, else the axes, along which methods with a learning rate per entry have an advantage.

    Errors: UserError for different numbers of curvatures and singular values.
    """

    def __init__(
        self,
        *,
        curvatures: tuple[Positive, ...],
        singular_values: tuple[Positive, ...],
        rotated: bool,
    ) -> None:
        n = len(curvatures)
        if n != len(singular_values) or n < 2:
            raise UserError(
                f"function.singular_values={list(singular_values)}: one for each of function.curvatures="
                f"{list(curvatures)} is needed, at least two"
            )
        self.shape = (n, n)
        self.left = self.right = torch.eye(n, dtype=torch.float64)
        if rotated:
            drawn = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.left, self.right = torch.linalg.qr(drawn).Q
        start = (self.left * torch.tensor(singular_values, dtype=torch.float64)) @ self.right.T
        super().__init__(start=tuple(start.flatten().tolist()), window=None)
        self.minima = ((0.0,) * n**2,)
        self.eigenvalues = torch.tensor(curvatures, dtype=torch.float64)

    def shows(self, points: Tensor) -> bool:
        """Returns whether the signed singular values stay in the plot, which leaves some room below zero."""
        along, _ = self.components(points)
        return bool((along >= -BELOW * along[0].max()).all() and (along <= ABOVE * along[0].max()).all())

    def components(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Returns u_i^T W v_i [..., n], and the norm [...] of all other u_i^T W v_j."""
        rotated = self.left.T @ points.unflatten(-1, self.shape) @ self.right
        along = rotated.diagonal(dim1=-2, dim2=-1)
        return along, (rotated - torch.diag_embed(along)).flatten(-2).norm(dim=-1)

    def __call__(self, points: Tensor) -> Tensor:
        return ((points.unflatten(-1, self.shape) @ self.right).square() * self.eigenvalues).sum((-2, -1)) / 2


class Rosenbrock(Function):
    """(1 - x)^2 + 100 (y - x^2)^2: a narrow, bent valley with a nearly flat floor (Rosenbrock 1960)."""

    minima = ((1.0, 1.0),)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


class Beale(Function):
    """(1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2: plateaus with steep walls (Beale 1958)."""

    minima = ((3.0, 0.5),)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


class Himmelblau(Function):
    """(x^2 + y - 11)^2 + (x + y^2 - 7)^2: four equal minima (Himmelblau 1972)."""

    minima = (
        (3.0, 2.0),
        (-2.805118086952745, 3.131312518250573),
        (-3.779310253377747, -3.283185991286170),
        (3.584428340330492, -1.848126526964404),
    )

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


class Saddle(Function):
    """(x^2 - y^2) / 2 + y^4 / 4: a saddle point at the origin between the two minima (0, 1) and (0, -1)."""

    minima = ((0.0, 1.0), (0.0, -1.0))
    least = -0.25

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (x**2 - y**2) / 2 + y**4 / 4


class Plateau(Function):
    """1 - exp(-(x^2 + y^2) / 2): a well in a plateau, on which the gradient vanishes."""

    minima = ((0.0, 0.0),)

    def __call__(self, points: Tensor) -> Tensor:
        return 1 - torch.exp(-points.square().sum(-1) / 2)


class DigitPair(Function):
    """Logistic regression of two classes of scikit-learn's digits on two features.

    The features are the first two principal components of the images of both classes, divided by the standard
    deviation of the first; the loss is mean log(1 + exp(-label w^T x)) + weight_decay |w|^2 / 2 over the training set.
    An update uses a batch of `batch_size` images drawn without replacement, or `full`: all images.

    Errors: UserError for equal classes, or a batch larger than the training set.
    """

    axes = ("weight of the first principal component", "weight of the second")

    def __init__(
        self,
        *,
        classes: tuple[Digit, Digit],
        batch_size: Count | Literal["full"],
        weight_decay: Positive,
        start: Point,
        window: Window,
    ) -> None:
        if classes[0] == classes[1]:
            raise UserError(f"function.classes=[{classes[0]},{classes[1]}]: two different digits are required")
        super().__init__(start=start, window=window)
        self._decay = weight_decay
        self._products = _signed_features(classes)  # label * x; the loss depends on nothing else
        count = len(self._products)
        if batch_size != "full" and batch_size > count:
            raise UserError(f"function.batch_size={batch_size}: there are {count} images; use full for all of them")
        self.samples = count if batch_size == "full" else batch_size
        minimum = self._minimum()
        self.least = float(self(minimum))
        self.minima = ((float(minimum[0]), float(minimum[1])),)

    def __call__(self, points: Tensor) -> Tensor:
        return self._loss(points, self._products)

    def sample(self, generator: torch.Generator) -> Loss:
        if self.samples == len(self._products):
            return self
        batch = self._products[torch.randperm(len(self._products), generator=generator)[: self.samples]]
        return lambda points: self._loss(points, batch)

    def _loss(self, points: Tensor, products: Tensor) -> Tensor:
        margins = points @ products.T
        return torch.nn.functional.softplus(-margins).mean(-1) + self._decay * points.square().sum(-1) / 2

    def _minimum(self) -> Tensor:
        """Finds the minimum by Newton's method; the loss is strictly convex."""
        point = torch.zeros(2, dtype=torch.float64)
        for _ in range(50):
            error = torch.sigmoid(-(self._products @ point))  # probability of the wrong class
            gradient = self._decay * point - (error @ self._products) / len(error)
            weighted = (error * (1 - error)).unsqueeze(1) * self._products
            hessian = weighted.T @ self._products / len(error) + self._decay * torch.eye(2, dtype=torch.float64)
            point = point - torch.linalg.solve(hessian, gradient)
        return point


def _signed_features(classes: tuple[int, int]) -> Tensor:
    """Returns [N, 2] float64: the features of the training images times their label (-1 or 1)."""
    train = digits().train
    indices = ((train.targets == classes[0]) | (train.targets == classes[1])).nonzero().squeeze(1)
    images = train.fetch(indices).flatten(1).double()
    images = images - images.mean(0)
    directions = torch.linalg.svd(images, full_matrices=False).Vh[:2]
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    features = images @ directions.T
    labels = torch.where(train.targets[indices] == classes[1], 1.0, -1.0).double()
    return labels.unsqueeze(1) * features / features[:, 0].std()
