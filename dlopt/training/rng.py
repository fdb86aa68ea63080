"""States of the global random generators. dlopt itself uses counter-based streams; layers and libraries may not."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def state() -> dict[str, Any]:
    """Returns the states as numbers and tensors, for `weights_only`."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: Mapping[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# Streams: random numbers for different purposes are independent, even with equal seeds.
WEIGHTS, SCHEME, ORDER, AUGMENTATION, DROPOUT, ADAPTERS, ROUNDING, EVALUATION = range(11, 19)
