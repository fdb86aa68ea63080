"""Pretrained models get the normalization and the image size of their training, unless they are set."""

from pathlib import Path

import pytest
import torch
import torchvision

from dlopt.config.compose import Composer
from dlopt.config.resolve import choices_of
from dlopt.training.reporting import describe_pretrained
from tests.support.line import dlopt
from tests.support.runs import run_config

PRETRAINED = ("model=torchvision", "model.name=efficientnet_b3", "model.pretrained=true")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("overrides", "normalize", "size"),
    [
        (PRETRAINED, "fixed", [300, 300]),
        ((*PRETRAINED, "data.image_size=64"), "fixed", 64),
        ((*PRETRAINED, "data.image_size=null"), "fixed", None),
        ((*PRETRAINED, "normalize=standardize"), "standardize", [300, 300]),
        ((*PRETRAINED, "normalize=unit", "data.image_size=64"), "unit", 64),
        (PRETRAINED[:2], "standardize", None),
    ],
)
def test_only_keys_that_are_not_typed_change(overrides: tuple[str, ...], normalize: str, size: object) -> None:
    config = Composer().compose(list(overrides))
    assert choices_of(config)["normalize"] == normalize and config.data.image_size == size
    if normalize == "fixed":
        assert (config.normalize.mean, config.normalize.std) == (MEAN, STD)


def test_timm_constants_and_an_unknown_model() -> None:
    pytest.importorskip("timm")
    config = Composer().compose(["model=timm", "model.name=vit_base_patch16_224", "model.pretrained=true"])
    assert config.normalize.mean == [0.5, 0.5, 0.5] and config.data.image_size == [224, 224]
    unknown = Composer().compose(["model=timm", "model.name=resnet19", "model.pretrained=true"])
    assert choices_of(unknown)["normalize"] == "standardize", "building the model will report it"


def test_the_header_compares_the_inputs() -> None:
    same = describe_pretrained(run_config(*PRETRAINED), (3, 300, 300))
    assert same.startswith("pretrained on images of 300x300 with mean [0.485, 0.456, 0.406] and std [0.229,")
    assert same.endswith("; this run uses the same")
    other = describe_pretrained(run_config(*PRETRAINED, "normalize=unit"), (3, 64, 48))
    assert other.endswith("; this run uses another normalization and images of 64x48")
    assert describe_pretrained(run_config("model=mlp"), (1, 8, 8)) == ""


@pytest.mark.slow
def test_a_run_reports_the_images_of_the_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    line = ("train", "model=torchvision", "model.pretrained=true", "data.image_size=32", "data.subset=20", "steps=1")
    result = dlopt(tmp_path, *line, "tracking=[]", "hydra.run.dir=run", "threads=1")
    assert result.code == 0, result.err
    assert "pretrained on images of 224x224" in result.out and "this run uses images of 32x32" in result.out
