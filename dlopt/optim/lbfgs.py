from typing import ClassVar, Literal

import torch
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import as_groups, refuse_own_rates
from dlopt.ranges import Count, NonNegative, Positive


class LBFGS(torch.optim.LBFGS):
    """torch's L-BFGS, which takes one group only: groups are joined, as it has no decay in which they differ."""

    evaluations: ClassVar[str] = "many"
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        max_iter: Count = 20,
        max_eval: Count | None = None,
        history_size: Count = 10,
        tolerance_grad: NonNegative = 1e-7,
        tolerance_change: NonNegative = 1e-9,
        line_search_fn: Literal["strong_wolfe"] | None = "strong_wolfe",
    ) -> None:
        groups = as_groups(params)
        refuse_own_rates("lbfgs", lr, groups)
        everything = [p for group in groups for p in group["params"]]
        super().__init__(
            everything, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn
        )
