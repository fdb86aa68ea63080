"""Parameter groups: which parameters an optimizer decays."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def parameter_groups(model: nn.Module, *, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """The trainable parameters as groups for an optimizer, in the model's order.

    With `decay_norm_and_bias=False` normalization parameters and biases stand in a group whose weight decay is zero,
    which every optimizer that has decay understands.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if decay_norm_and_bias:
        return [{"params": [p for _, p in trainable]}]
    norms = {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)}
    exempt = [p for name, p in trainable if p in norms or name.rpartition(".")[2].startswith("bias")]
    decayed = [p for name, p in trainable if not (p in norms or name.rpartition(".")[2].startswith("bias"))]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
