"""What holds for every choice of the group, whosever class it is."""

import copy
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object

from dlopt import optim
from dlopt.config.choices import Catalogue
from dlopt.lab.verify.methods import METHODS
from dlopt.optim import LossClosure
from dlopt.optim.common import chunks
from dlopt.optim.traits import optimizer_traits
from tests.support.choices import names

CONF = Path(__file__).parents[2] / "conf"
CHOICES = names("optimizer")
# Values in the YAML other than the defaults of the signature: `dfp`, `dmuon` and `momentum` are a class under a second
# name, and the learning rate of `sam` is that of its base.
OTHER_VALUES = {
    "dfp": {"xi", "c2"},
    "dmuon": {"lr", "weight_decay", "adjust_lr_fn", "rest_lr", "rest_betas"},
    "momentum": {"weight_decay"},
    "sam": {"lr"},
}


# Defaults of the authors' code.
KNOWN = {name: METHODS[name.replace("_", "")].authors for name in CHOICES if name.replace("_", "") in METHODS}
AUTHORS = {name: authors for name, authors in KNOWN.items() if authors}


@pytest.mark.parametrize("choice", AUTHORS)
def test_comments_name_the_defaults_of_the_authors_where_others_are_used(choice: str) -> None:
    catalogue = Catalogue()
    [listed] = [each for each in catalogue.choices("optimizer") if each.name == choice]
    keys = {key.name: key for key in catalogue.keys(listed)}
    for name, theirs in AUTHORS[choice].items():
        ours = keys[f"optimizer.{name}"]
        if json.loads(ours.value) != theirs:
            values = re.findall(r"\[.*?\]|[\d.]+(?:e-\d+)?", ours.comment.partition("author")[2])
            assert theirs in [json.loads(value) for value in values], (name, ours.comment)


@pytest.fixture(params=CHOICES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    return str(request.param)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_yaml_states_every_value_and_agrees_with_defaults(name: str, keys_of: Callable[..., Any]) -> None:
    """A signature may repeat the paper's defaults, as torch's do; it need not."""
    keys = keys_of(name)
    target = get_object(keys.pop("_target_"))
    parameters = dict(inspect.signature(target).parameters)
    for runtime in ("params", "fused"):
        parameters.pop(runtime, None)
    if not target.__module__.startswith("dlopt."):
        assert set(keys) <= set(parameters)
        return
    assert set(keys) == set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    defaults = {key: plain(p.default) for key, p in parameters.items() if p.default is not p.empty}
    other = {key for key, value in defaults.items() if keys[key] != value}
    assert other == OTHER_VALUES.get(name, set())


def test_a_few_steps_lower_the_loss(name: str, problem: Callable[..., Any], choose: Callable[..., Any]) -> None:
    p = problem()
    optimizer, before = choose(name, p.params), p.loss().item()
    closure = LossClosure(optimizer, p.loss)
    losses = [float(optimizer.step(closure)) for _ in range(12)]
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    assert losses[0] == pytest.approx(before)  # the loss before the step
    assert p.loss().item() < before


def test_saving_midway_and_resuming_changes_nothing(
    name: str, problem: Callable[..., Any], choose: Callable[..., Any], tmp_path: Path
) -> None:
    def steps(p: Any, optimizer: Any, n: int) -> None:
        for _ in range(n):
            optimizer.step(LossClosure(optimizer, p.loss))

    def groups(p: Any) -> list[dict[str, Any]]:
        return [{"params": p.params[::2]}, {"params": p.params[1::2], "weight_decay": 0.0}]

    typed = ["max_iter=2", "history_size=3"] if name == "lbfgs" else []  # not at the minimum before it is saved
    whole, first, second = problem(), problem(), problem()
    steps(whole, choose(name, groups(whole), *typed), 9)

    optimizer = choose(name, groups(first), *typed)
    steps(first, optimizer, 5)
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # a checkpoint holds the weights that are evaluated
    torch.save({"model": first.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)

    resumed = choose(name, groups(second), *typed)
    second.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    if hasattr(resumed, "train"):
        resumed.train()
    steps(second, resumed, 4)
    assert torch.equal(second.weights(), whole.weights())
    assert not torch.equal(first.weights(), whole.weights())


def test_parameters_without_gradient_stay(name: str, problem: Callable[..., Any], choose: Callable[..., Any]) -> None:
    p = problem()
    p.model[0].weight.requires_grad_(False)
    frozen = p.model[0].weight.clone()
    optimizer = choose(name, p.params)
    before = p.weights()
    for _ in range(2):
        optimizer.step(LossClosure(optimizer, p.loss))
    assert torch.equal(p.model[0].weight, frozen)
    assert not torch.equal(p.weights(), before)


def test_classes_declare_evaluations(name: str, problem: Callable[..., Any], choose: Callable[..., Any]) -> None:
    p = problem()
    optimizer = choose(name, p.params)
    calls = 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return p.loss()

    optimizer.step(LossClosure(optimizer, loss))
    assert optimizer_traits(optimizer).evaluations == ("once" if calls == 1 else "many")


DECOUPLED = ["adamw", "sgdw", "momentum", "lamb", "lion", "muon", "nadam", "radam", "schedule_free_adamw"]
DECOUPLED += ["schedule_free_sgd"]
DECOUPLED += ["adabelief", "ademamix", "dmuon", "kron", "mars", "shampoo", "signum"]


@pytest.mark.parametrize("choice", [*DECOUPLED, "lars"])
def test_decay_is_decoupled(choice: str, problem: Callable[..., Any], choose: Callable[..., Any]) -> None:
    """Without a gradient the weights shrink by lr * weight_decay and moments stay empty."""
    if choice.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    p = problem()
    typed = ["lr=0.1", "weight_decay=0.5"]
    typed += ["rest_lr=0.1"] if choice == "muon" else ["decoupled_weight_decay=true"] if choice == "lars" else []
    optimizer, before = choose(choice, p.params, *typed), p.weights()
    for q in p.params:
        q.grad = torch.zeros_like(q)
    optimizer.step()
    moved = before - p.weights()
    if choice == "lamb":  # the decay is scaled with the update: here each tensor moves by lr times its norm
        for q, m in zip(p.params, moved.split([q.numel() for q in p.params]), strict=True):
            assert m.norm().item() == pytest.approx(0.1 * q.norm().item() / 0.9)
    else:
        torch.testing.assert_close(moved, 0.05 * before)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            assert not state.get(key, torch.zeros(1)).any()


@pytest.mark.parametrize("name", ["rprop", "irprop"])
def test_rprop_starts_with_the_step_size_of_its_key(name: str) -> None:
    """The learning rate is the first step size only: a warmup would make it another one, for good."""
    with initialize_config_dir(str(CONF), version_base=None):
        assert compose("train", overrides=[f"optimizer={name}"]).schedule._target_ == "dlopt.schedules.constant"


def test_gradient_descent_defaults_to_the_full_batch() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        full = compose("train", overrides=["optimizer=gradient_descent", "optimizer.lr=0.3"])
        typed = compose("train", overrides=["data.batch_size=32", "optimizer=gradient_descent"])
        other = compose("train")
    assert full.data.batch_size == "full"
    assert full.optimizer.lr == 0.3
    assert typed.data.batch_size == 32
    assert typed.optimizer.momentum == 0.0
    keys = {"_target_", "lr", "momentum", "dampening", "nesterov", "weight_decay"}
    assert keys <= set(full.optimizer)
    assert set(typed.optimizer) == set(full.optimizer) == set(other.optimizer)
    assert isinstance(other.data.batch_size, int)


def test_chunks_hold_every_parameter_with_a_gradient_once() -> None:
    sizes = (10, 1 << 19, 5, 1 << 16, 1 << 17, 1)
    params = [torch.zeros(n, dtype=d) for n in sizes for d in (torch.float, torch.double)]
    for p in params[1:]:
        p.grad = torch.zeros_like(p)
    lists = list(chunks(params))
    assert sorted(id(p) for part in lists for p in part) == sorted(id(p) for p in params[1:])
    assert all(len(part) == 1 or sum(p.numel() for p in part) <= 1 << 18 for part in lists)
    assert len(lists) < len(params) - 1


def test_exported_classes_can_be_copied() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    classes = [
        each for each in vars(optim).values() if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)
    ]
    assert len(classes) > 25
    for each in set(classes) - {optim.SAM}:
        copy.deepcopy(each([p]))
