"""Schedule-free learning (Defazio et al. 2024): the methods of the schedulefree package, made to resume exactly.

They train at one point y and are evaluated at another, x: `optimizer.train()` before updates, `optimizer.eval()` before
an evaluation or a checkpoint. The package moves between the two by interpolation, which loses the last bits; here y is
kept in the state meanwhile, so that evaluations and checkpoints leave no trace.
"""

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch.optim.optimizer import ParamsT

from dlopt.errors import UserError, install
from dlopt.ranges import Fraction, NonNegative, Positive

try:
    import schedulefree
except ModuleNotFoundError as missing:
    raise UserError(
        f"optimizer=schedule_free_*: the package schedulefree is not installed; {install('dlopt[schedulefree]')}"
    ) from missing

Open = Annotated[float, Interval(gt=0, lt=1)]


class _KeepsTrainingPoint:
    param_groups: list[dict[str, Any]]
    state: Any

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        self.state[p]["y"] = p.clone()
        super().eval()  # type: ignore[misc]

    @torch.no_grad()
    def train(self) -> None:
        resting = [p for group in self.param_groups if not group["train_mode"] for p in group["params"]]
        super().train()  # type: ignore[misc]
        for p in resting:
            if "y" in self.state[p]:
                p.copy_(self.state[p].pop("y"))


class ScheduleFreeSGD(_KeepsTrainingPoint, schedulefree.SGDScheduleFree):
    """Schedule-free SGD; `momentum` is the interpolation between the average and the last iterate."""

    evaluations: ClassVar[str] = "once"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        momentum: Open = 0.9,
        weight_decay: NonNegative = 0.0,
        r: NonNegative = 0.0,
        weight_lr_power: NonNegative = 2.0,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power
        )
        self.train()


class ScheduleFreeAdamW(_KeepsTrainingPoint, schedulefree.AdamWScheduleFree):
    """Schedule-free AdamW; betas[0] is the interpolation between the average and the last iterate."""

    evaluations: ClassVar[str] = "once"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0025,
        betas: tuple[Open, Fraction] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        r: NonNegative = 0.0,
        weight_lr_power: NonNegative = 2.0,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power
        )
        self.train()
