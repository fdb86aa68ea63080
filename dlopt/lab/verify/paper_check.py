"""Compares the updates of an optimizer with its paper's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dlopt.lab.verify.methods import Method, arguments_of
from dlopt.lab.verify.outcome import CheckOutcome
from dlopt.lab.verify.subject import Subject, by_gradients, literal

UPDATES = 8


def compare(subject: Subject, method: Method | None) -> CheckOutcome:
    """Compares every update of a matrix and of a vector, from the same gradients, in float64."""
    if method is None or method.formula is None:
        return CheckOutcome("not applicable", "dlopt has no reference; name one by paper=NAME")
    if subject.update is not by_gradients:
        return CheckOutcome("not applicable", "evaluates the loss itself")
    keys, absent = arguments_of(method, subject.takes)
    if absent:
        return CheckOutcome("not applicable", f"no argument for {', '.join(absent)}")
    draw = np.random.default_rng(0)
    for shape in ((5, 4), (4, 5)) if method.matrices else ((3, 2), (3,)):
        start, *gradients = draw.normal(size=(UPDATES + 1, *shape)).round(2)
        p = nn.Parameter(torch.tensor(start))
        optimizer = subject.make([p], **keys)
        for number, expected in enumerate(method.formula(start, list(gradients)), 1):
            p.grad = torch.tensor(gradients[number - 1])
            optimizer.step()
            gap, way = abs(p.detach().numpy() - expected).max(), abs(expected - start).max()
            if not gap <= method.tolerance * way + 1e-12:
                found = (
                    f"update {number} of a tensor {list(shape)}: {gap:.2g} from the paper's, {way:.2g} from the start"
                )
                text = _text(subject, keys, start, gradients[:number], expected, method.tolerance * way + 1e-12)
                return CheckOutcome("fail", f"{found}; {method.source}", "\n".join(text))
    return CheckOutcome("pass", method.source)


def _text(
    subject: Subject, keys: Mapping[str, Any], start: Any, gradients: Any, expected: Any, bound: float
) -> list[str]:
    imports, make = subject.head()
    return [
        imports,
        make,
        f"p = torch.nn.Parameter(torch.tensor({start.tolist()}, dtype=torch.float64))",
        f"o = make([p], **{literal(dict(keys))})",
        f"for g in {[each.tolist() for each in gradients]}: p.grad = torch.tensor(g, dtype=torch.float64); o.step()",
        f"expected = torch.tensor({expected.tolist()}, dtype=torch.float64)",
        f"assert (p - expected).abs().max() <= {bound:.3g}, (p - expected).abs().max()",
    ]
