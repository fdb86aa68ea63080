"""The optimizer that is verified: how it is built and driven, as functions and as text of plain PyTorch."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dlopt.extend import LossClosure
from dlopt.lab.verify.cases import pseudo_huber

MATRIX_AND_VECTOR = ((5, 4), (6,))  # timm's Muon takes no matrices below 4 x 4
MATRICES = ((5, 4), (4, 6))
_WIDTH = 260  # of a line of a reproduction

Target = Callable[..., torch.optim.Optimizer]


# -- ways to update; a reproduction holds one of them, under the name `update`


def by_gradients(o: Any, params: Any, loss: Any) -> Any:
    o.zero_grad()
    loss(params).backward()
    return o.step()


def by_closure(o: Any, params: Any, loss: Any) -> Any:
    o.zero_grad()
    loss(params).backward()  # pytorch-optimizer's SAM wants the first gradient in place
    return o.step(lambda: (o.zero_grad(), loss(params).backward(), loss(params))[-1])


def by_loss_closure(o: Any, params: Any, loss: Any) -> Any:
    return o.step(LossClosure(o, lambda: loss(params)))


def by_second_derivatives(o: Any, params: Any, loss: Any) -> Any:
    o.zero_grad()
    loss(params).backward(create_graph=True)
    return o.step()


WAYS = (by_gradients, by_closure, by_loss_closure, by_second_derivatives)


@dataclass(frozen=True)
class Subject:
    """An optimizer's class with its keyword arguments.

    Attributes:
        base: of a wrapper such as SAM: (argument, class, keyword arguments) of the optimizer inside.
        shapes: of the parameters: a matrix and a vector, or matrices only.
        marks_muon: whether groups need the key `use_muon`.
        update: one of `WAYS`.
    """

    target: Target
    keys: Mapping[str, Any]
    base: tuple[str, Target, Mapping[str, Any]] | None = None
    shapes: tuple[tuple[int, ...], ...] = MATRIX_AND_VECTOR
    marks_muon: bool = False
    update: Callable[..., Any] = by_gradients
    takes_groups: bool = True

    @property
    def name(self) -> str:
        return self.target.__name__

    def takes(self, key: str) -> bool:
        """Returns whether the constructor has this argument."""
        parameters = inspect.signature(self.target).parameters
        return key in parameters or (self.base is not None and key in inspect.signature(self.base[1]).parameters)

    def default(self, key: str) -> Any:
        """Returns the value of an argument: from `keys`, or the default; None if there is none."""
        parameter = inspect.signature(self.target).parameters.get(key)
        default = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        return self.keys.get(key, default)

    @property
    def maximizes(self) -> bool:
        """Whether the optimizer ascends; its updates then get the negated loss."""
        base = self.base[2] if self.base is not None else {}
        return bool(base.get("maximize", self.default("maximize")))

    def make(self, params: Any, **keys: Any) -> torch.optim.Optimizer:
        """Builds the optimizer for tensors or groups; `keys` replace the subject's keys."""
        if self.marks_muon:
            groups = [each if isinstance(each, dict) else {"params": [each]} for each in params]
            params = [{"use_muon": each["params"][0].ndim > 1, **each} for each in groups]
        if self.base is None:
            optimizer = self.target(params, **{**self.keys, **keys})
        else:
            argument, target, own = self.base
            optimizer = self.target(**{argument: target(params, **{**own, **keys})}, **self.keys)
        getattr(optimizer, "train", lambda: None)()
        return optimizer

    def fresh(self, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
        """Returns parameters, whose values have few enough bits for every type."""
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(s, dtype=torch.float64).bfloat16().to(dtype)) for s in self.shapes]

    # -- text

    def head(self) -> list[str]:
        """Returns the lines that import and define `make`."""
        built = f"{self.target.__name__}({'marked(params)' if self.marks_muon else 'params'}, "
        built += f"**{{**{literal(self.keys)}, **keys}})" if self.keys else "**keys)"
        imports = ["import contextlib, copy, io, torch", _import(self.target)]
        if self.base is not None:
            argument, base, own = self.base
            imports.append(_import(base))
            inner = f"{base.__name__}(params, **{{**{literal(own)}, **keys}})"
            built = f"{self.target.__name__}({argument}={inner}, **{literal(self.keys)})"
        if self.update is by_loss_closure:
            imports.append("from dlopt.optim import LossClosure")
        if self.marks_muon:
            imports.append(
                "marked = lambda params: [{'use_muon': g['params'][0].ndim > 1, **g} for g in "
                "[p if isinstance(p, dict) else {'params': [p]} for p in params]]"
            )
        if hasattr(self.target, "train"):
            built = f"(o := {built}, o.train())[0]"
        return ["; ".join(imports), f"make = lambda params, **keys: {built}"]

    def text(self, loss: Callable[..., Any]) -> list[str]:
        """Returns lines of PyTorch that define make, loss, fresh and update."""
        imports, make = self.head()
        [value] = source(loss)
        body = source(self.update)
        if self.maximizes:
            body = ["minimized, loss = loss, lambda params: -minimized(params)", *body]
        return [
            imports,
            f"{make}; loss = lambda params: {value.removeprefix('return ')}",
            "fresh = lambda dtype=torch.float64: torch.manual_seed(0) and [torch.nn.Parameter("
            f"torch.randn(s, dtype=torch.float64).bfloat16().to(dtype)) for s in {list(self.shapes)}]",
            f"def update(o, params, loss=loss): {'; '.join(body)}",
        ]


def _import(target: Target) -> str:
    return f"from {target.__module__} import {target.__name__}"


def literal(value: Any) -> str:
    """Returns an expression for a plain value, a class or a function."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {literal(each)}" for name, each in value.items()) + "}"
    if isinstance(value, type) and value.__module__.startswith("torch.optim"):
        return f"torch.optim.{value.__name__}"
    return repr(value)


def source(function: Callable[..., Any]) -> list[str]:
    """Returns the text of a function's body, without comments, docstring and type annotations."""
    [parsed] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(parsed, ast.FunctionDef)
    return _joined([each for each in parsed.body if each is not parsed.body[0] or ast.get_docstring(parsed) is None])


def definition(function: Callable[..., Any]) -> list[str]:
    """Returns the text of a function."""
    names = ", ".join(
        str(each.replace(annotation=inspect.Parameter.empty))
        for each in inspect.signature(function).parameters.values()
    )
    return [f"def {function.__name__}({names}):", *(f"    {line}" for line in source(function))]


def _joined(statements: list[ast.stmt]) -> list[str]:
    """Returns statements as text, several simple ones in a line."""
    lines: list[str] = []
    simple: list[str] = []

    def close() -> None:
        if simple:
            lines.append("; ".join(simple))
            simple.clear()

    for statement in statements:
        text = ast.unparse(statement).replace(", strict=True", "")
        if isinstance(statement, ast.For | ast.With | ast.If):
            close()
            head, inner = text.partition("\n")[0], _joined(statement.body)
            is_plain = len(inner) == 1 and not isinstance(statement.body[0], ast.For | ast.With | ast.If)
            lines += [f"{head} {inner[0]}"] if is_plain else [head, *(f"    {line}" for line in inner)]
        else:
            if sum(map(len, simple)) + len(text) > _WIDTH:
                close()
            simple.append(text)
    close()
    return lines


# -- finding out how to drive an optimizer


def find(subject: Subject) -> Subject:
    """Returns the subject with the shapes, groups and the way to update with which an update succeeds.

    Raises the error of the first trial if none does.
    """
    first: Exception | None = None
    for shapes, marks in ((MATRIX_AND_VECTOR, False), (MATRICES, False), (MATRIX_AND_VECTOR, True)):
        for way in WAYS:
            trial = replace(subject, shapes=shapes, marks_muon=marks, update=way)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _try(trial)
            except Exception as error:
                first = first or error
                continue
            return replace(trial, takes_groups=_takes_groups(trial))
    assert first is not None
    raise first


def _try(subject: Subject) -> None:
    params = subject.fresh()
    before = [p.detach().clone() for p in params]
    optimizer = subject.make(params)
    for _ in range(12):
        subject.update(optimizer, params, pseudo_huber)
    if all(torch.equal(p, b) for p, b in zip(params, before, strict=True)):
        raise RuntimeError("twelve updates change nothing")


def _takes_groups(subject: Subject) -> bool:
    try:
        subject.make([{"params": [p]} for p in subject.fresh()])
    except Exception:
        return False
    return True
