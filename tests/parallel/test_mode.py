"""The mode of one process, which all other modes extend."""

import pytest
import torch

from dlopt.data.batches import Batch
from dlopt.parallel.mode import Mode


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [(1, [[1, 2, 3, 4, 10]]), (2, [[1, 2, 3], [4, 10]]), (9, [[1], [2], [3], [4], [10]])],
)
def test_divides_a_batch_and_weights_the_losses(accumulate: int, expected: list[list[float]]) -> None:
    values, mode = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]), Mode(torch.device("cpu"))
    parts = mode.split.micro_batches(Batch(values, values, 5), accumulate)
    assert [part.inputs.tolist() for part in parts] == [part.targets.tolist() for part in parts] == expected
    assert sum(part.weight * float(part.inputs.mean()) for part in parts) == pytest.approx(4.0)
    assert [part.total for part in parts] == [len(part) for part in expected]
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
