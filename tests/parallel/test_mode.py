"""The mode of one process, which all other modes extend."""

from typing import Any

import torch
from torch import Tensor

from dlopt.parallel.mode import Mode


class Steps:
    """Notes the micro-batches; the loss of each sample is its input."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.seen: list[list[float]] = []

    def micro_batch(self, inputs: Tensor, targets: Tensor, weight: float, record: Any) -> Tensor:
        return weight * self.differentiable_loss(inputs, targets)

    def differentiable_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        assert torch.equal(inputs, targets)
        self.seen.append(inputs.tolist())
        return inputs.mean()


def test_divides_a_batch_and_weights_the_losses() -> None:
    batch, mode = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]), Mode(torch.device("cpu"))
    for accumulate, expected in (
        (1, [[1, 2, 3, 4, 10]]),
        (2, [[1, 2, 3], [4, 10]]),
        (9, [[1], [2], [3], [4], [10]]),
    ):
        evaluated, differentiated = Steps(accumulate), Steps(accumulate)
        torch.testing.assert_close(mode.forward_backward(evaluated, batch, batch, None), torch.tensor(4.0))  # type: ignore[arg-type]
        torch.testing.assert_close(mode.differentiable_loss(differentiated, batch, batch), torch.tensor(4.0))  # type: ignore[arg-type]
        assert evaluated.seen == differentiated.seen == expected
