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

_ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_TIMED_VALUES = 1 << 18  # inputs of a timed pass; emulated, a ResNet-20 takes a second for so many
_TIMED_PASSES = 2


@dataclass(frozen=True)
class Precision:
    """fp32, tf32 and fp64 compute in the dtype of the weights; bf16 and fp16 keep fp32 weights and use autocast."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def place(self, module: nn.Module) -> nn.Module:
        """Moves the module to the device and its weights to `dtype`, complex ones to the complex dtype of its width.

        `Module.to` would make complex weights real.
        """

        def convert(tensor: Tensor) -> Tensor:
            dtype = self.dtype.to_complex() if tensor.is_complex() else self.dtype
            return tensor.to(self.device, dtype if tensor.is_floating_point() or tensor.is_complex() else None)

        return module._apply(convert)

    @property
    def is_emulated(self) -> bool:
        """Whether the processor computes bf16 in software, which is slower than fp32."""
        return self.name == "bf16" and self.device.type == "cpu" and not _has_bf16(self.device)

    def autocast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function under autocast for bf16 and fp16; otherwise the function itself, without overhead."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        if low is None:
            return function
        return torch.autocast(self.device.type, dtype=low)(function)

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
    # oneDNN's limit of the instruction set, which torch's functions do not regard.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return (
        device.type == "cpu"
        and limit.upper() not in _ISAS_WITHOUT_BF16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


def bf16_slowdown(
    module: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor, clock: Callable[[], float] = process_time
) -> float:
    """Returns the processor time of a pass in bf16 divided by that in fp32; other processes hardly change it.

    A pass is forward and backward. Uses copies of the modules and at most `_TIMED_VALUES` values of the batch, and
    restores the random generator. Each time is the shortest of `_TIMED_PASSES` interleaved ones, after one untimed.
    """
    module, loss = copy.deepcopy(module), copy.deepcopy(loss)
    samples = max(_TIMED_VALUES // inputs[0].numel(), 2)  # batch norm needs two
    inputs, targets = inputs[:samples], targets[:samples]

    def forward_backward() -> None:
        loss(module(inputs), targets).backward()

    passes = {name: Precision(name, inputs.device).autocast(forward_backward) for name in ("bf16", "fp32")}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.random.fork_rng([]):
        for number in range(1 + _TIMED_PASSES):
            for name, run in passes.items():
                start = clock()
                run()
                if number > 0:
                    seconds[name].append(clock() - start)
    return min(seconds["bf16"]) / min(seconds["fp32"])


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
