"""Models from other packages."""

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dlopt.errors import UserError, install
from dlopt.models.layers import image_shape
from dlopt.ranges import Fraction


def timm_model(
    *, input_shape: tuple[int, ...], classes: int, name: str, pretrained: bool, dropout: Fraction
) -> nn.Module:
    """Builds a model of the timm package: images [B, C, H, W] of the data's size -> [B, classes].

    Errors: UserError if timm is not installed, does not have the model, or does not support the image size or
    pretrained weights for it.
    """
    channels, height, width = image_shape(input_shape, "a timm model")
    try:
        import timm
    except ImportError as error:
        hint = install("dlopt[timm]")
        raise UserError(f"model=timm model.name={name}: the package timm is not installed; {hint}") from error
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"model.name={name}: timm has no such model; {hint}see timm.list_models()")
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "drop_rate": dropout}
    # Only models with a fixed image size accept this argument.
    configuration = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if configuration is not None and configuration.fixed_input_size:
        arguments["img_size"] = (height, width)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments).eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_shape))  # many models fail only here if the images are too small
    except Exception as error:
        raise UserError(
            f"model.name={name}: timm cannot build it for {classes} classes and images of "
            f"{channels}x{height}x{width} with model.pretrained={str(pretrained).lower()}: {error}"
        ) from error
    return model.train()
