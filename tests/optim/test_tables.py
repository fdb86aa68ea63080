"""Every optimizer is in the tables of the tests: a new one that is missing fails here, by its name."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from dlopt import optim
from tests.optim import test_choices, test_first_order, test_hyperball, test_papers, test_protocol, test_recorded
from tests.optim import test_second_order as second_order
from tests.support.choices import names, values

# Classes that make no updates themselves: the decays are put around any optimizer (tests/schedules/test_decay.py,
# tests/training/test_graphed_update.py).
BASES = {"ForeachOptimizer", "RealOptimizer", "CautiousDecay", "CapturedDecay"}
# Tests of classes that no formula or table covers, since an update is more than a function of the gradients.
REFERENCES: dict[str, Callable[..., None]] = {
    "BFGS": second_order.test_ends_of_the_family_are_bfgs_and_dfp,
    "LBFGS": second_order.test_rosenbrock_as_fast_as_scipy,
    "Newton": second_order.test_newton_takes_one_step_on_a_quadratic,
    "NewtonCG": second_order.test_newton_and_newton_cg_take_the_same_step_on_a_net,
    "UndampedNewton": second_order.test_undamped_newton_stops_at_a_saddle_and_newton_does_not,
    "Kron": test_papers.test_kron_at_every_update,
    "Prodigy": test_papers.test_prodigy_at_every_update,
    "Sophia": test_papers.test_sophia_at_every_update,
    "Scion": test_papers.test_scion_moves_each_tensor_by_the_norm_of_its_ball,
    "Muon": test_first_order.test_muon_equals_torch_for_matrices_and_adamw_otherwise,
    "SAM": test_first_order.test_sam_equals_pytorch_optimizer,
    "HyperballAdamW": test_hyperball.test_each_update_is_the_formula_of_the_paper,
    # Beside the package from which they are derived.
    "ScheduleFreeSGD": test_first_order.test_evaluations_do_not_change_schedule_free_training,
    "ScheduleFreeAdamW": test_first_order.test_evaluations_do_not_change_schedule_free_training,
}
# Tests in place of a case of a table: those of an optional package, and of what takes no common path.
PROTOCOLS: dict[str, Callable[..., None]] = {
    "ScheduleFreeSGD": test_protocol.test_schedule_free_resumes_a_state_without_the_newest_key,
    "ScheduleFreeAdamW": test_protocol.test_schedule_free_resumes_a_state_without_the_newest_key,
    "UndampedNewton": second_order.test_undamped_newton_stays_where_the_eigenvalues_cannot_be_computed,
}
RECORDINGS: dict[str, Callable[..., None]] = {
    "SAM": test_recorded.test_path_of_sam,
    "HyperballAdamW": test_hyperball.test_each_update_is_the_formula_of_the_paper,
    "ScheduleFreeSGD": test_first_order.test_evaluations_do_not_change_schedule_free_training,
    "ScheduleFreeAdamW": test_first_order.test_evaluations_do_not_change_schedule_free_training,
}
FORMULAS = [*test_first_order.FORMULAS.values(), *test_papers.ALGORITHMS.values()]
RECORDED = test_recorded.CASES | test_recorded.COARSE
DECAYS = {*test_choices.DECOUPLED, "lars"}


def classes() -> Iterator[type[torch.optim.Optimizer]]:
    """Yields the optimizers of the package, those of optional packages only where these are installed."""
    for module in pkgutil.iter_modules(optim.__path__):
        if module.name == "schedule_free" and find_spec("schedulefree") is None:
            continue
        for name, each in vars(import_module(f"dlopt.optim.{module.name}")).items():
            is_own = isinstance(each, type) and each.__module__ == f"dlopt.optim.{module.name}"
            if is_own and issubclass(each, torch.optim.Optimizer) and name[0] != "_" and name not in BASES:
                yield each


def class_of(built: torch.optim.Optimizer) -> str:
    return type(built).__name__


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(4))]


def missing(covered: set[str], names: set[str] | None = None) -> list[str]:
    return sorted((names or {each.__name__ for each in classes()}) - covered)


def lacks(choose: Callable[..., Any]) -> list[str]:
    """Returns a line for each entry that a class or a choice lacks: its name, the file and the table."""
    formulas = {class_of(choose(choice, parameters(), *typed)) for choice, typed, _ in FORMULAS}
    makers = {class_of(make([parameters()[0]])) for make in test_protocol.MAKERS.values()}
    recorded = {class_of(make(parameters(), **keys)) for make, keys in RECORDED.values()}
    # Of a choice: its own formula, or that of its class.
    targets = {name: values("optimizer", name)["_target_"].rpartition(".")[2] for name in names("optimizer")}
    choices = {choice for choice, _, _ in FORMULAS} | {name for name, each in targets.items() if each in REFERENCES}
    # Decoupled, with gradients of zero; of others, and of what scales the decay, the formula has it.
    decays = {class_of(choose(choice, parameters())) for choice in DECAYS if _is_installed(choice)}
    decays |= {
        class_of(choose(choice, parameters(), *keys))
        for choice, keys, _ in FORMULAS
        if values("optimizer", choice).get("weight_decay") or any(key.startswith("weight_decay") for key in keys)
    }
    decays |= {class_of(make(parameters(), **keys)) for make, keys in RECORDED.values() if keys.get("weight_decay")}
    with_decay = {each.__name__ for each in classes() if "weight_decay" in inspect.signature(each).parameters}
    tables = {
        "FORMULAS of test_first_order.py": missing(formulas | set(REFERENCES)),
        "FORMULAS of test_first_order.py (the choice)": missing(choices | {"dmuon"}, set(targets)),
        "SETTINGS or MAKERS of test_protocol.py": missing(makers | set(PROTOCOLS)),
        "CASES of test_recorded.py": missing(recorded | set(RECORDINGS)),
        "DECOUPLED of test_choices.py": missing(decays, with_decay),
    }
    return [f"{name}: add it to {table}" for table, found in tables.items() for name in found]


def test_every_optimizer_is_in_the_tables(choose: Callable[..., Any]) -> None:
    lines = lacks(choose)
    assert not lines, "\n".join(lines)


def _is_installed(choice: str) -> bool:
    return not choice.startswith("schedule_free") or find_spec("schedulefree") is not None


def test_a_class_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, choose: Callable[..., Any]) -> None:
    new = type("Newest", (optim.SGDW,), {"__module__": "dlopt.optim.sgd"})
    monkeypatch.setattr("dlopt.optim.sgd.Newest", new, raising=False)
    lines = lacks(choose)
    assert len(lines) == 4 and all(line.startswith("Newest: add it to ") for line in lines)
