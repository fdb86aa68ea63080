"""Updates of bf16 weights, against those of fp32 weights and against closed forms."""

import math
from collections.abc import Callable
from copy import deepcopy as copy_of
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.instruments.profiling import state_bytes
from dlopt.optim import SGDW, AdEMAMix, adamw
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.rounding import RoundedUpdate, random_bits, round_stochastically, round_updates
from tests.support.choices import REFUSED_IN_PURE_BF16, names
from tests.support.runs import run_config, same, small_workload

# -- rounding


def test_bits_are_uniform_and_independent() -> None:
    """By chi-square tests over 64 cells, and by correlations of updates, of neighbours, and of the two halves."""
    seeds = [stream(0, update, parameter, 0) for update in (1, 2, 3) for parameter in (0, 1)]
    draws = [random_bits(torch.arange(1 << 16, dtype=torch.int32), seed) for seed in seeds]
    parts = [bits >> shift & 0xFFFF for bits in draws for shift in (0, 16)]
    for part in parts:
        counts = torch.bincount(part >> 10, minlength=64).double()
        assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 4 * math.sqrt(126)
    series = torch.stack([*parts, *(part.roll(1) for part in parts)]).double()
    correlations = torch.corrcoef(series) - torch.eye(len(series))
    assert correlations.abs().max() < 5 / 256  # five standard deviations


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    values = torch.logspace(-30, 30, 41).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(41)
    many = values.repeat(1 << 14, 1)
    rounded = round_stochastically(many, random_bits(torch.arange(many.numel(), dtype=torch.int32).view_as(many), 5))
    ulp = torch.exp2(values.abs().log2().floor() - 7).double()
    errors = (rounded.double() - many.double()) / ulp
    assert errors.abs().max() < 1
    assert errors.mean(0).abs().max() < 5 * 0.5 / 128  # five standard errors, of which 0.5 ulp is the largest


def test_rounding_keeps_what_bf16_has() -> None:
    special = [0.0, -0.0, 1.5, -256.0, math.inf, -math.inf, 1e-40]
    values = torch.tensor(special).bfloat16().float()
    for bits in (0, 0xFFFF, -1):
        assert round_stochastically(values, torch.full_like(values, bits, dtype=torch.int32)).float().equal(values)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # also those of CUDA
    assert round_stochastically(nans, torch.full((3,), 0xFFFF, dtype=torch.int32)).isnan().all()


# -- updates

GRADIENTS = (0.5, 2.0**-9, 0.5, 2.0**-9)
BF16_OPTIMIZERS = [name for name in names("optimizer") if name not in REFUSED_IN_PURE_BF16]


def bf16_weights(dtype: torch.dtype) -> list[Tensor]:
    """Two matrices and two vectors with values in 1 to 2, whose units in the last place are 2^-7."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((16, 16), (16, 16), (256,), (256,))
    return [(1 + torch.rand(shape, generator=draw)).bfloat16().to(dtype).requires_grad_() for shape in shapes]


def update(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, float]]:
    """Returns the largest norm of each tensor of the state, at every 20th update, by parameter."""
    largest: list[dict[str, float]] = [{} for _ in params]
    for number in range(steps):
        for p, value in zip(params, GRADIENTS, strict=True):
            p.grad = torch.full_like(p, value)
        optimizer.step()
        if number % 20:
            continue
        for p, norms in zip(params, largest, strict=True):
            for name, state in optimizer.state[p].items():
                if isinstance(state, Tensor):
                    norms[name] = max(norms.get(name, 0.0), state.double().norm().item())
    return largest


def compare_with_fp32(choice: str, steps: int) -> None:
    """States within 5 %, and mean displacements of 256 weights within 2 % and five standard errors of the rounding.

    5 % of a state's largest norm: where decay balances the gradient, as in LARS, the momentum tends to zero.
    """
    build = run_config(f"optimizer={choice}").optimizer.build
    params, wide_params = bf16_weights(torch.bfloat16), bf16_weights(torch.float32)
    optimizer, wide = build(params=params), build(params=wide_params)
    round_updates(optimizer, 0)
    update(params, optimizer, steps)
    largest = update(wide_params, wide, steps)
    for p, q, first, norms in zip(params, wide_params, bf16_weights(torch.float64), largest, strict=True):
        assert p.dtype == torch.bfloat16
        actual, expected = ((each.detach().double() - first).mean() for each in (p, q))
        ulp = torch.exp2(torch.stack([q.abs().max(), first.abs().max()]).max().log2().floor() - 7)
        assert (actual - expected).abs() < 0.02 * expected.abs() + 5 * (ulp * expected.abs() / 256).sqrt()
        for name, value in wide.state[q].items():
            if isinstance(value, Tensor):
                assert optimizer.state[p][name].dtype == value.dtype
                error = (optimizer.state[p][name].double() - value.double()).norm()
                assert error <= 0.05 * norms[name], name


@pytest.mark.parametrize("choice", BF16_OPTIMIZERS)
def test_every_optimizer_moves_bf16_weights_as_fp32_ones(choice: str) -> None:
    compare_with_fp32(choice, 60)


@pytest.mark.slow
@pytest.mark.parametrize("choice", BF16_OPTIMIZERS)
def test_every_optimizer_moves_bf16_weights_as_fp32_ones_for_long(choice: str) -> None:
    """Rounded to nearest, second moments and AdEMAMix's slow average would stop within 700 updates.

    4,000 updates for Adam's averages, which Muon and SOAP share, and for the slowest one.
    """
    compare_with_fp32(choice, 4000 if choice in ("adamw", "ademamix") else 800)


@pytest.mark.parametrize(("make", "name", "decay"), [(adamw, "exp_avg_sq", 0.9995), (AdEMAMix, "exp_avg_slow", 0.9999)])
def test_slow_averages_of_bf16_weights_equal_their_closed_form(
    make: Callable[..., torch.optim.Optimizer], name: str, decay: float
) -> None:
    """In bf16, rounded to nearest, they stop when a step is below half a unit in the last place."""
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = make([p], lr=1e-6, betas=(0.9, 0.9995, 0.9999)[: 3 if make is AdEMAMix else 2])
    round_updates(optimizer, 0)
    for _ in range(1000):
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    expected = (0.25 if name == "exp_avg_sq" else 0.5) * (1 - decay**1000)
    torch.testing.assert_close(optimizer.state[p][name], torch.full((3,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("choice", ["adamw", "muon", "kron", "soap"])
def test_bf16_weights_of_a_resumed_optimizer_are_bitwise_identical(choice: str) -> None:
    build = run_config(f"optimizer={choice}").optimizer.build
    params, copies = bf16_weights(torch.bfloat16), bf16_weights(torch.bfloat16)
    optimizer, loaded = build(params=params), build(params=copies)
    for each in (optimizer, loaded):
        round_updates(each, 0)
    update(params, optimizer, 5)
    with torch.no_grad():
        for p, copy in zip(params, copies, strict=True):
            copy.copy_(p)
    loaded.load_state_dict(copy_of(optimizer.state_dict()))
    update(params, optimizer, 5)
    update(copies, loaded, 5)
    assert all(p.equal(q) for p, q in zip(params, copies, strict=True))
    assert same(optimizer.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("choice", ["adamw", "muon", "adagrad", "sgd", "soap"])
def test_a_state_that_was_saved_in_bf16_is_loaded(choice: str) -> None:
    build = run_config(f"optimizer={choice}").optimizer.build
    params = bf16_weights(torch.bfloat16)
    former, optimizer = build(params=params), build(params=params)
    update(params, former, 2)
    round_updates(optimizer, 0)
    optimizer.load_state_dict(copy_of(former.state_dict()))
    for p in params:
        for name, value in former.state[p].items():
            assert optimizer.state[p][name].dtype == torch.float32 and optimizer.state[p][name].equal(value.float())
    update(params, optimizer, 2)


def test_bf16_weights_of_any_layout_and_size() -> None:
    """A kernel in channels-last order, a scalar, a slice with gaps in memory, a weight without a gradient."""
    draw = torch.Generator().manual_seed(0)
    kernel = torch.rand(5, 3, 2, 2, generator=draw).to(memory_format=torch.channels_last)
    tensors = [kernel, torch.tensor(0.5), torch.rand(4, 6, generator=draw)[:, ::2], torch.rand(0, 3), torch.rand(2)]
    params = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    params[2] = tensors[2].bfloat16().repeat_interleave(2, 1)[:, ::2].detach().requires_grad_()
    wide = [p.detach().float().requires_grad_() for p in params]
    optimizer, plain = torch.optim.SGD(params, lr=1.0), torch.optim.SGD(wide, lr=1.0)
    round_updates(optimizer, 0)
    for p, q in zip(params[:-1], wide[:-1], strict=True):
        p.grad = (torch.arange(p.numel()) / 64).view(p.shape).bfloat16()
        q.grad = p.grad.float()
    optimizer.step()
    plain.step()
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2**-7, atol=0)


def test_state_of_bf16_weights_is_fp32() -> None:
    params = bf16_weights(torch.bfloat16)
    optimizer = adamw(params)
    round_updates(optimizer, 0)
    update(params, optimizer, 2)
    assert 0 <= state_bytes(optimizer) - 1024 * 8 <= 4 * 4  # the counts of updates are the rest


def test_hooks_of_a_step_run_once_and_see_all_groups() -> None:
    params, seen = bf16_weights(torch.bfloat16), []
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups)
    round_updates(optimizer, 0)
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    assert optimizer.step(lambda: 2.5) == 2.5
    assert seen == [2, 2]


def test_a_failed_update_leaves_weights_and_groups() -> None:
    params = bf16_weights(torch.bfloat16)
    optimizer = SGDW(params, lr=0.1)
    round_updates(optimizer, 0)
    update(params, optimizer, 1)
    before = copy_of(optimizer.state_dict()["state"])
    params[0].grad = torch.ones(16, 16).bfloat16().to_sparse()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
    assert same(optimizer.state_dict()["state"], before)


class NoSynchronization(TorchDispatchMode):
    """Fails if a value is read on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_rounding_reads_no_value_on_the_host() -> None:
    params = bf16_weights(torch.bfloat16)
    optimizer = SGDW(params, lr=0.1)
    round_updates(optimizer, 0)
    for p in params:
        p.grad = torch.ones_like(p)
    with NoSynchronization():
        optimizer.step()
        optimizer.step()


class Replacing(torch.optim.SGD):
    """Replaces the data of its parameters."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.data = p.data - p.grad


class Hoarding(torch.optim.SGD):
    """Updates tensors that it keeps elsewhere."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, lr=1.0)
        self.kept = list(params)

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.kept:
                p.sub_(1.0)


def test_optimizers_of_others_with_bf16_weights() -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer: torch.optim.Optimizer = Replacing([p], lr=1.0)
    round_updates(optimizer, 0)
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert p.tolist() == [0.5] * 4
    optimizer = Hoarding([p])
    round_updates(optimizer, 0)
    with pytest.raises(UserError, match=r"^precision=bf16_pure: Hoarding updates tensors that are not in its"):
        optimizer.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
def test_only_bf16_weights_are_rounded(precision: str) -> None:
    optimizer = build_optimizer(small_workload("optimizer=adamw", f"precision={precision}"))
    assert isinstance(optimizer, RoundedUpdate) == (precision == "bf16_pure")
    assert optimizer_traits(optimizer) == optimizer_traits(build_optimizer(small_workload("optimizer=adamw")))
