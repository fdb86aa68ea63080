"""Denoising diffusion on digits (Ho, Jain & Abbeel 2020, algorithm 1): the model predicts the noise in an image.

cd docs/examples/tasks
dlopt train task=denoising.Denoise allow_packages=[denoising] model=mlp model.widths=[256,256] optimizer=adamw epochs=20
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.extend import Count, Draws, UserTask


class Denoise(UserTask):
    def __init__(self, *, steps: Count = 100) -> None:
        t = torch.linspace(0, 1, steps, dtype=torch.float64)
        self.signal = torch.cos(t * math.pi / 2 * 0.98)  # of the clean image after t steps (Nichol & Dhariwal 2021)

    def model_arguments(self, shape, classes):
        pixels = math.prod(shape)
        return {"input_shape": (pixels + 1,), "classes": pixels}  # a noisy image and its time -> the noise

    def loss(self, model, batch, draws: Draws) -> Tensor:
        images = batch[0].flatten(1)
        step = draws.integers(len(self.signal))
        noise = draws.normal(images.shape[1])
        signal = self.signal.to(images)[step].unsqueeze(1)
        noisy = signal * images + (1 - signal**2).sqrt() * noise
        time = (step / len(self.signal)).to(images).unsqueeze(1)
        return F.mse_loss(model(torch.cat([noisy, time], 1)), noise)
