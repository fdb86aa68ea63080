"""Updates of the papers, written out in NumPy in float64.

Each takes the initial weights of a tensor and its gradients, and yields the weights after every update.

`dlopt verify` compares any optimizer with them, and dlopt's tests its own. `dlopt.lab.verify.methods` holds the
sources and the hyperparameters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Gradients = list[Array]
Formula = Callable[..., Iterator[Array]]

LR, DECAY = 0.1, 0.3


def penalized(formula: Formula) -> Formula:
    """Adds the L2 penalty to the gradients of a formula without weight decay."""

    def weights(w: Array, gs: Iterable[Array], wd: float, **keys: Any) -> Iterator[Array]:
        current = w
        for current in formula(w, (g + wd * current for g in gs), **keys):
            yield current

    return weights


def decoupled(formula: Formula, last: bool = False) -> Formula:
    """Adds decoupled weight decay, lr * wd * w, to the steps of a formula, which do not depend on the weights.

    `last`: of the weights after the step.
    """

    def weights(w: Array, gs: Iterable[Array], wd: float, lr: float, **keys: Any) -> Iterator[Array]:
        before = w
        for after in formula(w, gs, lr=lr, **keys):
            if after is not before:  # else the update has only filled the state
                step = after - before
                w = (w + step) * (1 - lr * wd) if last else w - lr * wd * w + step
            before = after
            yield w

    return weights


def sgd(
    w: Array, gs: Iterable[Array], lr: float = 0.1, momentum: float = 0.9, wd: float = 0.3, nesterov: bool = False
) -> Iterator[Array]:
    delta: Any = None
    for g in gs:
        g = g + wd * w
        delta = g if delta is None else momentum * delta + g
        w = w - lr * (g + momentum * delta if nesterov else delta)
        yield w


def averaging(
    w: Array, gs: Iterable[Array], lr: float = 0.1, momentum: float = 0.9, wd: float = 0.0
) -> Iterator[Array]:
    delta: Any = np.zeros_like(w)
    for g in gs:
        delta = momentum * delta + (1 - momentum) * g
        w = w - lr * delta - lr * wd * w
        yield w


def sgdw(w: Array, gs: Gradients, alpha: float = 0.01, m: float = 0.9, wd: float = 0.03) -> Iterator[Array]:
    """Algorithm 1 of Loshchilov & Hutter 2019 with the schedule multiplier 1."""
    delta: Any = np.zeros_like(w)
    for g in gs:
        delta = m * delta + alpha * g
        w = w - delta - wd * w
        yield w


def rprop(w: Array, gs: Iterable[Array], lr: float = LR, skip: bool = False) -> Iterator[Array]:
    size, before = np.full_like(w, lr), np.zeros_like(w)
    for g in gs:
        size = np.where(g * before > 0, size * 1.2, np.where(g * before < 0, size * 0.5, size)).clip(0.04, 0.13)
        if skip:
            g = np.where(g * before < 0, 0.0, g)
        w, before = w - size * np.sign(g), g
        yield w


def adagrad(w: Array, gs: Iterable[Array], lr: float = LR, eps: float = 1e-10) -> Iterator[Array]:
    total: Any = 0.0
    for g in gs:
        total = total + g**2
        w = w - lr * g / (np.sqrt(total) + eps)
        yield w


def adadelta(w: Array, gs: Iterable[Array], lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6) -> Iterator[Array]:
    squares, deltas = np.zeros_like(w), np.zeros_like(w)
    for g in gs:
        squares = rho * squares + (1 - rho) * g**2
        delta = np.sqrt(deltas + eps) / np.sqrt(squares + eps) * g  # the average of deltas up to the previous one
        deltas = rho * deltas + (1 - rho) * delta**2
        w = w - lr * delta
        yield w


def rmsprop(w: Array, gs: Iterable[Array], lr: float = LR, alpha: float = 0.9, eps: float = 1e-8) -> Iterator[Array]:
    squares = np.zeros_like(w)
    for g in gs:
        squares = alpha * squares + (1 - alpha) * g**2
        w = w - lr * g / (np.sqrt(squares) + eps)
        yield w


Betas = tuple[float, float]
ADAM = (0.9, 0.999)


def moments(w: Array, gs: Iterable[Array], betas: Betas = ADAM) -> Iterator[tuple[int, Array, Array, Array]]:
    """Yields the number of the update, the gradient, and the moments without bias correction."""
    (b1, b2), m, v = betas, np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield t, g, m, v


def adam(
    w: Array,
    gs: Iterable[Array],
    lr: float = LR,
    wd: float = 0.0,
    betas: Betas = ADAM,
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> Iterator[Array]:
    largest = np.zeros_like(w)
    for t, _, m, v in moments(w, gs, betas):
        largest = np.maximum(largest, v) if amsgrad else v
        w = w - lr * wd * w - lr * m / (1 - betas[0] ** t) / (np.sqrt(largest / (1 - betas[1] ** t)) + eps)
        yield w


def nadam(
    w: Array, gs: Iterable[Array], lr: float = LR, betas: Betas = ADAM, eps: float = 1e-8, momentum_decay: float = 0.004
) -> Iterator[Array]:
    product = 1.0
    for t, g, m, v in moments(w, gs, betas):
        now, after = (betas[0] * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in (t, t + 1))
        product *= now
        average = (1 - now) * g / (1 - product) + after * m / (1 - product * after)
        w = w - lr * average / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield w


def radam(w: Array, gs: Iterable[Array], lr: float = LR, betas: Betas = ADAM, eps: float = 1e-8) -> Iterator[Array]:
    b1, b2 = betas
    longest = 2 / (1 - b2) - 1
    for t, _, m, v in moments(w, gs, betas):
        length = longest - 2 * t * b2**t / (1 - b2**t)
        mean = m / (1 - b1**t)
        if length > 5:
            above, below = (length - 4) * (length - 2) * longest, (longest - 4) * (longest - 2) * length
            mean = mean * np.sqrt(above / below) * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        w = w - lr * mean
        yield w


def lion(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = (0.9, 0.99)
) -> Iterator[Array]:
    m = np.zeros_like(w)
    for g in gs:
        w = w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + wd * w)
        m = betas[1] * m + (1 - betas[1]) * g
        yield w


def lamb(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = ADAM, eps: float = 1e-6
) -> Iterator[Array]:
    for t, _, m, v in moments(w, gs, betas):
        u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + wd * w
        w = w - lr * np.linalg.norm(w) / np.linalg.norm(u) * u
        yield w


def lars(
    w: Array,
    gs: Iterable[Array],
    lr: float = LR,
    wd: float = DECAY,
    momentum: float = 0.9,
    trust_coefficient: float = 0.02,
) -> Iterator[Array]:
    v = np.zeros_like(w)
    for g in gs:
        norm = np.linalg.norm(w)
        local = trust_coefficient * norm / (np.linalg.norm(g) + wd * norm) if w.ndim > 1 else 1.0
        v = momentum * v + lr * local * (g + wd * w)
        w = w - v
        yield w


def mask(u: Array, g: Array) -> Array:
    phi = (u * g > 0).astype(float)
    scaled: Array = phi * phi.size / (phi.sum() + 1)
    return scaled


def c_adamw(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = ADAM, eps: float = 1e-8
) -> Iterator[Array]:
    for t, g, m, v in moments(w, gs, betas):
        u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        w = w - lr * wd * w - lr * mask(u, g) * u
        yield w


def c_lion(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = (0.9, 0.99)
) -> Iterator[Array]:
    m = np.zeros_like(w)
    for g in gs:
        u = np.sign(betas[0] * m + (1 - betas[0]) * g)
        w = w - lr * wd * w - lr * mask(u, g) * u
        m = betas[1] * m + (1 - betas[1]) * g
        yield w


def signum(w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, momentum: float = 0.9) -> Iterator[Array]:
    m = np.zeros_like(w)
    for g in gs:
        m = momentum * m + (1 - momentum) * g
        w = w - lr * (np.sign(m) + wd * w)
        yield w


def adopt(
    w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY, betas: Betas = (0.9, 0.9999), eps: float = 1e-6
) -> Iterator[Array]:
    (b1, b2), m, v = betas, np.zeros_like(w), gs[0] ** 2
    yield w
    for t, g in enumerate(gs[1:], 1):
        m = b1 * m + (1 - b1) * np.clip(g / np.maximum(np.sqrt(v), eps), -(t**0.25), t**0.25)
        w = w - lr * (m + wd * w)
        v = b2 * v + (1 - b2) * g**2
        yield w


def ademamix(w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY, warmup: int = 7) -> Iterator[Array]:
    m1, m2, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    log1, log3 = math.log(0.9), math.log(0.9999)
    for t, g in enumerate(gs, 1):
        alpha = min(5.0 * t / warmup, 5.0)
        beta3 = min(math.exp(log1 * log3 / ((1 - t / warmup) * log3 + t / warmup * log1)), 0.9999)
        m1, m2, v = 0.9 * m1 + 0.1 * g, beta3 * m2 + (1 - beta3) * g, 0.999 * v + 0.001 * g**2
        update = (m1 / (1 - 0.9**t) + alpha * m2) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - lr * (update + wd * w)
        yield w


def adan(
    w: Array,
    gs: Gradients,
    lr: float = LR,
    wd: float = DECAY,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
) -> Iterator[Array]:
    (b1, b2, b3), old = betas, gs[0]
    m, v, n = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g - old)
        n = b3 * n + (1 - b3) * (g + b2 * (g - old)) ** 2
        rate = lr / (np.sqrt(n / (1 - b3**t)) + eps)
        w = (w - rate * (m / (1 - b1**t) + b2 * v / (1 - b2**t))) / (1 + wd * lr)
        old = g
        yield w


def adabelief(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = ADAM, eps: float = 1e-16
) -> Iterator[Array]:
    (b1, b2), m, s = betas, np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gs, 1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        w = w - lr * (m / (1 - b1**t) / (np.sqrt(s / (1 - b2**t)) + eps) + wd * w)
        yield w


def mars(
    w: Array,
    gs: Gradients,
    lr: float = LR,
    wd: float = DECAY,
    betas: Betas = (0.95, 0.99),
    gamma: float = 0.025,
    eps: float = 1e-8,
) -> Iterator[Array]:
    b1, b2 = betas
    m, v, old = np.zeros_like(w), np.zeros_like(w), gs[0]
    for t, g in enumerate(gs, 1):
        c = g + gamma * b1 / (1 - b1) * (g - old)
        c = c / max(1.0, float(np.linalg.norm(c)))
        m, v, old = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2, g
        w = w - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * w)
        yield w


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def adafactor(w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY) -> Iterator[Array]:
    rows, columns, v = np.zeros(w.shape), np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gs, 1):
        beta = 1 - t**-0.8
        alpha = max(0.001, rms(w)) * min(lr, 1 / math.sqrt(t))
        squares = g**2 + 1e-30
        if w.ndim > 1:
            rows = beta * rows + (1 - beta) * squares.sum(-1, keepdims=True)
            columns = beta * columns + (1 - beta) * squares.sum(-2, keepdims=True)
            v = rows * columns / rows.sum(-2, keepdims=True)
        else:
            v = beta * v + (1 - beta) * squares
        u = g / np.sqrt(v)
        w = w - lr * wd * w - alpha * u / max(1.0, rms(u))
        yield w


def unfold(x: Array, mode: int) -> Array:
    return np.moveaxis(np.atleast_1d(x), mode, 0).reshape(np.atleast_1d(x).shape[mode], -1)


def times(x: Array, mode: int, matrix: Array) -> Array:
    product: Array = np.moveaxis(np.tensordot(matrix, x, axes=(1, mode)), 0, mode)
    return product


def inverse_root(h: Array, order: int) -> Array:
    values, vectors = np.linalg.eigh(h)
    root: Array = vectors @ np.diag(values ** (-1 / order)) @ vectors.T
    return root


def shampoo(w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY) -> Iterator[Array]:
    w = np.atleast_1d(w)  # a scalar as a vector of one entry
    h, m = [1e-4 * np.eye(n) for n in w.shape], np.zeros_like(w)
    for t, g in enumerate(gs):
        m = 0.9 * m + 0.1 * g
        h = [each + unfold(g, mode) @ unfold(g, mode).T for mode, each in enumerate(h)]
        if t % 3 == 0:
            roots = [inverse_root(each, 2 * w.ndim) for each in h]
        step = m
        for mode, root in enumerate(roots):
            step = times(step, mode, root)
        w = w - lr * (step + wd * w)
        yield w


def distributed_shampoo(w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY) -> Iterator[Array]:
    m, v, h = np.zeros_like(w), np.zeros_like(w), [np.zeros((n, n)) for n in w.shape]
    for t, g in enumerate(gs, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        h = [0.99 * each + 0.01 * unfold(g, mode) @ unfold(g, mode).T for mode, each in enumerate(h)]
        mean = m / (1 - 0.9**t)
        adam = step = mean / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        if t % 3 == 0:
            roots = [inverse_root(each / (1 - 0.99**t) + 1e-4 * np.eye(len(each)), 2 * w.ndim) for each in h]
        if t >= 3:
            step = mean
            for mode, root in enumerate(roots):
                step = times(step, mode, root)
            step = step * np.linalg.norm(adam) / np.linalg.norm(step)
        w = w - lr * (step + wd * w)
        yield w


def soap(w: Array, gs: Gradients, lr: float = LR, wd: float = DECAY) -> Iterator[Array]:
    modes = range(w.ndim) if w.ndim > 1 else []
    m, v = np.zeros_like(w), np.zeros_like(w)
    grams = {i: 0.05 * unfold(gs[0], i) @ unfold(gs[0], i).T for i in modes}
    q = {i: np.linalg.eigh(grams[i])[1][:, ::-1] for i in modes}
    yield w
    for t, g in enumerate(gs[1:], 1):
        rotated, m = g, 0.95 * m + 0.05 * g
        average = m
        for i in modes:
            rotated, average = times(rotated, i, q[i].T), times(average, i, q[i].T)
        v = 0.95 * v + 0.05 * rotated**2
        step = average / (1 - 0.95**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        for i in modes:
            step = times(step, i, q[i])
        w = w - lr * (step + wd * w)
        for i in modes:
            grams[i] = 0.95 * grams[i] + 0.05 * unfold(g, i) @ unfold(g, i).T
            if t % 3 == 0:
                order = np.argsort(-np.diag(q[i].T @ grams[i] @ q[i]))
                v = np.take(v, order, axis=i)
                q[i] = np.linalg.qr((grams[i] @ q[i])[:, order])[0]
        yield w


def prodigy(
    w: Array,
    gs: Gradients,
    d: float = 0.01,
    d_coef: float = 1.0,
    wd: float = DECAY,
    rates: Sequence[float] | None = None,
) -> Iterator[tuple[Array, float]]:
    """The weights of all parameters together, and d; `rates`: the schedule's gamma at each update."""
    x, m, v, s, r, root = w, np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), 0.0, math.sqrt(0.999)
    for g, gamma in zip(gs, rates or [1.0] * len(gs), strict=True):
        r = root * r + (1 - root) * gamma * d**2 * float(np.vdot(g, w - x))
        s = root * s + (1 - root) * gamma * d**2 * g
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d**2 * g**2
        x = x - gamma * d * (m / (np.sqrt(v) + d * 1e-8) + wd * x)
        d = max(d, d_coef * r / float(np.abs(s).sum()))
        yield x, d


def muon(
    w: Array,
    gs: Iterable[Array],
    lr: float = LR,
    wd: float = DECAY,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
) -> Iterator[Array]:
    """The Newton-Schulz iteration in float64; implementations have it in bfloat16."""
    m = np.zeros_like(w)
    for g in gs:
        m = momentum * m + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * m if nesterov else m
        x = x / np.linalg.norm(x)
        for _ in range(ns_steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        w = w - lr * wd * w - lr * math.sqrt(max(1.0, w.shape[0] / w.shape[1])) * x
        yield w


def schedule_free_sgd(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, momentum: float = 0.9
) -> Iterator[Array]:
    """At the points y, where the gradients are taken."""
    x = y = z = w
    for t, g in enumerate(gs, 1):
        z = z - lr * (g + wd * y)
        x = x + (z - x) / t
        y = (1 - momentum) * z + momentum * x
        yield y


def schedule_free_adamw(
    w: Array, gs: Iterable[Array], lr: float = LR, wd: float = DECAY, betas: Betas = ADAM, eps: float = 1e-8
) -> Iterator[Array]:
    """At the points y, where the gradients are taken."""
    x = y = z = w
    (b1, b2), v = betas, np.zeros_like(w)
    for t, g in enumerate(gs, 1):
        v = b2 * v + (1 - b2) * g**2
        z = z - lr * (g / (np.sqrt(v / (1 - b2**t)) + eps) + wd * y)
        x = x + (z - x) / t
        y = (1 - b1) * z + b1 * x
        yield y
