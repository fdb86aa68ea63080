import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_method, get_object
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from dlopt import schedules
from dlopt.basics.errors import UserError
from dlopt.config.parameters import parameters_of
from dlopt.optim import LARS, Muon, Rprop
from dlopt.schedules import Factor, Horizon, Plateau, Schedule, Scheduler, Warmup, warmed_up
from tests.support.choices import names
from tests.support.schedules import EPOCH, STEPS, make, values

CHOICES = names("schedule")
PURE = [name for name in CHOICES if name != "plateau"]
NO_WARMUP = Warmup(warmup_epochs=None, warmup_steps=0, warmup_fraction=0.0, warmup_start=0.0, warmup_shape="linear")


def curve(factor: Factor, steps: int = STEPS) -> list[float]:
    return [factor(t) for t in range(steps)]


def one_parameter(lr: float = 1.0, **keys: Any) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, **keys)


def torch_curve(build_scheduler: Any, steps: int = STEPS) -> list[float]:
    optimizer = one_parameter(momentum=0.9)
    scheduler = build_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours_through_scheduler(factor: Factor, steps: int = STEPS) -> list[float]:
    return torch_curve(lambda optimizer: Scheduler(optimizer, factor), steps)


def test_a_schedule_is_a_function() -> None:
    with pytest.raises(UserError, match=r"^schedule: returns float; must return a function from the update"):
        schedules.build(lambda horizon: 0.9, NO_WARMUP, steps=1, steps_per_epoch=1)


def test_numbers_of_numpy_become_those_of_python() -> None:
    """A checkpoint with NumPy's could not be read again."""

    class Cycles:
        cycle_momentum = True

        def __call__(self, t: float) -> Any:
            return np.float64(0.5) ** t

        def momentum(self, t: float) -> Any:
            return np.float64(0.9)

    optimizer = one_parameter(momentum=0.9)
    scheduler = Scheduler(optimizer, Cycles())
    scheduler.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], scheduler.rate) == (0.5, 0.9, 0.5)
    assert type(group["lr"]) is type(group["momentum"]) is type(scheduler.rate) is float


class OwnMomentum:
    """A schedule of the user without a key cycle_momentum."""

    def __call__(self, t: float) -> Any:
        return 1.0

    def momentum(self, t: float) -> Any:
        return 0.5 + t / 10


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, momentum=0.0), torch.optim.AdamW])
def test_the_momentum_of_a_schedule_of_ones_own_is_set(kind: Any) -> None:
    optimizer, own = kind([torch.nn.Parameter(torch.zeros(1))], lr=1.0), OwnMomentum()
    scheduler = Scheduler(optimizer, Schedule(warmed_up(own, 2, 0.0, "linear"), momentum=own.momentum))
    for t in range(4):
        group = optimizer.param_groups[0]
        assert (group["betas"][0] if "betas" in group else group["momentum"]) == 0.5 + t / 10 == scheduler.momentum(t)
        scheduler.step()


def test_the_momentum_of_a_schedule_of_ones_own_needs_an_optimizer_that_has_one() -> None:
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match=r"^schedule\.cycle_momentum=true: Adagrad has neither momentum nor betas"):
        Scheduler(optimizer, OwnMomentum())
    off = OwnMomentum()
    off.cycle_momentum = False  # type: ignore[attr-defined]
    assert Scheduler(optimizer, off).momentum(0) is None


class WrongMomentum(OwnMomentum):
    def momentum(self) -> float:  # type: ignore[override]
        return 0.9


@pytest.mark.parametrize("own", [lambda t, u: 1.0, lambda: 1.0, lambda t: "x", lambda t: None, WrongMomentum(), None])
def test_refuses_a_schedule_that_is_no_function_of_the_update(own: Any) -> None:
    with pytest.raises(UserError, match=r"^schedule: returns \w+; must return a function from the update t, its only"):
        schedules.build(lambda horizon: own, NO_WARMUP, steps=1, steps_per_epoch=1)


class WithoutState(OwnMomentum):
    def update(self, metrics: Mapping[str, float]) -> None: ...


class OtherCycle(OwnMomentum):
    def ended_cycle(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (WithoutState(), r"^schedule: WithoutState must have update\(metrics\), state_dict\(\) and load_state_dict"),
        (OtherCycle(), r"^schedule: OtherCycle\.ended_cycle must be callable as ended_cycle\(t\)$"),
    ],
)
def test_refuses_a_schedule_that_breaks_its_contract(own: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedules.build(lambda horizon: own, NO_WARMUP, steps=1, steps_per_epoch=1)


@pytest.mark.parametrize("name", CHOICES)
def test_yaml_and_signature_name_the_same_keys(name: str) -> None:
    keys = set(values(name)) - {"_target_"} - set(Warmup.__dataclass_fields__)
    parameters = parameters_of(get_method(values(name)["_target_"]))  # the schema: with the keys of a TypedDict
    assert keys == set(parameters) - {"horizon", "monitor_mode"}
    required = [parameter for key, parameter in parameters.items() if key != "monitor_mode"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in required)


CLOSED_FORMS = {
    "constant": (partial(make, "constant"), lambda t: 1.0),
    "step": (partial(make, "step", every_epochs=3), lambda t: 0.1 ** (t // (3 * EPOCH))),
    "step in steps": (partial(make, "step", every_steps=50, gamma=0.5), lambda t: 0.5 ** (t // 50)),
    "multistep": (partial(make, "multistep", milestones_epochs=[5, 7.5]), lambda t: 0.1 ** ((t >= 120) + (t >= 180))),
    "multistep by share": (partial(make, "multistep"), lambda t: 0.1 ** ((t >= 120) + (t >= 180))),
    "exponential": (partial(make, "exponential"), lambda t: math.exp(-0.1 * t / EPOCH)),
    "exponential in steps": (partial(make, "exponential", k=0.01, unit="steps"), lambda t: math.exp(-0.01 * t)),
    "time_decay": (partial(make, "time_decay", decay=0.5), lambda t: 1 / (1 + 0.5 * t / EPOCH)),
    "cosine": (partial(make, "cosine", final=0.1), lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / STEPS)) / 2),
    "cosine over 5 epochs": (
        partial(make, "cosine", decay_epochs=5),
        lambda t: (1 + math.cos(math.pi * min(t, 120) / 120)) / 2,
    ),
    "linear": (partial(make, "linear", final=0.2), lambda t: 1 - 0.8 * t / STEPS),
    "polynomial": (partial(make, "polynomial", power=3.0), lambda t: (1 - t / STEPS) ** 3),
    "linear_warmup": (
        partial(make, "linear_warmup", warmup_steps=40),
        lambda t: (t + 1) / 41 if t < 40 else (STEPS - t) / (STEPS - 40),
    ),
    "cosine_warmup": (
        partial(make, "cosine_warmup", warmup_epochs=2),
        lambda t: (t + 1) / 49 if t < 48 else (1 + math.cos(math.pi * (t - 48) / (STEPS - 48))) / 2,
    ),
    "wsd": (
        partial(make, "wsd", warmup_fraction=0.1, decay_fraction=0.5),
        lambda t: (t + 1) / 25 if t < 24 else 1.0 if t < 132 else 1 - math.sqrt((t - 132) / 108),
    ),
    "wsd, linear": (
        partial(make, "wsd", shape="linear", warmup_fraction=0.1, decay_fraction=0.5),
        lambda t: (t + 1) / 25 if t < 24 else 1.0 if t < 132 else 1 - (t - 132) / 108,
    ),
    "wsd, a power": (
        partial(make, "wsd", shape=1.2, warmup_fraction=0.1, decay_fraction=0.5),
        lambda t: (t + 1) / 25 if t < 24 else 1.0 if t < 132 else ((240 - t) / 108) ** 1.2,
    ),
    "wsd, cosine": (
        partial(make, "wsd", shape="cosine", warmup_fraction=0.1, decay_fraction=0.5),
        lambda t: (t + 1) / 25 if t < 24 else 1.0 if t < 132 else (1 + math.cos(math.pi * (t - 132) / 108)) / 2,
    ),
    "wsd, inverse square root": (
        partial(make, "wsd", stable="inverse_sqrt", warmup_steps=40, decay_steps=60, shape="linear"),
        lambda t: (t + 1) / 41 if t < 40 else math.sqrt(40 / t) * min(1.0, (STEPS - t) / 60),
    ),
    "wsd, inverse square root with a timescale, to 0.1": (
        partial(make, "wsd", stable="inverse_sqrt", timescale_steps=90, warmup_steps=0, decay_epochs=5, final=0.1),
        lambda t: 0.1 + (math.sqrt(90 / (90 + t)) - 0.1) * (1 - math.sqrt(max(t - 120, 0) / 120)),
    ),
    "exponential after a warmup": (
        partial(make, "exponential", warmup_epochs=1, warmup_start=0.5),
        lambda t: 0.5 + 0.5 * t / 24 if t < 24 else math.exp(-0.1 * (t - 24) / EPOCH),
    ),
    "milestones count from the start of training": (
        partial(make, "step", every_steps=60, warmup_steps=40),
        lambda t: 0.1 ** (t // 60) * min((t + 1) / 41, 1),
    ),
}


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_closed_form_at_every_step(case: str) -> None:
    build_factor, expected = CLOSED_FORMS[case]
    assert curve(build_factor()) == pytest.approx([expected(t) for t in range(STEPS)], rel=1e-12, abs=1e-15)


TORCH = {
    "step": (partial(make, "step", every_steps=30), lambda o: lr_scheduler.StepLR(o, 30)),
    "multistep": (partial(make, "multistep", milestones_steps=[7, 90]), lambda o: lr_scheduler.MultiStepLR(o, [7, 90])),
    "exponential": (
        partial(make, "exponential", k=0.02, unit="steps"),
        lambda o: lr_scheduler.ExponentialLR(o, math.exp(-0.02)),
    ),
    "cosine": (partial(make, "cosine", final=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.01)),
    "polynomial": (partial(make, "polynomial", power=1.7), lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=1.7)),
    "linear": (partial(make, "linear", final=0.25), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, STEPS)),
    "cosine_restarts": (
        partial(make, "cosine_restarts", T_0_steps=34, T_mult=2, eta_min=0.05),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 34, 2, eta_min=0.05),
    ),
    "one_cycle": (partial(make, "one_cycle"), lambda o: lr_scheduler.OneCycleLR(o, 1.0, STEPS)),
    "one_cycle, three linear phases": (
        partial(make, "one_cycle", three_phase=True, anneal="linear", pct_start=0.4),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, STEPS, pct_start=0.4, anneal_strategy="linear", three_phase=True),
    ),
    "one_cycle, two of three phases": (
        partial(make, "one_cycle", three_phase=True, pct_start=0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, STEPS, pct_start=0.5, three_phase=True),
    ),
    "warmup": (
        partial(make, "cosine", warmup_steps=19),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 1 / 20, 1.0, 19), lr_scheduler.CosineAnnealingLR(o, STEPS - 19)], [19]
        ),
    ),
}


# Its cycles with a warmup have a test of their own.
ELSEWHERE = {"cosine_warmup_restarts"}


def test_every_schedule_has_a_reference() -> None:
    missing = sorted({*PURE} - {*CLOSED_FORMS, *TORCH, *ELSEWHERE})
    assert missing == [], "add a formula to CLOSED_FORMS, or a scheduler of torch to TORCH"


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("case", TORCH)
def test_equals_torch(case: str) -> None:
    build_factor, reference = TORCH[case]
    assert ours_through_scheduler(build_factor()) == pytest.approx(torch_curve(reference), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
def test_one_cycle_momentum_equals_torch(optimizer: Any, three_phase: bool) -> None:
    def momenta(attach: Any) -> list[float]:
        opt = optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, seen = attach(opt), []
        for _ in range(100):
            group = opt.param_groups[0]
            seen.append(group["betas"][0] if "betas" in group else group["momentum"])
            opt.step()
            scheduler.step()
        return seen

    factor = make("one_cycle", steps=100, three_phase=three_phase)
    ours = momenta(lambda o: Scheduler(o, factor))
    assert ours == pytest.approx(momenta(lambda o: lr_scheduler.OneCycleLR(o, 0.1, 100, three_phase=three_phase)))
    assert max(ours) == pytest.approx(0.95)
    assert min(ours) == pytest.approx(0.85, abs=1e-3)


def test_one_cycle_momentum_needs_an_optimizer_that_has_one() -> None:
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    Scheduler(optimizer, make("one_cycle")).step()
    with pytest.raises(UserError, match=r"schedule\.cycle_momentum=true"):
        Scheduler(optimizer, make("one_cycle", cycle_momentum=True))


def test_restarts_change_peak_and_minimum_and_end_at_a_minimum() -> None:
    factor = make(
        "cosine_restarts", steps=70, T_0_steps=10, T_mult=2, eta_min=0.1, peak_factor=0.5, eta_min_factor=0.25
    )
    for begin, length, high, low in [(0, 10, 1.0, 0.1), (10, 20, 0.5, 0.025), (30, 40, 0.25, 0.00625)]:
        expected = [low + (high - low) * (1 + math.cos(math.pi * t / length)) / 2 for t in range(length)]
        assert [factor(begin + t) for t in range(length)] == pytest.approx(expected, rel=1e-12)
    assert factor(70) == factor(10**6) == pytest.approx(0.00625)


@pytest.mark.parametrize("steps", [14, 100, 997])
def test_a_number_of_cycles_divides_the_run(steps: int) -> None:
    peaks = curve(make("cosine_restarts", steps=steps), steps)
    assert sum(b > a for a, b in itertools.pairwise(peaks)) == 2  # T_mult 2: 1/7, 2/7 and 4/7 of the run
    assert make("cosine_restarts", steps=steps)(steps) == pytest.approx(0.0, abs=1e-12)


def test_cycles_divide_the_steps_after_the_warmup() -> None:
    factor = cosine_restarts_after(20, 90)  # T_mult 2: 10, 20 and 40 of 70 steps
    peaks = [t for t in range(20, 90) if factor(t) == pytest.approx(1.0)]
    assert peaks == [20, 30, 50]


def cosine_restarts_after(start: int, steps: int) -> Factor:
    keys = {key: value for key, value in values("cosine_restarts").items() if key not in Warmup.__dataclass_fields__}
    target = get_object(keys.pop("_target_"))
    built: Factor = target(**keys, horizon=Horizon(start, steps, 10))
    return built


def test_one_cycle_after_a_warmup_is_the_same_cycle_later() -> None:
    keys = {key: value for key, value in values("one_cycle").items() if key not in Warmup.__dataclass_fields__}
    target = get_object(keys.pop("_target_"))
    late, early = (target(**keys, horizon=Horizon(start, start + 50, 10)) for start in (30, 0))
    assert [late(30 + t) for t in range(50)] == pytest.approx([early(t) for t in range(50)])
    assert late(200) == pytest.approx(early(49))  # after its end, the last value
    equal = target(**{**keys, "base_momentum": 0.9, "max_momentum": 0.9}, horizon=Horizon(0, 50, 10))
    assert equal.momentum(10) == equal.momentum(40) == pytest.approx(0.9)


def test_each_cycle_warms_up() -> None:
    factor = make("cosine_warmup_restarts", steps=60, T_0_steps=20, T_mult=1, cycle_warmup_steps=5, eta_min=0.2)
    cycle = [0.2 + 0.8 * (t + 1) / 6 for t in range(5)]
    cycle += [0.2 + 0.8 * (1 + math.cos(math.pi * (t - 5) / 15)) / 2 for t in range(5, 20)]
    assert curve(factor, 60) == pytest.approx(cycle * 3, rel=1e-12)


METRIC_SERIES = [1.0, 0.9, 0.9, 0.95, 0.9, 0.89995, 0.5, 0.6, 0.6, math.nan, 0.6, 0.6, 0.6, 0.4] + [0.4] * 12


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_plateau_equals_torch(mode: Any, sign: int, threshold_mode: Any, cooldown: int) -> None:
    optimizer = one_parameter(0.3)
    reference = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, patience=2, threshold_mode=threshold_mode, threshold=0.01, cooldown=cooldown,
        min_lr=0.3 * 2e-3, eps=0,
    )  # fmt: skip
    keys: dict[str, Any] = {
        "mode": mode,
        "patience": 2,
        "threshold_mode": threshold_mode,
        "threshold": 0.01,
        "cooldown": cooldown,
    }
    ours = Scheduler(one_parameter(0.3), make("plateau", monitor="x", min_factor=2e-3, **keys))
    rates = []
    for figure in METRIC_SERIES:
        reference.step(sign * figure + (2 if sign < 0 else 0))
        ours.update({"x": sign * figure + (2 if sign < 0 else 0)})
        ours.step()
        rates.append(ours.get_last_lr()[0])
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 2


def test_an_absolute_threshold_is_in_units_of_the_metric() -> None:
    for mode, monitor, results in (("min", "val_loss", (1.0, 0.93)), ("max", "val_accuracy", (0.5, 0.57))):
        keys = {"mode": mode, "threshold_mode": "abs", "patience": 0, "factor": 0.5}
        for threshold, rate in ((0.1, 0.5), (0.05, 1.0)):
            scheduler = Scheduler(one_parameter(1.0), make("plateau", monitor=monitor, threshold=threshold, **keys))
            for value in results:
                scheduler.update({monitor: value})
            assert scheduler.get_last_lr() == [rate]


def test_plateau_with_warmup_resumes_and_names_a_missing_metric() -> None:
    def fresh() -> Scheduler:
        return Scheduler(one_parameter(), make("plateau", patience=0, warmup_steps=4))

    first = fresh()
    for t in range(6):
        first.step()
        first.update({"val_loss": float(t)})
    assert first.get_last_lr() == pytest.approx([1e-5])
    second = fresh()
    second.load_state_dict(first.state_dict())
    for scheduler in (first, second):
        scheduler.update({"val_loss": 7.0})
    assert second.get_last_lr() == first.get_last_lr() == pytest.approx([1e-6])
    with pytest.raises(UserError, match=r"schedule\.monitor=val_loss.*val_accuracy"):
        first.update({"val_accuracy": 0.5})
    assert isinstance(make("plateau", monitor="val_accuracy").follows, Plateau)


def test_plateau_maximizes_accuracies() -> None:
    factor = make("plateau", monitor="val_accuracy", patience=0)
    assert isinstance(factor.follows, Plateau)
    for accuracy in (0.5, 0.6, 0.7):
        factor.follows.update({"val_accuracy": accuracy})
    assert factor(0) == 1.0
    factor.follows.update({"val_accuracy": 0.6})
    assert factor(0) == pytest.approx(0.1)


@pytest.mark.parametrize("name", CHOICES)
@given(steps=st.integers(1, 2000), epoch=st.integers(1, 300), t=st.integers(0, 3000))
def test_defaults_are_valid_for_every_run_length(name: str, steps: int, epoch: int, t: int) -> None:
    factor = make(name, steps=steps, epoch=epoch)
    assert 0.0 <= factor(t) <= 1.0
    assert factor(min(t, steps - 1)) > 0.0
    assert factor(steps + t) == factor(steps)  # past the end it stays


SMOOTH = [n for n in PURE if n not in ("step", "multistep", "cosine_restarts", "cosine_warmup_restarts")]


@pytest.mark.parametrize("name", SMOOTH)
@given(steps=st.integers(50, 3000), warmup=st.floats(0.1, 0.5))
def test_curves_have_no_jumps(name: str, steps: int, warmup: float) -> None:
    factor = make(name, steps=steps, epoch=steps / 10, warmup_fraction=warmup)
    points = curve(factor, steps + 1)
    slope = 20 if name == "one_cycle" else 12
    if name == "wsd":  # 1 - sqrt(x) is vertical where it begins
        slope = 12 * math.isqrt(steps)
    assert max(abs(b - a) for a, b in itertools.pairwise(points)) <= slope / steps


@given(a=st.integers(2, 40), b=st.integers(2, 40))
def test_curve_depends_only_on_the_fraction_of_the_run(a: int, b: int) -> None:
    """Twice the updates per epoch (fewer accumulated micro-batches, more ranks) only stretch a schedule."""
    for name in ("exponential", "cosine", "step", "time_decay", "polynomial"):
        keys: dict[str, Any] = {"every_epochs": 3} if name == "step" else {}
        one, two = (make(name, steps=10 * e, epoch=e, **keys) for e in (a, a * b))
        assert [one(t) for t in range(10 * a)] == pytest.approx([two(t * b) for t in range(10 * a)], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("step", {"every_epochs": 2, "every_steps": 3}, r"schedule\.every_epochs=2 and schedule\.every_steps=3"),
        ("multistep", {"milestones_epochs": [1], "milestones_steps": [2]}, "milestones_epochs"),
        ("cosine", {"warmup_epochs": 1, "warmup_steps": 3}, "warmup_epochs=1"),
        ("cosine", {"warmup_epochs": 11}, r"schedule\.warmup_epochs=11.*264 steps.*240"),
        ("cosine_warmup", {"warmup_steps": 241}, r"schedule\.warmup_steps=241"),
        ("wsd", {"decay_epochs": 11}, "is longer than"),
        ("wsd", {"timescale_steps": 9}, r"schedule\.timescale_steps=9: only with schedule\.stable=inverse_sqrt"),
        ("one_cycle", {"base_momentum": 0.96}, r"schedule\.base_momentum=0\.96"),
        ("one_cycle", {"three_phase": True, "pct_start": 0.6}, r"schedule\.pct_start=0\.6.*at most 0\.5"),
        ("cosine_warmup_restarts", {"T_0_steps": 10, "cycle_warmup_steps": 10}, "not shorter than"),
    ],
)
def test_mistakes_are_named(name: str, typed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **typed)


def test_warmup_may_be_as_long_as_the_training() -> None:
    for name in CHOICES:
        assert all(math.isfinite(x) for x in curve(make(name, warmup_epochs=10), STEPS + 5))


def test_warmup_length_overrides_the_default_fraction() -> None:
    for name in ("cosine_warmup", "linear_warmup", "wsd"):
        by_epochs, none = make(name, warmup_epochs=5), make(name, warmup_epochs=0)
        assert by_epochs(119) < by_epochs(120) == 1.0
        assert none(0) == 1.0


@pytest.mark.parametrize("typed", [{"warmup_steps": 40}, {"warmup_steps": 0, "timescale_steps": 7}])
def test_a_schedule_without_an_end_does_not_depend_on_the_run(typed: dict[str, Any]) -> None:
    short, long = (make("wsd", steps, stable="inverse_sqrt", decay_fraction=0.0, **typed) for steps in (50, 5000))
    assert curve(short, 5000) == curve(long, 5000)
    cooled = make("wsd", 900, stable="inverse_sqrt", decay_steps=100, **typed)
    assert curve(cooled, 800) == curve(long, 800)
    assert cooled(900) == cooled(1000) == 0.0


def test_scheduler_multiplies_every_groups_own_base() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    tensor_lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": tensor_lr}], lr=1.0)
    factor = make("cosine_warmup")
    scheduler = Scheduler(optimizer, factor)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    for t in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == 0.1 * factor(t)
        assert optimizer.param_groups[1]["lr"] is tensor_lr  # changed in place
        assert tensor_lr.item() == 0.5 * factor(t)
        assert scheduler.get_last_lr() == [0.1 * factor(t), tensor_lr]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", CHOICES)
def test_scheduler_resumes_exactly(name: str) -> None:
    whole = ours_through_scheduler(make(name))
    optimizer = one_parameter()
    scheduler = Scheduler(optimizer, make(name))
    for _ in range(101):
        scheduler.step()
    saved = scheduler.state_dict()
    resumed_optimizer = one_parameter()
    resumed = Scheduler(resumed_optimizer, make(name))
    resumed.load_state_dict(saved)
    rates = []
    for _ in range(101, STEPS):
        rates.append(resumed_optimizer.param_groups[0]["lr"])
        resumed.step()
    assert rates == whole[101:]


def test_a_constant_warmup_stays_at_its_start() -> None:
    """He et al. 2016, section 4.2: ResNet-110 begins with a tenth of the learning rate for 400 updates."""
    factor = make("multistep", steps=1000, warmup_steps=400, warmup_start=0.1, warmup_shape="constant")
    assert [factor(t) for t in (0, 399, 400, 499, 500, 750)] == pytest.approx([0.1, 0.1, 1.0, 1.0, 0.1, 0.01])


def test_a_start_that_is_given_is_the_factor_of_the_first_update() -> None:
    """As torch's LinearLR; without one the first of W updates has 1 / (W + 1), as in nanoGPT."""
    factor = make("constant", warmup_steps=10, warmup_start=0.01)
    optimizer = one_parameter()
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=10)
    for t in range(12):
        assert factor(t) == pytest.approx(reference.get_last_lr()[0] / optimizer.defaults["lr"], rel=1e-12)
        optimizer.step()
        reference.step()
    plain = make("constant", warmup_steps=10)
    assert [plain(t) for t in (0, 9, 10)] == pytest.approx([1 / 11, 10 / 11, 1.0])


def test_rejects_a_constant_warmup_at_zero() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup_start=0.0.*above 0"):
        make("cosine", warmup_steps=10, warmup_shape="constant")


def two_groups(horizon: float) -> tuple[torch.optim.SGD, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.5, "horizon": horizon}]
    return torch.optim.SGD(groups, lr=1.0), parameters


def test_group_horizon_shortens_the_schedule() -> None:
    """The schedule ends after that fraction of the run; then the group keeps its final value."""
    optimizer, parameters = two_groups(0.375)
    scheduler = Scheduler(optimizer, make("linear", steps=200))
    for t in range(200):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(1 - t / 200)
        assert second == pytest.approx(0.5 * max(1 - t / 75, 0))
        assert scheduler.get_lr() == pytest.approx([first, second])
        scheduler.step()
    assert all(p.requires_grad for p in parameters) and scheduler.resting == 1  # freezing was not requested


def test_group_horizon_shortens_the_cycle_of_the_momentum() -> None:
    optimizer, _ = two_groups(0.5)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    one_cycle: Any = make("one_cycle", steps=200)
    scheduler = Scheduler(optimizer, one_cycle)
    for t in range(200):
        first, second = (group["momentum"] for group in optimizer.param_groups)
        assert (first, second) == (one_cycle.momentum(t), one_cycle.momentum(2 * t))
        scheduler.step()
    assert one_cycle.momentum(59) == pytest.approx(0.85)  # at the peak of the learning rate


def test_reports_the_rate_without_multipliers() -> None:
    """The first group may have another one: layer_decay gives it the smallest."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    groups = [{"params": [p], **keys} for p, keys in zip(parameters, ({"lr": 0.1}, {"horizon": 0.5}, {}), strict=True)]
    scheduler = Scheduler(torch.optim.SGD(groups, lr=0.4), make("linear", steps=20))
    for t in range(20):
        assert scheduler.rate == pytest.approx(0.4 * (1 - t / 20))
        scheduler.step()
    only = Scheduler(torch.optim.SGD(groups[:1], lr=0.4), make("linear", steps=20))
    assert only.rate == pytest.approx(0.1)


def test_freezes_groups_at_zero_learning_rate() -> None:
    optimizer, parameters = two_groups(0.5)
    scheduler = Scheduler(optimizer, make("linear", steps=20), freezes=True)
    requires_grad = []
    for _ in range(20):
        requires_grad.append([p.requires_grad for p in parameters])
        scheduler.step()
    assert requires_grad == [[True, True]] * 10 + [[True, False]] * 10
    assert scheduler.resting == 1
    early = {**scheduler.state_dict(), "last_epoch": 3}
    scheduler.load_state_dict(early)
    assert [p.requires_grad for p in parameters] == [True, True] and scheduler.resting == 0


@pytest.mark.parametrize("keys", [{"lr": 0.0}, {"horizon": 0.5}])
def test_a_group_at_a_rate_of_zero_rests_with_any_optimizer(keys: dict[str, float]) -> None:
    """Rprop's steps do not follow the rate, LARS continues by momentum, and normalized weights keep their norm."""
    for kind in (torch.optim.Rprop, Rprop, partial(LARS, momentum=0.9), partial(Muon, normalize_weights=True)):
        parameters = [torch.nn.Parameter(torch.full((2, 3), 0.5 + i)) for i in range(2)]
        optimizer = kind([{"params": [parameters[0]]}, {"params": [parameters[1]], **keys}], lr=0.1)  # type: ignore[operator]
        scheduler = Scheduler(optimizer, make("linear", steps=20))
        before: list[torch.Tensor] = []
        for number in range(14):
            if number == (10 if "horizon" in keys else 0):
                before = [p.detach().clone() for p in parameters]
            for p in parameters:
                p.grad = torch.randn(2, 3)
            optimizer.step()
            scheduler.step()
        assert torch.equal(parameters[1], before[1]) and not torch.equal(parameters[0], before[0])


def test_rejects_cycles_shorter_than_an_update() -> None:
    with pytest.raises(UserError, match=r"schedule\.T_0_epochs=1e-09: a cycle of 1e-08 updates"):
        make("cosine_restarts", T_0_epochs=1e-9, epoch=10)


@pytest.mark.parametrize("setting", ["auto", True])
def test_one_cycle_leaves_a_momentum_of_zero_off(setting: bool | str) -> None:
    for optimizer in (one_parameter(), torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], betas=(0.0, 0.9))):
        scheduler = Scheduler(optimizer, make("one_cycle", cycle_momentum=setting))
        scheduler.step()
        group = optimizer.param_groups[0]
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        assert (momentum == 0) is (setting == "auto") is not scheduler.cycles_momentum


def test_rejects_horizons_with_plateau() -> None:
    optimizer, _ = two_groups(0.5)
    with pytest.raises(UserError, match="horizon is a fraction of the schedule"):
        Scheduler(optimizer, make("plateau"))


@pytest.mark.parametrize(
    ("name", "keys", "first"),
    [
        ("step", {"every_fraction": 0.07}, 7),  # 0.07 * 100 = 7.000000000000001
        ("step", {"every_epochs": 0.07}, 7),
        ("multistep", {"milestones_fraction": [0.55]}, 55),
        ("multistep", {"milestones_epochs": [0.07]}, 7),
    ],
)
def test_rounding_does_not_delay_a_drop(name: str, keys: dict[str, Any], first: int) -> None:
    factor = make(name, steps=100, epoch=100, **keys)
    assert [factor(first - 1), factor(first)] == pytest.approx([1.0, 0.1])


def test_rounding_delays_no_later_drop() -> None:
    factor = make("step", steps=44, epoch=22, every_epochs=0.1)  # every 2.2 updates, and 11 // 2.2 is 4
    drops = [t for t in range(1, 44) if factor(t) < factor(t - 1)]
    assert drops == [-(-22 * i // 10) for i in range(1, 20)]


def test_rounding_changes_neither_warmups_nor_restarts() -> None:
    constant = make("constant", steps=100, warmup_fraction=0.29)  # 0.29 * 100 = 28.999999999999996
    assert constant(28) < constant(29) == 1.0
    factor: Any = make("cosine_restarts", steps=42, epoch=21, T_0_epochs=0.1, T_mult=1.0)
    assert factor.restarts[9] == 21  # ten times 2.1 is 21.000000000000004


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_a_decay_longer_than_the_run_stays_at_its_value_at_the_end(name: str) -> None:
    """A group with a shorter horizon reads the factor after the end of the run."""
    factor = make(name, decay_steps=3 * STEPS)
    assert 0 < factor(STEPS) == factor(2 * STEPS)


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_of_a_short_run_equals_torch(steps: int, three_phase: bool) -> None:
    """Also where the way up is shorter than one step."""
    keys: dict[str, Any] = {"pct_start": 0.07, "three_phase": three_phase}
    optimizer = one_parameter(momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, steps, **keys)
    expected = []
    for t in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        if t < steps - 1:
            scheduler.step()
    assert curve(make("one_cycle", steps=steps, **keys), steps) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_does_not_move_the_average_of_schedule_free() -> None:
    """Its momentum interpolates between the iterates and their average."""
    schedule_free = pytest.importorskip("dlopt.optim.schedule_free")
    optimizer = schedule_free.ScheduleFreeSGD([torch.nn.Parameter(torch.zeros(1))], momentum=0.7)
    scheduler = Scheduler(optimizer, make("one_cycle"))
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.7
    with pytest.raises(UserError, match=r"schedule\.cycle_momentum=true: ScheduleFreeSGD"):
        Scheduler(optimizer, make("one_cycle", cycle_momentum=True))


def test_a_drop_that_is_never_reached() -> None:
    assert curve(make("step", every_epochs=math.inf)) == [1.0] * STEPS


def test_restarts_stay_at_the_minimum_after_the_horizon() -> None:
    """Groups of parameters may have a horizon before the end of the run, in the middle of a cycle."""
    keys: Any = {"cycles": 3, "T_0_epochs": None, "T_0_steps": 10, "T_mult": 2.0, "eta_min": 0.1}
    keys |= {"peak_factor": 1.0, "eta_min_factor": 1.0, "horizon": Horizon(0, 25, 5.0)}
    factor = schedules.cosine_restarts(**keys)
    assert factor(25) == factor(26) == factor(31) == factor(1000) != factor(24)


def test_a_warmup_of_a_fraction_has_whole_updates_rounded_down() -> None:
    for steps, length in ((19, 1), (20, 2), (29, 2)):
        assert replace(NO_WARMUP, warmup_steps=None, warmup_fraction=0.1).length(steps, 10) == length


def test_plateau_counts_an_equal_metric_as_no_improvement() -> None:
    """As ReduceLROnPlateau does, without a threshold."""
    reference = lr_scheduler.ReduceLROnPlateau(one_parameter(), patience=1, threshold=0.0, factor=0.5)
    ours = Scheduler(one_parameter(), make("plateau", monitor="x", patience=1, threshold=0.0, factor=0.5))
    rates = []
    for _ in range(6):
        reference.step(1.0)
        ours.update({"x": 1.0})
        rates.append((ours.get_last_lr(), reference.get_last_lr()))
    assert all(a == b for a, b in rates) and rates[-1][0] < [1.0]


def test_rates_are_copies() -> None:
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": torch.tensor(1.0)}])
    scheduler = Scheduler(optimizer, lambda t: 1 / (1 + t))
    scheduler.step()
    assert scheduler.rate == 0.25 and [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.5]
    shown = scheduler.get_last_lr()
    scheduler.step()
    assert [float(lr) for lr in shown] == [0.25, 0.5]
    assert scheduler.get_lr() == pytest.approx([0.5 / 3, 1 / 3])
    assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor)
    scheduler.step(0)
    assert scheduler.last_epoch == 0 and scheduler.rate == 0.5


def test_a_cycle_of_one_update_leaves_no_room_for_a_warmup() -> None:
    keys: dict[str, Any] = {"steps": 4, "warmup_fraction": 0.0, "cycle_warmup_steps": 1, "cycle_warmup_fraction": 0.0}
    with pytest.raises(UserError, match=r"cycle warmup of 1 steps is not shorter than the first cycle \(1 steps\)"):
        make("cosine_warmup_restarts", **keys, T_0_steps=1, T_mult=1)
    whole = make("cosine_warmup_restarts", **keys | {"warmup_steps": 4, "warmup_fraction": 0.0})
    assert 0 < whole(0) < whole(3) < 1, "a warmup as long as the run leaves no cycle"


def test_plateau_starts_without_bad_evaluations() -> None:
    plateau = make("plateau", monitor="val_loss", patience=1, factor=0.5, threshold=0.0, cooldown=0).follows
    assert isinstance(plateau, Plateau)
    assert plateau.state_dict() == {"value": 1.0, "best": math.inf, "bad": 0, "resting": 0}
    values = []
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        plateau.update({"val_loss": loss})
        values.append(plateau.value)
    assert values == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
