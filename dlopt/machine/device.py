"""Device selection, deterministic algorithms, a clock that waits for the device."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that `set_deterministic` sets."""


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` selects the available CUDA or MPS accelerator, otherwise the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "mps") else torch.device("cpu")


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Lists the GPUs by their names for CUDA_VISIBLE_DEVICES.

    Uses nvidia-smi, because torch would allocate memory on every GPU.
    """
    selected = environment.get("CUDA_VISIBLE_DEVICES")
    if selected is not None:
        return [name.strip() for name in selected.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return [line.strip() for line in listed.splitlines() if line.strip().isdigit()]
    return []


def prefers_onednn() -> bool:
    """Returns whether oneDNN multiplies fp32 matrices faster than MKL, which torch uses, on this processor.

    On AMD's processors MKL uses 256-bit instructions, oneDNN 512-bit ones. The latter double the speed from Zen 5
    (family 26) on; Zen 4 splits them in halves.
    """
    try:
        with CPU_INFO.open(encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in itertools.takewhile(str.strip, file)]  # of the first core
    except OSError:
        return False
    values = {key.strip(): value.strip() for key, _, value in lines}
    is_zen5 = values.get("vendor_id") == "AuthenticAMD" and int(values.get("cpu family", 0)) >= 26
    return is_zen5 and torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()


def set_deterministic(enabled: bool, *, warn_only: bool = False) -> None:
    """Does what `torch.use_deterministic_algorithms` does.

    That function imports torch's compiler to set a flag there, which takes two seconds. Without the flag and without
    the compiler there is nothing to set: the compiler's default is off.
    """
    if enabled:  # cuBLAS reproduces its sums with a fixed workspace only, and torch refuses any other
        os.environ.setdefault(WORKSPACE, ":4096:8")
    if enabled or "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode("default")


def synchronized_time(device: torch.device) -> float:
    """Returns the seconds of a clock after the work that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
