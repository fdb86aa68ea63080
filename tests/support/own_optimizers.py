"""Gradient descent as users write it: the ways in which their classes evaluate the loss."""

from typing import Any, ClassVar

import torch

from dlopt.optim import SGDW
from dlopt.optim.traits import OptimizerTraits


class _Descent(torch.optim.Optimizer):
    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def _descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


class WithoutClosure(_Descent):
    def step(self) -> None:  # type: ignore[override]
        self._descend()


class IgnoresClosure(_Descent):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._descend()


class TakesAnything(_Descent):
    def step(self, *args: Any, **keys: Any) -> None:  # type: ignore[override]
        self._descend()


class CallsClosure(_Descent):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._descend()
        return loss


class CallsWithoutGradients(_Descent):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        self._descend()


class RequiresClosure(_Descent):
    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        self._descend()


class RequiresLoss(_Descent):
    def step(self, compute_loss: Any, /) -> None:  # type: ignore[override]
        compute_loss()
        self._descend()


class StatesMany(CallsWithoutGradients):
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many")


class OfTorch(torch.optim.SGD):
    """Has no traits, since it is not torch's own class."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)


class OfDlopt(SGDW):
    """Keeps the traits of its base, and does not pass the closure on."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr, momentum=0.0, weight_decay=0.0)

    def step(self, closure: Any = None) -> Any:
        return super().step()


class Wraps(torch.optim.Optimizer):
    """As Lookahead: another optimizer makes the updates of the same groups."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.base = IgnoresClosure(self.param_groups)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class InInferenceMode(_Descent):
    @torch.inference_mode()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        self._descend()


ONE_EVALUATION = [
    WithoutClosure, IgnoresClosure, TakesAnything, CallsClosure, CallsWithoutGradients, RequiresClosure, RequiresLoss,
    StatesMany, OfTorch, OfDlopt, Wraps,
    InInferenceMode,
]  # fmt: skip


class Twice(_Descent):
    """Evaluates the loss twice at the same weights."""

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        closure()
        self._descend()


class NeverCalls(_Descent):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        self._descend()


class StatesManyButIgnores(IgnoresClosure):
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many")


class CallsFirstTimeOnly(_Descent):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        if not self.state:
            closure()
            self.state["called"] = {}
        self._descend()


class CallsNone(_Descent):
    """Its signature says that it needs no closure."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        self._descend()


class AssertsClosure(CallsNone):
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        super().step(closure)


class RaisesWithoutClosure(CallsNone):
    def step(self, closure: Any = None) -> None:
        if closure is None:
            message = "a closure is required"
            raise RuntimeError(message)
        super().step(closure)


MISSING_CLOSURE = [CallsNone, AssertsClosure, RaisesWithoutClosure]


UNEVALUATED = [NeverCalls, StatesManyButIgnores, CallsFirstTimeOnly]


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        pass


class ByKeyword(_Descent):
    def step(self, *, closure: Any) -> None:  # type: ignore[override]
        closure()


class TwoArguments(_Descent):
    def step(self, closure: Any, batch: Any) -> None:  # type: ignore[override]
        closure()


class StatesManyWithoutClosure(WithoutClosure):
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="many")


class StatesOnceButRequires(RequiresClosure):
    traits: ClassVar[OptimizerTraits] = OptimizerTraits(evaluations="once")


UNCALLABLE = [ByKeyword, TwoArguments, StatesManyWithoutClosure, StatesOnceButRequires]
