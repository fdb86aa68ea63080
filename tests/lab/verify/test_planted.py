"""Forty errors that `dlopt verify` has to catch, and forty right variants that it must not blame.

Each error changes a line of one of three short implementations. The lists were written before the checks they test.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import schedulefree
import timm.optim
import torch

from dlopt import optim
from dlopt.lab.verify.checks import CHECKS, run
from dlopt.lab.verify.command import certify
from dlopt.lab.verify.methods import METHODS, known
from dlopt.lab.verify.subject import Subject, find

SOURCES = {
    "adamw": """
class AdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, maximize=False, foreach=False):
        keys = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach}
        super().__init__(params, {"lr": lr, **keys})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, eps, wd = group["lr"], group["eps"], group["weight_decay"]
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            grads = [-p.grad if group["maximize"] else p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                self.state[p]["step"] += 1
            if group["foreach"]:
                self.update_together(params, grads, lr, beta1, beta2, eps, wd)
                continue
            for p, g in zip(params, grads):
                m, v, t = self.state[p]["m"], self.state[p]["v"], self.state[p]["step"]
                p.mul_(1 - lr * wd)
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                mean = m / (1 - beta1**t)
                root = (v / (1 - beta2**t)).sqrt() + eps
                p.sub_(lr * mean / root)
        return loss

    def update_together(self, params, grads, lr, beta1, beta2, eps, wd):
        if not params:
            return
        ms, vs, ts = ([self.state[p][name] for p in params] for name in ("m", "v", "step"))
        torch._foreach_mul_(params, 1 - lr * wd)
        torch._foreach_mul_(ms, beta1)
        torch._foreach_add_(ms, grads, alpha=1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, grads, grads, value=1 - beta2)
        means = [m / (1 - beta1**t) for m, t in zip(ms, ts)]
        roots = [(v / (1 - beta2**t)).sqrt() + eps for v, t in zip(vs, ts)]
        torch._foreach_addcdiv_(params, means, roots, value=-lr)
""",
    "sgd": """
class SGD(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, momentum=0.9, weight_decay=0.0, foreach=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, wd = group["lr"], group["momentum"], group["weight_decay"]
            params = [p for p in group["params"] if p.grad is not None]
            if group["foreach"] and params and not any(p.grad.is_sparse for p in params):
                grads = torch._foreach_add([p.grad for p in params], params, alpha=wd)
                buffers = [self.state[p].setdefault("buffer", torch.zeros_like(p)) for p in params]
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, grads)
                torch._foreach_add_(params, buffers, alpha=-lr)
                continue
            for p in params:
                g = p.grad
                if wd != 0:
                    g = g.add(p, alpha=wd)
                if "buffer" not in self.state[p]:
                    self.state[p]["buffer"] = g.clone()
                else:
                    self.state[p]["buffer"].mul_(momentum).add_(g)
                p.add_(self.state[p]["buffer"], alpha=-lr)
        return loss
""",
    "muon": """
class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.01, ns_steps=5):
        keys = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "ns_steps": ns_steps}
        super().__init__(params, {"lr": lr, **keys})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon is for matrices")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, wd = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(momentum).add_(g, alpha=1 - momentum)
                u = g.lerp(m, momentum) if group["nesterov"] else m
                u = self.orthogonalize(u, group["ns_steps"])
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - lr * wd)
                p.add_(u, alpha=-lr * scale)
        return loss

    def orthogonalize(self, u, steps):
        x = u.bfloat16()
        if u.shape[0] > u.shape[1]:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        if u.shape[0] > u.shape[1]:
            x = x.T
        return x.to(u.dtype)
""",
}
ERRORS: dict[str, tuple[str, str, str]] = {  # method, line, line with the error
    "decay of the wrong sign": ("adamw", "p.mul_(1 - lr * wd)", "p.mul_(1 + lr * wd)"),
    "decay twice": ("adamw", "p.mul_(1 - lr * wd)", "p.mul_((1 - lr * wd) ** 2)"),
    "decay without lr": ("adamw", "p.mul_(1 - lr * wd)", "p.mul_(1 - wd)"),
    "decay by the constructor's lr": ("adamw", "p.mul_(1 - lr * wd)", "p.mul_(1 - self.defaults['lr'] * wd)"),
    "decay of parameters without a gradient": ("adamw", "params = [",
        "[p.mul_(1 - lr * wd) for p in group['params'] if p.grad is None]; params = ["),
    "decay coupled": ("adamw", "p.mul_(1 - lr * wd)", "g = g + wd * p"),
    "decay of the defaults in all groups": ("adamw", 'wd = group["lr"], group["eps"], group["weight_decay"]',
        'wd = group["lr"], group["eps"], self.defaults["weight_decay"]'),
    "decay 0 replaced by the default": ("adamw", 'group["weight_decay"]\n',
        'group["weight_decay"] or self.defaults["weight_decay"]\n'),
    "lr of group 0 in all groups": ("adamw", 'wd = group["lr"]', 'wd = self.param_groups[0]["lr"]'),
    "betas of group 0 in all groups": ("adamw", 'beta2 = group["betas"]', 'beta2 = self.param_groups[0]["betas"]'),
    "eps of the defaults in all groups": ("adamw", ' group["eps"],', ' self.defaults["eps"],'),
    "eps before the bias correction": ("adamw", "(v / (1 - beta2**t)).sqrt() + eps\n                p",
        "(v.sqrt() + eps) / (1 - beta2**t) ** 0.5\n                p"),
    "gradient changed in place": ("adamw", "addcmul_(g, g, value=1 - beta2)", "add_(g.square_(), alpha=1 - beta2)"),
    "one count of updates for all parameters": ("adamw",
        't = self.state[p]["m"], self.state[p]["v"], self.state[p]["step"]',
        't = self.state[p]["m"], self.state[p]["v"], max(s["step"] for s in self.state.values())'),
    "foreach without decay": ("adamw foreach", "torch._foreach_mul_(params, 1 - lr * wd)", "pass"),
    "foreach with the first parameter's count": ("adamw foreach", "means = [m / (1 - beta1**t)",
        "means = [m / (1 - beta1**ts[0])"),
    "maximize also reverses the decay": ("adamw", "p.mul_(1 - lr * wd)",
        "p.mul_(1 + lr * wd if group['maximize'] else 1 - lr * wd)"),
    "closure called twice": ("adamw", "loss = closure()", "closure(); loss = closure()"),
    "update lost without contiguous memory": ("adamw", "p.sub_(lr * mean / root)",
        "p.reshape(-1).sub_((lr * mean / root).reshape(-1))"),
    "sgd: decay of the wrong sign": ("sgd", "g.add(p, alpha=wd)", "g.sub(p, alpha=wd)"),
    "sgd: decay decoupled": ("sgd", "g = g.add(p, alpha=wd)", "p.mul_(1 - lr * wd)"),
    "sgd: decay times lr": ("sgd", "g.add(p, alpha=wd)", "g.add(p, alpha=lr * wd)"),
    "sgd: no decay of vectors": ("sgd", "if wd != 0:", "if wd != 0 and p.ndim > 1:"),
    "sgd: momentum of group 0 in all groups": ("sgd", 'momentum, wd = group["lr"], group["momentum"]',
        'momentum, wd = group["lr"], self.param_groups[0]["momentum"]'),
    "sgd: buffer is the gradient": ("sgd", "g.clone()", "g"),
    "sgd: averages the gradients": ("sgd", "mul_(momentum).add_(g)", "mul_(momentum).add_(g, alpha=1 - momentum)"),
    "sgd: momentum fades without a gradient": ("sgd", "params = [",
        "[self.state[p]['buffer'].mul_(momentum) for p in group['params'] if p.grad is None and self.state[p]]; "
        "params = ["),
    "sgd: lr 0 replaced by the default": ("sgd", 'wd = group["lr"]', 'wd = group["lr"] or self.defaults["lr"]'),
    "sgd: duplicates of a sparse gradient are lost": ("sgd", "g = p.grad",
        "g = p.grad; g = g if not g.is_sparse else torch.zeros_like(p).index_copy_(0, g._indices()[0], g._values())"),
    "sgd: foreach decays after the momentum": ("sgd foreach", "torch._foreach_add_(params, buffers, alpha=-lr)",
        "torch._foreach_add_(params, buffers, alpha=-lr); torch._foreach_mul_(buffers, 1 - wd)"),
    "muon: decay of the wrong sign": ("muon", "1 - lr * wd", "1 + lr * wd"),
    "muon: no decay": ("muon", "p.mul_(1 - lr * wd)", "pass"),
    "muon: decay coupled": ("muon", "g = p.grad", "g, wd = p.grad + wd * p, 0"),
    "muon: decay by the scaled lr": ("muon", "1 - lr * wd", "1 - lr * scale * wd"),
    "muon: decay without lr": ("muon", "1 - lr * wd", "1 - wd"),
    "muon: momentum of group 0 in all groups": ("muon", 'momentum, wd = group["lr"], group["momentum"]',
        'momentum, wd = group["lr"], self.param_groups[0]["momentum"]'),
    "muon: lr of group 0 in all groups": ("muon", 'wd = group["lr"]', 'wd = self.param_groups[0]["lr"]'),
    "muon: gradient changed in place": ("muon", "g.lerp(", "g.lerp_("),
    "muon: scale of wide instead of tall matrices": ("muon", "p.shape[0] / p.shape[1]", "p.shape[1] / p.shape[0]"),
    "muon: one buffer for each shape": ("muon", "self.state[p].setdefault(",
        "self.state[p.shape[0], p.shape[1]].setdefault("),
}  # fmt: skip
REORDERED: dict[str, tuple[str, str, str]] = {  # method, line, another that does the same
    "nothing changed": ("adamw", "", ""),
    "decay by add": ("adamw", "p.mul_(1 - lr * wd)", "p.add_(p, alpha=-lr * wd)"),
    "moments by lerp": ("adamw", "m.mul_(beta1).add_(g, alpha=1 - beta1)", "m.lerp_(g, 1 - beta1)"),
    "decay within the step": ("adamw", "p.sub_(lr * mean / root)",
        "p.div_(1 - lr * wd).sub_(lr * (mean / root + wd * p))"),
    "torch's order of the bias corrections": ("adamw", "p.sub_(lr * mean / root)",
        "p.addcdiv_(m, (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps), value=-lr / (1 - beta1**t))"),
    "powers of beta kept as products": ("adamw", "mean = m / (1 - beta1**t)",
        "self.state[p]['b1'] = self.state[p].get('b1', 1.0) * beta1; mean = m / (1 - self.state[p]['b1'])"),
    "copies of the gradients": ("adamw", "m, v, t =", "g = g.clone(); m, v, t ="),
    "adamw: decay before the moments of all": ("adamw", "params = [",
        "[p.mul_(1 - lr * wd) for p in group['params'] if p.grad is not None]; wd = 0; params = ["),
    "adamw: states from the start": ("adamw", 'super().__init__(params, {"lr": lr, **keys})',
        'super().__init__(params, {"lr": lr, **keys}); '
        "[self.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p)) "
        "for each in self.param_groups for p in each['params']]"),
    "adamw: foreach by default": ("adamw foreach", "foreach=False", "foreach=True"),
    "sgd: nothing changed": ("sgd", "", ""),
    "sgd: buffer of zeros": ("sgd", "= g.clone()", "= torch.zeros_like(p).add_(g)"),
    "sgd: new buffers": ("sgd", 'self.state[p]["buffer"].mul_(momentum).add_(g)',
        'self.state[p]["buffer"] = momentum * self.state[p]["buffer"] + g'),
    "muon: nothing changed": ("muon", "", ""),
    "muon: sum of the gradients": (  # the norm is divided out
        "muon",
        "m.mul_(momentum).add_(g, alpha=1 - momentum)\n                u = g.lerp(m, momentum)",
        "m.mul_(momentum).add_(g)\n                u = g.add(m, alpha=momentum)",
    ),
    "muon: float32": ("muon", "u.bfloat16()", "u.float()"),
    "muon: decay within the step": ("muon", "p.mul_(1 - lr * wd)\n                p.add_(u, alpha=-lr * scale)",
        "p.sub_(lr * (scale * u + wd * p))"),
}  # fmt: skip
PACKAGES: dict[str, tuple[Any, dict[str, Any], str | None]] = {  # class, arguments, paper
    "torch AdamW": (torch.optim.AdamW, {}, "adamw"),
    "torch AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}, "adamw"),
    "torch AdamW maximize": (torch.optim.AdamW, {"maximize": True}, "adamw"),
    "torch AdamW amsgrad, maximize, foreach": (
        torch.optim.AdamW,
        {"amsgrad": True, "maximize": True, "foreach": True},
        "adamw",
    ),
    "torch AdamW fused": (torch.optim.AdamW, {"fused": True}, "adamw"),
    "torch Adam": (torch.optim.Adam, {"weight_decay": 0.01}, "adam"),
    "torch Adam decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}, "adamw"),
    "torch SGD": (torch.optim.SGD, {"momentum": 0.9}, "sgd"),
    "torch SGD maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}, "sgd"),
    "torch SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True, "weight_decay": 1e-3}, "sgd"),
    "torch SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, None),
    "torch Muon": (torch.optim.Muon, {}, "muon"),
    "torch NAdam": (torch.optim.NAdam, {}, None),
    "torch Adagrad": (torch.optim.Adagrad, {}, None),
    "torch RMSprop": (torch.optim.RMSprop, {}, None),
    "torch RAdam": (torch.optim.RAdam, {}, None),
    "torch Adadelta": (torch.optim.Adadelta, {}, None),
    "torch NAdam decoupled": (torch.optim.NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}, None),
    "torch Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}, "adam"),
    "timm AdamWLegacy": (timm.optim.AdamWLegacy, {"lr": 1e-3}, "adamw"),
    "timm AdamWLegacy amsgrad": (timm.optim.AdamWLegacy, {"lr": 1e-3, "amsgrad": True}, "adamw"),
    "timm Adan": (timm.optim.Adan, {}, None),
    "timm SGDW": (timm.optim.SGDW, {"lr": 0.1, "momentum": 0.9}, None),
    "schedulefree AdamW": (schedulefree.AdamWScheduleFree, {}, None),
    "dlopt Muon": (optim.Muon, {}, "muon"),
    "dlopt SOAP": (optim.SOAP, {}, None),
    "dlopt SGDW": (optim.SGDW, {}, None),
}

CONFIRMED = {
    **dict.fromkeys(("torch SGD", "torch SGD maximize", "torch SGD nesterov"), "implementations"),
    "schedulefree AdamW": "missing gradients",
}
"""Failures of packages that plain PyTorch reproduces.

The fused SGD of torch 2.15 raises if the gradients of one parameter begin later; schedulefree divides gradients in
place.
"""


def planted(method: str, line: str, other: str) -> Any:
    """Returns the class of a method with a line replaced; it takes `foreach` if the method's name ends with it."""
    name, _, foreach = method.partition(" ")
    source = SOURCES[name]
    if not foreach:
        for text, none in ((", foreach=False", ""), (', "foreach": foreach', ""), ('group["foreach"]', "False")):
            source = source.replace(text, none)
    assert line in source, line
    namespace: dict[str, Any] = {"torch": torch}
    exec(source.replace(line, other, 1) if line else source, namespace)
    [found] = [each for each in namespace.values() if isinstance(each, type)]
    found.__module__ = __name__
    return found


def failed(target: Any, keys: Mapping[str, Any], paper: str | None) -> dict[str, str]:
    """Returns the checks that fail, with their reasons."""
    method = METHODS[paper] if paper is not None else known(target, keys)
    results = certify(Subject(target, keys), method)
    return {check.name: outcome.reason for check, outcome in results if outcome.status == "fail"}


@pytest.mark.parametrize(
    ("error", "check"),
    [
        ("decay of the wrong sign", "weight decay"),
        ("betas of group 0 in all groups", "reference"),
        ("decay 0 replaced by the default", "reference"),
        ("gradient changed in place", "missing gradients"),
        ("maximize also reverses the decay", "implementations"),
        ("closure called twice", "unusual input"),
        ("lr of group 0 in all groups", "rate zero"),
        ("muon: decay by the scaled lr", "weight decay"),
        ("sgd: duplicates of a sparse gradient are lost", "unusual input"),
    ],
)
def test_a_planted_error_is_caught_by_its_check(error: str, check: str) -> None:
    found = planted(*ERRORS[error])
    method = METHODS[ERRORS[error][0].split()[0]]
    [one] = [each for each in CHECKS if each.name == check]
    assert run(one, find(Subject(found, {})), method).status == "fail"


@pytest.mark.parametrize("check", ["reference", "weight decay", "unusual input"])
@pytest.mark.parametrize("name", ["torch AdamW amsgrad, maximize, foreach", "torch SGD foreach", "torch Muon"])
def test_a_right_variant_passes(name: str, check: str) -> None:
    target, keys, paper = PACKAGES[name]
    assert paper is not None
    [one] = [each for each in CHECKS if each.name == check]
    assert run(one, find(Subject(target, keys)), METHODS[paper]).status == "pass"


@pytest.mark.slow
def test_most_planted_errors_are_caught() -> None:
    passed = [name for name, error in ERRORS.items() if not failed(planted(*error), {}, error[0].split()[0])]
    assert len(ERRORS) == 40 and len(passed) <= 2, passed


@pytest.mark.slow
def test_no_right_variant_is_blamed() -> None:
    right = {name: (planted(*variant), {}, variant[0].split()[0]) for name, variant in REORDERED.items()} | PACKAGES
    failures = {name: list(failed(*variant)) for name, variant in right.items()}
    blamed = {name: checks for name, checks in failures.items() if checks and checks != [CONFIRMED.get(name)]}
    assert len(right.keys() - CONFIRMED.keys()) == 40 and not blamed, blamed
