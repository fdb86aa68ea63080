"""Autoencoders: the network, its loss, and runs whose targets are the inputs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dlopt.data.splits import prepare
from dlopt.losses import PixelCrossEntropy
from tests.commands.line import dlopt, refused
from tests.data.test_downloads import write
from tests.training.runs import experiment

SMALL = ("model=autoencoder", "model.widths=[8]", "model.code=3", "data.subset=100", "threads=1", "device=cpu")


def test_the_network_of_the_paper(build: Callable[..., nn.Module]) -> None:
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
    line = (*SMALL, "model.widths=[]", "data.val_split=0", "data.batch_size=full", "optimizer=lbfgs", "precision=fp64")
    result = dlopt(tmp_path, "train", *line, "steps=40", "tracking=[]", "hydra.run.dir=run", "log_every_steps=null")
    assert result.code == 0, result.err
    losses = [json.loads(text)["train_loss"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    chosen = experiment(*line)
    samples = prepare(chosen.data.build(), chosen.data_settings).train
    pixels = samples.fetch(torch.arange(len(samples))).flatten(1).double() / 255
    values = torch.linalg.svdvals(pixels - pixels.mean(0))
    assert losses[-1] == pytest.approx((values[3:].square().sum() / pixels.numel()).item(), rel=1e-3)


def test_a_run_draws_its_reconstructions(tmp_path: Path) -> None:
    line = (*SMALL, "loss=pixel_cross_entropy", "epochs=2", "hydra.run.dir=run")
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


def test_the_recipe_reads_idx_files(tmp_path: Path) -> None:
    write(tmp_path / "files", zipped=True, train=40)
    typed = ("data.root=files", "data.batch_size=20", "epochs=2", "threads=1", "device=cpu", "hydra.run.dir=run")
    result = dlopt(tmp_path, "train", "experiment=autoencoder_fashion_mnist", *typed)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["test_loss"] < 1 and (tmp_path / "run/reconstructions.png").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("data=wine", *SMALL[:3]), "model=Autoencoder: reconstructs images, but the samples are vectors"),
        ((*SMALL, "loss=cross_entropy"), "loss=cross_entropy: the targets are numbers"),
        ((*SMALL, "loss=pixel_cross_entropy", "model.output=sigmoid"), "use model.output=identity"),
        (("model=mlp", "loss=pixel_cross_entropy"), "the targets must be the pixels of images"),
    ],
)
def test_refused_combinations(tmp_path: Path, overrides: tuple[str, ...], error: str) -> None:
    assert error in refused(tmp_path, "train", *overrides)
