import io
import random

import numpy as np
import torch

from dlopt.training import rng


def draw() -> tuple[float, float, float, float]:
    return random.gauss(0, 1), float(np.random.normal()), float(torch.rand(())), float(torch.randn(3)[2])


def test_restores_generators() -> None:
    rng.seed_all(5)
    draw()  # leaves half a pair of normal draws in Python's and NumPy's generators
    state = rng.state()
    expected = [draw() for _ in range(3)]
    rng.seed_all(6)
    assert draw() != expected[0]
    rng.restore(state)
    assert [draw() for _ in range(3)] == expected


def test_state_loads_with_weights_only() -> None:
    rng.seed_all(5)
    draw()
    file = io.BytesIO()
    torch.save(rng.state(), file)
    expected = draw()
    file.seek(0)
    rng.restore(torch.load(file, weights_only=True))
    assert draw() == expected


def test_seeds_all_generators() -> None:
    for seed in (0, 2**32, 2**63 - 1):
        rng.seed_all(seed)
        first = draw()
        rng.seed_all(seed)
        assert draw() == first
