"""Cases of the certificate notice what they are for."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.lab.verify.cases import stays_within_rounding


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (3.0, False)])
def test_a_low_precision_is_compared_with_float64(factor: float, passes: bool) -> None:
    """The update multiplies its step by `factor`, unless it is computed in float64."""

    def fresh(dtype: torch.dtype = torch.float64) -> list[Any]:
        return [torch.ones(4, dtype=dtype)]

    def loss(params: Sequence[Tensor]) -> Tensor:
        return sum((p**2).sum() for p in params)  # type: ignore[return-value]

    def update(_: Any, params: Sequence[Tensor], *others: Any) -> None:
        for p in params:
            p.mul_(1 - 0.01 * (1.0 if p.dtype == torch.float64 else factor))

    def check() -> None:
        stays_within_rounding(lambda params: None, update, fresh, loss, torch.float32, 0.1)  # type: ignore[arg-type]

    if passes:
        check()
    else:
        with pytest.raises(AssertionError, match=r"^torch.float32: loss .*, in float64 "):
            check()
