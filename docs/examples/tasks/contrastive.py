"""SimCLR on digits: two augmented views of an image are to be neighbours (Chen et al. 2020, equation 1).

cd docs/examples/tasks
dlopt train task=contrastive.SimCLR allow_packages=[contrastive] model=mlp model.widths=[256] \
    augmentation=crop_flip optimizer=adamw monitor=val_neighbour_accuracy
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.extend import Count, Draws, Positive, UserTask


class SimCLR(UserTask):
    couples_batch = True  # the other images of a batch are the negatives
    views = 2
    values: ClassVar = {"neighbour_accuracy": "max"}  # whether the nearest embedding has the same label

    def __init__(self, *, features: Count = 32, temperature: Positive = 0.2) -> None:
        self.features, self.temperature = features, temperature

    def model_arguments(self, shape, classes):
        return {"input_shape": shape, "classes": self.features}

    def loss(self, model, batch, draws: Draws) -> Tensor:
        views, _ = batch
        count = len(views)
        z = F.normalize(model(views.flatten(0, 1)), dim=1).view(count, 2, -1).transpose(0, 1).flatten(0, 1)
        similarity = (z @ z.T / self.temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * count, device=z.device).roll(count)
        return F.cross_entropy(similarity, partner)

    def evaluate(self, model, batches, draws: Draws, split):
        embedded = [(F.normalize(model(views[:, 0]), dim=1), labels) for views, labels in batches]
        z, labels = (torch.cat(column) for column in zip(*embedded, strict=True))
        nearest = (z @ z.T).fill_diagonal_(-torch.inf).argmax(1)
        return {"neighbour_accuracy": (labels[nearest] == labels).double().mean()}
