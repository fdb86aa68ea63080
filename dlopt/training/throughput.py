"""Throughput of training, its fraction of what the GPU can compute, and GPU memory."""

import math
import re
from dataclasses import dataclass

import torch

from dlopt.metrics.measures import Training, measured
from dlopt.training.builders.precision import Precision

# Dense TFLOP/s (without sparsity) by words of the card's name, more specific names first: bf16 and fp16 with fp32
# accumulation, TF32, fp32 without tensor cores. None for cards without bf16 and TF32; their first number is for fp16.
# From NVIDIA's data sheets of each card; GeForce and RTX from the white papers of Ampere (GA102), Ada and Blackwell.
_CARDS: dict[str, tuple[float, float | None, float]] = {
    "GB200": (2500, 1250, 80), "B200": (2250, 1125, 75), "GH200": (989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 417.5, 60), "H100 NVL": (835.5, 417.5, 60), "H100 PCIE": (756, 378, 51.2),
    "H200": (989.4, 494.7, 66.9), "H100": (989.4, 494.7, 66.9),
    "A100": (312, 156, 19.5), "A40": (149.7, 74.8, 37.4), "A30": (165, 82.5, 10.3), "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6), "L40": (181, 90.5, 90.5), "L4": (121, 60.5, 30.3), "A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8), "RTX 4090": (165.2, 82.6, 82.6), "RTX 3090": (71, 35.6, 35.6),
    "V100 PCIE": (112, None, 14), "V100": (125, None, 15.7), "T4": (65, None, 8.1),
}  # fmt: skip
_OTHER_CARDS = {"MIG", "LAPTOP", "D", "TI"}  # words of slower or faster variants, and of slices of a card


def nominal_flops(card: str, precision: str) -> float | None:
    """Returns the dense FLOP/s of a GPU in a precision of dlopt, by torch's name of the GPU; None if unknown."""
    words = set(re.split(r"[^A-Z0-9]+", card.upper()))
    rates = next((rates for name, rates in _CARDS.items() if words.issuperset(name.split())), None)
    if rates is None or words & _OTHER_CARDS:
        return None
    half, tf32, fp32 = rates
    by_precision = {"fp16": half, "bf16": half if tf32 else None, "bf16_pure": half if tf32 else None}
    rate = {**by_precision, "tf32": tf32, "fp32": fp32}.get(precision)
    return None if rate is None else rate * 1e12


@dataclass(frozen=True)
class Throughput:
    """How samples and seconds of training become metrics.

    Utilization is the model FLOPs utilization (MFU) of each GPU: the FLOPs of matrix products and convolutions (the
    backward pass counts as two forward passes), divided by the time of training and by the GPU's nominal rate.
    Recomputed activations, a teacher, and additional passes of an optimizer do not count.

    Args:
        gpu: whose memory is measured; None if there is none.
        tokens: of a sample of a text; None if samples are counted.
        flops: of one training sample; None if there is no utilization.
        nominal: FLOP/s of one GPU.
        processes: with one GPU each.
    """

    gpu: torch.device | None = None
    tokens: int | None = None
    flops: float | None = None
    nominal: float | None = None
    processes: int = 1
    name: str = ""  # of the GPU and the precision, for `note`

    @classmethod
    def on(cls, precision: Precision, tokens: int | None, flops: float | None, processes: int) -> "Throughput":
        """Builds it for a run in `precision`; looks up the nominal rate of its device."""
        if precision.device.type != "cuda":
            return cls(tokens=tokens)
        card = torch.cuda.get_device_name(precision.device)
        nominal = nominal_flops(card, precision.name)
        return cls(precision.device, tokens, flops, nominal, processes, f"{card}, {precision.name}")

    @property
    def note(self) -> str | None:
        """The nominal rate to which the utilization refers; None if there is no utilization."""
        if self.nominal is None or self.flops is None:
            return None
        return (
            f"utilization: of {self.nominal / 1e12:,.4g} TFLOP/s ({self.name}, dense) on each GPU; a training sample "
            f"counts {self.flops / 1e9:,.3g} GFLOPs (3 x forward)"
        )

    def metrics(self, samples: int, seconds: float) -> dict[str, float]:
        """Returns samples or tokens per second and, on a GPU, utilization and the peak of the allocated memory."""
        rate = samples / max(seconds, 1e-9) if samples else math.nan  # nan: all updates were skipped, or none was due
        peak = None if self.gpu is None else torch.cuda.max_memory_allocated(self.gpu)
        return measured(Training(rate, self.tokens, self.flops, self.nominal, self.processes, peak))


ON_CPU = Throughput()
