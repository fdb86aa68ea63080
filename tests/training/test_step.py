"""Tests of the step against hand-written PyTorch loops."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt import losses
from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.metrics.sums import MetricSum
from dlopt.optim import SAM, NewtonCG
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.tasks.text import NextToken
from dlopt.training.builders.precision import Precision
from dlopt.training.clipping import ByNorm, ByValue, gradient_norm
from dlopt.training.micro_loss import Network
from dlopt.training.step import Step, StepSettings
from tests.support import own_optimizers
from tests.support.runs import same
from tests.support.steps import CPU, SEED, batch, begin, equal, make_closure, make_step, net, train, whole
from tests.support.tasks import CLASSIFICATION

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_updates_equal_plain_loop(name: str, accumulate: int) -> None:
    model = net(norm=accumulate == 1)  # a last micro-batch of one sample has no statistics
    reference = copy.deepcopy(model)
    make = OPTIMIZERS[name]

    def factor(t: int) -> float:
        return 1 / (1 + t)

    update, sums = (
        make_closure(model, make(model.parameters()), accumulate=accumulate, factor=factor),
        MetricSum(CLASSIFICATION),
    )
    for step in range(5):
        train(update, batch(step, size=10 - step), step, sums)

    optimizer = make(reference.parameters())
    base = optimizer.param_groups[0]["lr"]
    losses, right = 0.0, 0
    for step in range(5):
        torch.manual_seed(stream(SEED, step))
        inputs, targets = batch(step, size=10 - step)
        optimizer.param_groups[0]["lr"] = base * factor(step)
        optimizer.zero_grad()
        for x, y in zip(inputs.tensor_split(accumulate), targets.tensor_split(accumulate), strict=True):
            outputs = reference(x)
            loss = F.cross_entropy(outputs, y)
            losses += loss.item() * len(y)
            right += int((outputs.argmax(1) == y).sum())
            (loss * (len(y) / len(targets)) if accumulate > 1 else loss).backward()
        optimizer.step()
    assert equal(model, reference)
    count = 10 + 9 + 8 + 7 + 6
    assert sums.means("train") == {"train_loss": losses / count, "train_accuracy": right / count}
    assert update.rate == base * factor(4)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 7, 10])
@pytest.mark.parametrize("size", [10, 11])
def test_accumulated_gradients_equal_those_of_the_full_batch(accumulate: int, size: int) -> None:
    """Micro-batches are weighted by their number of samples."""
    model = net(dropout=0.0, norm=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    inputs, targets = batch(1, size, torch.float64)
    loss = F.cross_entropy(model(inputs), targets)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    evaluate = make_closure(model, optimizer, accumulate=accumulate)
    begin(evaluate, whole(inputs, targets), 0)
    torch.testing.assert_close(evaluate(), loss.detach(), rtol=1e-13, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


class Mean(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


def test_gradients_of_bf16_weights_are_added_up_in_fp32() -> None:
    """Added up in bf16, 1,024 gradients of 1 / 1024 are 1 / 4."""
    model = nn.Linear(1, 3, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    evaluate = make_closure(model, optimizer, accumulate=1024, loss=Mean(), precision=Precision("bf16_pure", CPU))
    begin(evaluate, whole(torch.ones(1024, 1).bfloat16(), torch.zeros(1024, dtype=torch.int64)), 0)
    evaluate()
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.bfloat16
    assert model.weight.grad.flatten().tolist() == pytest.approx([1 / 3] * 3, rel=2**-7)


@pytest.mark.parametrize("clip", [None, ByNorm(max_norm=1.0)])
def test_gradient_norms_of_bf16_weights_are_fp32(clip: ByNorm | None) -> None:
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.empty(size, dtype=torch.bfloat16)) for size in (1000, 7)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    norm = gradient_norm(parameters) if clip is None else clip(parameters)
    assert norm is not None and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-5)


def test_fewer_samples_than_micro_batches() -> None:
    model = net(dropout=0.0, norm=False)
    evaluate = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0), accumulate=8)
    inputs, targets = batch(1, 3)
    begin(evaluate, whole(inputs, targets), 0)
    torch.testing.assert_close(evaluate(), F.cross_entropy(model(inputs), targets).detach())


class Kept(nn.Module):
    """Records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs.detach().clone())
        return inputs


def test_evaluations_of_an_update_share_random_numbers() -> None:
    record = Kept()
    model = nn.Sequential(nn.Dropout(0.5), record, nn.Linear(6, 3))
    evaluate = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0))
    inputs, targets = torch.ones(50, 6), torch.zeros(50, dtype=torch.int64)
    for step in (0, 1):
        begin(evaluate, whole(inputs, targets), step)
        torch.rand(step)  # whatever else draws has no part in it
        first = evaluate()
        assert torch.equal(evaluate(), first)
        assert torch.equal(evaluate.loss().detach(), first)
    masks = record.seen
    assert all(torch.equal(mask, masks[0]) for mask in masks[:3])
    assert all(torch.equal(mask, masks[3]) for mask in masks[3:])
    assert not torch.equal(masks[0], masks[3])
    assert 0.3 < float((masks[0] == 0).float().mean()) < 0.7


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_only_the_first_evaluation_updates_statistics(norm: str) -> None:
    layer: nn.Module = nn.BatchNorm1d(6, momentum=0.25)
    if norm == "instance":
        layer = nn.InstanceNorm1d(6, momentum=0.25, track_running_stats=True)
    model = nn.Sequential(nn.Unflatten(1, (6, 4)), layer, nn.Flatten(), nn.Linear(24, 3))
    evaluate = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0))
    draws = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(5, 24, generator=draws) + 2, torch.zeros(5, dtype=torch.int64)
    expected = copy.deepcopy(layer)
    expected(inputs.view(5, 6, 4))
    begin(evaluate, whole(inputs, targets), 0)
    losses = [evaluate(), evaluate(), evaluate.loss().detach(), evaluate()]
    assert all(torch.equal(loss, losses[0]) for loss in losses), "normalized with the batch's statistics every time"
    assert equal(layer, expected)
    begin(evaluate, whole(inputs, targets), 1)
    evaluate()
    expected(inputs.view(5, 6, 4))
    assert equal(layer, expected), "the next step moves them again"


def test_metrics_count_the_first_evaluation_only() -> None:
    model = net()
    evaluate, sums = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0)), MetricSum(CLASSIFICATION)
    begin(evaluate, batch(0), 0)
    evaluate.loss()
    first = evaluate()
    evaluate()
    evaluate.loss()
    assert evaluate.result is not None
    sums.add(*evaluate.result.micro_batches)
    sums.sync()
    assert sums.count == 10
    assert sums.loss / 10 == float(first)


def test_lbfgs_equals_plain_loop() -> None:
    model = net(dropout=0.0, norm=False).double()
    reference = copy.deepcopy(model)
    calls = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")

    update, sums = make_step(model, make(model), evaluates_once=False), MetricSum(CLASSIFICATION)
    for step in range(3):
        train(update, batch(step, dtype=torch.float64), step, sums)

    optimizer = make(reference)
    for step in range(3):
        inputs, targets = batch(step, dtype=torch.float64)

        def plain(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(inputs), targets)
            loss.backward()
            calls.append(1)
            return loss

        optimizer.step(plain)  # type: ignore[arg-type]
    assert equal(model, reference)
    assert len(calls) > 6, "otherwise L-BFGS evaluated once per update"
    assert sums.means("train")["train_loss"] > 0
    assert sums.count == 30


def _step_of(kind: Any) -> Step:
    model = net(dropout=0.0, norm=False)
    optimizer = kind(model.parameters(), lr=0.5)
    return make_step(model, optimizer, evaluates_once=optimizer_traits(optimizer).evaluations == "once")


@pytest.mark.parametrize("kind", own_optimizers.ONE_EVALUATION)
def test_optimizers_of_users_equal_a_plain_loop(kind: Any) -> None:
    step, reference = _step_of(kind), net(dropout=0.0, norm=False)
    for number in range(3):
        inputs, targets = batch(number)
        step.update(batch(number), number)
        gradients = torch.autograd.grad(F.cross_entropy(reference(inputs), targets), [*reference.parameters()])
        with torch.no_grad():
            for p, gradient in zip(reference.parameters(), gradients, strict=True):
                p -= 0.5 * gradient
    for p, q in zip(step.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", own_optimizers.MISSING_CLOSURE)
def test_refuses_a_step_that_fails_without_a_closure(kind: Any) -> None:
    step = _step_of(kind)
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.step\(\): fails without a closure.*evaluations='many'"):
        step.update(batch(0), 0)


@pytest.mark.parametrize("kind", own_optimizers.UNEVALUATED)
def test_refuses_an_update_without_an_evaluation(kind: Any) -> None:
    step = _step_of(kind)
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.step\(closure\): did not call its closure"):
        for number in range(2):
            step.update(batch(number), number)


def test_lbfgs_with_dropout_and_batch_norm() -> None:
    """The line search sees a deterministic function, with one dropout mask: the loss decreases."""
    model = net(dropout=0.5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    evaluate = make_closure(model, optimizer)
    inputs, targets = batch(0, 30)
    evaluate.update(whole(inputs, targets), 0)
    after = evaluate.loss().item()
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]
    torch.manual_seed(0)
    fresh = net(dropout=0.5)
    torch.manual_seed(stream(SEED, 0))
    assert after < F.cross_entropy(fresh(inputs), targets).item() / 2


def test_loss_is_twice_differentiable() -> None:
    """A Hessian-vector product through closure.loss() equals the one of a hand-written loss."""
    model = net(dropout=0.4, norm=False).double()
    parameters = list(model.parameters())
    evaluate = make_closure(model, torch.optim.SGD(parameters, lr=1.0), accumulate=3)
    inputs, targets = batch(0, dtype=torch.float64)
    begin(evaluate, whole(inputs, targets), 4)
    direction = [torch.randn_like(p) for p in parameters]

    def product(loss: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return torch.autograd.grad(slope, parameters)  # type: ignore[arg-type]

    with torch.no_grad():  # as inside optimizer.step
        loss = evaluate.loss()
    assert all(p.grad is None for p in parameters)
    found = product(loss)
    torch.manual_seed(stream(SEED, 4))
    parts = zip(inputs.tensor_split(3), targets.tensor_split(3), strict=True)
    expected = product(sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in parts) / 10)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert any(bool(b.abs().max() > 1e-3) for b in expected)


def test_labels_drawn_from_the_predictions_do_not_depend_on_the_micro_batches() -> None:
    inputs, targets = batch(0, 10, torch.float64)
    mixed = F.one_hot(targets, 3).double()
    drawn = []
    for accumulate, labels in ((1, targets), (3, targets), (4, mixed)):
        model = net(dropout=0.0, norm=False).double()
        step = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0), accumulate=accumulate)
        begin(step, whole(inputs, labels), 0)
        step()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        loss, count = step.sampled_loss(7)
        drawn.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        assert count == 10
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]
        assert step.loss().item() != loss.item()
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-12, atol=1e-14)


def test_reports_the_gradient_norm_before_clipping() -> None:
    model = net(dropout=0.0)
    evaluate = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=ByValue(max_value=1e-3))
    unclipped = make_closure(model, torch.optim.SGD(model.parameters(), lr=1.0))
    norms = []
    for each in (unclipped, evaluate):
        begin(each, batch(0), 0, log_norm=True)
        each()
        assert each.result is not None
        norms.append(each.result.norm)
    assert norms[0] is not None and norms[1] is not None
    assert torch.equal(norms[0], norms[1])
    assert float(gradient_norm(evaluate.parameters)) < float(norms[1]) / 2


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, ByNorm(max_norm=1e-2), ByValue(max_value=1e-3)])
@pytest.mark.parametrize("kind", ["sam", "lbfgs", "newton_cg"])
def test_the_norm_belongs_to_the_weights_of_the_loss(kind: str, clip: Any, accumulate: int) -> None:
    """Both are of the weights before the update, however many evaluations follow."""
    if kind == "newton_cg" and clip is not None:
        pytest.skip("is refused")
    model = net(dropout=0.0, norm=False).double()
    given = batch(0, dtype=torch.float64)
    loss = F.cross_entropy(model(given.inputs), given.targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    optimizer: Any = {
        "sam": lambda p: SAM(base=torch.optim.SGD(p, lr=0.1), rho=2.0),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5),
        "newton_cg": lambda p: NewtonCG(p, lr=1.0),
    }[kind](list(model.parameters()))
    step = make_step(model, optimizer, clip=clip, evaluates_once=False, accumulate=accumulate)
    result = train(step, given, 0, MetricSum(CLASSIFICATION), log_norm=True)
    assert result.loss is not None and result.norm is not None
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert float(result.norm) == pytest.approx(expected, rel=1e-12)


class GradientPasses(TorchDispatchMode):
    """Counts the operations that read all gradients: norms, and the check for non-finite values."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def norms_and_checks(self) -> tuple[int, int]:
        return self.counted["_foreach_norm"], self.counted["_amp_foreach_non_finite_check_and_unscale_"]


@pytest.mark.parametrize("log_norm", [False, True])
@pytest.mark.parametrize("check_now", [True, False])
def test_reads_the_gradients_once_for_clipping_log_and_check(check_now: bool, log_norm: bool) -> None:
    model = net(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = make_step(model, optimizer, clip=ByNorm(max_norm=1.0), check_now=check_now)
    with GradientPasses() as passes:
        result = step.update(batch(0), 0, log_norm=log_norm)
    assert passes.norms_and_checks == (1, 0)
    assert result.norm is not None


def test_reads_the_gradients_once_for_the_log_and_the_check_of_a_processor() -> None:
    model = net(dropout=0.0)
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with GradientPasses() as logged:
        step.update(batch(0), 0, log_norm=True)
    with GradientPasses() as unlogged:
        step.update(batch(1), 1)
    assert (logged.norms_and_checks, unlogged.norms_and_checks) == ((1, 0), (0, 1))


def test_clips_before_the_update() -> None:
    model = net(dropout=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    evaluate = make_step(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=ByValue(max_value=1e-4))
    evaluate.update(batch(0), 0)
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True)]
    assert 0 < max(moved) <= 1.01e-4


def test_the_weight_average_sees_the_new_weights() -> None:
    model = net()
    seen = []
    update = make_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), average=lambda: seen.append(copy.deepcopy(model))
    )
    for step in range(3):
        update.update(batch(step), step)
    assert len(seen) == 3 and equal(seen[-1], model) and not equal(seen[0], seen[1])


def test_an_optimizer_may_drop_gradients_itself() -> None:
    class Counted(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls += 1
            super().zero_grad(set_to_none)

    models = net(dropout=0.0), net(dropout=0.0)
    optimizer = Counted(models[0].parameters(), lr=0.1)
    for model, each in zip(models, (optimizer, torch.optim.SGD(models[1].parameters(), lr=0.1)), strict=True):
        step = make_step(model, each)
        for number in range(3):
            step.update(batch(number), number)
    assert optimizer.calls == 3 and equal(*models)


def test_frozen_parameters_do_not_change() -> None:
    model = net(norm=False)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    make_step(model, torch.optim.SGD(trainable, lr=0.1)).update(batch(0), 0)
    assert equal(model[0], before[0]) and not equal(model[4], before[4])


def test_bfloat16_autocast_keeps_weights_and_loss_in_float32() -> None:
    model = net(dropout=0.0)
    record = Kept()
    model.append(record)
    precision = Precision("bf16", torch.device("cpu"))
    evaluate = make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)
    sums = MetricSum(CLASSIFICATION)
    train(evaluate, batch(0), 0, sums)
    assert record.seen[0].dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
    assert evaluate.loss().dtype == torch.float32
    reference = net(dropout=0.0)
    torch.testing.assert_close(
        sums.means("train")["train_loss"],
        F.cross_entropy(reference(batch(0).inputs), batch(0).targets).item(),
        rtol=0.02,
        atol=0,
    )


def test_the_state_of_a_loss_scaler_is_loaded_where_there_is_one() -> None:
    """A run may be resumed with another precision."""

    class Scaler:
        loaded = None

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

    scaler = Scaler()
    for own, saved in ((None, {"scale": 2.0}), (None, None), (scaler, None), (scaler, {"scale": 4.0})):
        step: Any = SimpleNamespace(scaler=own, settings=SimpleNamespace(halve_on_out_of_memory=False))
        Step.load_state_dict(step, {"lr": 0.1, "scaler": saved})
        assert step.rate == 0.1 and (own is None or own.loaded == saved)


def test_skips_an_update_whose_second_gradient_is_not_finite() -> None:
    model = net(dropout=0.0)
    optimizer = SAM(base=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    update = make_step(model, optimizer, skip=lambda error: error.step == 2, evaluates_once=False)
    update.update(batch(0), 0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    factors = iter([1.0, math.nan])
    model[0].bias.register_hook(lambda gradient: gradient * next(factors))  # type: ignore[union-attr]
    assert update.update(batch(1), 1).micro_batches == []
    assert same(before, (model.state_dict(), optimizer.state_dict()["state"]))


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    class Scaled(Precision):
        def scaler(self) -> torch.amp.GradScaler:
            return torch.amp.GradScaler("cpu", init_scale=1024.0)

    plain = nn.Linear(6, 3)
    scaled = copy.deepcopy(plain)
    for model, precision in ((plain, Precision("fp32", CPU)), (scaled, Scaled("fp32", CPU))):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        make_step(model, optimizer, precision=precision, clip=ByNorm(max_norm=0.1)).update(batch(0), 0)
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-5, atol=1e-7)


def test_sampled_loss_counts_every_token() -> None:
    """Sophia-G scales its estimate by the number of predictions (Liu et al. 2024, algorithm 2)."""
    model = nn.Sequential(nn.Embedding(7, 7))
    update = make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1))
    begin(update, whole(torch.randint(7, (4, 5)), torch.randint(7, (4, 5))))
    assert update.sampled_loss(0)[1] == 20


def test_memory_that_runs_out_between_micro_batches_leaves_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the batch is repeated, but counts once in batch norm."""
    whole = net(dropout=0.0)
    model = copy.deepcopy(whole)
    make_step(whole, torch.optim.SGD(whole.parameters(), lr=0.1), accumulate=4).update(batch(0), 0)
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2, halve_on_out_of_memory=True)
    calls = itertools.count(1)

    def micro_batch(*_: object) -> AbstractContextManager[None]:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return nullcontext()

    monkeypatch.setattr(step.mode, "micro_batch", micro_batch)
    step.update(batch(0), 0)
    assert step.accumulate == 4 and equal(model, whole)


@pytest.mark.parametrize("precision", ["fp64", "bf16", "bf16_pure"])
def test_model_loss_and_metrics_are_compiled_as_one_region(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, of which the loss processes the outputs at once; its gradients are those of the eager update."""
    monkeypatch.setattr(losses, "_MAX_CHUNK", 8)
    chosen = Precision(precision, CPU)
    results = []
    for compile in (None, partial(torch.compile, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        model = chosen.place(nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 13)))
        if compile is not None:
            monkeypatch.setattr(losses._ChunkedCrossEntropy, "apply", None)
        loss = losses.CrossEntropy(label_smoothing=0.1, class_weights=None, classes=13)
        network = Network(model, model, loss, compile=compile)
        optimizer, sums = torch.optim.SGD(model.parameters(), lr=0.5), MetricSum(NextToken(13, predictions=5))
        step = Step(
            network, optimizer, Scheduler(optimizer, lambda t: 1.0), Mode(CPU), StepSettings(accumulate=2),
            precision=chosen, metrics=sums,
        )  # fmt: skip
        tokens = torch.randint(13, (6, 6), generator=torch.Generator().manual_seed(1))
        train(step, whole(tokens[:, :-1], tokens[:, 1:]), 0, sums)
        results.append({"loss": torch.tensor(sums.loss), "correct": torch.tensor(sums.correct), **model.state_dict()})
    tolerance = {"fp64": 1e-12, "bf16": 1e-3, "bf16_pure": 2e-2}[precision]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
