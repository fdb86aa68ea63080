"""AdamW in a few lines, and the same with one error each."""

from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW with a second implementation, `fused`, which gives the same."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, p.grad, self.state[p])
        return loss

    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        t = self.count(state)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        self.move(group, p, grad, state, t)

    def count(self, state: dict[str, Any]) -> int:
        state["step"] = state.get("step", 0) + 1
        return int(state["step"])

    def move(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any], t: int) -> None:
        beta1, beta2 = group["betas"]
        for name, value, beta in (("exp_avg", grad, beta1), ("exp_avg_sq", grad * grad, beta2)):
            state.setdefault(name, self.zeros(p)).lerp_(value, 1 - beta)
        mean = state["exp_avg"] / (1 - beta1**t)
        p.sub_(group["lr"] * mean / self.root(group, state["exp_avg_sq"] / (1 - beta2**t)))

    def zeros(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p)

    def root(self, group: dict[str, Any], squares: Tensor) -> Tensor:
        return squares.sqrt() + group["eps"]


class ForgetsItsStep(AdamW):
    """Counts outside its state."""

    steps = 0

    def count(self, state: dict[str, Any]) -> int:
        self.steps += 1
        return max(1, self.steps // 2)


class CouplesItsDecay(AdamW):
    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        self.move(group, p, grad + group["weight_decay"] * p, state, self.count(state))


class AddsTheSign(AdamW):
    """Its weight decay is an L1 penalty."""

    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        self.move(group, p, grad + group["weight_decay"] * p.sign(), state, self.count(state))


class FusedOffByEps(AdamW):
    def root(self, group: dict[str, Any], squares: Tensor) -> Tensor:
        return (squares + group["eps"] ** 2).sqrt() if group["fused"] else super().root(group, squares)


class MissesVectors(AdamW):
    """The learning rate of vectors is the one at the start, whatever the schedule."""

    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        super().update(group if p.ndim > 1 else {**group, "lr": self.defaults["lr"]}, p, grad, state)


class LeavesOutTheBiasCorrection(AdamW):
    def count(self, state: dict[str, Any]) -> int:
        return 10_000


class Climbs(AdamW):
    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        super().update(group, p, -grad, state)


class Drifts(AdamW):
    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        super().update(group, p, grad, state)
        if group["lr"] == 0:
            p.add_(1e-9)


class DecaysWhatHasNoGradient(AdamW):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


class KeepsItsStateInFloat32(AdamW):
    """And does not convert the gradients of weights in bfloat16."""

    def zeros(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


class HidesNaN(AdamW):
    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        super().update(group, p, grad.nan_to_num(), state)


class ReadsItsDefaults(AdamW):
    """Takes betas from the constructor, not from the group."""

    def update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        super().update({**group, "betas": self.defaults["betas"]}, p, grad, state)


class SGD(torch.optim.SGD):
    """Plain updates with the arguments of torch's: one tensor at a time."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group["lr"], self.direction(group, p))
        return loss

    def direction(self, group: dict[str, Any], p: Tensor) -> Tensor:
        grad: Tensor = -p.grad if group["maximize"] else p.grad  # type: ignore[operator, assignment]
        grad = grad.add(p, alpha=group["weight_decay"])
        if group["momentum"] == 0:
            return grad
        if "momentum_buffer" in self.state[p]:
            self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
        else:
            self.state[p]["momentum_buffer"] = self.first(grad)
        return self.ahead(group, grad, self.state[p]["momentum_buffer"])

    def first(self, grad: Tensor) -> Tensor:
        return grad.clone()

    def ahead(self, group: dict[str, Any], grad: Tensor, buffer: Tensor) -> Tensor:
        return grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer

    def move(self, p: Tensor, lr: float, direction: Tensor) -> None:
        p.sub_(lr * direction)


class ForgetsNesterov(SGD):
    def ahead(self, group: dict[str, Any], grad: Tensor, buffer: Tensor) -> Tensor:
        return buffer


class KeepsTheGradient(SGD):
    def direction(self, group: dict[str, Any], p: Tensor) -> Tensor:
        assert p.grad is not None
        if group["momentum"] == 0:
            return p.grad
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = p.grad
            return p.grad
        return self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)


class MovesItsWeights(SGD):
    def move(self, p: Tensor, lr: float, direction: Tensor) -> None:
        p.data = p - lr * direction


class SwitchesGradientsOff(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if closure is not None:
            torch.set_grad_enabled(False)
        return loss
