import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dlopt.config.schema import ALLOWED_PACKAGES, component

CONF = Path(__file__).parents[2] / "conf"

Build = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a choice of conf/model from its YAML file: build("resnet20", "norm=group", input_shape=...)."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "train.yaml").write_text("defaults: [_self_, init: default, loss: cross_entropy, model: mlp]\n")

    @functools.cache
    def composed(choice: str) -> DictConfig:
        with initialize_config_dir(str(folder), version_base=None):
            return compose("train", [f"hydra.searchpath=[file://{CONF}]", f"model={choice}"])

    def build(choice: str, *overrides: str, **arguments: Any) -> nn.Module:
        config = OmegaConf.merge(composed(choice), OmegaConf.from_dotlist([f"model.{each}" for each in overrides]))
        node: Any = OmegaConf.to_container(config.model)
        model = component("model", node, ("input_shape", "classes", "vocabulary"), ALLOWED_PACKAGES).build(**arguments)
        assert isinstance(model, nn.Module)
        return model

    return build
