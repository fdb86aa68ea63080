from collections import defaultdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.optim.common import Closure, as_groups, buffers, evaluate
from dlopt.ranges import Count, NonNegative, Positive, Share


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (Jordan et al. 2024; torch's implementation), another method for the rest.

    Matrices are the parameters of two and more dimensions; a convolution's kernel counts as [out, in * height * width].
    A group with `use_muon=False` leaves its matrices to the other method, as is advised for embeddings and the last
    layer. The rest is updated by torch's AdamW, or SGD with Nesterov momentum, with a learning rate of its own. Both
    decays are decoupled (SGD's is the L2 penalty of torch's SGD).

    The parameters are regrouped: each group given becomes one of matrices and one of the rest.
    """

    evaluations: ClassVar[str] = "once"
    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Positive = 0.02,
        weight_decay: NonNegative = 0.01,
        momentum: Share = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: Count = 5,
        eps: Positive = 1e-7,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        rest: Literal["adamw", "sgd"] = "adamw",
        rest_lr: Positive = 0.001,
        rest_momentum: Share = 0.9,
        rest_betas: tuple[Share, Share] = (0.9, 0.999),
        rest_eps: Positive = 1e-8,
    ) -> None:
        own = {"momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        own |= {"eps": eps, "adjust_lr_fn": adjust_lr_fn}
        matrices, others = [], []
        for group in as_groups(params):
            members, keys = group.pop("params"), {"lr": lr, "weight_decay": weight_decay, **group}
            wanted = keys.pop("use_muon", True)
            chosen = [p for p in members if wanted and p.ndim > 1]
            left = [p for p in members if not (wanted and p.ndim > 1)]
            if chosen:
                matrices.append({**own, **keys, "params": chosen, "use_muon": True})
            if left:
                keys["lr"] = keys["lr"] / lr * rest_lr
                others.append({**keys, "params": left, "use_muon": False})
        self._muon = torch.optim.Muon([torch.zeros(1, 1)])  # given its matrices in every step
        self._rest: torch.optim.Optimizer | None = None
        if others:
            self._rest = (
                torch.optim.AdamW(others, lr=rest_lr, betas=rest_betas, eps=rest_eps)
                if rest == "adamw"
                else torch.optim.SGD(others, lr=rest_lr, momentum=rest_momentum, nesterov=rest_momentum > 0)
            )
        super().__init__([*matrices, *(self._rest.param_groups if self._rest else [])], {})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = evaluate(closure)
        self._step_matrices([group for group in self.param_groups if group["use_muon"]])
        if self._rest is not None:  # shares groups and state, which loading a state replaces
            self._rest.param_groups = [group for group in self.param_groups if not group["use_muon"]]
            self._rest.state = self.state
            self._rest.step()
        return loss

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """torch's Muon takes two dimensions only: it works on views of the parameters and of their state."""
        inner = self._muon
        inner.param_groups, inner.state = [], defaultdict(dict)
        for group in groups:
            views = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                (average,) = buffers(self, [p], "momentum_buffer")
                view = _matrix(p.detach(), p)
                view.grad = _matrix(p.grad, p)
                inner.state[view] = {"momentum_buffer": _matrix(average, p)}
                views.append(view)
            inner.param_groups.append({**inner.defaults, **group, "params": views})
        inner.step()


def _matrix(t: Tensor, like: Tensor) -> Tensor:
    """[out, everything else], a view wherever t is laid out like `like`. The order of the columns is the layout's: it
    differs for channels-last kernels, and orthogonalization does not depend on it."""
    if like.ndim == 2:
        return t
    if not like.is_contiguous():
        order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
        t = t.permute(0, *order)
    return t.reshape(len(t), -1)
