from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Interval
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, buffers, chunks, evaluate
from dlopt.ranges import Positive

Etas = tuple[Annotated[float, Interval(gt=0, lt=1)], Annotated[float, Gt(1)]]


class Rprop(torch.optim.Optimizer):
    """Resilient propagation as it is taught, Rprop- of Igel & Huesken 2003: every weight always steps by its own step
    size against the sign of its gradient.

    The step size, lr at first, is multiplied by etas[1] while the sign stays, by etas[0] when it changes, and clipped
    to `step_sizes`. torch's Rprop (iRprop-) skips the step after a change of sign and forgets that gradient.
    """

    evaluations: ClassVar[str] = "once"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.001,
        etas: Etas = (0.5, 1.2),
        step_sizes: tuple[Positive, Positive] = (1e-6, 50.0),
    ) -> None:
        super().__init__(params, {"lr": lr, "etas": etas, "step_sizes": step_sizes})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        for group in self.param_groups:
            (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
            for params in chunks(group["params"]):
                for p, previous in zip(params, buffers(self, params, "prev"), strict=True):
                    state, grad = self.state[p], p.grad
                    assert grad is not None
                    if "step_size" not in state:
                        state["step_size"] = torch.full_like(p, float(group["lr"]))
                    size = state["step_size"]
                    agreement = previous.mul_(grad)
                    size.copy_(torch.where(agreement > 0, size * grow, torch.where(agreement < 0, size * shrink, size)))
                    size.clamp_(least, most)
                    p.addcmul_(grad.sign(), size, value=-1)
                    previous.copy_(grad)
        return loss
