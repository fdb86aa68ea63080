"""Perceptrons; autoencoders (the network, its loss, and runs whose targets are the inputs); polynomials."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.data.splits import prepare
from dlopt.losses import PixelCrossEntropy
from dlopt.models.layers import ACTIVATIONS
from dlopt.models.mlp import MLP, Polynomials, ResidualMLP
from tests.support.idx import write
from tests.support.line import dlopt, refused
from tests.support.norm import NORM
from tests.support.runs import run_config

# -- perceptrons


def mlp(**changes: Any) -> MLP:
    keys = {"input_shape": (1, 8, 8), "classes": 10, "widths": (16, 12), "activation": "relu", "dropout": 0.0}
    return MLP(**{**keys, **NORM, "norm": "none", **changes})


def residual_mlp(**changes: Any) -> ResidualMLP:
    keys = {"input_shape": (1, 8, 8), "classes": 10, "width": 16, "blocks": 2, "residual": True, "activation": "relu"}
    return ResidualMLP(**{**keys, "dropout": 0.0, **NORM, "norm": "none", **changes})


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def samples(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp_matches_the_formula(name: str) -> None:
    model = mlp(activation=name).double()
    vectors = samples(5, 1, 8, 8).flatten(1)
    for layer in (model.layer1, model.layer2):
        assert isinstance(layer, nn.Sequential)
        linear = layer.get_submodule("linear")
        vectors = ACTIVATIONS[name]()(vectors @ linear.get_parameter("weight").T + linear.get_parameter("bias"))
    expected = vectors @ model.head.weight.T + model.head.bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(samples(5, 1, 8, 8)), expected)


def test_parameters_and_the_linear_model() -> None:
    assert count(mlp()) == 64 * 16 + 16 + 16 * 12 + 12 + 12 * 10 + 10
    assert count(mlp(widths=())) == 64 * 10 + 10
    assert count(mlp(norm="batch")) == 64 * 16 + 16 * 12 + 2 * (16 + 12) + 12 * 10 + 10
    assert count(residual_mlp(blocks=3)) == 64 * 16 + 16 + 6 * (16 * 16 + 16) + 16 * 10 + 10


@pytest.mark.parametrize("choice", ["mlp", "residual_mlp"])
def test_the_choices_build_for_vectors_and_one_output(build: Callable[..., nn.Module], choice: str) -> None:
    assert build(choice, input_shape=(3,), classes=1)(samples(4, 3, dtype=torch.float32)).shape == (4, 1)


def test_widths_and_activation_are_configurable(build: Callable[..., nn.Module]) -> None:
    model = build("mlp", "widths=[64,64]", "activation=tanh", "norm=none", input_shape=(5,), classes=2)
    assert count(model) == 5 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2
    assert sum(isinstance(module, nn.Tanh) for module in model.modules()) == 2


def test_dropout_acts_on_hidden_features_only_in_training() -> None:
    model = mlp(dropout=0.5, activation="sigmoid", widths=(400,)).double()
    features = []
    model.get_submodule("head").register_forward_hook(lambda module, arguments, output: features.append(arguments[0]))
    model(samples(8, 1, 8, 8))
    model.eval()(samples(8, 1, 8, 8))
    assert 0.4 < (features[0] == 0).double().mean() < 0.6
    assert (features[1] != 0).all()


@pytest.mark.parametrize("residual", [True, False])
def test_only_a_skip_passes_the_gradient_around_a_dead_branch(residual: bool) -> None:
    """All inputs of the branch's ReLU are negative."""
    block = residual_mlp(residual=residual, blocks=1).double().get_submodule("block1")
    with torch.no_grad():
        block.get_parameter("layer2.linear.bias").fill_(-1e3)
    hidden = samples(5, 16).requires_grad_()
    output = block(hidden)
    output.backward(samples(5, 16))
    expected = samples(5, 16) if residual else torch.zeros(5, 16).double()
    assert hidden.grad is not None and torch.equal(output, expected) and torch.equal(hidden.grad, expected)


# -- autoencoders


AUTOENCODER = ("model=autoencoder", "model.widths=[8]", "model.code=3", "data.subset=100", "threads=1", "device=cpu")


def test_the_autoencoder_of_the_paper(build: Callable[..., nn.Module]) -> None:
    """784-1000-500-250-30 and back, for MNIST."""
    with torch.device("meta"):
        model = build("autoencoder", "activation=sigmoid", input_shape=(1, 28, 28), classes=784)
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == sizes
    assert sum(isinstance(module, nn.Sigmoid) for module in model.modules()) == 6, "the code is linear"


def test_pixel_cross_entropy_is_its_formula() -> None:
    outputs, targets = torch.randn(5, 7).double(), torch.rand(5, 7).double()
    p = outputs.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(PixelCrossEntropy(classes=None)(outputs, targets), expected, rtol=1e-12, atol=0)


def test_a_linear_autoencoder_finds_the_principal_components(tmp_path: Path) -> None:
    """Its lowest error is that of PCA (Baldi & Hornik 1989)."""
    line = (
        *AUTOENCODER,
        "model.widths=[]",
        "data.val_split=0",
        "data.batch_size=full",
        "optimizer=lbfgs",
        "precision=fp64",
    )
    result = dlopt(tmp_path, "train", *line, "steps=40", "tracking=[]", "hydra.run.dir=run", "log_every_steps=null")
    assert result.code == 0, result.err
    losses = [json.loads(text)["train_loss"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    chosen = run_config(*line)
    samples = prepare(chosen.data.build(), chosen.data_settings).train
    pixels = samples.fetch(torch.arange(len(samples))).flatten(1).double() / 255
    values = torch.linalg.svdvals(pixels - pixels.mean(0))
    assert losses[-1] == pytest.approx((values[3:].square().sum() / pixels.numel()).item(), rel=1e-3)


def test_a_run_draws_its_reconstructions(tmp_path: Path) -> None:
    line = (*AUTOENCODER, "loss=pixel_cross_entropy", "epochs=2", "hydra.run.dir=run")
    result = dlopt(tmp_path, "train", *line)
    assert result.code == 0, result.err
    assert "reconstructions: run/reconstructions.png" in result.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "test_accuracy" not in summary
    (tmp_path / "run/reconstructions.png").unlink()
    result = dlopt(tmp_path, "eval", "checkpoint=run")
    assert result.code == 0 and (tmp_path / "run/reconstructions.png").exists(), result.err
    assert json.loads((tmp_path / "run/eval.json").read_text())["test_loss"] == summary["test_loss"]
    assert "reconstructs images; `dlopt eval checkpoint=" in refused(tmp_path, "predict", "checkpoint=run", "images=.")


def test_an_autoencoder_reads_idx_files(tmp_path: Path) -> None:
    write(tmp_path / "files", zipped=True, train=40)
    typed = ("data.root=files", "data.batch_size=20", "epochs=2", "threads=1", "device=cpu", "hydra.run.dir=run")
    result = dlopt(tmp_path, "train", "experiment=autoencoder_digits", "data=fashion_mnist", *typed)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["test_loss"] < 1 and (tmp_path / "run/reconstructions.png").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("data=wine", *AUTOENCODER[:3]), "model=autoencoder: reconstructs images, but the samples are vectors"),
        ((*AUTOENCODER, "loss=cross_entropy"), "loss=cross_entropy: the targets are numbers"),
    ],
)
def test_refused_combinations_with_autoencoders(tmp_path: Path, overrides: tuple[str, ...], error: str) -> None:
    assert error in refused(tmp_path, "train", *overrides)


# -- polynomials


BASES = {
    "monomial": np.polynomial.polynomial.polyvander,
    "legendre": np.polynomial.legendre.legvander,
    "chebyshev": np.polynomial.chebyshev.chebvander,
}


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("degree", [1, 2, 12])
def test_polynomial_bases_match_numpy(basis: str, degree: int) -> None:
    x = np.linspace(-1.2, 1.2, 31)
    ours = Polynomials(degree, basis)(torch.from_numpy(x)[:, None])  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.numpy(), BASES[basis](x, degree)[:, 1:], rtol=1e-10, atol=1e-12)


def test_the_polynomial_has_one_coefficient_per_degree(build: Callable[..., nn.Module]) -> None:
    model = build("polynomial", "degree=9", input_shape=(1,), classes=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10
    assert model(torch.zeros(4, 1)).shape == (4, 1)


def test_the_polynomial_rejects_other_data(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(UserError, match=r"model=polynomial: .*\[1, 8, 8\]"):
        build("polynomial", input_shape=(1, 8, 8), classes=1)
