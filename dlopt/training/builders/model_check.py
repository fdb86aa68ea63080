"""Checks that a model fits the memory and the data, where possible on the meta device: shapes without values."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from dlopt.basics.errors import UserError
from dlopt.config.parameters import show
from dlopt.config.schema import Component, dotted_name
from dlopt.machine.memory import available_memory
from dlopt.models import third_party
from dlopt.models.layers import copied_state, evaluation_mode
from dlopt.training.builders.phases import CpuModel

_VALUE_BYTES = 4  # models are built in fp32
_BATCH = 2  # some models squeeze a batch of one
_SMALLEST_IMAGE = (8, 8)  # of the data sets that come with dlopt
_RANDOM = {Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_}


class _TooLarge(UserError):
    pass


class _SkipInit(TorchFunctionMode):
    """Skips initialization: on the meta device, the first random function imports 1,000 modules."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init" or function in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Context in which new tensors are on the meta device, and are not initialized."""
    with torch.device("meta"), _SkipInit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_memory(model: Component, runtime: dict[str, Any], *, has_gradients: bool) -> None:
    """Raises `UserError` if the weights, and their gradients if `has_gradients`, exceed the available memory.

    Does nothing for models that cannot be built on the meta device, and for those with pretrained weights, which would
    be read twice. `runtime`: the arguments of `model.build`.
    """
    if "pretrained" in model.arguments:
        return
    try:
        parameters = sum(parameter.numel() for parameter in build_on_meta(model, runtime).parameters())
    except UserError:
        raise
    except Exception as error:
        if "overflow" not in str(error).lower():
            return
        raise _TooLarge(f"{_largest_argument(model)}: a tensor of the model has 2^63 bytes or more") from None
    needed, available = parameters * _VALUE_BYTES * (2 if has_gradients else 1), available_memory()
    if needed > available:
        content = "parameters and their gradients need" if has_gradients else "parameters need"
        raise _TooLarge(
            f"{_largest_argument(model)}: the model's {parameters:,} {content} {needed / 2**30:,.1f} GiB of memory, "
            f"{available / 2**30:,.1f} GiB are available; use a smaller model"
        )


def check_minimum_memory(model: Component, image_size: tuple[int, int] | None) -> None:
    """Like `check_memory`, before the data is known: counts the weights for one class and the smallest images.

    Does nothing for models that need larger images.
    """
    runtime = {"input_shape": (1, *(image_size or _SMALLEST_IMAGE)), "classes": 1}
    try:
        check_memory(model, runtime, has_gradients=False)
    except _TooLarge:
        raise
    except UserError:
        pass


def _largest_argument(model: Component) -> str:
    """Returns KEY=VALUE for the argument with the largest integer, the most likely mistake."""
    sizes = {name: _largest_integer(value) for name, value in model.arguments.items()}
    name = max(sizes, key=lambda name: sizes[name], default=None)
    if name is None or not sizes[name]:
        return model.choice
    return f"{model.key}.{name}={show(model.arguments[name])}"


def _largest_integer(value: Any) -> int:
    if isinstance(value, list | tuple):
        return max(map(_largest_integer, value), default=0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def build_module(model: Component, arguments: Mapping[str, Any]) -> nn.Module:
    """Builds the model; gives lazy layers of torch (`LazyLinear`) their sizes by a forward pass with zeros.

    `arguments`: those known at run time, see `Task.model_arguments`. Raises `UserError`.
    """
    module = model.build_as(nn.Module, **arguments)
    if not (lazy := _lazy_names(module)):
        return module
    path = f"{model.key}._target_={dotted_name(model.target)}"
    device = next(module.parameters()).device
    vocabulary, size = arguments.get("vocabulary"), (_BATCH, *arguments["input_shape"])
    inputs = torch.zeros(size, device=device, dtype=None if vocabulary is None else torch.int64)
    try:
        with evaluation_mode(module), torch.no_grad():
            module(inputs)
    except Exception as error:
        if device.type == "meta":  # the operation may have no meta implementation
            raise
        raise _failed(path, size[1:], error) from None
    if lazy := _lazy_names(module):
        raise UserError(f"{path}: the size of {lazy[0]} is not known, because the forward pass does not use this layer")
    return module


def _lazy_names(module: nn.Module) -> list[str]:
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def build_on_meta(model: Component, runtime: dict[str, Any]) -> nn.Module:
    """Builds the model on the meta device, without initialization. Draws no random numbers."""
    with on_meta():
        return build_module(model, runtime)


def model_on_meta(model: Component, arguments: dict[str, Any]) -> nn.Module:
    """Builds the model on the meta device; a model that can only be built in memory is moved there."""
    try:
        return build_on_meta(model, arguments)
    except UserError:
        raise
    except Exception:
        check_memory(model, arguments, has_gradients=False)
        module = build_module(model, arguments)
    # Layers that share a parameter continue to do so, unlike in `Module.to`.
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            shared[name] = first[parameter]
    module.to("meta")
    for name, source in shared.items():
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, module.get_parameter(source))
    return module


def check_outputs(model: CpuModel) -> None:
    """Raises `UserError` if a custom or third-party model does not fit the data: the number of outputs or the inputs.

    Does nothing for dlopt's models, and for losses from other packages, which may require other outputs.
    """
    target, loss = model.run_config.model.target, model.run_config.loss.target
    if target.__module__.startswith("dlopt.") or not loss.__module__.startswith(("dlopt.", "torch.")):
        return
    task, shape = model.task, model.shape
    expected = task.output_shape(shape)
    path = f"model._target_={dotted_name(target)}"
    try:
        outputs = _outputs(model, "meta")
    except Exception:  # data-dependent operations, for example, have no meta implementation
        if model.device.type != "cpu":  # the model may need an accelerator
            return
        try:
            outputs = _outputs(model, "cpu")
        except UserError:
            raise
        except Exception as error:
            raise _failed(path, shape, error) from None
    if not isinstance(outputs, Tensor):
        raise UserError(f"{path}: returns {type(outputs).__name__}; must return a tensor {_batch(expected)}")
    fits = outputs.shape == (_BATCH, *expected) or (expected == (1,) and outputs.shape == (_BATCH,))
    if not fits:
        hint = "set the argument of the model for it, for example +model.num_classes="
        raise UserError(
            f"{path}: returns {_batch(outputs.shape[1:])} values, but the data has {task.outputs} {task.purpose}; "
            f"{hint}{task.outputs}"
        )


def uses_channels_last(model: CpuModel) -> bool:
    """Returns whether images and convolutions are in the channels-last format; `auto`: if the model has convolutions.

    Calls a custom model, which may need contiguous maps (`maps.view(len(maps), -1)`), on the device of the run: the
    meta device does not have the formats of convolutions. Raises `UserError` for channels_last=true if it fails.
    """
    setting, target = model.run_config.settings.channels_last, model.run_config.model.target
    if setting is False or not has_convolutions(model):
        return setting is True
    if target.__module__.startswith("dlopt."):
        return True
    try:
        _outputs(model, model.device, torch.channels_last)
    except Exception as error:
        if setting == "auto":
            return False
        reason = _first_line(error).rstrip(".")
        raise UserError(
            f"channels_last=true: model._target_={dotted_name(target)} fails for images in this memory format: "
            f"{reason}; use channels_last=false"
        ) from None
    return True


def accepts_an_empty_batch(model: CpuModel) -> bool:
    """Returns whether the model computes outputs for no sample: `batch.view(len(batch), -1)`, say, is an error."""
    defined_in = model.run_config.model.target.__module__
    if defined_in.startswith("dlopt.") and defined_in != third_party.__name__:
        return True
    try:
        _outputs(model, "meta", samples=0)
    except Exception:
        return False
    return True


def has_convolutions(model: CpuModel) -> bool:
    """Returns whether the model convolves images, whose memory format then matters."""
    return len(model.shape) == 3 and any(isinstance(m, nn.Conv2d) for m in model.module.modules())


def _outputs(
    model: CpuModel,
    on: torch.device | str,
    memory_format: torch.memory_format = torch.preserve_format,
    samples: int = _BATCH,
) -> Any:
    """Calls the model with copies of its state, which the call may change, and restores the generators."""
    device = torch.device(on)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), device:
        inputs = model.task.random_inputs((samples, *model.shape))
        state = copied_state(model.module, device)
        if memory_format != torch.preserve_format:
            inputs = inputs.to(memory_format=memory_format)
            state = {name: t.to(memory_format=memory_format) if t.ndim == 4 else t for name, t in state.items()}
        return functional_call(model.module, state, (inputs,))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _failed(path: str, shape: tuple[int, ...], error: Exception) -> UserError:
    read = f"; items {list(shape[1:])} are read as grey images [H, W]: data.sequences=true reads [channels, length]"
    advice = read * (len(shape) == 3 and shape[0] == 1)
    return UserError(f"{path}: fails for inputs of shape {_batch(shape)}: {_first_line(error)}{advice}")


def _batch(shape: Sequence[int]) -> str:
    return f"[batch, {', '.join(map(str, shape))}]"
