"""Numerical precision: dtype of the weights, autocast, loss scaling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """fp32, tf32 and fp64 compute in the dtype of the weights; bf16 and fp16 keep fp32 weights and use autocast."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function under autocast for bf16 and fp16; otherwise the function itself, without overhead."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        if low is None:
            return function
        return torch.autocast(self.device.type, dtype=low)(function)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Returns a loss scaler for fp16, whose gradients underflow (Micikevicius et al. 2018)."""
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
    return (
        device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    )
