import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlopt.training.averaging import ExponentialAverage, TailAverage, WeightAverage


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def averaged(average: WeightAverage, model: nn.Module) -> dict[str, Tensor]:
    with average.swapped_in():
        return {name: value.clone() for name, value in model.state_dict().items()}


def move(model: nn.Module, n: int) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(n), dtype=value.dtype))
            else:
                value.add_(n)


def test_closed_form() -> None:
    """a_n = d^n w_0 + (1 - d) sum_k d^(n-k) w_k, for weights and batch-norm statistics; counters are copied."""
    model, decay, count = net(), 0.8, 7
    average = ExponentialAverage(model, decay)
    history = [copy.deepcopy(model.state_dict())]
    for n in range(1, count + 1):
        move(model, n)
        average.update()
        history.append(copy.deepcopy(model.state_dict()))
    for name, value in averaged(average, model).items():
        if not value.is_floating_point():
            assert int(value) == int(history[-1][name]) > 0
            continue
        expected = decay**count * history[0][name]
        for n in range(1, count + 1):
            expected = expected + (1 - decay) * decay ** (count - n) * history[n][name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
        assert not torch.equal(value, history[-1][name])


def test_warmup() -> None:
    """The decay of update n is min(decay, (1 + n) / (10 + n)): 2/11, 3/12, then 0.3."""
    model, decays = net(), [2 / 11, 1 / 4, 0.3, 0.3, 0.3]
    average = ExponentialAverage(model, 0.3, warmup=True)
    expected = model[0].weight.detach().clone()
    for n, decay in enumerate(decays, 1):
        move(model, n)
        average.update()
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(averaged(average, model)["0.weight"], expected, rtol=1e-12, atol=1e-13)


def test_warmup_forgets_the_initial_weights() -> None:
    """A constant decay of 0.999 leaves them a share of 0.999^420 = 66 % after 420 updates."""

    def share(warmup: bool) -> float:
        model = nn.Linear(1, 1, bias=False).double()
        model.weight.data.fill_(1.0)
        average = ExponentialAverage(model, 0.999, warmup=warmup)
        model.weight.data.fill_(0.0)
        for _ in range(420):
            average.update()
        return averaged(average, model)["weight"].item()

    assert share(False) == pytest.approx(0.999**420)
    assert 0 < share(True) < 1e-15


def test_starts_at_the_weights_and_does_not_change_the_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    average = ExponentialAverage(model, 0.9)
    assert all(torch.equal(averaged(average, model)[name], before[name]) for name in before)
    average.update()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_swapped_in_restores_weights_and_keeps_changes() -> None:
    model = net()
    average = ExponentialAverage(model, 0.9)
    move(model, 1)
    average.update()
    weights, expected = copy.deepcopy(model.state_dict()), averaged(average, model)
    with pytest.raises(KeyError), average.swapped_in():
        assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
        model[1].running_mean.fill_(7.0)
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert bool((averaged(average, model)["1.running_mean"] == 7.0).all()), "what was changed meanwhile is kept"


def test_shared_weights_are_averaged_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second).double()
    average = ExponentialAverage(model, 0.75)
    start = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.add_(1.0)
    average.update()
    torch.testing.assert_close(averaged(average, model)["1.weight"], start + 0.25, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("updates", "first"), [(12, 10), (11, 10), (3, 3), (1, 1)])
def test_tail(updates: int, first: int) -> None:
    """The mean of the weights after the updates from `first` to the last; before, the weights."""
    model = net()
    average = TailAverage(model, updates)
    seen = []
    for n in range(1, updates + 1):
        move(model, n)
        average.update()
        seen.append(copy.deepcopy(model.state_dict()))
        if n <= first:
            assert torch.equal(averaged(average, model)["0.weight"], seen[-1]["0.weight"])
    for name, value in averaged(average, model).items():
        if value.is_floating_point():
            expected = torch.stack([state[name] for state in seen[first - 1 :]]).mean(0)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


AVERAGES: dict[str, Callable[[nn.Module], WeightAverage]] = {
    "constant": lambda model: ExponentialAverage(model, 0.9),
    "warmup": lambda model: ExponentialAverage(model, 0.9, warmup=True),
    "tail": lambda model: TailAverage(model, 8),
    "tail of all": lambda model: TailAverage(model, 4),
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("cut", [0, 3, 4])
def test_resumes_bitwise_identically(cut: int, make: Callable[[nn.Module], WeightAverage]) -> None:
    model, other = net(), net()
    average, resumed = make(model), make(other)
    for n in range(1, 6):
        move(model, n)
        average.update()
        if n == cut:
            other.load_state_dict(averaged(average, model))
            resumed.restart(n)
            other.load_state_dict(model.state_dict())
        elif n > cut:
            move(other, n)
            resumed.update()
    expected, found = averaged(average, model), averaged(resumed, other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_averages_weights_that_are_loaded_later() -> None:
    model = net()
    average = ExponentialAverage(model, 0.5)
    new = {name: torch.full_like(value, 3) for name, value in model.state_dict().items()}
    expected = (averaged(average, model)["0.weight"] + 3.0) / 2
    model.load_state_dict(new)
    average.update()
    torch.testing.assert_close(averaged(average, model)["0.weight"], expected)
