"""What torch's own tests ask of every optimizer: copies, pickles, added and frozen groups, odd parameters, hooks."""

import copy
import importlib
import io
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from dlopt import optim
from dlopt.basics.errors import UserError
from dlopt.optim import LARS, LBFGS, SAM, SOAP, DistributedShampoo, Kron, LossClosure, Muon, NAdam, Scion, Shampoo
from dlopt.optim.traits import optimizer_traits

Make = Callable[[list[Any]], torch.optim.Optimizer]
SETTINGS: dict[str, dict[str, Any]] = {
    "LAMB": {"lr": 0.1}, "LARS": {"lr": 0.1}, "Lion": {"lr": 0.01}, "Signum": {"lr": 0.01}, "ADOPT": {"lr": 0.01},
    "AdEMAMix": {"lr": 0.01, "warmup": 10}, "Adan": {"lr": 0.01}, "AdaBelief": {"lr": 0.01}, "MARS": {"lr": 0.01},
    "Adafactor": {"lr": 0.01}, "Prodigy": {"d0": 0.001}, "Shampoo": {"lr": 0.1}, "SOAP": {"lr": 0.01},
    "DistributedShampoo": {"lr": 0.01, "update_every": 2},
    "Kron": {"lr": 0.01}, "Sophia": {"lr": 0.01, "update_every": 2}, "Scion": {"lr": 0.001, "radius": 10.0},
    "Muon": {"lr": 0.01, "rest_lr": 0.01}, "NAdam": {"lr": 0.01}, "Rprop": {"lr": 0.01}, "SGDW": {"lr": 0.1},
    "BFGS": {}, "Newton": {}, "NewtonCG": {}, "LBFGS": {"max_iter": 2},
}  # fmt: skip
MAKERS: dict[str, Make] = {
    **{name.lower(): partial(getattr(optim, name), **keys) for name, keys in SETTINGS.items()},
    "lion_cautious": partial(optim.Lion, lr=0.01, cautious=True),
    "adamw_cautious": partial(optim.adamw, lr=0.01, cautious=True),
    "muon_cautious": partial(Muon, lr=0.01, rest_lr=0.01, cautious=True),
    "muon_sphere": partial(Muon, lr=0.01, rest_lr=0.01, weight_decay=0.0, row_beta=0.9, hyperball=True),
    "adamw_sphere": partial(optim.adamw, lr=0.01, weight_decay=0.0, hyperball=True),
    "soap_sphere": partial(SOAP, lr=0.01, weight_decay=0.0, orthogonalize=True, hyperball=True),
    "muon_sgd": partial(Muon, lr=0.01, rest="sgd", rest_lr=0.01),
    "sam": lambda params: SAM(base=torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    "sam_nadam": lambda params: SAM(base=NAdam(params, lr=0.01)),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _scion_of_the_rest(params: list[Any]) -> torch.optim.Optimizer:
    return Scion([{"params": params, "use_muon": False}])


class Problem:
    """A least-squares fit of a two-layer net."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.targets = torch.randn(16, 3, generator=generator), torch.randn(16, 2, generator=generator)
        self.params = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 4), (4,), (4, 2))]

    def loss(self) -> Tensor:
        first, bias, second = self.params
        return (torch.tanh(self.inputs @ first + bias) @ second - self.targets).square().mean()

    def steps(self, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        closure = LossClosure(optimizer, self.loss)
        return [float(optimizer.step(closure)) for _ in range(count)]  # type: ignore[arg-type]


def by_pickle(thing: tuple[Problem, torch.optim.Optimizer]) -> tuple[Problem, torch.optim.Optimizer]:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    loaded: tuple[Problem, torch.optim.Optimizer] = torch.load(file, weights_only=False)
    return loaded


@ALL
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["copied", "pickled"])
def test_a_copy_continues_like_the_original(make: Make, duplicate: Callable[[Any], Any]) -> None:
    problem = Problem()
    optimizer = make(problem.params)
    problem.steps(optimizer, 3)
    other_problem, other = duplicate((problem, optimizer))
    assert other.param_groups[0]["params"][0] is other_problem.params[0]
    assert other_problem.steps(other, 3) == problem.steps(optimizer, 3)
    for ours, theirs in zip(problem.params, other_problem.params, strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs


@ALL
def test_added_parameters_are_trained(make: Make) -> None:
    problem = Problem()
    optimizer = make(problem.params[:1])
    problem.steps(optimizer, 2)
    before = [p.detach().clone() for p in problem.params]
    for p in problem.params[1:]:
        optimizer.add_param_group({"params": [p]})
    losses = problem.steps(optimizer, 20)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(problem.params, before, strict=True))


@ALL
def test_nothing_to_train(make: Make) -> None:
    problem = Problem()
    before = [p.detach().clone() for p in problem.params]
    for p in problem.params:
        p.requires_grad_(False)
    optimizer = make(problem.params)

    def closure() -> Tensor:
        return problem.loss()

    closure.loss = problem.loss  # type: ignore[attr-defined]
    assert optimizer.step(closure) is not None  # type: ignore[arg-type, func-returns-value]
    assert all(torch.equal(p, old) for p, old in zip(problem.params, before, strict=True))


@pytest.mark.parametrize(
    "make",
    [partial(optim.Lion, cautious=True), optim.Lion, optim.Signum, optim.Rprop, _scion_of_the_rest],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_signs_hide_no_gradient_that_is_not_finite(make: Make, value: float) -> None:
    """torch's sign of NaN is 0: the weight would stop moving, and nothing would show it."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make([p])
    for gradient in (value, 1.0):
        p.grad = torch.ones(2, 2)
        p.grad[0, 0] = gradient
        optimizer.step()
    assert not p[0, 0].isfinite() and p[1].isfinite().all()


@pytest.mark.parametrize(
    "make", [Muon, Scion, Shampoo, partial(DistributedShampoo, update_every=1), SOAP, Kron, optim.Adafactor]
)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices_are_left_alone(make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int]) -> None:
    empty, matrix = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([empty, matrix])
    for _ in range(2):  # the first gradient only initializes SOAP
        empty.grad, matrix.grad = torch.zeros(shape), torch.ones(2, 2)
        optimizer.step()
    assert not torch.equal(matrix, torch.ones(2, 2))


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer{index}", p) for index, p in enumerate(params)]


@ALL
def test_names_of_parameters_stay_with_them(make: Make) -> None:
    problem = Problem()
    optimizer = make(named(problem.params))
    problem.steps(optimizer, 2)
    loaded = make(named(problem.params))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, loaded):
        found = {
            name: p
            for group in each.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        assert all(found[name] is p for name, p in named(problem.params)) and len(found) == 3
    with pytest.raises(ValueError, match="with/without names"):
        make([*named(problem.params[:2]), problem.params[2]])


@pytest.mark.parametrize("make", [Muon, LBFGS])
def test_names_of_groups_and_of_added_parameters(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    problem = Problem()
    first, second, third = named(problem.params)
    optimizer = make([{"params": [first]}, {"params": [second]}])
    optimizer.add_param_group({"params": [third]})
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == [
        "layer0", "layer1", "layer2"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@ALL
def test_what_is_not_an_iterable_of_tensors_is_refused_as_torch_does(make: Make) -> None:
    weight: Any = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        make(weight)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make([weight, "name"])
    with pytest.raises(ValueError, match="non-leaf Tensor"):
        make([weight * 2])
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


@ALL
def test_a_state_without_the_newest_keys_can_be_resumed(make: Make) -> None:
    """Also of torch's optimizers inside: they get new keys from time to time. Such a key has its default."""
    problem, other = Problem(), Problem()
    optimizer, loaded = make(problem.params), make(other.params)
    problem.steps(optimizer, 2)
    for ours, theirs in zip(problem.params, other.params, strict=True):
        theirs.data.copy_(ours)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("foreach", "fused", "maximize", "capturable", "differentiable"):
            group.pop(key, None)
    loaded.load_state_dict(state)
    assert other.steps(loaded, 3) == pytest.approx(problem.steps(optimizer, 3), rel=1e-5)  # fused or not


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_schedule_free_resumes_a_state_without_the_newest_key(name: str) -> None:
    pytest.importorskip("schedulefree")
    from dlopt.optim import schedule_free

    make = getattr(schedule_free, name)
    problem = Problem()
    optimizer = make(problem.params, lr=0.1)
    problem.steps(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["foreach"]
    loaded = make(problem.params, lr=0.1)
    loaded.load_state_dict(state)
    problem.steps(loaded, 1)
    assert loaded.param_groups[0]["k"] == 3


@pytest.fixture
def hooks() -> Iterator[list[str]]:
    """Registers hooks on the steps of all optimizers; the list is what they have seen."""
    seen: list[str] = []
    before = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(f"before {type(optimizer).__name__}"))
    after = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(f"after {type(optimizer).__name__}"))
    yield seen
    before.remove()
    after.remove()


@ALL
def test_hooks_run_once_per_step(make: Make, hooks: list[str]) -> None:
    torch.optim.LBFGS([nn.Parameter(torch.ones(2))])  # torch puts its hooks into the class when it is first used
    problem = Problem()
    optimizer = make(problem.params)
    optimizer.register_step_pre_hook(lambda *_: hooks.append("own before"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("own after"))
    problem.steps(optimizer, 1)
    name = type(optimizer).__name__
    assert hooks == [f"before {name}", "own before", "own after", f"after {name}"]
    torch.optim.SGD(problem.params).step()
    assert hooks[4:] == ["before SGD", "after SGD"], "all hooks are back"


def test_hooks_of_a_base_that_torch_has_wrapped_again_run_once(
    hooks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile of torch 2.11 wraps it, to keep the compiler out of L-BFGS."""
    torch.optim.LBFGS([nn.Parameter(torch.ones(2))])
    step: Any = torch.optim.LBFGS.step

    @wraps(step)
    def wrapped(*arguments: Any) -> Any:
        return step(*arguments)

    monkeypatch.setattr(torch.optim.LBFGS, "step", wrapped)
    problem = Problem()
    problem.steps(LBFGS(problem.params, max_iter=2), 1)
    assert hooks == ["before LBFGS", "after LBFGS"]


def test_sam_runs_the_hooks_of_its_base_and_keeps_those_of_all_optimizers(hooks: list[str]) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    base.register_step_post_hook(lambda *_: hooks.append("base"))
    optimizer = SAM(base=base)
    problem.steps(optimizer, 1)
    assert hooks == ["before SAM", "base", "after SAM"]

    def failing(*_: object) -> None:
        raise RuntimeError("in the base")

    base.register_step_pre_hook(failing)
    with pytest.raises(RuntimeError, match="in the base"):
        problem.steps(optimizer, 1)
    torch.optim.SGD(problem.params).step()
    assert hooks[-2:] == ["before SGD", "after SGD"]


def test_complex_weights_are_pairs_of_real_ones() -> None:
    """Matrices, and vectors, which LARS updates without its ratio in both forms."""
    for shape, flat in (((3, 4), False), ((2, 2, 2), False), ((5,), True)):
        draw = torch.Generator().manual_seed(0)
        start, *grads = (torch.randn(shape, dtype=torch.complex128, generator=draw) for _ in range(6))

        def real(values: Tensor, flat: bool = flat) -> Tensor:
            pairs = torch.view_as_real(values).clone()
            return pairs.flatten() if flat else pairs

        weight, pairs = nn.Parameter(start.clone()), nn.Parameter(real(start))
        optimizers = LARS([weight], lr=0.5), LARS([pairs], lr=0.5)
        for grad in grads:
            weight.grad, pairs.grad = grad.clone(), real(grad)
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(real(weight.detach()), pairs.detach(), rtol=1e-13, atol=1e-13)
        assert not torch.allclose(pairs, real(start))


def test_muon_does_not_fuse_over_gaps_in_memory() -> None:
    """torch's fused kernels overwrite the values between the elements of a strided parameter."""
    storage = torch.ones(8)
    strided, dense = nn.Parameter(storage[::2]), nn.Parameter(torch.ones(4))
    strided.grad, dense.grad = torch.ones(4), torch.ones(4)
    Muon([strided], rest_lr=0.1).step()
    Muon([dense], rest_lr=0.1).step()
    assert torch.allclose(strided, dense) and torch.equal(storage[1::2], torch.ones(4))


def test_muon_reads_its_groups_again_after_loading() -> None:
    problem, other = Problem(), Problem()
    optimizer, loaded = Muon(problem.params[:2]), Muon(other.params[:2])
    problem.steps(optimizer, 2)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, params in ((optimizer, problem.params), (loaded, other.params)):
        each.add_param_group({"params": params[2:]})
    for ours, theirs in zip(problem.params, other.params, strict=True):
        theirs.data.copy_(ours)
    assert problem.steps(optimizer, 3) == other.steps(loaded, 3)


def test_muon_saves_the_state_of_parameters_that_are_added_later() -> None:
    problem = Problem()
    optimizer = Muon(problem.params[:1])
    optimizer.add_param_group({"params": problem.params[1:]})
    problem.steps(optimizer, 1)
    assert optimizer.state.keys() == set(problem.params)


def test_sam_runs_the_hooks_registered_on_it() -> None:
    problem = Problem()
    optimizer = SAM(base=torch.optim.SGD(problem.params, lr=0.1))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["saving", "loaded"] and optimizer.state is optimizer.base.state


COMPLEX = ["LAMB", "Adafactor", "Muon", "Newton", "Rprop", "BFGS", "Lion", "SOAP", "Kron", "Scion", "Prodigy"]


@pytest.mark.parametrize("name", [*COMPLEX, "ScheduleFreeAdamW"])
def test_complex_parameters_are_refused(name: str) -> None:
    if name.startswith("ScheduleFree"):
        pytest.importorskip("schedulefree")
    make = getattr(optim if name in COMPLEX else importlib.import_module("dlopt.optim.schedule_free"), name)
    choice = {"ScheduleFreeAdamW": "schedule_free_adamw"}.get(name, name.lower())
    with pytest.raises(UserError, match=f"optimizer={choice}: complex parameters"):
        make([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("name", ["BFGS", "Lion", "SOAP", "Kron", "Scion", "Prodigy"])
def test_sparse_gradients_are_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(UserError, match="sparse gradients are not supported"):
        getattr(optim, name)([p]).step(lambda: p.sum())


def test_lbfgs_refuses_a_parameter_in_two_groups() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        LBFGS([{"params": [weight]}, {"params": [weight]}])


def test_sam_rescales_every_group_of_muon() -> None:
    problem = Problem()
    optimizer = SAM(base=Muon(problem.params, lr=0.1, rest_lr=0.01), lr=0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.005}
    losses = problem.steps(optimizer, 10)
    assert losses[-1] < losses[0]


@ALL
def test_updates_do_not_depend_on_addresses_and_strides(make: Make) -> None:
    """Bitwise: with parallel=ddp gradients are parts of a bucket, and loaded shards of a state are contiguous."""
    draws = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=draws) for shape in ((31, 17), (17,), (7, 31))]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizers = make(ours), make(theirs)
    if any(optimizer_traits(optimizer).evaluations != "once" for optimizer in optimizers):
        pytest.skip("evaluates the loss itself")
    for step in range(25):
        bucket = torch.zeros(sum(w.numel() for w in weights) + 1)
        end = 1
        for p, other in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=draws)
            start, end = end, end + p.numel()
            other.grad = bucket[start:end].view(p.shape).copy_(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        if step % 6 == 5:
            state = tree_map_only(Tensor, Tensor.contiguous, optimizers[1].state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(p, other) for p, other in zip(ours, theirs, strict=True))
