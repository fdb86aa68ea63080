"""Checks in every update what a parallel mode promises (`check=step`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from dlopt.parallel.mode import Mode
from dlopt.parallel.replicas import refuse_other_replicas
from dlopt.training.step import Observer, Step


class ReplicaCheck(Observer):
    """Compares gradients after each backward pass, and weights and buffers after each update, over the ranks.

    Raises `UserError`: a rank that decided by other numbers would leave the others waiting.
    """

    def __init__(self, mode: Mode, module: nn.Module) -> None:
        self.mode = mode
        self.module = module

    @contextmanager
    def around_forward_backward(self) -> Iterator[None]:
        yield
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        refuse_other_replicas(self.mode, "the gradient of", gradients)

    @contextmanager
    def around_update(self, step: Step, inputs: Tensor, targets: Tensor, number: int) -> Iterator[None]:
        yield
        refuse_other_replicas(self.mode, f"after update {number + 1},", self.module.state_dict())
