"""Compares the updates of an optimizer with its paper's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dlopt.lab.verify.cases import ABSENT, MATRIX_SHAPES, SHAPES, updates_in_groups
from dlopt.lab.verify.methods import DECOUPLED, Method, arguments_of, name_in
from dlopt.lab.verify.outcome import CheckOutcome
from dlopt.lab.verify.references import Array, Formula, decoupled, penalized
from dlopt.lab.verify.subject import Subject, by_gradients, definition, literal

SECOND = {"lr": 0.5, "weight_decay": 0.1}  # of the second group; lr times that of the first


@dataclass(frozen=True)
class Scenario:
    """Ten updates of parameters in groups.

    Attributes:
        absent: for each parameter, the updates without a gradient.
        keys: arguments of the constructor.
        groups: for each group, the keys that differ from these.
        formulas: for each group, the arguments of the formula.
    """

    shapes: tuple[tuple[int, ...], ...]
    absent: tuple[tuple[int, ...], ...]
    keys: Mapping[str, Any]
    groups: list[dict[str, Any]]
    formulas: list[dict[str, Any]]
    steps: int

    def name(self, place: int) -> str:
        """Describes a parameter."""
        shape = f"a tensor {list(self.shapes[place])}"
        if len(self.shapes) == 1:
            return shape
        missing = [t + 1 for t in self.absent[place]]
        what = "transposed in memory" if place == 2 else f"without a gradient in updates {missing}" if missing else ""
        return f"{shape} of group {place // 2}{', ' * bool(what)}{what}"


def compare(subject: Subject, method: Method | None) -> CheckOutcome:
    """Compares every update of two groups with the paper's, from the same gradients, in float64."""
    if method is None or method.formula is None:
        return CheckOutcome("not applicable", "dlopt has no reference; name one by paper=NAME")
    if subject.update is not by_gradients:
        return CheckOutcome("not applicable", "evaluates the loss itself")
    keys, absent = arguments_of(method, subject.takes)
    if absent:
        return CheckOutcome("not applicable", f"no argument for {', '.join(absent)}")
    outcomes = []
    for formula in _formulas(subject, method, keys):
        outcomes.append(_compare(subject, method, formula, keys))
        if outcomes[-1].status == "pass":
            return outcomes[-1]
    return outcomes[0]


def _formulas(subject: Subject, method: Method, keys: Mapping[str, Any]) -> list[Formula]:
    """Returns the method's formula with the weight decay of the class; with either one where the paper has none."""
    assert method.formula is not None
    if method.own_decay:
        return [method.formula]
    if "weight_decay" not in keys:
        return [lambda w, gs, wd, **others: method.formula(w, gs, **others)]
    flags = [name for name in DECOUPLED if subject.takes(name)]
    if flags and not method.decays_last:
        return [(decoupled if subject.default(flags[0]) else penalized)(method.formula)]
    if method.decays_last:
        return [decoupled(method.formula, last=True), decoupled(method.formula)]
    coupled, apart = penalized(method.formula), decoupled(method.formula)
    return {"decoupled": [apart], "l2": [coupled], None: [coupled, apart]}[method.decay]


def _scenarios(subject: Subject, method: Method, keys: Mapping[str, Any], steps: int) -> Iterator[Scenario]:
    """Yields two groups and a third without decay; parameters alone if the method couples all of them."""
    if steps > 10 and "lr" in keys:  # the weights keep their size while gradients grow to 1e4
        keys = {**keys, "lr": 0.01 * keys["lr"]}
    shapes = MATRIX_SHAPES if method.matrices else SHAPES
    first = {"lr": keys.get("lr", 0.1), "wd": keys.get("weight_decay", 0.0)}
    first |= {name: method.keys[name] for name in method.second if name in method.keys}
    options = {name: subject.default(name) for name in method.options if subject.takes(name)}
    if method.couples or not subject.takes_groups:
        for shape in (shapes[0], shapes[3]):
            yield Scenario((shape,), ((),), keys, [{}], [first | options], steps)
        return
    held = subject.make([torch.nn.Parameter(torch.ones(shapes[0]))], **keys).param_groups[0]
    group, second = {}, dict(first)
    for name, value in {
        **method.second,
        "lr": SECOND["lr"] * first["lr"],
        "weight_decay": SECOND["weight_decay"],
    }.items():
        own = name_in(held, name)
        if own is not None and (own in keys or name in method.second):
            group[own] = value
            second["wd" if name == "weight_decay" else name] = value
    absent = ((),) * len(shapes) if method.counts_groups else ABSENT
    none = {"weight_decay": 0.0} if "weight_decay" in keys else {}
    formulas = [first | options, second | options, first | options | {"wd": 0.0}]
    yield Scenario(shapes, absent, keys, [{}, group, none], formulas, steps)


def _draws(scenario: Scenario) -> tuple[list[Array], list[list[Array]]]:
    """Returns the weights at the start and each parameter's gradients in `updates_in_groups`."""
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64).numpy() for shape in scenario.shapes]
    gradients: list[list[Array]] = [[] for _ in starts]
    for t in range(scenario.steps):
        for place, shape in enumerate(scenario.shapes):
            if t not in scenario.absent[place]:
                size = 10.0 ** (t % 9 - 4) if scenario.steps > 10 else 1.0
                gradients[place].append(size * torch.randn(shape, generator=draw, dtype=torch.float64).numpy())
    return starts, gradients


def _expected(scenario: Scenario, formula: Formula, sign: int) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yields the start and the weights of all parameters after each update."""
    starts, gradients = _draws(scenario)
    updates = []
    for place, (start, own) in enumerate(zip(starts, gradients, strict=True)):
        updates.append(formula(start, [sign * g for g in own], **scenario.formulas[place // 2]))
    weights = list(starts)
    for t in range(scenario.steps):
        for place, update in enumerate(updates):
            if t not in scenario.absent[place]:
                weights[place] = next(update)
        yield starts, list(weights)


def _turned(subject: Subject) -> tuple[int, ...]:
    """Returns which gradients are transposed: torch's fused kernels read them in the layout of their parameter."""
    return (2,) if subject.default("fused") else (0, 2)


def _compare(subject: Subject, method: Method, formula: Formula, keys: Mapping[str, Any]) -> CheckOutcome:
    for scenario in (each for steps in (10, 300) for each in _scenarios(subject, method, keys, steps)):
        make = partial(subject.make, **scenario.keys)
        of = scenario
        seen = updates_in_groups(make, of.shapes, of.absent, of.groups, turned=_turned(subject), steps=of.steps)
        expected = _expected(scenario, formula, -1 if subject.maximizes else 1)
        for number, (found, (starts, weights)) in enumerate(zip(seen, expected, strict=True), 1):
            for place, (ours, theirs) in enumerate(zip(found, weights, strict=True)):
                gap = float(np.linalg.norm(ours.numpy() - theirs))
                way = float(np.linalg.norm(theirs - starts[place]))
                # Over 300 updates at a small rate, some implementations round to float32 within.
                rounding = 1e-12 if scenario.steps == 10 else 2e-7 * float(np.linalg.norm(theirs))
                bound = method.tolerance * way + rounding
                if gap <= bound:
                    continue
                message = (
                    f"update {number} of {scenario.name(place)}: {gap:.2g} from the paper's, {way:.2g} from the start"
                )
                text = _text(subject, scenario, number, place, theirs, bound)
                return CheckOutcome("fail", f"{message}; {method.source}", "\n".join(text))
    return CheckOutcome("pass", method.source)


def _text(subject: Subject, scenario: Scenario, number: int, place: int, expected: Array, bound: float) -> list[str]:
    imports, make = subject.head()
    groups = ", ".join(literal(each) for each in scenario.groups)
    return [
        imports,
        make,
        *definition(updates_in_groups),
        f"seen = list(updates_in_groups(lambda groups: make(groups, **{literal(scenario.keys)}), {scenario.shapes}, "
        f"{scenario.absent}, [{groups}], turned={_turned(subject)}, steps={scenario.steps}))",
        f"gap = (seen[{number - 1}][{place}] - torch.tensor({expected.tolist()}, dtype=torch.float64)).norm(); "
        f"assert gap <= {bound:.3g}, gap",
    ]
