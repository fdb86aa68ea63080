"""The checks of `dlopt verify`: what each means, the cases that it runs, its tolerance, and what came out."""

import inspect
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dlopt.lab.verify import cases, paper_check
from dlopt.lab.verify.cases import ABSENT, MATRIX_SHAPES, SHAPES, pseudo_huber
from dlopt.lab.verify.methods import DECOUPLED, Method, name_in
from dlopt.lab.verify.outcome import CheckOutcome
from dlopt.lab.verify.subject import MATRICES, Subject, by_gradients, definition, literal, source


@dataclass(frozen=True)
class Case:
    """A function of cases.py with its other arguments; or, with `skipped`, the reason why it does not apply."""

    function: Callable[..., None] | None = None
    arguments: Mapping[str, Any] | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Check:
    name: str
    meaning: str
    tolerance: str
    run: Callable[[Subject, Method | None], CheckOutcome]


# -- running cases


def check_cases(subject: Subject, chosen: list[Case], note: str = "") -> CheckOutcome:
    """Runs cases until one fails; passes if any has run."""
    skipped = [case.skipped for case in chosen if case.skipped]
    ran = False
    for case in chosen:
        if case.function is None:
            continue
        message = failure(subject, case)
        if message is None:
            ran = True
        elif "not implemented for" in message or "UserError" in message:  # of a type, or said in a sentence
            # Without the names of the case and of the error: the check may pass.
            skipped.append(re.sub(r'^[a-z0-9 ]+: \w+Error: (".*?" )?', "", message))
        else:
            return CheckOutcome("fail", message, reproduction(subject, case))
    reasons = "; ".join([*([note] if note else []), *dict.fromkeys(skipped)])
    return CheckOutcome("pass" if ran else "not applicable", reasons)


def failure(subject: Subject, case: Case) -> str | None:
    """Returns the failure of a case, None if it passes."""
    assert case.function is not None
    extra = {"loss": pseudo_huber, **(case.arguments or {})}
    loss = extra["loss"]
    given = {
        "make": subject.make,
        "fresh": subject.fresh,
        "update": lambda o, params, loss=loss: subject.update(o, params, _negated(loss) if subject.maximizes else loss),
        **extra,
    }
    names = inspect.signature(case.function).parameters
    try:
        with torch.enable_grad():  # also if the optimizer has switched gradients off
            case.function(**{name: given[name] for name in names})
    except AssertionError as error:
        return str(error) or "an assertion of the optimizer fails"
    except Exception as error:
        return f"{case.function.__name__.replace('_', ' ')}: {message_of(error)}"
    return None


def _negated(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params: -loss(params)


def message_of(error: Exception) -> str:
    first = re.sub("\x1b\\[[0-9;]*m", "", next(iter(str(error).strip().splitlines()), ""))
    return f"{type(error).__name__}: {first}"[:200]


def reproduction(subject: Subject, case: Case) -> str:
    """Returns at most ten lines of PyTorch that reproduce the error of the case."""
    assert case.function is not None
    extra = dict(case.arguments or {})
    lines = subject.text(extra.pop("loss", pseudo_huber))
    body = source(case.function)
    if extra:
        body[0] = "; ".join([*(f"{name} = {value!r}" for name, value in extra.items()), body[0]])
    text = "\n".join(body)
    if "fresh(" not in text and "update(" not in text:
        lines = lines[:2]
    for helper in (cases.updates_in_groups, cases.turning):
        if f"{helper.__name__}(" in text:
            lines += definition(helper)
    return "\n".join([*lines, text])


# -- the checks


def descent(subject: Subject, method: Method | None) -> CheckOutcome:
    return check_cases(subject, [Case(cases.falls, {"loss": each}) for each in cases.PROBLEMS])


def schedule(subject: Subject, method: Method | None) -> CheckOutcome:
    groups = subject.make(subject.fresh()).param_groups
    if any(group.get("lr") is None for group in groups):
        return CheckOutcome("not applicable", "its parameter groups have no lr")
    if method is not None and method.no_schedule:
        return CheckOutcome("not applicable", method.no_schedule)
    return check_cases(subject, [Case(cases.follows_the_schedule)])


def rate_zero(subject: Subject, method: Method | None) -> CheckOutcome:
    before = schedule(subject, method)
    if before.status != "pass":
        return CheckOutcome(
            "not applicable", before.reason if before.status != "fail" else "a schedule misses parameters"
        )
    chosen = [Case(cases.rests_at_rate_zero)]
    if subject.takes_groups:
        chosen.append(Case(cases.rests_where_the_rate_is_zero))
    return check_cases(subject, chosen)


def decay(subject: Subject, method: Method | None) -> CheckOutcome:
    if not subject.takes("weight_decay"):
        return CheckOutcome("not applicable", "no argument weight_decay")
    flags = [name for name in DECOUPLED if subject.takes(name)][:1]
    flag = dict.fromkeys(flags, True)
    apart = Case(cases.decays_apart_from_the_gradient, {"flag": flag})
    penalty = Case(cases.decays_as_the_l2_penalty, {"flag": flag})
    scheduled = Case(cases.decays_with_the_schedule, {"flag": flag})
    is_decoupled = bool(flags) or (method is not None and method.decay == "decoupled")
    chosen = []
    if subject.takes_groups:
        # Group 1 at zero gradients: in some methods, the decay of a group changes the steps of all.
        for scale, place in ((1.0, 0), (0.0, 1)):
            chosen.append(Case(cases.decays_by_group, {"scale": scale, "place": place, "expected": place == 0}))
    wrong = failure(subject, apart) or ""
    if "grow" in wrong:
        chosen.append(apart)
    elif "do not shrink" in wrong and "one factor" not in wrong:
        chosen.append(Case(skipped="at zero gradients nothing moves"))
    elif "over time" in wrong and failure(subject, penalty) is not None:
        chosen.append(Case(skipped="shrinks a tensor by one factor, which changes over time"))
    elif is_decoupled:
        chosen += [apart] if method is not None and method.no_schedule else [apart, scheduled]
    elif method is not None and method.decay == "l2":
        chosen.append(penalty)
    if method is not None and method.decay == "decoupled" and not method.own_decay and subject.takes("lr"):
        chosen.append(Case(cases.decays_by_the_rate, {"flag": flag}))
    kind = _kind_of_decay(subject)
    outcome = check_cases(
        subject, chosen, kind or f"neither decoupled nor coupled{_size_of_decay(subject)} at zero gradients"
    )
    if outcome.status == "fail" or kind:
        return outcome
    if method is not None and method.own_decay and paper_check.compare(subject, method).status == "pass":
        return replace(outcome, status="pass", reason="neither decoupled nor coupled, but as in the paper")
    return replace(outcome, status="undecided")


def _kind_of_decay(subject: Subject) -> str:
    """Returns which weight decay the optimizer has by default, with its size; empty if it is none of these."""
    params, others = subject.fresh(), subject.fresh()
    for each, optimizer in (
        (params, subject.make(params, weight_decay=0.1)),
        (others, subject.make(others, weight_decay=0.0)),
    ):
        for _ in range(12):
            subject.update(optimizer, each, _negated(pseudo_huber) if subject.maximizes else pseudo_huber)
    if all(torch.equal(a, b) for a, b in zip(params, others, strict=True)):
        return "none: 0.1 changes no weight"
    held = []
    shrinks = failure(subject, Case(cases.decays_apart_from_the_gradient, {"flag": {}})) is None
    if shrinks and _adds_its_decay(subject):
        held.append(f"decoupled{_size_of_decay(subject)}")
    if failure(subject, Case(cases.decays_as_the_l2_penalty, {"flag": {}})) is None:
        held.append("coupled: adds 1 weight_decay w to the gradient")
    return " and ".join(held)


def _adds_its_decay(subject: Subject) -> bool:
    """Returns whether the first update decays by as much as one at zero gradients, within 5 %."""
    ends = []
    for decay, scale in ((0.0, 1.0), (0.1, 1.0), (0.1, 0.0)):
        params, sign = subject.fresh(), -1.0 if subject.maximizes else 1.0
        subject.update(
            subject.make(params, weight_decay=decay), params, lambda each, f=scale * sign: f * pseudo_huber(each)
        )
        ends.append([p.detach() for p in params])
    for start, without, with_, alone in zip(subject.fresh(), *ends, strict=True):
        decayed = start.detach() - alone
        if (without - with_ - decayed).abs().max() > 0.05 * decayed.abs().max():
            return False
    return True


def _size_of_decay(subject: Subject) -> str:
    """Says by how much the weights shrink at zero gradients in the third update."""
    params = subject.fresh()
    optimizer = subject.make(params, weight_decay=0.1)
    for _ in range(3):  # the first ones may only fill the state
        before = params[0].detach().clone()
        subject.update(optimizer, params, lambda params: sum((0 * p**2).sum() for p in params))
    shrunk, rate = float((1 - params[0].detach() / before).mean()), optimizer.param_groups[0].get("lr")
    if rate is None:
        return f": {shrunk / 0.1:.3g} weight_decay w"
    return f": {shrunk / 0.1 / float(rate):.3g} lr weight_decay w"


def missing(subject: Subject, method: Method | None) -> CheckOutcome:
    chosen = [Case(cases.leaves_what_has_no_gradient)]
    if subject.update is by_gradients:
        chosen.append(Case(cases.takes_no_gradients_at_all))
        chosen += [Case(cases.updates_in_place), Case(cases.keeps_no_gradient)]
        for keys in ({}, {"weight_decay": 0.1}, {"maximize": True}):
            if all(map(subject.takes, keys)):
                chosen.append(Case(cases.leaves_the_gradients, {"keys": keys}))
    return check_cases(subject, chosen)


def resume(subject: Subject, method: Method | None) -> CheckOutcome:
    keys = {"keys": _values_of_a_group(subject) if _takes_plain_groups(subject) else None}
    # A resume casts a number in the state of NAdam of torch to float64, which differs by rounding.
    bounds = {torch.float32: 0.0, torch.float64: 1e-12}
    chosen = [Case(cases.resumes_from_its_state_dict, {**keys, "dtype": d, "bound": b}) for d, b in bounds.items()]
    optimizer = subject.make(subject.fresh())
    if hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
        chosen.append(Case(cases.evaluates_without_a_trace))
    chosen.append(Case(cases.resumes_from_a_deepcopy, keys))
    return check_cases(subject, chosen)


def groups(subject: Subject, method: Method | None) -> CheckOutcome:
    chosen = []
    if subject.update is by_gradients:
        # torch's fused kernels read gradients in the layout of their parameter, which autograd gives them.
        chosen += [] if subject.default("fused") else [Case(cases.ignores_the_memory_layout)]
        chosen.append(Case(cases.leaves_the_generator))
        if failure(subject, Case(cases.ignores_the_order, {"twins": False})) is None:  # as it does not if it draws
            chosen.append(Case(cases.ignores_the_order, {"twins": True}))
    own = _values_of_a_group(subject)
    values = [own] if own else []
    if subject.takes("maximize") and "maximize" in subject.make(subject.fresh()).param_groups[0]:
        values.append({"maximize": not subject.maximizes})
    if subject.base is None:
        chosen += [Case(cases.obeys_changed_keys, {"keys": keys}) for keys in values]
        later = Case(cases.obeys_changed_keys, {"keys": _switched_on(subject)})
        if (failure(subject, later) or "").startswith("{"):  # torch's raise: they have no buffer yet
            chosen.append(later)
    if not _takes_plain_groups(subject) or subject.update is not by_gradients:
        chosen.append(Case(skipped="takes no plain groups"))
    elif (method and method.couples) or failure(subject, Case(cases.moves_as_alone, {"keys": {}})) is not None:
        chosen.append(Case(skipped="a parameter's step depends on the others'"))
    else:
        chosen += [Case(cases.moves_as_alone, {"keys": keys}) for keys in values]
        chosen.append(Case(cases.moves_as_alone_if_added, {"keys": own}))
    return check_cases(subject, chosen)


def _takes_plain_groups(subject: Subject) -> bool:
    return subject.takes_groups and not subject.marks_muon


def _values_of_a_group(subject: Subject) -> dict[str, Any]:
    """Returns other values than the defaults, which the optimizer takes in one of two groups."""
    held = subject.make(subject.fresh()).param_groups[0]
    first, *others = subject.fresh()
    values = _other_values({key: value for key, value in held.items() if subject.takes(key)})
    for key in [*values]:
        try:
            subject.make([{"params": [first]}, {"params": others, key: values[key]}])
            subject.make(others, **{key: values[key]})
        except Exception:
            del values[key]
    return values


def _other_values(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns another value for every number, and a weight decay where there is none."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, float | Tensor):
            values[key] = 0.7 * value
        elif isinstance(value, tuple) and all(isinstance(each, float) for each in value):
            values[key] = tuple(0.9 * each for each in value)
    return values | ({"weight_decay": 0.1} if keys.get("weight_decay") == 0 else {})


def options(subject: Subject, method: Method | None) -> CheckOutcome:
    """Compares with an optimizer of torch whose updates are the same by default: with its options, they should be."""
    if subject.update is not by_gradients or not _takes_plain_groups(subject) or subject.shapes == MATRICES:
        return CheckOutcome("not applicable", "not an optimizer of plain groups")
    outcomes = [
        _compared(subject, name, each)
        for name, each in vars(torch.optim).items()
        if isinstance(each, type) and each is not subject.target
        if not _own_arguments(subject, each)  # which make it another method
        if failure(subject, _as_torch(name, _shared(subject, each), {})) is None
    ]
    passed = [outcome for outcome in outcomes if outcome.status == "pass"]
    none = CheckOutcome("not applicable", "updates as no other optimizer of torch by default")
    return next(iter([*passed, *outcomes, none]))


def _compared(subject: Subject, twin: str, of_torch: Callable[..., Any]) -> CheckOutcome:
    keys = _shared(subject, of_torch)
    switched = {k: True if v is False else 0.1 for k, v in keys.items() if v is False or (v == 0 and k != "lr")}
    if any(failure(subject, _as_torch(twin, keys | {**each, "weight_decay": 0.1}, {})) for each in ({}, switched)):
        switched.pop("weight_decay", None)  # of which there are more kinds
    sets = [{k: v for k, v in switched.items() if k in some} for n in (0, 1, 2) for some in combinations(switched, n)]
    tried = []
    for own in [*sets, switched]:
        try:
            of_torch(subject.fresh(), **{**keys, **own})
        except ValueError:  # nesterov without a momentum
            continue
        held = subject.make(subject.fresh(), **own).param_groups[0]
        values = {key: value for key, value in {**keys, **own}.items() if key in held and (value or key in switched)}
        second = _other_values(values)
        second |= {key: keys[key] for key in own if key in held}
        second.pop("initial_accumulator_value", None)  # which torch's Adagrad reads from its constructor only
        tried.append((keys | own, second))
    chosen = [_as_torch(twin, *each, size=size) for each in tried for size in (1.0, 1e-7)]
    chosen.append(_as_torch(twin, *tried[-1], steps=300))
    with suppress(OSError):  # of a class that was typed, not read
        if "complex" in inspect.getsource(subject.target):  # plain code for real weights is not wrong
            chosen.append(Case(cases.equals_torch_with_complex_weights, {"twin": twin, "keys": tried[-1][0]}))
    outcome = check_cases(subject, chosen)
    reason = f"as torch.optim.{twin}" + f" with {', '.join(switched)}" * bool(switched)
    return replace(outcome, reason=reason) if outcome.status == "pass" else outcome


def _own_arguments(subject: Subject, twin: Callable[..., Any]) -> set[str]:
    return {*inspect.signature(subject.target).parameters} - {*inspect.signature(twin).parameters, *_FLAGS}


def _shared(subject: Subject, twin: Callable[..., Any]) -> dict[str, Any]:
    """Returns the arguments that both have, with the subject's values; implementations are not among them."""
    names = [name for name in inspect.signature(twin).parameters if subject.takes(name) and name not in _FLAGS]
    values = {name: subject.default(name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | tuple)}


def _as_torch(
    twin: str, keys: Mapping[str, Any], second: Mapping[str, Any], steps: int = 10, size: float = 1.0
) -> Case:
    groups = {"shapes": SHAPES, "absent": ABSENT, "groups": [{}, dict(second), {}]}
    return Case(cases.equals_torch, {**groups, "twin": twin, "keys": dict(keys), "steps": steps, "size": size})


_FLAGS = ("params", "foreach", "fused", "capturable", "differentiable", "maximize")


def implementations(subject: Subject, method: Method | None) -> CheckOutcome:
    flags = [name for name in ("foreach", "fused", "capturable", "maximize") if subject.takes(name)]
    if not flags:
        return CheckOutcome("not applicable", "one implementation")
    chosen: list[Case] = []
    compared: list[str] = []
    refused: dict[str, str] = {}
    for name in flags:
        try:
            params = subject.fresh()
            subject.update(subject.make(params, **{name: True}), params, pseudo_huber)
        except Exception as error:
            refused[name] = message_of(error)
            continue
        own = []
        if name != "maximize":  # the gradients of which have the other sign
            own.append(Case(cases.equals_the_loop, {"flag": {name: True}}))
        if subject.takes_groups and subject.update is by_gradients:
            first, second, third = _groups(subject)
            scenario = {
                "shapes": MATRIX_SHAPES if subject.shapes == MATRICES or subject.marks_muon else SHAPES,
                "absent": ABSENT,
                "groups": [first, second, third],
                "flag": {name: True},
                "others": [first, second, third],
                "signs": (-1, -1, -1) if name == "maximize" else (1, 1, 1),
            }
            own.append(Case(cases.equals_the_loop_in_groups, scenario))
            if name == "maximize" and name in subject.make(subject.fresh()).param_groups[0]:
                of_one = {"flag": {name: False}, "others": [first, {**second, name: True}, third], "signs": (1, -1, 1)}
                own.append(Case(cases.equals_the_loop_in_groups, {**scenario, **of_one}))
            if name == "maximize" and "foreach" in compared:
                own.append(Case(cases.equals_the_loop_in_groups, {**scenario, "flag": {"foreach": True, name: True}}))
        chosen += own
        compared += [name] if own else []
    outcome = check_cases(subject, chosen)
    if outcome.status == "fail":
        return outcome
    reasons = [f"{name}: {message}" for name, message in refused.items()]
    if outcome.status == "pass":  # without the errors of what was not compared
        reasons = [f"compared: {', '.join(compared)}"]
        reasons += [f"refused on a CPU: {', '.join(refused)}"] if refused else []
    return replace(outcome, reason="; ".join([*reasons, *filter(None, [outcome.reason])]))


def _groups(subject: Subject) -> list[dict[str, Any]]:
    """Returns the keys of three groups: two differ in every number of the optimizer's groups, one has no decay."""
    keys = subject.make(subject.fresh()).param_groups[0]
    first = {name: value for name, value in {"weight_decay": 0.3, "momentum": 0.9}.items() if name in keys}
    second = {name: value for name, value in _other_values({**keys, **first}).items() if name in keys}
    return [first, second, {"weight_decay": 0.0} if "weight_decay" in keys else {}]


def precision(subject: Subject, method: Method | None) -> CheckOutcome:
    shares = {torch.float32: 0.01, torch.bfloat16: 0.2}
    chosen = [Case(cases.stays_within_rounding, {"dtype": d, "share": share}) for d, share in shares.items()]
    return check_cases(subject, [*chosen, Case(cases.keeps_the_precision), Case(cases.counts_all_updates)])


def unusual(subject: Subject, method: Method | None) -> CheckOutcome:
    chosen = [Case(cases.leaves_zeros_at_zero_gradients), Case(cases.takes_empty_tensors), Case(cases.shows_nan)]
    if subject.shapes == MATRICES:
        chosen.append(Case(skipped="takes matrices only: no scalars"))
    else:
        chosen.insert(1, Case(cases.trains_scalars))
    if subject.update is by_gradients:
        chosen += _of_the_interface(subject)
    return check_cases(subject, chosen)


def _of_the_interface(subject: Subject) -> list[Case]:
    """Returns the cases of a closure and of sparse gradients, where the method takes them."""
    params = subject.fresh()
    optimizer = subject.make(params)
    chosen = []
    if "closure" in inspect.signature(optimizer.step).parameters:
        of = [{}, {"maximize": True}] if subject.takes("maximize") else [{}]
        chosen += [
            *(Case(cases.calls_its_closure_once, {"keys": each}) for each in of),
            Case(cases.steps_by_its_closure),
        ]
    keys = {"weight_decay": 0.0} if subject.takes("weight_decay") else {}
    sparse = Case(cases.takes_sparse_gradients, {"keys": keys})
    if subject.shapes != MATRICES and (failure(subject, sparse) or "3 updates").startswith(
        "3 updates"
    ):  # others refuse it
        chosen.append(sparse)
    # Plain code for real weights is not wrong if it takes complex ones without an error.
    wrong = failure(subject, Case(cases.trains_complex_weights)) if subject.shapes != MATRICES else None
    if wrong is not None and wrong.startswith("a weight"):
        chosen.append(Case(skipped="not for complex weights"))
    return chosen


def cost(subject: Subject, method: Method | None) -> CheckOutcome:
    """Measures the state in float32 and the time of an update."""
    n = 128 if subject.update is by_gradients else 16  # a Newton method stores a matrix of n^2 x n^2
    trial = replace(subject, shapes=((n, n), (n, n) if subject.shapes == MATRICES else (n,)))
    params = trial.fresh(torch.float32)
    optimizer = trial.make(params)
    seconds: list[float] = []
    while len(seconds) < 12 and sum(seconds) < 0.5:
        start = time.perf_counter()
        trial.update(optimizer, params, pseudo_huber)
        seconds.append(time.perf_counter() - start)
    size = sum(tensor.nbytes for tensor in _tensors(list(optimizer.state.values())))
    count = sum(p.numel() for p in params)
    usual = statistics.median(seconds[1:] or seconds) * 1e6
    speed = f"{usual:.0f} us per update of {count:,} parameters on this machine, at its present load"
    return CheckOutcome("measured", f"{size / count:.3g} bytes per parameter; {speed}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def defaults(subject: Subject, method: Method | None) -> CheckOutcome:
    if method is None or not method.authors:
        return CheckOutcome("not applicable", "dlopt does not know the authors' defaults")
    differing = []
    parameters = inspect.signature(subject.target).parameters
    for key, theirs in method.authors.items():
        name = name_in(parameters, key)
        if name is None:
            differing.append(f"no {key} (authors: {theirs})")
            continue
        ours = parameters[name].default
        plain = list(ours) if isinstance(ours, tuple) else ours
        if plain != (list(theirs) if isinstance(theirs, tuple) else theirs):
            shown = "required" if ours is inspect.Parameter.empty else ours
            differing.append(f"{name} {shown} (authors: {theirs})")
    return CheckOutcome("measured", "; ".join(differing) or "those of the authors")


CHECKS = (
    Check(
        "reference",
        "10 updates of three groups, and 300 with gradients from 1e-4 to 1e4, equalled the paper's",
        "1e-6 of the distance moved; 10 % for Muon",
        paper_check.compare,
    ),
    Check("descent", "60 updates reduced each of five convex losses", "none", descent),
    Check("schedule", "after 12 updates, a tenth of the rate shortened the step of every parameter", "5 %", schedule),
    Check("rate zero", "2 updates at lr = 0 changed no weight, in one group and in all", "none", rate_zero),
    Check("weight decay", "acted in the group that set it, decoupled or as the L2 penalty", "1e-6; 1e-9", decay),
    Check(
        "missing gradients",
        "parameters without a gradient stayed for 12 updates, then moved; gradients were not changed",
        "none",
        missing,
    ),
    Check(
        "resume",
        "3 updates after state_dict and after deepcopy, of groups with other values, equalled those without",
        "none; in float64 1e-12; eval() and train(): 1e-9",
        resume,
    ),
    Check(
        "groups",
        "with other values, at first, after 5 updates or added, a group moved as in an optimizer of its own",
        "1e-9; order of parameters: 1e-6; memory layouts: 1 %",
        groups,
    ),
    Check("options", "each option, two and all of them did what they do in an optimizer of torch", "1e-6", options),
    Check(
        "implementations",
        "12 updates with foreach, fused, capturable and maximize equalled the loop's",
        "1e-9; 1e-7 in groups",
        implementations,
    ),
    Check(
        "precision",
        "10 updates in float32 and bfloat16 followed float64, whose state is in it; counters in bfloat16 reached 300",
        "loss: 1 % and 20 % of the decrease, and rounding",
        precision,
    ),
    Check(
        "unusual input",
        "a NaN stayed visible; zeros, scalars, empty and sparse tensors and closures worked",
        "none",
        unusual,
    ),
    Check("cost", "state and time of an update", "", cost),
    Check("defaults", "defaults here and of the authors", "", defaults),
)


def run(check: Check, subject: Subject, method: Method | None) -> CheckOutcome:
    """Runs a check without the optimizer's warnings. An error of the optimizer is a failure, with its message."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            outcome = check.run(subject, method)
            switched = _switched_on(subject) if check.run in _WITH_OPTIONS and outcome.status == "pass" else {}
            if switched:
                with_them = check.run(replace(subject, keys={**subject.keys, **switched}), None)
                if with_them.status == "fail":
                    return replace(with_them, reason=f"with {literal(switched)}: {with_them.reason}")
            return outcome
        except Exception as error:
            return CheckOutcome("fail", message_of(error))


_WITH_OPTIONS = (missing, resume, groups, implementations)


def _switched_on(subject: Subject) -> dict[str, Any]:
    """Returns torch's options that change the updates, of those that the optimizer has and that are off."""
    switched: dict[str, Any] = {}
    usual = {"momentum": 0.9, "nesterov": True, "amsgrad": True, "centered": True, "dampening": 0.1, "lr_decay": 0.01}
    for key, value in usual.items():
        if subject.takes(key) and subject.default(key) in (0, False):
            try:
                subject.make(subject.fresh(), **{**switched, key: value})
            except Exception:
                continue
            switched[key] = value
    return switched
