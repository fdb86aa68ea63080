from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from dlopt.ranges import NonNegative, Positive, Share


class NAdam(torch.optim.NAdam):
    """torch's NAdam, made to resume exactly in float64.

    Its running product of momenta is a float32 number, which torch's loading converts to the type of the parameters;
    the products after it are then rounded differently.
    """

    evaluations: ClassVar[str] = "once"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.002,
        betas: tuple[Share, Share] = (0.9, 0.999),
        eps: NonNegative = 1e-8,
        momentum_decay: NonNegative = 0.004,
        weight_decay: NonNegative = 0.0,
        decoupled_weight_decay: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "mu_product" in state:
                wide = torch.get_default_dtype() == torch.float64
                state["mu_product"] = state["mu_product"].to(torch.float64 if wide else torch.float32)
