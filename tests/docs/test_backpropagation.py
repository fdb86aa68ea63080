"""docs/examples/backpropagation.py is short, and its gradients equal those of dlopt's network and loss."""

import runpy

import numpy as np
import pytest
import torch

from dlopt.losses import CrossEntropy
from dlopt.models.mlp import MLP
from tests.support.norm import NORM
from tests.support.pages import ROOT

PATH = ROOT / "docs/examples/backpropagation.py"


def test_gradients_equal_those_of_dlopt_in_float64() -> None:
    example = runpy.run_path(str(PATH))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.integers(0, 3, 7)
    layers = [(weight, rng.normal(size=len(bias))) for weight, bias in example["initialize"]([5, 8, 6, 3], rng)]
    inputs, logits = example["forward"](layers, x)
    loss, gradient = example["cross_entropy"](logits, y)
    gradients = [each for pair in example["backward"](layers, inputs, gradient) for each in pair]

    keys = {"widths": [8, 6], "activation": "relu", "dropout": 0.0, **NORM, "norm": "none"}
    model = MLP(input_shape=(5,), classes=3, **keys).double()
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter, value in zip(parameters, (each for pair in layers for each in pair), strict=True):
            parameter.copy_(torch.from_numpy(value))
    expected = CrossEntropy(label_smoothing=0.0, class_weights=None, classes=3)(
        model(torch.from_numpy(x)), torch.from_numpy(y)
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for parameter, value in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(parameter.grad, value, rtol=1e-12, atol=1e-14)


def test_example_needs_numpy_alone() -> None:
    lines = PATH.read_text().splitlines()
    assert len(lines) < 80
    assert [line for line in lines if line.startswith(("import", "from"))] == [
        "from itertools import pairwise",
        "import numpy as np",
    ]
