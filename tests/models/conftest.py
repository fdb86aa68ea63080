from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from dlopt.config.schema import ALLOWED_PACKAGES, component

CONF = Path(__file__).parents[2] / "conf"

Build = Callable[..., nn.Module]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a choice of conf/model from its YAML file: build("resnet20", "norm=group", input_shape=...)."""
    (tmp_path / "train.yaml").write_text("defaults: [_self_, init: default, loss: cross_entropy, model: mlp]\n")

    def build(choice: str, *overrides: str, **arguments: Any) -> nn.Module:
        with initialize_config_dir(str(tmp_path), version_base=None):
            keys = [f"model.{override}" for override in overrides]
            config = compose("train", [f"hydra.searchpath=[file://{CONF}]", f"model={choice}", *keys])
        node: Any = OmegaConf.to_container(config.model)
        model = component("model", node, ("input_shape", "classes", "vocabulary"), ALLOWED_PACKAGES).build(**arguments)
        assert isinstance(model, nn.Module)
        return model

    return build
