"""Backpropagation by hand: a multi-layer perceptron on scikit-learn's digits, with NumPy alone.

    python docs/examples/backpropagation.py

Shapes: inputs [batch, features], weights [outputs, inputs], biases [outputs], labels [batch].
"""

from itertools import pairwise

import numpy as np


def initialize(widths, rng):
    """Draws one (weight, bias) pair per layer; Kaiming: the variance of a weight is 2 / inputs."""
    return [(rng.normal(0, np.sqrt(2 / m), (n, m)), np.zeros(n)) for m, n in pairwise(widths)]


def forward(layers, x):
    """Returns the input of each layer, and the outputs of the last. A ReLU follows every layer but the last."""
    inputs = []
    for i, (weight, bias) in enumerate(layers):
        inputs.append(x)
        x = x @ weight.T + bias
        if i < len(layers) - 1:
            x = np.maximum(x, 0)
    return inputs, x


def cross_entropy(logits, labels):
    """Returns the mean loss, and its gradient with respect to the logits: (softmax - one-hot) / batch size."""
    shifted = logits - logits.max(1, keepdims=True)  # exp does not overflow; the softmax is the same
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_softmax)
    gradient[rows, labels] -= 1
    return -log_softmax[rows, labels].mean(), gradient / len(labels)


def backward(layers, inputs, gradient):
    """Returns the (weight, bias) gradients of each layer, by the chain rule from the last layer to the first."""
    gradients = []
    for i in reversed(range(len(layers))):
        weight, _ = layers[i]
        gradients.append((gradient.T @ inputs[i], gradient.sum(0)))
        gradient = gradient @ weight  # with respect to the layer's input
        if i > 0:
            gradient = gradient * (inputs[i] > 0)  # through the ReLU before it
    return gradients[::-1]


def main():
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    x, y = digits.data[order] / 16, digits.target[order]
    layers = initialize([64, 32, 10], rng)
    for epoch in range(1, 11):
        for start in range(0, 1500, 32):
            batch = slice(start, min(start + 32, 1500))
            inputs, logits = forward(layers, x[batch])
            _, gradient = cross_entropy(logits, y[batch])
            steps = backward(layers, inputs, gradient)
            layers = [(w - 0.1 * dw, b - 0.1 * db) for (w, b), (dw, db) in zip(layers, steps, strict=True)]
        loss, _ = cross_entropy(forward(layers, x[:1500])[1], y[:1500])
        accuracy = (forward(layers, x[1500:])[1].argmax(1) == y[1500:]).mean()
        print(f"epoch {epoch:2d}: training loss {loss:.3f}, validation accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
