"""Sharpness-aware minimization."""

from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import NonNegative, Positive
from dlopt.optim.common import Closure, Tensors, chunks, gradients, loss_of, needs_closure, without_global_step_hooks
from dlopt.optim.traits import OptimizerTraits, is_schedule_free, optimizer_traits


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): the base optimizer uses the gradient at w + e, the approximate
    maximum of the loss within a radius rho around w, with e = rho * g / |g|.

    `adaptive` is ASAM (Kwon et al. 2021): e = rho * w^2 g / | |w| g |, which is invariant to rescaling of the weights.
    Calls the closure twice, at w and at w + e; returns the loss at w. Shares groups and state with the base.
    `rho` and `adaptive` may differ between groups; the norm is taken over all groups.

    `lr` replaces the learning rate of the base; groups with another one keep their ratio to it.
    """

    def __init__(
        self,
        *,
        base: torch.optim.Optimizer,
        lr: Positive | None = None,
        rho: NonNegative = 0.05,
        adaptive: bool = False,
    ) -> None:
        if optimizer_traits(base).evaluations == "many" or is_schedule_free(type(base)):
            raise UserError(
                f"optimizer.base={type(base).__name__}: not supported by SAM, whose base must use one gradient per "
                f"step and train the weights that are evaluated; use for example sgd or adamw"
            )
        if lr is not None:
            for group in base.param_groups:
                group["lr"] *= lr / base.defaults["lr"]
        self.base = base
        super().__init__(base.param_groups, {"rho": rho, "adaptive": adaptive})
        self._share_base()

    @property
    def traits(self) -> OptimizerTraits:
        decoupled = optimizer_traits(self.base).decoupled_decay
        return OptimizerTraits(evaluations="many", uses_all_gradients=True, decoupled_decay=decoupled)

    def _share_base(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(needs_closure(self, closure))
        saved = self._perturb()
        try:
            loss_of(closure)
        finally:  # the closure may raise for a non-finite gradient
            for params, weights in saved:
                torch._foreach_copy_(params, weights)  # copies, because subtracting e would round
        with without_global_step_hooks():
            self.base.step()
        return loss

    def _perturb(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Moves the weights to w + e; returns the parameters with copies of w."""
        steps: list[tuple[list[Tensor], Tensors, float]] = []
        norms: list[Tensor] = []
        for group in self.param_groups:
            for params in chunks(group["params"]):
                direction: Tensors = gradients(params)
                if group["adaptive"]:
                    scale = torch._foreach_abs(params)
                    direction = torch._foreach_mul(direction, scale)
                    norms += torch._foreach_norm(direction)
                    torch._foreach_mul_(direction, scale)
                else:
                    norms += torch._foreach_norm(direction)
                steps.append((params, direction, group["rho"]))
        if not norms:
            return []
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm() + 1e-12
        saved = []
        for params, direction, rho in steps:
            saved.append((params, [p.clone() for p in params]))
            radius: Tensor = (rho / norm).to(params[0].device)
            torch._foreach_addcmul_(params, direction, [radius] * len(params))
        return saved

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # Optimizer.__init__ calls this with the base's own groups.
        if any(param_group is group for group in self.base.param_groups):
            param_group.setdefault("rho", self.defaults["rho"])
            param_group.setdefault("adaptive", self.defaults["adaptive"])
            return
        self.base.add_param_group({**self.defaults, **param_group})

    # The base saves and loads, because it may convert its state (NAdam). torch has no public way to run the hooks that
    # are registered on this optimizer.

    def state_dict(self) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base.load_state_dict(state_dict)  # replaces the base's groups and state
        self._share_base()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}  # for copy and pickle; groups and state stay shared
