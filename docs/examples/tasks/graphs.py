"""A graph convolution (Kipf & Welling 2017) finds the communities of a generated graph from a few labelled nodes.

cd docs/examples/tasks
dlopt train task=graphs.Communities allow_packages=[graphs] data=drawn data.train_size=1 data.val_size=1 \
    data.test_size=1 data.batch_size=1 model=graphs.GraphConvolution model.width=16 optimizer=adamw \
    optimizer.lr=0.02 epochs=100
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.extend import Count, Draws, Probability, UserTask


class Communities(UserTask):
    couples_batch = True  # one update computes the whole graph: an epoch has one update
    values: ClassVar = {"node_accuracy": "max"}

    def __init__(self, *, communities: Count = 4, nodes: Count = 200, inside: Probability = 0.1) -> None:
        draw = torch.Generator().manual_seed(0)
        self.labels = torch.arange(nodes) % communities
        same = self.labels[:, None] == self.labels
        edges = torch.rand(nodes, nodes, generator=draw) < torch.where(same, inside, inside / 10)
        edges = edges.triu(1) | edges.triu(1).T | torch.eye(nodes, dtype=torch.bool)
        degree = edges.sum(1).double().rsqrt()
        self.graph = degree[:, None] * edges * degree  # D^-1/2 (A + I) D^-1/2
        order = torch.randperm(nodes, generator=draw)
        labelled, rest = nodes // 10, (nodes - nodes // 10) // 2
        self.parts = dict(
            zip(("train", "val", "test"), order.split([labelled, rest, nodes - labelled - rest]), strict=True)
        )

    def model_arguments(self, shape, classes):
        return {"input_shape": (len(self.labels),), "classes": int(self.labels.max()) + 1}

    def outputs(self, model, draws: Draws) -> Tensor:
        return model(self.graph.to(draws.device, draws.dtype)).cpu()

    def loss(self, model, batch, draws: Draws) -> Tensor:
        nodes = self.parts["train"]
        return F.cross_entropy(self.outputs(model, draws)[nodes], self.labels[nodes])

    def evaluate(self, model, batches, draws: Draws, split):
        nodes = self.parts[split]
        right = self.outputs(model, draws)[nodes].argmax(1) == self.labels[nodes]
        return {"node_accuracy": right.double().mean()}


class GraphConvolution(nn.Module):
    def __init__(self, *, input_shape: tuple[int, ...], classes: int, width: Count = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(input_shape[0], width), nn.Linear(width, classes)

    def forward(self, graph: Tensor) -> Tensor:
        return graph @ self.second(F.relu(graph @ self.first(torch.eye(len(graph)).to(graph))))
