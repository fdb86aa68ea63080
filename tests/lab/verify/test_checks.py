"""Each check of `dlopt verify` catches its error; no other does, except the comparison with the paper."""

from typing import Any

import pytest
import torch

from dlopt import optim
from dlopt.lab.verify import cases, checks
from dlopt.lab.verify.command import certify
from dlopt.lab.verify.methods import METHODS, known
from dlopt.lab.verify.outcome import CheckOutcome
from dlopt.lab.verify.subject import MATRICES, Subject, by_closure, by_gradients, by_loss_closure, find
from tests.support import planted

PLANTED: dict[str, tuple[type[torch.optim.Optimizer], str | None]] = {
    "reference": (planted.LeavesOutTheBiasCorrection, "adamw"),
    "descent": (planted.Climbs, None),
    "schedule": (planted.MissesVectors, "adamw"),
    "rate zero": (planted.Drifts, "adamw"),
    "weight decay": (planted.CouplesItsDecay, "adamw"),
    "missing gradients": (planted.DecaysWhatHasNoGradient, "adamw"),
    "resume": (planted.ForgetsItsStep, None),
    "groups": (planted.ReadsItsDefaults, None),
    "options": (planted.ForgetsNesterov, None),
    "implementations": (planted.FusedOffByEps, "adamw"),
    "precision": (planted.KeepsItsStateInFloat32, "adamw"),
    "unusual input": (planted.HidesNaN, "adamw"),
}


def outcomes(target: Any, paper: str | None = None, **keys: Any) -> dict[str, CheckOutcome]:
    method = METHODS[paper] if paper is not None else known(target, keys)
    return {check.name: outcome for check, outcome in certify(Subject(target, keys), method)}


def outcome_of(name: str, target: Any, method: Any = None) -> CheckOutcome:
    """Runs one check: all take two seconds."""
    check = next(each for each in checks.CHECKS if each.name == name)
    return checks.run(check, find(Subject(target, {})), method)


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_error_fails_its_check(check: str) -> None:
    target, paper = PLANTED[check]
    found = outcome_of(check, target, METHODS[paper] if paper is not None else known(target, {}))
    assert found.status == "fail" and found.reproduction.count("\n") < 10
    with pytest.raises((AssertionError, RuntimeError)) as error:
        exec(found.reproduction, {})
    if check != "reference":  # whose message also names the paper
        assert found.reason.endswith(str(error.value).splitlines()[0])


@pytest.mark.parametrize("check", ["resume", "options"])
def test_a_planted_error_fails_no_other_check(check: str) -> None:
    failed = {name for name, outcome in outcomes(*PLANTED[check]).items() if outcome.status == "fail"}
    assert failed - {"reference", "groups"} == {check}


def test_every_check_that_can_fail_has_a_planted_error() -> None:
    assert [check.name for check in checks.CHECKS] == [*PLANTED, "cost", "defaults"]


def test_a_momentum_that_is_the_gradient_itself_is_found_where_it_is_switched_on() -> None:
    found = outcome_of("missing gradients", planted.KeepsTheGradient)
    assert found.status == "fail"
    assert found.reason.startswith("with {'momentum': 0.9, 'nesterov': True}: ")


@pytest.mark.parametrize(
    "target, check, reason",
    [
        (planted.MovesItsWeights, "missing gradients", "2 of 2 weights are in new memory"),
        (planted.SwitchesGradientsOff, "unusual input", "after step(closure), gradients are switched off"),
    ],
)
def test_what_a_step_leaves_behind_is_looked_at(target: Any, check: str, reason: str) -> None:
    found = outcome_of(check, target)
    assert found.status == "fail" and found.reason.startswith(reason)


def test_options_are_compared_with_the_optimizer_of_torch_that_updates_alike() -> None:
    class Momentum(torch.optim.SGD):
        pass

    found = outcome_of("options", Momentum)
    assert found.status == "pass"
    assert found.reason == "as torch.optim.SGD with momentum, dampening, nesterov"


@pytest.mark.parametrize("paper", ["adamw", None])
def test_the_same_optimizer_without_an_error_passes(paper: str | None) -> None:
    found = outcomes(planted.AdamW, paper)
    assert all(outcome.status in ("pass", "measured") for outcome in found.values()), found
    assert found["defaults"].reason == "lr 0.01 (authors: 0.001)"
    assert found["weight decay"].reason == "decoupled: 1 lr weight_decay w"
    assert found["cost"].reason.startswith("8 bytes per parameter")


def test_a_pass_names_what_was_compared_and_has_no_text_of_an_error() -> None:
    found = outcome_of("implementations", torch.optim.Adam)
    assert found == CheckOutcome("pass", "compared: foreach, fused, maximize; refused on a CPU: capturable")
    assert outcome_of("precision", optim.Newton) == CheckOutcome("pass", "not implemented for 'BFloat16'")


def test_another_weight_decay_is_undecided() -> None:
    assert outcome_of("weight decay", planted.AddsTheSign).status == "undecided"
    assert outcome_of("weight decay", planted.AddsTheSign, METHODS["adamw"]).status == "fail"
    found = outcome_of("weight decay", optim.LAMB, METHODS["lamb"])
    assert found.status == "pass" and found.reason == "neither decoupled nor coupled, but as in the paper"


def test_errors_of_the_optimizer_are_failures_with_its_message() -> None:
    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise KeyError("exp_avg")

    found = outcomes(Raises)
    assert found.pop("descent") == CheckOutcome("fail", "KeyError: 'exp_avg'")
    assert {outcome.reason for outcome in found.values()} == {"no update succeeds"}
    found = outcomes(torch.optim.SparseAdam)
    assert found["descent"].reason.startswith("RuntimeError: SparseAdam does not support dense gradients")


class Marked(torch.optim.Muon):
    """Wants `use_muon` in each group, as Jordan's Muon does."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__([each for each in params if each["use_muon"]], lr=lr)


@pytest.mark.parametrize(
    ("target", "keys", "update", "only_matrices", "marks"),
    [
        (torch.optim.SGD, {"lr": 0.1}, by_gradients, False, False),
        (torch.optim.LBFGS, {"max_iter": 2}, by_closure, False, False),
        (optim.NewtonCG, {}, by_loss_closure, False, False),
        (torch.optim.Muon, {}, by_gradients, True, False),
        (Marked, {}, by_gradients, False, True),
    ],
)
def test_finds_out_how_to_drive_an_optimizer(
    target: Any, keys: dict[str, Any], update: Any, only_matrices: bool, marks: bool
) -> None:
    found = find(Subject(target, keys))
    assert found.update is update
    assert (found.shapes == MATRICES) == only_matrices and found.marks_muon == marks


# Of optimizers that take closures, which evaluate the loss many times, the cases that drive them in different ways.
DRIVEN = ("falls", "resumes_from_its_state_dict", "calls_its_closure_once")


@pytest.mark.parametrize("target", [torch.optim.AdamW, torch.optim.LBFGS, optim.NewtonCG, Marked])
def test_reproductions_run_and_are_short(target: Any) -> None:
    """Of every case, also of those that pass: the text is what the check has run."""
    takes_closures = target in (torch.optim.LBFGS, optim.NewtonCG)
    subject = find(Subject(target, {}))
    extra: dict[Any, dict[str, Any]] = {
        cases.falls: {"loss": cases.logistic},
        cases.decays_apart_from_the_gradient: {"flag": {}},
        cases.decays_as_the_l2_penalty: {"flag": {}},
        cases.decays_by_group: {"scale": 0.0, "place": 1, "expected": False},
        cases.decays_by_the_rate: {"flag": {}},
        cases.leaves_the_gradients: {"keys": {}},
        cases.takes_sparse_gradients: {"keys": {}},
        cases.calls_its_closure_once: {"keys": {}},
        cases.decays_with_the_schedule: {"flag": {}},
        cases.resumes_from_its_state_dict: {"keys": {"lr": 0.003}, "dtype": torch.float32, "bound": 0.0},
        cases.resumes_from_a_deepcopy: {"keys": None},
        cases.ignores_the_order: {"twins": True},
        cases.moves_as_alone: {"keys": {"lr": 0.003}},
        cases.moves_as_alone_if_added: {"keys": {}},
        cases.obeys_changed_keys: {"keys": {"lr": 0.003}},
        cases.equals_the_loop: {"flag": {"foreach": True}},
        cases.equals_the_loop_in_groups: {
            "shapes": cases.MATRIX_SHAPES,
            "absent": cases.ABSENT,
            "groups": [{}, {"lr": 0.01}, {}],
            "flag": {"foreach": True},
            "others": [{}, {"lr": 0.01}, {}],
            "signs": (1, 1, 1),
        },
        cases.equals_torch: {
            "shapes": cases.MATRIX_SHAPES,
            "absent": cases.ABSENT,
            "twin": "SGD",
            "keys": {"lr": 0.01},
            "groups": [{}, {"lr": 0.003}, {}],
            "steps": 10,
            "size": 1.0,
        },
        cases.equals_torch_with_complex_weights: {"twin": "SGD", "keys": {"lr": 0.01}},
        cases.stays_within_rounding: {"dtype": torch.float32, "share": 0.01},
    }
    ran = 0
    for name, function in list(vars(cases).items()):  # a warning adds to the module
        if getattr(function, "__module__", "") != cases.__name__ or function in cases.PROBLEMS:
            continue
        if name in ("evaluates_without_a_trace", "updates_in_groups", "turning"):
            continue
        if takes_closures and name not in DRIVEN:
            continue
        case = checks.Case(function, extra.get(function, {}))
        expected = checks.failure(subject, case)
        text = checks.reproduction(subject, case)
        assert text.count("\n") < 10, text
        try:
            exec(text, {})
        except Exception as error:
            assert expected is not None and str(error).splitlines()[0][:200] in expected, text
        else:
            assert expected is None, text
        ran += 1
    assert ran == len(DRIVEN) if takes_closures else ran > 15
