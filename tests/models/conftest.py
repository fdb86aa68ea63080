import functools
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dlopt.config.compose import Composer
from dlopt.config.schema import ALLOWED_PACKAGES, component

Build = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def build() -> Build:
    """Builds a choice of conf/model from its YAML file: build("resnet20", "norm=group", input_shape=...)."""
    composer = Composer()

    @functools.cache
    def composed(choice: str) -> DictConfig:
        return OmegaConf.create({"model": composer.compose([f"model={choice}"]).model})

    def build(choice: str, *overrides: str, **arguments: Any) -> nn.Module:
        config = OmegaConf.merge(composed(choice), OmegaConf.from_dotlist([f"model.{each}" for each in overrides]))
        node: Any = OmegaConf.to_container(config.model)
        model = component("model", node, ("input_shape", "classes", "vocabulary"), ALLOWED_PACKAGES).build(**arguments)
        assert isinstance(model, nn.Module)
        return model

    return build
