"""Schedule-free learning (Defazio et al. 2024): the optimizers of the schedulefree package, with exact resumes.

The gradient is taken at one point, y, and the model is evaluated at another, x. Call `optimizer.train()` before updates
and `optimizer.eval()` before an evaluation or a checkpoint. The package moves between the points by interpolation,
which changes the last bits. Here `eval()` keeps a copy of y in the state and `train()` restores it, so evaluations and
checkpoints do not change the training.
"""

from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from dlopt.basics.errors import require_package
from dlopt.basics.ranges import Fraction, NonNegative, OpenFraction, Positive
from dlopt.optim.common import fill_defaults, refuse_complex
from dlopt.optim.traits import OptimizerTraits

require_package("optimizer=schedule_free_*", "schedulefree")
import schedulefree  # noqa: E402


class _KeepsTrainingPoint:
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(scope="element")  # moves towards the average at any rate
    param_groups: list[dict[str, Any]]
    state: Any

    @torch.no_grad()
    def eval(self) -> None:
        # The package computes y from x and z when it switches back, which changes the last bits: a run that validates,
        # or is saved, would then differ from one that does not.
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        self.state[p]["y"] = p.clone()
        super().eval()  # type: ignore[misc]

    @torch.no_grad()
    def train(self) -> None:
        evaluated = [p for group in self.param_groups if not group["train_mode"] for p in group["params"]]
        super().train()  # type: ignore[misc]
        for p in evaluated:
            if "y" in self.state[p]:
                p.copy_(self.state[p].pop("y"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        fill_defaults(self)  # type: ignore[arg-type]


class ScheduleFreeSGD(_KeepsTrainingPoint, schedulefree.SGDScheduleFree):
    """Schedule-free SGD. `momentum` interpolates between the last iterate (0) and the average (1)."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 1.0,
        momentum: OpenFraction = 0.9,
        weight_decay: NonNegative = 0.0,
        r: NonNegative = 0.0,
        weight_lr_power: NonNegative = 2.0,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power
        )
        self.train()


class ScheduleFreeAdamW(_KeepsTrainingPoint, schedulefree.AdamWScheduleFree):
    """Schedule-free AdamW. betas[0] interpolates between the last iterate (0) and the average (1)."""

    traits: ClassVar[OptimizerTraits] = OptimizerTraits(scope="element", normalizes_entries=True)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.0025,
        betas: tuple[OpenFraction, Fraction] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        r: NonNegative = 0.0,
        weight_lr_power: NonNegative = 2.0,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power
        )
        self.train()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_complex("schedule_free_adamw", self.param_groups[-1]["params"])
