"""Optimizers of lecture recipes against torch's, and against the closed form of what they leave out."""

import math

import pytest
import torch

from dlopt.lab.optimizers import Adam


def _path(optimizer: type[torch.optim.Optimizer], **keys: object) -> list[torch.Tensor]:
    """Returns the weights after each of 50 updates with the same random gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    made = optimizer([weights], lr=0.1, **keys)  # type: ignore[call-arg]
    path = [weights.detach().clone()]
    for _ in range(50):
        weights.grad = torch.randn(5, dtype=torch.float64, generator=generator)
        made.step()
        path.append(weights.detach().clone())
    return path


def test_adam_with_bias_correction_is_that_of_torch() -> None:
    torch.testing.assert_close(_path(Adam), _path(torch.optim.Adam), rtol=1e-12, atol=1e-12)


def test_without_bias_correction_the_updates_are_larger_by_the_closed_form() -> None:
    corrected, uncorrected = (torch.stack(_path(Adam, eps=0.0, bias_correction=on)).diff(dim=0) for on in (True, False))
    factors = torch.tensor([(1 - 0.9**t) / math.sqrt(1 - 0.999**t) for t in range(1, 51)], dtype=torch.float64)
    torch.testing.assert_close(uncorrected, factors.unsqueeze(1) * corrected, rtol=1e-9, atol=1e-12)
    assert float(factors[0]) == pytest.approx(3.16, abs=0.01)
