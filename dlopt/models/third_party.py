"""Models from other packages: timm and torchvision."""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.basics.names import Names
from dlopt.basics.ranges import Fraction, installed
from dlopt.models.layers import image_shape

TimmName = Annotated[str, installed("timm")]


def timm_model(
    *, input_shape: tuple[int, ...], classes: int, name: TimmName, pretrained: bool, dropout: Fraction
) -> nn.Module:
    """Builds a model of the timm package: images [B, C, H, W] of the data's size -> [B, classes].

    Errors: UserError if timm does not have the model, or does not support the image size or pretrained weights for it.
    """
    channels, height, width = image_shape(input_shape, "a timm model")
    import timm

    if not timm.is_model(name):
        raise Names("model of timm", timm.list_models(), "timm.list_models()", "model.name=").unknown(name)
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
        raise _cannot_build("timm", name, input_shape, classes, pretrained, error) from error
    return model.train()


def torchvision_model(*, input_shape: tuple[int, ...], classes: int, name: str, pretrained: bool | str) -> nn.Module:
    """Builds a classification model of torchvision: images [B, C, H, W] of the data's size -> [B, classes].

    Auxiliary heads (GoogLeNet, Inception v3) are removed. For other than 3 channels, the first convolution is replaced;
    pretrained, it keeps its response to grey images. A pretrained head is replaced unless it has as many classes.

    Args:
        pretrained: downloads weights: true: the default ones; or a name, such as IMAGENET1K_V1.

    Errors: UserError if torchvision does not have the model or the weights, or does not support the image size.
    """
    channels, height, width = image_shape(input_shape, "a torchvision model")
    from torchvision import models

    names = models.list_models(module=models)
    Names("classifier of torchvision", names, "torchvision.models.list_models()", "model.name=").check(name)
    weights = _torchvision_weights(name, pretrained)
    arguments: dict[str, Any] = {"weights": weights}
    if weights is None:
        arguments["num_classes"] = classes
    # These models have a fixed image size.
    if name.startswith("vit_"):
        if height != width:
            raise UserError(f"model.name={name}: requires square images, not {height}x{width}; set data.image_size=224")
        arguments["image_size"] = height
    elif name.startswith("maxvit_"):
        arguments["input_size"] = (height, width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a future change of the initialization
            model: nn.Module = models.get_model(name, **arguments)
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
                setattr(model, "aux_logits", False)  # noqa: B010 (nn.Module's annotations refuse a bool)
        if weights is not None:
            _replace_head(model, len(weights.meta["categories"]), classes)
        _set_channels(model, channels, keep=weights is not None)
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_shape))  # many models fail only here if the images are too small
    except Exception as error:
        raise _cannot_build("torchvision", name, input_shape, classes, pretrained, error) from error
    return model.train()


def _torchvision_weights(name: str, pretrained: bool | str) -> Any:
    """Returns the entry of torchvision's enumeration of weights; None for `pretrained` false. Raises `UserError`."""
    from torchvision import models

    if pretrained is False:
        return None
    choices = models.get_model_weights(name)
    key = "DEFAULT" if pretrained is True else pretrained
    names = Names(f"weights of {name} in torchvision", choices.__members__, prefix="model.pretrained=")
    names.check(key, f"model.pretrained={pretrained}")
    return choices[key]


def _replace_head(model: nn.Module, outputs: int, classes: int) -> None:
    """Replaces the last layer, of `outputs` classes, if the data has another number."""
    if classes == outputs:
        return
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == outputs)
        or (isinstance(module, nn.Conv2d) and module.out_channels == outputs)
    ]
    name, head = heads[-1]
    if isinstance(head, nn.Linear):
        model.set_submodule(name, nn.Linear(head.in_features, classes))
    else:
        assert isinstance(head, nn.Conv2d)  # SqueezeNet: a 1x1 convolution
        model.set_submodule(name, nn.Conv2d(head.in_channels, classes, 1))


def _set_channels(model: nn.Module, channels: int, *, keep: bool) -> None:
    """Replaces the first convolution for images of `channels` channels.

    `keep`: spreads its weights evenly over the channels, so that grey images give the same features as in colour.
    """
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return
    convolution = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    if keep:
        with torch.no_grad():
            convolution.weight.copy_(first.weight.sum(1, keepdim=True) / channels)
            if first.bias is not None and convolution.bias is not None:
                convolution.bias.copy_(first.bias)
    model.set_submodule(name, convolution)


def _cannot_build(
    package: str, name: str, input_shape: tuple[int, ...], classes: int, pretrained: bool | str, error: Exception
) -> UserError:
    shown = str(pretrained).lower() if isinstance(pretrained, bool) else pretrained
    reason = " ".join(str(error).split()) or type(error).__name__
    hint = "; without a network: model.pretrained=false init_from=FILE" if pretrained else ""
    return UserError(
        f"model.name={name}: {package} cannot build it for {classes} classes and images of "
        f"{'x'.join(map(str, input_shape))} with model.pretrained={shown}: {reason}{hint}"
    )


@dataclass(frozen=True)
class PretrainedInputs:
    """The images of a pretraining: normalization constants per channel (for values 0..1), and height and width."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]


def pretrained_inputs(target: str, name: str, pretrained: bool | str) -> PretrainedInputs | None:
    """Returns the inputs for which the pretrained weights of a model were trained.

    None without pretrained weights. Also None for unknown weights, which building the model reports.

    Args:
        target: dotted name of `timm_model` or `torchvision_model`.
    """
    if not pretrained:
        return None
    if target == f"{__name__}.timm_model":
        try:
            import timm
        except ImportError:
            return None
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if known is None:
            return None
        _, height, width = known.input_size
        return PretrainedInputs(tuple(known.mean), tuple(known.std), (height, width))
    if target == f"{__name__}.torchvision_model":
        from torchvision import models

        if name not in models.list_models(module=models):
            return None
        transforms = _torchvision_weights(name, pretrained).transforms()
        size = transforms.crop_size[0]
        return PretrainedInputs(tuple(transforms.mean), tuple(transforms.std), (size, size))
    return None
