"""The order in which a model computes, found by a forward pass: layers may be registered in another one."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dlopt.models.layers import evaluation_mode
from dlopt.optim.parameters import NORMS, is_usually_exempt, registration_order

# Functions that read the type or the shape of a tensor, not its values.
_READ_NO_VALUES = {"to", "type_as", "expand_as", "view_as", "reshape_as", "is_same_size"}


class _Recorder(TorchFunctionMode):
    """Records the names of the parameters that functions of torch compute with.

    Modules may use a parameter without calling its layer. As any such mode, this one disables torch's fused kernels.
    """

    def __init__(self, names: Mapping[int, str], uses: list[str]) -> None:
        super().__init__()
        self._names, self._uses = names, uses

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [name for leaf in tree_leaves((args, kwargs)) if (name := self._names.get(id(leaf))) is not None]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        computes = name not in _READ_NO_VALUES and not name.startswith("new_") and not name.endswith("_like")
        if used and computes and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._uses += used
        return result


def forward_order(model: nn.Module, inputs: Tensor) -> list[str]:
    """Returns the paths of modules and the names of parameters, each as often as they are used, in order.

    Runs the model once on `inputs`, in evaluation mode: neither buffers nor random numbers change. Errors: those of the
    model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    paths = {module: path for path, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    uses: list[str] = []

    def record(module: nn.Module, inputs: object) -> None:
        if module in paths:
            uses.append(paths[module])

    devices = {t.device for t in itertools.chain(model.parameters(), [inputs]) if t.device.type == "cuda"}
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(list(devices)):
        try:
            with register_module_forward_pre_hook(record), _Recorder(names, uses):
                model(inputs)
        finally:
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    return uses


def output_layer(model: nn.Module, uses: Sequence[str] | None = None) -> nn.Module | None:
    """Returns the layer that the outputs come from: the last one with a matrix or kernel, of any type of layer.

    `uses`: as `forward_order` returns it; None: the order of registration. Weights that two layers share count for the
    one that is called last. None for a model without matrices.
    """
    uses = registration_order(model) if uses is None else uses
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for number in reversed(range(len(uses))):
        weight = parameters.get(uses[number])
        if weight is None or weight.ndim < 2 or is_usually_exempt(model, uses[number], weight):
            continue
        owners = [path for path, module in modules.items() if any(each is weight for each in module.parameters(False))]
        if not isinstance(modules[owners[0]], NORMS):
            called = next((path for path in reversed(uses[:number]) if path in owners), owners[0])
            return modules[called.partition(".parametrizations")[0]]
    return None
