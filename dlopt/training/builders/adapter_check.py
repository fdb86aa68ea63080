"""Checks that a model calls the layers that have adapters: some models only read the weights of their layers."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlopt.adapt import LoRALinear
from dlopt.basics.errors import UserError
from dlopt.config.run_config import RunConfig
from dlopt.models.layers import evaluation_mode, replaced_forwards
from dlopt.tasks.task import Task
from dlopt.training.builders.precision import Precision

log = logging.getLogger(__name__)

_BATCH = 2  # batch norm needs two
_PASSES = 20  # in training mode: a model may skip layers at random
_SHOWN, _PATTERNS = 4, 8  # names in an error message


def check_adapters(
    run_config: RunConfig, module: nn.Module, precision: Precision, shape: tuple[int, ...], task: Task
) -> None:
    """Raises `UserError` for adapters that the model does not use, or that never train. Restores state and generators.

    Calls the model in training mode, with a backward pass, and in evaluation mode. Warns if that fails. `module` is on
    the device of the run; `shape`: of one input.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        return
    device, choice = precision.device, run_config.adapt.choice
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    call = precision.autocast(partial(functional_call, module, buffers))
    reads, untrained = _WeightReads(layers), set(layers)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with device:
            inputs = task.random_inputs((_BATCH, *shape)).to(task.input_dtype(precision.dtype))
        try:
            for _ in range(_PASSES):
                with reads.recording():
                    outputs = [t for t in tree_leaves(call(inputs)) if isinstance(t, Tensor) and t.requires_grad]
                adapters = {name: layers[name].lora_b for name in untrained}
                if outputs and adapters:  # find those on which the outputs depend, whatever the values
                    ones = [torch.ones_like(each) for each in outputs]
                    gradients = torch.autograd.grad(outputs, list(adapters.values()), ones, allow_unused=True)
                    untrained -= {name for name, each in zip(adapters, gradients, strict=True) if each is not None}
                if not untrained - reads.found:
                    break
            with reads.recording(), evaluation_mode(module), torch.inference_mode():
                call(inputs)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("%s: no check whether the model uses its adapters, because it fails for %d random samples: %s",
                        choice, _BATCH, reason)  # fmt: skip
            return
    if not reads.found and not untrained:
        return
    unused = [name for name in layers if name in (reads.found or untrained)]
    shown = ", ".join(unused[:_SHOWN]) + (f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else "")
    problem = (
        f"adapters of {shown} have no effect where the model reads the weight of the layer instead of calling it"
        if reads.found
        else f"adapters of {shown} would never train, because they get no gradient"
    )
    # Advise to adapt the others, with * for the numbers of blocks.
    used = [name for name in layers if name not in reads.found | untrained]
    patterns = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in used)
    precise = [each for each in patterns if not any(fnmatchcase(name, each) for name in unused)]
    targets = f"adapt.targets=[{','.join(precise[:_PATTERNS])}]" if precise else "adapt.targets to other layers"
    raise UserError(f"{choice}: {problem}; set {targets}")


class _WeightReads(TorchDispatchMode):
    """Finds the layers whose weight an operation reads outside of the layer's own forward pass."""

    def __init__(self, layers: Mapping[str, LoRALinear]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._layers = layers.values()
        self._names = {_storage(layer.weight): name for name, layer in layers.items()}
        self._is_inside = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        # Not by hooks: a layer with hooks may be computed in another way.
        with replaced_forwards({layer: partial(self._call, layer.forward) for layer in self._layers}), self:
            yield

    def _call(self, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        self._is_inside = True
        try:
            return forward(*inputs)
        finally:
            self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self._is_inside and not name.startswith("new_") and not name.endswith("_like"):  # these read no values
            # A view reads no values either; what reads the view is the next operation.
            for storage in _storages((args, kwargs)) - _storages(result):
                if storage in self._names:
                    self.found.add(self._names[storage])
        return result


def _storages(values: object) -> set[int | None]:
    return {_storage(each) for each in tree_leaves(values) if isinstance(each, Tensor)}


def _storage(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
