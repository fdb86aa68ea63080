"""Optimizer state in bf16, against state in the dtype of the weights and against closed forms."""

import math
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.instruments.profiling import state_bytes
from dlopt.optim import SGDW, AdEMAMix, Lion, Signum, adamw
from dlopt.optim.traits import optimizer_traits
from dlopt.training.builders import state_dtype
from dlopt.training.builders.optimizer import build_optimizer
from dlopt.training.builders.state_dtype import (
    RoundedUpdate,
    choices_with_moments_in_bf16,
    keep_state_in_bf16,
    random_bits,
    round_stochastically,
    round_updates,
)
from tests.support.choices import CONF, REFUSED_IN_PURE_BF16, names
from tests.support.equality import Cases, compare
from tests.support.modes import DDP, FSDP
from tests.support.runs import at_update, result, resume, run_config, same, small_workload, start, terminate, timeless
from tests.support.sizes import MLP, SMALL, without

BF16 = "optimizer.state_dtype=bf16"
Make = Callable[[Any], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam, a loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adamw": lambda p: adamw(p, lr=0.01, fused=True),
    "adamw, cautious": lambda p: adamw(p, lr=0.01, cautious=True),
    "sgdw": lambda p: SGDW(p, lr=0.1),
    "lion": lambda p: Lion(p, lr=0.001),
    "signum": lambda p: Signum(p, lr=0.001),
}


# -- rounding


def test_bits_are_uniform_and_independent() -> None:
    """By chi-square tests over 64 cells, and by correlations of updates, of neighbours, and of the two moments."""
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


def test_second_moment_follows_the_gradient_unlike_rounded_to_nearest() -> None:
    """v = g^2 (1 - beta2^t) for a constant gradient g: rounded to nearest it stops where a change is half an ulp."""
    beta2, steps = 0.999, 2000
    p = torch.zeros(1024, requires_grad=True)
    optimizer = adamw([p], lr=1e-6, betas=(0.9, beta2))
    keep_state_in_bf16(optimizer, 0)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
        nearest = (nearest.float() * beta2 + (1 - beta2)).bfloat16()
    exact, v = 1 - beta2**steps, optimizer.state[p]["exp_avg_sq"].float()
    assert float(nearest) < 0.6 * exact
    assert v.mean().item() == pytest.approx(exact, rel=0.003)


def test_error_of_the_moments() -> None:
    """The documented errors: unbiased, 5 % of one second moment, of which the noise of gradients is 3 %."""
    p, q = (torch.zeros(1024, requires_grad=True) for _ in range(2))
    optimizer, plain = adamw([p], lr=1e-6), adamw([q], lr=1e-6)
    keep_state_in_bf16(optimizer, 0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2500):
        p.grad = torch.randn(1024, generator=draw)
        q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    (m, v), (exact_m, exact_v) = ((*moments(*each),) for each in ((optimizer, [p]), (plain, [q])))
    errors = v / exact_v - 1
    assert 0.02 < errors.std() < 0.055
    assert errors.mean().abs() < 0.005
    assert (m - exact_m).std() < 0.01 * exact_m.std()
    assert exact_v.std() / exact_v.mean() == pytest.approx(math.sqrt(0.001), rel=0.2)


# -- optimizers


def weights() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    kernel = torch.randn(3, 2, 3, 3, generator=draw).to(memory_format=torch.channels_last)
    tensors = [torch.randn(40, 30, generator=draw), torch.randn(7, generator=draw), kernel, torch.tensor(0.5)]
    return [tensor.requires_grad_() for tensor in tensors]


def train(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        draw = torch.Generator().manual_seed(number)
        for p in params:
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            p.grad = (p.detach() + 0.5 * noise).to(p.dtype, memory_format=torch.preserve_format)
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return [v for p in params for k, v in sorted(optimizer.state[p].items()) if k != "step" and p.ndim]


@pytest.mark.parametrize("name", MAKE)
def test_an_update_is_the_plain_one_with_rounded_moments(name: str) -> None:
    """From the same state, weights are bitwise equal, and moments are neighbours of the plain ones."""
    params, plain_params = weights(), weights()
    optimizer, plain = MAKE[name](params), MAKE[name](plain_params)
    keep_state_in_bf16(optimizer, 0)
    train(params, optimizer, range(3))
    plain.load_state_dict(copy_of(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, plain_params, strict=True):
            q.copy_(p)
    train(params, optimizer, range(3, 4))
    train(plain_params, plain, range(3, 4))
    for p, q in zip(params, plain_params, strict=True):
        assert p.equal(q)
    rounded, exact = moments(optimizer, params), moments(plain, plain_params)
    assert len(rounded) == len(exact) >= 3
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32 and a.stride() == b.stride()
        assert ((a.double() - b.double()).abs() < b.double().abs() * 2**-7 + 1e-40).all()


@pytest.mark.parametrize("name", MAKE)
def test_stays_near_plain_training(name: str) -> None:
    results = []
    for bf16 in (False, True):
        params = weights()
        optimizer = MAKE[name](params)
        if bf16:
            keep_state_in_bf16(optimizer, 0)
        train(params, optimizer, range(60))
        results.append(params)
    moved = sum((p - q).norm().item() ** 2 for p, q in zip(weights(), results[0], strict=True))
    apart = sum((p - q).norm().item() ** 2 for p, q in zip(*results, strict=True))
    assert apart < 0.03**2 * moved


def test_chunks_do_not_change_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1, 1 << 18):
        monkeypatch.setitem(state_dtype._CHUNK, "cpu", size)
        params = weights()
        optimizer = MAKE["adamw"](params)
        keep_state_in_bf16(optimizer, 0)
        train(params, optimizer, range(4))
        results.append([*params, *moments(optimizer, params)])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_hooks_of_a_step_run_once_and_see_all_groups() -> None:
    params, seen = weights(), []
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups)
    keep_state_in_bf16(optimizer, 0)
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    assert optimizer.step(lambda: 2.5) == 2.5
    assert seen == [2, 2]


def test_a_failed_update_leaves_the_state_in_bf16() -> None:
    params = weights()
    optimizer = MAKE["sgdw"](params)
    keep_state_in_bf16(optimizer, 0)
    train(params, optimizer, range(1))
    before = [value.clone() for value in moments(optimizer, params)]
    params[0].grad = torch.ones(40, 30).to_sparse()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert all(a.equal(b) for a, b in zip(moments(optimizer, params), before, strict=True))


class NoSynchronization(TorchDispatchMode):
    """Fails if a value is read on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_rounding_reads_no_value_on_the_host() -> None:
    params = weights()
    optimizer = MAKE["sgdw"](params)
    keep_state_in_bf16(optimizer, 0)
    with NoSynchronization():
        train(params, optimizer, range(2))


def test_memory_is_that_of_bf16() -> None:
    """Bytes per parameter: 2 per moment instead of 4; the counts of updates are the rest."""
    params = [torch.randn(500, 20, requires_grad=True)]
    for make, count in ((MAKE["adamw"], 2), (MAKE["sgd"], 1), (MAKE["lion"], 1)):
        for keep, each in ((False, 4), (True, 2)):
            optimizer = make(params)
            if keep:
                keep_state_in_bf16(optimizer, 0)
            train(params, optimizer, range(1))
            assert 0 <= state_bytes(optimizer) - 10_000 * count * each <= 8


# -- bf16 weights

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


@pytest.mark.parametrize(("moments", "size"), [(False, 8), (True, 4)])
def test_memory_of_the_state_of_bf16_weights(moments: bool, size: int) -> None:
    params = [torch.randn(500, 20).bfloat16().requires_grad_()]
    optimizer = adamw(params)
    round_updates(optimizer, 0, moments=moments)
    train(params, optimizer, range(2))
    assert 0 <= state_bytes(optimizer) - 10_000 * size <= 8


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


# -- runs


def test_without_the_key_nothing_is_wrapped() -> None:
    optimizer = build_optimizer(small_workload("optimizer=adamw"))
    assert type(optimizer) is torch.optim.AdamW and "rounded_updates" not in optimizer.param_groups[0]


ALLOWED = choices_with_moments_in_bf16()


def test_train_yaml_names_the_choices() -> None:
    assert f"({', '.join(ALLOWED)})" in (CONF / "train.yaml").read_text()


@pytest.mark.parametrize("choice", names("optimizer"))
def test_choices_allow_or_refuse_it(choice: str) -> None:
    base = [f"optimizer={choice}"]
    if choice in ALLOWED:
        optimizer = build_optimizer(small_workload(*base, BF16))
        assert isinstance(optimizer, RoundedUpdate)
        assert optimizer_traits(optimizer) == optimizer_traits(build_optimizer(small_workload(*base)))
        return
    what = "momentum=0 has no state" if choice == "gradient_descent" else r"optimizer=adam\|adamw\|lion"
    with pytest.raises(UserError, match=rf"^optimizer.state_dtype=bf16: [^\n]*{what}[^\n]*$"):
        build_optimizer(small_workload(*base, BF16))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["optimizer=adamw", "optimizer.amsgrad=true"], "use amsgrad=false"),
        (["optimizer.momentum=0"], "momentum=0 has no state"),
    ],
)
def test_refusals(keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^optimizer.state_dtype=bf16: [^\n]*{message}"):
        build_optimizer(small_workload(*keys, BF16))


@pytest.mark.parametrize("choice", ["adamw", "sgd", "lion"])
def test_resumed_run_is_bitwise_identical(choice: str, tmp_path: Path) -> None:
    keys = [*SMALL, f"optimizer={choice}", BF16, "epochs=3", "checkpoint.every_steps=1"]
    start(tmp_path / "whole", *keys)
    with at_update(5, terminate):
        assert start(tmp_path / "cut", *keys)["status"] == "interrupted"
    resume(tmp_path / "cut", *keys)
    state = result(tmp_path / "cut")
    assert same(state, result(tmp_path / "whole")) and timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    saved = [v for values in state["optimizer"]["state"].values() for k, v in values.items() if k != "step"]
    assert saved and {value.dtype for value in saved} == {torch.bfloat16}


def test_loads_the_state_of_the_other_dtype() -> None:
    params = weights()
    plain = MAKE["adamw"](params)
    train(params, plain, range(2))
    optimizer = MAKE["adamw"](params)
    keep_state_in_bf16(optimizer, 0)
    optimizer.load_state_dict(copy_of(plain.state_dict()))
    train(params, optimizer, range(2, 4))
    plain.load_state_dict(copy_of(optimizer.state_dict()))
    train(params, plain, range(4, 6))
    assert {value.dtype for value in moments(plain, params)} == {torch.float32}


PLAIN = without(MLP, "optimizer.lr")
CASES: Cases = {
    f"{mode[0]} {choice}": (
        [*PLAIN, "model.norm=none", f"optimizer={choice}", BF16, "data.batch_size=32", "epochs=3"],
        mode,
    )
    for mode, choice in ((DDP, "lion"), (FSDP, "adamw"), (FSDP, "sgd"), (["parallel=filter"], "adam"))
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """In fp64 also the rounding is equal: random numbers belong to elements of the full tensors."""
    compare(tmp_path, 2, CASES)


def test_error_over_seeds(tmp_path: Path) -> None:
    """The final training losses of AdamW, relative to fp32 state: see docs/howto/performance.md."""
    changes = []
    for seed in range(5):
        keys = [*SMALL, "optimizer=adamw", f"seed={seed}", "epochs=15"]
        losses = []
        for name, extra in (("fp32", []), ("bf16", [BF16])):
            start(tmp_path / f"{name}{seed}", *keys, *extra)
            losses.append(timeless(tmp_path / f"{name}{seed}")[-1]["train_loss"])
        changes.append(losses[1] / losses[0] - 1)
    assert 0 < max(abs(change) for change in changes) < 0.005, changes
