"""The traits that optimizers state, tried on updates from given gradients."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.optim.traits import OptimizerTraits, is_unknown, optimizer_traits
from tests.support import own_optimizers
from tests.support.choices import names

Choose = Callable[..., torch.optim.Optimizer]


@pytest.fixture(params=names("optimizer"))
def name(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    return str(request.param)


def moved(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> None:
    """Updates the parameters with each list of gradients in turn."""
    for step in gradients:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()


def draw_gradients(steps: int) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 4), (4,)]
    return [[torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def parameters() -> list[Tensor]:
    return [torch.nn.Parameter(each) for each in draw_gradients(1)[0]]


def build(choose: Choose, name: str, *, evaluations: str = "once") -> tuple[torch.optim.Optimizer, list[Tensor]]:
    params = parameters()
    optimizer = choose(name, params)
    if optimizer_traits(optimizer).evaluations != evaluations:
        pytest.skip(f"evaluates the loss {optimizer_traits(optimizer).evaluations}")
    return optimizer, params


def test_updates_depend_on_no_more_than_the_scope(name: str, choose: Choose) -> None:
    gradients, changed = draw_gradients(4), draw_gradients(4)
    for step in changed:
        step[0][1, 2] *= -30
    ends = []
    for each in (gradients, changed):
        optimizer, params = build(choose, name)
        moved(optimizer, params, each)
        ends.append([p.detach().clone() for p in params])
    scope = optimizer_traits(optimizer).scope
    (first, *others), (changed_first, *changed_others) = ends
    if scope != "model":
        assert all(torch.equal(*pair) for pair in zip(others, changed_others, strict=True))
    if scope == "element":
        first[1, 2] = changed_first[1, 2]
        assert torch.equal(first, changed_first)


def test_no_weight_moves_at_a_learning_rate_of_zero(name: str, choose: Choose) -> None:
    optimizer, params = build(choose, name)
    if not optimizer_traits(optimizer).rests_at_zero_lr:
        pytest.skip("may move")
    moved(optimizer, params, draw_gradients(2))
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    moved(optimizer, params, draw_gradients(2))
    assert all(torch.equal(*pair) for pair in zip(before, params, strict=True))


def test_updates_do_not_depend_on_the_scale_of_the_gradient(name: str, choose: Choose) -> None:
    ends = []
    for scale in (1, 1000):
        optimizer, params = build(choose, name)
        if not optimizer_traits(optimizer).normalizes_entries:
            pytest.skip("may depend on it")
        moved(optimizer, params, [[scale * each for each in step] for step in draw_gradients(3)])
        ends.append(
            torch.cat([(p - start).detach().reshape(-1) for p, start in zip(params, parameters(), strict=True)])
        )
    torch.testing.assert_close(*ends, rtol=1e-2, atol=1e-7)


def test_updates_of_entries_of_one_size_do_not_depend_on_the_norm_of_the_weights(name: str, choose: Choose) -> None:
    """As init=mup assumes of them; a trust ratio would multiply the update by the norm."""
    ends = []
    for scale in (1, 100):
        optimizer, params = build(choose, name)
        if not optimizer_traits(optimizer).normalizes_entries:
            pytest.skip("may depend on it")
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        with torch.no_grad():
            torch._foreach_mul_(params, scale)
        before = [p.detach().clone() for p in params]
        moved(optimizer, params, draw_gradients(3))
        ends.append(torch.cat([(p - start).detach().reshape(-1) for p, start in zip(params, before, strict=True)]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_decoupled_decay_subtracts_a_multiple_of_the_weights(name: str, choose: Choose) -> None:
    """lr * weight_decay * theta, to first order: in the second update, because some move nothing in the first."""
    ends, gradients = [], draw_gradients(2)
    for decay in (0.0, 1e-3):
        params = parameters()
        optimizer = choose(name, params)
        if not optimizer_traits(optimizer).decoupled_decay or optimizer_traits(optimizer).evaluations != "once":
            pytest.skip("is not decoupled, or needs a closure")
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3, 0.0
        moved(optimizer, params, gradients[:1])
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        before = [p.detach().clone() for p in params]
        moved(optimizer, params, gradients[1:])
        ends.append([p.detach().clone() for p in params])
    for start, plain, decayed in zip(before, *ends, strict=True):
        torch.testing.assert_close((plain - decayed) / 1e-6, start, rtol=0.03, atol=0.003)


@pytest.mark.parametrize(
    ("name", "keys", "decoupled"),
    [
        ("adam", [], False), ("adam", ["decoupled_weight_decay=true"], True), ("nadam", [], True),
        ("nadam", ["decoupled_weight_decay=false"], False), ("radam", ["decoupled_weight_decay=true"], True),
        ("lars", [], False), ("lars", ["decoupled_weight_decay=true"], True), ("adamw", ["cautious=true"], True),
        ("muon", [], True), ("muon", ["rest=sgd"], False), ("muon", ["normalize_weights=true"], False),
        ("lamb", [], False), ("prodigy", [], False), ("sgd", [], False), ("sam", [], False), ("sophia", [], True),
    ],
)  # fmt: skip
def test_keys_decide_whether_the_decay_is_decoupled(
    name: str, keys: list[str], decoupled: bool, choose: Choose
) -> None:
    assert optimizer_traits(choose(name, parameters(), *keys)).decoupled_decay is decoupled


def test_unknown_optimizers_have_the_careful_traits() -> None:
    class Derived(torch.optim.Adam):
        """May do anything in its step."""

    class Stated(Derived):
        traits: ClassVar[OptimizerTraits] = OptimizerTraits(scope="tensor")

    params = parameters()
    unknown = optimizer_traits(Derived(params))
    assert is_unknown(unknown)
    assert OptimizerTraits("model", "once", False, False, False, False, False, False, False) == unknown
    assert optimizer_traits(Stated(params)).scope == "tensor"
    assert optimizer_traits(torch.optim.Adam(params)).scope == "element"
    assert optimizer_traits(torch.optim.LBFGS(params)).evaluations == "many"
    assert not optimizer_traits(torch.optim.Adam(params)).capturable
    assert optimizer_traits(torch.optim.Adam(params, fused=True)).capturable


def test_an_optimizer_whose_step_requires_a_closure_evaluates_the_loss_itself() -> None:
    class Evaluates(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    traits = optimizer_traits(Evaluates(parameters()))
    assert is_unknown(traits) and traits.evaluations == "many"
    assert not is_unknown(optimizer_traits(torch.optim.LBFGS(parameters())))


def test_refuses_other_values() -> None:
    class Wrong(torch.optim.SGD):
        traits: ClassVar[Any] = {"scope": "element"}

    with pytest.raises(UserError, match=r"Wrong.traits=\{'scope': 'element'\}: must be a dlopt.optim.OptimizerTraits"):
        optimizer_traits(Wrong(parameters()))


@pytest.mark.parametrize("kind", own_optimizers.UNCALLABLE)
def test_refuses_a_step_that_cannot_be_called_as_the_traits_say(kind: Any) -> None:
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.step\(.*: dlopt calls step\(\) after"):
        optimizer_traits(kind(parameters()))
