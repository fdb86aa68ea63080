"""The keys of norm layers that every model takes."""

from typing import Any

NORM: dict[str, Any] = {
    "norm": "batch", "norm_affine": True, "norm_groups": 8, "norm_ghost_batch": None, "norm_eps": 1e-5,
    "norm_momentum": 0.1,
}  # fmt: skip
