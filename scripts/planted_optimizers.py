#!/usr/bin/env python
"""Plants errors in optimizers and counts which of them `dlopt verify` catches.

.venv/bin/python scripts/planted_optimizers.py [--seed N] [--errors 40] [--right 30] [--out FILE.json]
.venv/bin/python scripts/planted_optimizers.py --prove    no error is equivalent, no right variant differs

An error is a change of text in a correct optimizer, a right variant one without an effect. The seed draws both. Each is
certified with the paper and without, and printed reproductions run in a new interpreter. `--show` adds the texts, which
authors of the checks should not read. The proof: an error differs from its base by more than 1e-6 (relative, or by an
exception) in the scenario that it names, a right variant by at most 1e-9 in all that it does not refuse, in float64.
"""

import argparse
import copy
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dlopt.lab.verify.command import certify  # noqa: E402
from dlopt.lab.verify.methods import METHODS  # noqa: E402
from dlopt.lab.verify.subject import Subject  # noqa: E402

HEAD = """\
import math

import torch


class NAME(torch.optim.Optimizer):
    def __init__(self, params, SIGNATURE, maximize=False):
        super().__init__(params, dict(DEFAULTS, maximize=maximize))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad(): loss = closure()
        for group in self.param_groups:
"""
LOOP = """\
            for p in group["params"]:
                if p.grad is None: continue
                w, grad = p, -p.grad if group["maximize"] else p.grad
                if p.is_complex(): w, grad = torch.view_as_real(p), torch.view_as_real(grad)
                self.update(w, grad, self.state[p], group)
        return loss

    def update(self, w, grad, state, group):
        lr = group["lr"]
"""
MOMENTS = """\
        beta1, beta2 = group["betas"]
        if not state: state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
        state["step"] += 1
        step, exp_avg, exp_avg_sq = state["step"], state["exp_avg"], state["exp_avg_sq"]
        if group["weight_decay"]: grad = grad.add(w, alpha=group["weight_decay"])
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
"""
UPDATES = """\
adam: lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False
LOOP
MOMENTS
        second = exp_avg_sq
        if group["amsgrad"]:
            if "max_exp_avg_sq" not in state: state["max_exp_avg_sq"] = torch.zeros_like(w)
            second = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq, out=state["max_exp_avg_sq"])
        denom = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        w.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step))
adamw: lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, foreach=True
            params = [p for p in group["params"] if p.grad is not None]
            for batch in [params] if group["foreach"] else [[p] for p in params]:
                if batch: self.update(batch, [p.grad for p in batch], group)
        return loss

    def update(self, params, grads, group):
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        if group["maximize"]: grads = torch._foreach_neg(grads)
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state: state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        lists = params, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        params, grads, means, squares = ([torch.view_as_real(x) if x.is_complex() else x for x in y] for y in lists)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denoms = torch._foreach_sqrt(squares)
        torch._foreach_div_(denoms, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(denoms, group["eps"])
        torch._foreach_addcdiv_(params, means, denoms, [-lr / (1 - beta1 ** state["step"]) for state in states])
sgd: lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False
LOOP
        momentum, buf = group["momentum"], state.get("momentum_buffer")
        if group["weight_decay"]: grad = grad.add(w, alpha=group["weight_decay"])
        if momentum != 0:
            if buf is None: buf = state["momentum_buffer"] = grad.clone()
            else: buf.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            grad = grad.add(buf, alpha=momentum) if group["nesterov"] else buf
        w.add_(grad, alpha=-lr)
rmsprop: lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False
LOOP
        alpha = group["alpha"]
        if not state: state.update((key, torch.zeros_like(w)) for key in ("square_avg", "grad_avg", "buf"))
        if group["weight_decay"]: grad = grad.add(w, alpha=group["weight_decay"])
        second = state["square_avg"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        mean = state["grad_avg"].lerp_(grad, 1 - alpha)
        if group["centered"]: second = second.addcmul(mean, mean, value=-1)
        denom = second.sqrt().add_(group["eps"])
        if group["momentum"]: w.add_(state["buf"].mul_(group["momentum"]).addcdiv_(grad, denom), alpha=-lr)
        else: w.addcdiv_(grad, denom, value=-lr)
adagrad: lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10
LOOP
        if not state: state.update(step=0, sum=torch.full_like(w, group["initial_accumulator_value"]))
        state["step"] += 1
        if group["weight_decay"]: grad = grad.add(w, alpha=group["weight_decay"])
        rate = lr / (1 + (state["step"] - 1) * group["lr_decay"])
        state["sum"].addcmul_(grad, grad, value=1)
        w.addcdiv_(grad, state["sum"].sqrt().add_(group["eps"]), value=-rate)
lion: lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0
LOOP
        beta1, beta2 = group["betas"]
        if not state: state["exp_avg"] = torch.zeros_like(w)
        exp_avg = state["exp_avg"]
        w.mul_(1 - lr * group["weight_decay"])
        update = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
        w.add_(update, alpha=-lr)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
nadam: lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, momentum_decay=4e-3
LOOP
MOMENTS
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (n * group["momentum_decay"])) for n in (step, step + 1))
        product = state["mu_product"] = state.get("mu_product", 1.0) * mu
        denom = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
        w.addcdiv_(grad, denom, value=-lr * (1 - mu) / (1 - product))
        w.addcdiv_(exp_avg, denom, value=-lr * mu_next / (1 - product * mu_next))
"""
# Kind: base scenario: old => new ; ... `||` separates errors of the same text, `&&` the changes of one.
ERRORS = r"""
bias: adam plain: math.sqrt(1 - beta2**step) => (1 - beta2**step) || 1.0 ; adam plain: -lr / (1 - beta1**step) => -lr \
; adam small: / math.sqrt(1 - beta2**step)).add_(group["eps"]) => + group["eps"]) / math.sqrt(1 - beta2**step) ; nadam \
plain: (1 - product * mu_next) => (1 - product) || (1 - mu_next) ; adamw plain: math.sqrt(1 - beta2 ** state["step"]) \
=> math.sqrt(1 - beta2 ** (state["step"] + 1))
buffers: sgd reused: grad.clone() => grad ; sgd plain: grad.add(buf, alpha=momentum) if => \
buf.mul_(momentum).add_(grad) if ; adam plain: state["max_exp_avg_sq"] = torch.zeros_like(w) => \
state["max_exp_avg_sq"] = exp_avg_sq ; adam plain: , out=state["max_exp_avg_sq"]) => ) ; nadam plain: \
exp_avg.lerp_(grad => exp_avg = exp_avg.lerp(grad ; adagrad plain: ["sum"].sqrt() => ["sum"].sqrt_() ; adagrad \
schedule: "] += 1 => "] += 1; state["sum"].mul_(state.get("lr", lr) == lr); state["lr"] = lr ; rmsprop plain: \
torch.zeros_like(w) => torch.ones_like(w)
groups: adam groups: beta1, beta2 = group["betas"] => beta1, beta2 = self.param_groups[0]["betas"] ; sgd groups: in \
self.param_groups: => in self.param_groups[:1]: ; nadam groups: lr = group["lr"] => lr = self.defaults["lr"] ; lion \
added: maximize)) => maximize)); self.groups = list(self.param_groups) && self.param_groups: => self.groups: ; lion \
plain: w.mul_(1 - lr => if w.ndim > 1: w.mul_(1 - lr ; adagrad plain: state["step"] += 1 => state["step"] = \
group["count"] = group.get("count", 0) + 1 ; adamw groups: float(group["lr"]) => float(self.param_groups[0]["lr"])
dtypes: adam huge: exp_avg_sq=torch.zeros_like(w) => exp_avg_sq=torch.zeros(w.shape) ; adam long: step=0 => \
step=torch.zeros((), dtype=torch.int8) && = state["step"], => = int(state["step"]), ; adam zero: add_(group["eps"]) => \
add_(torch.tensor(group["eps"], dtype=torch.float16)) ; rmsprop plain: ["square_avg"].mul_ => \
["square_avg"].copy_(state["square_avg"].half()).mul_ ; lion long: torch.zeros_like(w) => torch.zeros_like(w, \
dtype=torch.bfloat16) ; sgd plain: w.add_(grad => w.float().add_(grad ; adagrad float32: w.addcdiv_(grad => \
w.double().addcdiv_(grad ; nadam plain: step=0 => step=torch.zeros((), dtype=torch.bfloat16)
layouts: sgd layout: w.add_(grad, => w.reshape(-1).add_(grad.reshape(-1), ; rmsprop plain: w.addcdiv_( => w.data = \
w.addcdiv( ; lion layout: exp_avg = state => grad = torch.as_strided(grad, w.shape, w.stride()); exp_avg = state ; \
adam layout: exp_avg.lerp_(grad => exp_avg.view(-1).lerp_(grad.reshape(-1)
order: adamw plain: 1 - lr * group => 1 - group ; adamw plain: torch._foreach_mul_(params, 1 - lr * => grads = \
torch._foreach_add(grads, params, alpha= ; sgd plain: grad.add(buf, alpha=momentum) => buf.add(grad, alpha=momentum) ; \
sgd plain: grad.clone() => grad.mul(1 - group["dampening"]) ; rmsprop small: second.sqrt().add_(group["eps"]) => \
second.add(group["eps"]).sqrt_() ; adagrad plain: (state["step"] - 1) => state["step"] ; adam plain: grad = \
grad.add(w, alpha=group["weight_decay"]) => w.mul_(1 - lr * group["weight_decay"])
state: adam resume: def load_state_dict(self, d): super().load_state_dict(d); [s.update(step=0) for s in \
self.state.values()] ; sgd resume: def state_dict(self): return dict(super().state_dict(), state={}) ; sgd resume: def \
load_state_dict(self, d): super().load_state_dict(dict(d, state=dict([*d["state"].items()][:2]))) ; lion deepcopy: = \
state["exp_avg"] => = self.__dict__.setdefault("b", {}).setdefault(id(w), torch.zeros_like(w)) ; adam missing: = \
state["step"], => = next(iter(self.state.values()))["step"], ; adagrad pickle: def __getstate__(self): return \
dict(super().__getstate__(), state=type(self.state)(dict))
closures: adam closure: with torch.enable_grad(): => with torch.no_grad(): ; sgd closure: loss = closure() => \
closure(); loss = closure() ; adamw closure: return loss => return None ; adagrad closure: @torch.no_grad()\n    def \
=> def && loss = None => loss = torch.set_grad_enabled(False) and None
schedules: adam schedule: super() => self.lr = lr; super() && lr = group["lr"] => lr = self.lr ; adamw schedule: 1 - \
lr * => 1 - self.defaults["lr"] * || 1 - lr * lr / self.defaults["lr"] * ; lion schedule: 1 - lr * group => 1 - \
group.setdefault("first", lr) * group ; rmsprop schedule: alpha = group["alpha"] => alpha = \
group.setdefault("first_alpha", group["alpha"]) ; nadam schedule: lr = group["lr"] => lr = group.get("used", \
group["lr"]); group["used"] = group["lr"]
missing: adam missing: continue => break ; sgd missing: continue => p.grad = torch.zeros_like(p) ; nadam missing: \
continue => return loss ; rmsprop missing: continue => self.state.pop(p, None); continue ; lion zero: if p.grad is \
None => if p.grad is None or not p.grad.any()
maximize: sgd maximize: alpha=-lr) => alpha=lr if group["maximize"] else -lr) ; adam maximize: -p.grad if => p.grad if \
&& value=-lr => value=(lr if group["maximize"] else -lr) ; lion groups: if group["maximize"] => if \
self.defaults["maximize"] ; adamw maximize: if group["maximize"]: => if group["maximize"] and not group["foreach"]:
random: lion plain: .sign_() => .add_(torch.rand_like(w), alpha=1e-12).sign_() ; sgd plain: super() => \
torch.manual_seed(0); super() ; rmsprop plain: w.addcdiv_(grad, => w.add_(torch.randn_like(w), alpha=lr / \
1000).addcdiv_(grad,
gradients: adam plain: grad = grad.add( => grad.add_( ; nadam maximize: -p.grad if => p.grad.neg_() if ; rmsprop \
plain: w.addcdiv_(grad, denom, value=-lr) => w.add_(grad.div_(denom), alpha=-lr) ; adamw maximize: grads = \
torch._foreach_neg( => torch._foreach_neg_( ; sgd plain: w.add_(grad, alpha=-lr) => w.sub_(grad.mul_(lr)) ; lion \
plain: self.state[p], group) => self.state[p], group); p.grad = None
late: adam long: = state["step"], => = min(state["step"], 100), ; adam long: exp_avg.lerp_( => exp_avg.mul_(step != \
30).lerp_( ; adamw long: params, 1 - lr * => params, 1 - (states[0]["step"] <= 200) * lr * ; adagrad long: grad, grad, \
value=1 => grad, grad, value=float(state["step"] <= 64) ; nadam long: = state.get("mu_product", 1.0) * mu => = \
max(state.get("mu_product", 1.0) * mu, 1e-3)
clips: adam spike: w.addcdiv_(exp_avg, denom, value= => w.add_((exp_avg / denom).clamp_(-1, 1), alpha= ; sgd large: \
w.add_(grad => w.add_(grad.clamp(-10, 10) ; rmsprop small: add_(group["eps"]) => clamp_min_(1e-3) ; lion long: \
w.add_(update, alpha=-lr) => w.add_(update, alpha=-lr).clamp_(-1, 1)
inputs: adam complex: if p.is_complex(): => if False: ; rmsprop plain: if p.grad is None => if p.grad is None or \
p.ndim == 0 ; sgd sparse: w, grad = p, => if p.grad.is_sparse: w[p.grad._indices()[0]] -= group["lr"] * \
p.grad._values(); continue\n                w, grad = p, ; adagrad empty: if p.grad is None => if p.grad is None or \
p.grad.abs().max() == 0 ; lion complex: if p.is_complex(): => if False: && .sign_() => .sgn_() ; adamw complex: \
torch.view_as_real(x) if => x.real if
foreach: adamw missing: 2 ** state["step"]) for => 2 ** states[0]["step"]) for ; adamw plain: \
torch._foreach_sqrt(squares) => squares; torch._foreach_sqrt_(denoms) ; adamw plain: [params] if => [params[i : i + 2] \
for i in range(0, len(params) - 1, 2)] if
"""
# Of a base, a class of torch or changes; `*>` changes all places.
RIGHT = r"""
right: adam: ; adamw: ; sgd: ; rmsprop: ; adagrad: ; lion: ; nadam: ; adam: Adam ; adamw: AdamW ; sgd: SGD ; rmsprop: \
RMSprop ; adagrad: Adagrad ; adam: / math.sqrt(1 - beta2**step)).add_(group["eps"]) => + group["eps"] * math.sqrt(1 - \
beta2**step)) && -lr / (1 - beta1**step) => -lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) ; adam: \
w.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1**step)) => w.sub_(lr * (exp_avg / (1 - beta1**step)) / denom) ; \
adam: exp_avg.lerp_(grad, 1 - beta1) => exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1) ; adam: \
mul_(beta2).addcmul_(grad, grad, value=1 - beta2) => lerp_(grad.square(), 1 - beta2) ; adam: step=0 => \
step=torch.tensor(0.0) && = state["step"], => = state["step"].item(), ; adam: "exp_avg_sq" *> "v" && "exp_avg" *> "m" \
&& exp_avg=torch *> m=torch && exp_avg_sq=torch *> v=torch ; adam: in group["params"] => in reversed(group["params"]) \
; nadam: -p.grad if => p.grad * -1 if ; adam: maximize)) => maximize))\n        for p in (p for g in self.param_groups \
for p in g["params"]):\n            w = torch.view_as_real(p) if p.is_complex() else p\n            \
self.state[p].update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w)) ; adam: \
exp_avg=torch.zeros_like(w) => exp_avg=w.new_zeros(w.numel()) && state["exp_avg"], => state["exp_avg"].view_as(w), ; \
adam: exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w) => both=torch.stack([torch.zeros_like(w)] * 2) && \
state["exp_avg"], state["exp_avg_sq"] => *state["both"] ; adam: w.addcdiv_(exp_avg, denom, => \
w.copy_(w.double().addcdiv_(exp_avg.double(), denom.double(), && 1**step) => 1**step)) ; adam: lr = group["lr"] => lr \
= torch.as_tensor(group["lr"], dtype=torch.float64) ; adam: exp_avg.lerp_( => exp_avg = state["exp_avg"] = \
exp_avg.lerp( ; nadam: ("mu_product", 1.0) => ("mu_product", torch.ones((), dtype=torch.float64)) ; adagrad: p, \
-p.grad if => p.data, -p.grad.data if ; lion: exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_() => \
torch.lerp(exp_avg, grad, 1 - beta1).sign() ; lion: .sign_() => \n        update = torch.where(update > 0, 1.0, \
torch.where(update < 0, -1.0, 0.0)).to(w) ; lion: exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2) => exp_avg.add_(grad \
- exp_avg, alpha=1 - beta2) ; sgd: grad.clone() => torch.zeros_like(grad).add_(grad) ; sgd: w.add_(grad, alpha=-lr) => \
torch._foreach_add_([w], [grad], alpha=-lr) ; sgd: loss = None => loss = closure and torch.enable_grad()(closure)() && \
if closure is not None => if False ; rmsprop: second.sqrt() => second.pow(0.5) ; adagrad: ["sum"].addcmul_(grad, grad, \
value=1) => ["sum"].add_(grad * grad) ; rmsprop: def __setstate__(self, d): super().__setstate__(d); \
[g.setdefault("maximize") for g in self.param_groups] ; rmsprop: def step(self, closure=None): return \
self._step(closure) && @torch.no_grad()\n    def step( => @torch.no_grad()\n    def _step( ; adagrad: def step(self, \
closure=None): loss = closure and closure(); self.apply(); return loss && @torch.no_grad()\n    def step( => \
@torch.no_grad()\n    def apply( ; adamw: torch._foreach_mul_(params, 1 - lr * group["weight_decay"]) => \
torch._foreach_sub_(params, torch._foreach_mul(params, lr * group["weight_decay"])) ; adamw: foreach=True => \
foreach=False ; adamw: [params] if => [params[::2], params[1::2]] if
"""
OTHER: dict[str, Any] = {"lr": 0.05, "betas": (0.5, 0.7), "momentum": 0.5, "alpha": 0.7, "weight_decay": 0.2}
FAST: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}
OPTIONS: dict[str, list[dict[str, Any]]] = {  # of each scenario, in addition to the defaults; FAST for other bases
    "adam": [FAST, {"amsgrad": True, "weight_decay": 0.1}],
    "adamw": [FAST, {"foreach": False}],
    "sgd": [{"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}],
    "rmsprop": [{"momentum": 0.9, "weight_decay": 0.1}, {"alpha": 0.9, "centered": True}],
    "adagrad": [{"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}],
}
SCENARIOS = """plain long float32 small large huge spike zero missing first groups added resume deepcopy pickle schedule
maximize layout complex empty sparse reused tensor closure"""
Variant = tuple[str, str, str, str]  # kind, base, scenario, changes


def changed(base: str, text: str) -> str:
    if text.isalnum():
        return f"from torch import optim\n\n\nclass NAME(optim.{text}):\n    pass\n"
    signature, body = re.findall(rf"(?m)^{base}: (.*)\n((?:[ A-Z].*\n|\n)+)", UPDATES)[0]
    source = HEAD.replace("DEFAULTS", re.sub(r"(\w+)=(\(.*?\)|[^,]+)", r"\1=\1", signature))
    source = source.replace("SIGNATURE", signature) + body.replace("LOOP\n", LOOP).replace("MOMENTS\n", MOMENTS)
    for change in text.split(" && ") if text else []:
        change = f"@torch => {change}\\n\\n    @torch" if change.startswith("def ") else change
        old, sign, new = re.split(r" (=>|\*>) ?", change.replace(r"\n", "\n"), maxsplit=1)
        assert source.count(old) == 1 or (sign == "*>" and old in source), (base, old)
        source = source.replace(old, new)
    return source


def variants(pool: str) -> list[Variant]:
    found = []
    for line in pool.replace("\\\n", "").strip().splitlines():
        kind, entries = line.split(": ", 1)
        for base, scenario, text in re.findall(r"(\w+) ?(\w*):(.*?)(?: ; ?(?=\w+ ?\w*:)|$)", entries):
            first, *others = text.strip(" ").split(" || ")
            texts = [first, *(f"{first.split(' => ')[0]} => {other}" for other in others)]
            found += [(kind, base, scenario, x) for x in texts]
    return found


def run(name: str, cls: type, options: dict[str, Any]) -> list[Tensor]:
    """The parameters after the updates of a scenario, whether their memory is the same, gradients, random numbers."""
    torch.manual_seed(7)
    dtype = torch.complex128 if name == "complex" else torch.float64
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=dtype)
    shapes: Any = {"empty": [(0, 3), (1,), (2, 2)], "sparse": [(6, 3)]}.get(name, [(3, 4), (5,), (), (3, 4), (2,)])
    starts = [0.1 * draw(shape) for shape in shapes]
    if name == "layout":
        starts = [x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[..., 0] for x in starts]
    starts = [x.float() if name == "float32" else x for x in starts]
    params: list[Tensor] = [torch.nn.Parameter(x) for x in starts]
    more: Any = {"maximize": {"maximize": True}, "tensor": {"lr": torch.tensor(0.01, dtype=torch.float64)}}
    new = partial(cls, **{**options, **more.get(name, {})})
    other = {key: value for key, value in OTHER.items() if key in new(params).defaults}
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "maximize": True, **other}]
    optimizer = new(groups if name in ("groups", "first") else params[:2] if name == "added" else params)
    loss, seen = torch.tensor(1.0), []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        for p in params:
            p.grad = draw(p.shape)
        return loss

    for k in range(300 if name in ("long", "spike") else 8):
        scales = {"small": 1e-7, "large": 1e3, "huge": 1e25, "zero": k % 3, "spike": 1e4 if k == 250 else 1}
        for i, p in enumerate(params):
            g = draw(p.shape).to(p.dtype) * scales.get(name, 1)
            grad = torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), g[:3], g.shape) if name == "sparse" else g
            if name == "reused" and p.grad is not None:
                p.grad.copy_(grad)
            else:
                p.grad = None if (name == "missing" and (k + i) % 3 == 0) or (name == "first" and i < 2) else grad
        optimizer.param_groups[0]["lr"] *= 1 - k / 20 if name in ("schedule", "resume") else 1
        if k == 4 and name == "added":
            optimizer.add_param_group({"params": params[2:]})
        elif k == 4 and name == "schedule":
            optimizer.param_groups[0].update({key: value for key, value in other.items() if key != "lr"})
        elif k == 4 and name == "resume":
            torch.save(optimizer.state_dict(), file := io.BytesIO())
            optimizer = new(params)
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        elif k == 4 and name in ("deepcopy", "pickle"):
            optimizer = copy.deepcopy(optimizer) if name == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                p.grad, params[i] = params[i].grad, p
        seen += [optimizer.step(closure if name == "closure" else None) is loss, torch.is_grad_enabled()]
        torch.set_grad_enabled(True)
    seen += [p.data_ptr() == x.data_ptr() for p, x in zip(params, starts, strict=True)]
    grads = [torch.tensor(-1.0) if p.grad is None else p.grad.to_dense() for p in params]
    return [*(p.detach() for p in params), torch.tensor(seen).double(), *grads, torch.rand(2)]


def distance(name: str, pair: list[type], options: dict[str, Any]) -> float | str:
    """The largest difference relative to the largest element, or the exception of the second class alone."""
    results: list[Any] = []
    for one in pair:
        try:
            results.append(run(name, one, options))
        except Exception as error:
            results.append(type(error).__name__)
    if isinstance(results[0], str) or isinstance(results[1], str):
        return 0.0 if isinstance(results[0], str) else results[1]
    pairs = [(x, y) for x, y in zip(*results, strict=True) if not x.equal(y)]
    if any(x.shape != y.shape or not x.isnan().equal(y.isnan()) for x, y in pairs):
        return torch.inf
    return max([0.0, *(float((x - y).nan_to_num().abs().max() / x.nan_to_num().abs().max()) for x, y in pairs)])


def prove(tasks: list[tuple[str, Variant]]) -> int:
    wrong = 0
    for name, (kind, base, own, text) in tasks:
        for scenario in [own] if own else SCENARIOS.split():
            pair = [getattr(importlib.import_module(x.lower()), x) for x in (base.title(), name)]
            found = [distance(scenario, pair, options) for options in ({}, *OPTIONS.get(base, [FAST]))]
            refused = [x for x in found if isinstance(x, str)]
            largest = max([0.0, *(x for x in found if not isinstance(x, str))])
            bad = largest <= 1e-6 and not refused if own else largest > 1e-9 and scenario != "float32"
            wrong += bad
            if bad or (refused and not own):
                print("WRONG" if bad else "refuses", scenario, refused or largest, kind, base, text)
    print(f"{dict(Counter(kind for _, (kind, *_) in tasks))}: {wrong} wrong")
    return wrong


def reproduces(text: str, reason: str, folder: str) -> bool:
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, cwd=folder)
    error, _, message = (done.stderr.strip().splitlines() or [""])[-1].partition(": ")
    return done.returncode != 0 and (error == "AssertionError" or error in reason or (message or error)[:40] in reason)


def alike(outcome: Any) -> tuple[str, str]:
    return outcome.status, re.sub(r"[-+.\d]+(e[-+]\d+)?", "", outcome.reason)


def results_of(name: str, method: str) -> list[list[tuple[Any, Any]]]:
    """The checks and outcomes of a class, with the paper of a method and without."""
    subject = Subject(getattr(importlib.import_module(name.lower()), name), {})
    return [certify(subject, paper) for paper in (METHODS[method], None)]


def certificate(folder: str, bases: dict[str, Any], task: tuple[str, Variant]) -> dict[str, Any]:
    """The checks that fail beyond the base's, with and without the paper, and which reproductions raise as they should.

    A base may have errors of its own: the sign of Lion hides a NaN.
    """
    name, (kind, base, _, _) = task
    row: dict[str, Any] = {"name": name, "kind": kind, "method": base, "right": kind == "right", "reproduced": {}}
    for key, results, of_base in zip(("with", "without"), results_of(name, base), bases[base], strict=True):
        failed = [(check.name, outcome) for check, outcome in results if outcome.status == "fail"]
        failed = [each for each in failed if alike(each[1]) not in of_base]
        row[key] = {each: outcome.reason for each, outcome in failed}
        for _, outcome in failed:
            text = outcome.reproduction
            if text and text not in row["reproduced"]:
                row["reproduced"][text] = reproduces(text, outcome.reason, folder)
    return row


def certificates_of_base(base: str) -> list[set[tuple[str, str]]]:
    return [{alike(outcome) for _, outcome in results} for results in results_of(base.title(), base)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, number in (("--seed", 0), ("--errors", 40), ("--right", 30)):
        parser.add_argument(flag, type=int, default=number)
    parser.add_argument("--out", type=Path)
    for flag in ("--show", "--prove"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, rng, errors, right = time.monotonic(), random.Random(args.seed), variants(ERRORS), variants(RIGHT)
    chosen = errors + right
    if not args.prove:
        rng.shuffle(errors)
        of_kinds = list({variant[0]: variant for variant in errors}.values())
        chosen = (of_kinds + [x for x in errors if x not in of_kinds])[: args.errors] + rng.sample(right, args.right)
        rng.shuffle(chosen)
    tasks = [(f"V{number:03d}", variant) for number, variant in enumerate(chosen, 1)]
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, base, _, text) in tasks + [(x[1].title(), x) for x in right if not x[3]]:
            Path(folder, f"{name.lower()}.py").write_text(changed(base, text).replace("NAME", name))
        sys.path.insert(0, folder)
        if args.prove:
            return prove(tasks)
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            names = sorted({base for _, (_, base, _, _) in tasks})
            bases = dict(zip(names, pool.map(certificates_of_base, names, chunksize=1), strict=True))
            rows = []
            for row in pool.imap(partial(certificate, folder, bases), tasks, chunksize=1):
                rows.append(row)
                found = [f"{key} paper: {', '.join(row[key]) or 'no'}" for key in ("with", "without")]
                print(row["name"], row["method"], row["kind"], *found, sep="  ", flush=True)
    totals = Counter[str]()
    for row, (*_, text) in zip(rows, chosen, strict=True):
        row |= {"text": text} if args.show else {}
        of, count = ("right", "blamed") if row["right"] else ("errors", "caught")
        totals.update({of: 1, f"{count} with paper": bool(row["with"]), f"{count} without": bool(row["without"])})
        totals.update("reproduced" if works else "not reproduced" for works in row["reproduced"].values())
    print(json.dumps(totals, indent=1), f"{time.monotonic() - start:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, "totals": totals, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
