"""In which numbers a run computes: the weights' type, autocast, loss scaling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """fp32, tf32 and fp64 compute in the weights' type; bf16 and fp16 keep fp32 weights and autocast."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and inputs."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under autocast where this precision wants it; otherwise the function itself, at no cost."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        if low is None:
            return function
        return torch.autocast(self.device.type, dtype=low)(function)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling for fp16, whose gradients underflow (Micikevicius et al. 2018)."""
        return torch.amp.GradScaler(self.device.type) if self.name == "fp16" else None


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` takes bf16 where the processor computes in it, fp32 elsewhere."""
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
