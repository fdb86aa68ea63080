"""Answers questions about layers: are they known, containers, do they draw random numbers?"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Of classes, by the start of their module's name. Layers of users and of other packages are not known.
_KNOWN = ("torch.nn.", "dlopt.models.", "dlopt.adapt", "dlopt.parallel.dropout")
_RANDOM = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def is_container(module: nn.Module) -> bool:
    """Returns whether the module is a plain container of layers: a sequence, or one that is not called itself."""
    return type(module).forward in (nn.Sequential.forward, nn.Module.forward)


def is_known(layer: nn.Module) -> bool:
    """Returns whether the layer is known to have no control flow on the host, and no undeclared random numbers."""
    return type(layer).__module__.startswith(_KNOWN)


def treats_samples_alone(module: nn.Module) -> bool:
    """Returns whether all layers are known, and none uses other samples of the batch in evaluation mode."""
    return all(is_known(layer) and not _has_batch_statistics(layer) for layer in module.modules())


def _has_batch_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is None


def unknown_part(part: object) -> str | None:
    """Returns the name of the part of a loss, clipping or augmentation that may have control flow on the host; None:
    all are torch's or dlopt's."""
    for each in part.modules() if isinstance(part, nn.Module) else [part]:
        if not type(each).__module__.startswith(("torch.nn.", "dlopt.")):
            return str(getattr(each, "__name__", type(each).__name__))
    return None


def is_stochastic(module: nn.Module) -> bool:
    """Returns whether the forward pass may draw random numbers; layers that are not known count as random."""
    return any(_is_random(layer) for layer in module.modules())


def _is_random(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    rate = getattr(layer, "dropout", 0)  # recurrent and attention layers
    return not is_known(layer) or isinstance(layer, _RANDOM) or (isinstance(rate, float) and rate > 0)
