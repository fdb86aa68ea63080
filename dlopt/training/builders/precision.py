"""Numerical precision: dtype of the weights, autocast, loss scaling."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dlopt.basics.errors import UserError

_ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_TIMED_VALUES = 1 << 18  # inputs of a timed pass; a ResNet-20 takes 1 s for these in emulated bf16
_TIMED_PASSES = 2


@dataclass(frozen=True)
class Precision:
    """fp32, tf32 and fp64 compute in the dtype of the weights; bf16 and fp16 keep fp32 weights and use autocast.

    bf16_pure has bf16 weights and gradients, too. An update is computed in fp32, with a state in fp32, and rounded
    stochastically (`dlopt.training.builders.rounding`). Batch and instance norm keep fp32 parameters and statistics
    (running averages move by less than bf16 resolves), and losses and metrics are computed from fp32 outputs. There is
    no fp16_pure: the gradients of a mean loss underflow, and torch's GradScaler accepts no fp16 gradients.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and of the model's inputs."""
        return torch.bfloat16 if self.name == "bf16_pure" else self.data_dtype

    @property
    def data_dtype(self) -> torch.dtype:
        """The dtype of data before they enter the model, of their statistics, and of the loss's buffers."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the model to the device and its weights to `dtype`, complex ones to the complex dtype of its width.

        Raises `UserError` for weights or layers that bf16_pure does not support.
        """
        module, setting = self.place_data(module), f"precision={self.name}"
        if self.dtype == self.data_dtype:
            return module
        if any(parameter.is_complex() for parameter in module.parameters()):
            raise UserError(f"{setting}: the model has complex weights; use precision=fp32")
        for layer in module.modules():
            if isinstance(layer, nn.LocalResponseNorm) and self.device.type == "cpu":
                raise UserError(f"{setting}: torch has no LocalResponseNorm in bf16 on a CPU; use precision=bf16")
            if not isinstance(layer, _NormBase):
                layer._apply(lambda t: t.to(self.dtype) if t.is_floating_point() else t, recurse=False)
        return module

    def place_data(self, module: nn.Module) -> nn.Module:
        """Moves a normalization or a loss to the device and to `data_dtype`."""

        def convert(tensor: Tensor) -> Tensor:
            # `Module.to` would make complex weights real.
            dtype = self.data_dtype.to_complex() if tensor.is_complex() else self.data_dtype
            return tensor.to(self.device, dtype if tensor.is_floating_point() or tensor.is_complex() else None)

        return module._apply(convert)

    @property
    def is_emulated(self) -> bool:
        """Whether the processor computes bf16 in software, which is slower than fp32."""
        return self.name in ("bf16", "bf16_pure") and self.device.type == "cpu" and not _has_bf16(self.device)

    def autocast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function under autocast for bf16 and fp16, with fp32 outputs for bf16_pure, or itself."""
        if self.name == "bf16_pure":
            # A bf16 loss would have three digits, too few for metrics and for stopping rules.
            return lambda *inputs, **further: function(*inputs, **further).float()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        if low is None:
            return function
        return torch.autocast(self.device.type, dtype=low)(function)

    def autocast_parts(self, task_loss: Callable[..., Any]) -> Callable[..., dict[str, Tensor]]:
        """Returns a loss of named parts under autocast for bf16 and fp16, with parts in fp32 or fp64."""
        computed = task_loss if self.name == "bf16_pure" else self.autocast(task_loss)

        def promoted(*inputs: Any) -> dict[str, Tensor]:
            parts = computed(*inputs).items()
            return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in parts}

        return promoted

    def scaler(self) -> torch.amp.GradScaler | None:
        """Returns a loss scaler for fp16, whose gradients underflow (Micikevicius et al. 2018)."""
        # bf16 has the exponents of fp32, so its gradients do not underflow.
        return torch.amp.GradScaler(self.device.type) if self.name == "fp16" else None


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolves `auto` (bf16 if the hardware supports it, else fp32) and sets torch's TF32 switches."""
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    return Precision(name, device)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN's limit of the instruction set, which torch's functions ignore.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return (
        device.type == "cpu"
        and limit.upper() not in _ISAS_WITHOUT_BF16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


def bf16_slowdown(
    module: nn.Module,
    loss: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    clock: Callable[[], float] = process_time,
    *,
    name: str = "bf16",
) -> float:
    """Returns the ratio of processor times of a pass in bf16 and in fp32; other processes hardly change it.

    A pass is forward and backward, of copies of the modules and at most `_TIMED_VALUES` values of the batch. Each time
    is the shortest of `_TIMED_PASSES` interleaved ones, after one untimed. Restores the random generator. `name`: bf16
    or bf16_pure.
    """
    loss = copy.deepcopy(loss)
    samples = max(_TIMED_VALUES // inputs[0].numel(), 2)  # batch norm needs two
    inputs, targets = inputs[:samples], targets[:samples]

    def forward_backward(precision: Precision) -> Callable[[], None]:
        model = precision.autocast(precision.place(copy.deepcopy(module)))
        converted = inputs.to(precision.dtype) if inputs.is_floating_point() else inputs
        return lambda: precision.autocast(loss)(model(converted), targets).backward()

    passes = {each: forward_backward(Precision(each, inputs.device)) for each in (name, "fp32")}
    seconds: dict[str, list[float]] = {each: [] for each in passes}
    with torch.random.fork_rng([]):
        for number in range(1 + _TIMED_PASSES):
            for each, run in passes.items():
                start = clock()
                run()
                if number > 0:
                    seconds[each].append(clock() - start)
    return min(seconds[name]) / min(seconds["fp32"])


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Context with torch's defaults, which a notebook may have changed: float32 for new tensors, and gradients."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
