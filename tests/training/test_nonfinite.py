"""Tests of the non-finite check, and of skipped updates."""

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dlopt.basics.errors import RunError
from dlopt.data.batches import Batch
from dlopt.metrics.sums import Kept, MetricSum
from dlopt.parallel.mode import Mode
from dlopt.training.builders.precision import Precision
from dlopt.training.clipping import ByNorm
from dlopt.training.nonfinite import Diverged, NonFiniteCheck, Recovery, first_nonfinite_output, is_finite
from dlopt.training.step import Step
from dlopt.training.stopping import Tolerance
from tests.support.ranks import run_ranks
from tests.support.runs import (
    at_update,
    explosions,
    result,
    resume,
    run_config,
    run_job,
    same,
    start,
    terminate,
    timeless,
)
from tests.support.sizes import RUN
from tests.support.steps import CPU, batch, begin, equal, make_closure, make_step, net, train, whole
from tests.support.tasks import CLASSIFICATION

NAN, INF = float("nan"), float("inf")


def sgd(model: nn.Module, lr: float = 0.125) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def spoil(parameter: nn.Parameter, value: float, entry: int = 0) -> None:
    """Sets one entry of its gradient in every backward pass."""

    def hook(gradient: Tensor) -> Tensor:
        bad = gradient.clone()
        bad.view(-1)[entry] = value
        return bad

    parameter.register_hook(hook)


# -- found


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["0.weight", "1.bias", "4.bias"])
def test_one_nonfinite_gradient_entry_raises_before_the_update(name: str, bad: float) -> None:
    model = net()
    spoil(dict(model.named_parameters())[name], bad, entry=-1)
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    update = make_step(model, optimizer)
    with pytest.raises(Diverged, match=rf"gradient is not finite at update 8 .* of 0\.125 \(.*pass: {name}\)") as error:
        update.update(batch(0), 7)
    assert error.value.before_update and error.value.step == 8
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in parameters.items())
    assert not optimizer.state


def test_check_does_not_change_gradients() -> None:
    """Bitwise, including denormal and negative zero entries."""
    model = nn.Linear(6, 3)
    evaluate = make_closure(model, sgd(model))
    entries = torch.tensor([1e-42, -0.0, 1e38, -1e-30, 3.0, -7.5])
    model.weight.register_hook(lambda gradient: entries.expand(3, 6).clone())
    begin(evaluate, batch(0), 0)
    evaluate()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad.view(torch.int32), entries.expand(3, 6).contiguous().view(torch.int32))


def test_losses_and_flags_may_be_on_two_devices() -> None:
    """With parallel.cpu_offload=true the gradients are on the CPU, the loss is not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = nn.Parameter(torch.empty(3))
        p.grad = torch.empty(3)
        check = NonFiniteCheck([p], immediate=False, locate=lambda _: "", clips_by_norm=True)
        loss = torch.empty((), device="meta")
        flag = check.examine(loss, 0, 0.1, nn.utils.get_total_norm([p.grad]))
        assert flag is not None and flag.device.type == "cpu"
        check.defer(loss, 0, 0.1, flag)
        check._stack_pending()
        assert check._stacked[0][1].shape == (2, 1)


@pytest.mark.parametrize("clip", [None, ByNorm(max_norm=1.0)])
@pytest.mark.parametrize("log_norm", [False, True])
@pytest.mark.parametrize("check_now", [True, False])
def test_large_finite_gradients_pass(check_now: bool, log_norm: bool, clip: ByNorm | None) -> None:
    """Their squares overflow. A deferred check has only the norm, where clipping would set the gradients to zero."""
    model = nn.Linear(6, 3)
    model.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    step = make_step(model, sgd(model, lr=1e-30), check_now=check_now, clip=clip)
    step.update(batch(0), 0, log_norm=log_norm)
    is_reported = clip is not None and not check_now
    with pytest.raises(Diverged, match="gradient is not finite at update 1 ") if is_reported else nullcontext():
        step.check_updates()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("check_now", [True, False])
def test_checks_before_clipping(check_now: bool, bad: float) -> None:
    model = net()
    spoil(model[4].weight, bad)  # type: ignore[arg-type]
    step = make_step(model, sgd(model), clip=ByNorm(max_norm=1.0), check_now=check_now)
    place = r"pass: 4\.weight\)" if check_now else "check=step names the layer"
    with pytest.raises(Diverged, match=rf"gradient is not finite at update 1 .*{place}"):
        step.update(batch(0), 0)
        step.check_updates()


class Bad(nn.Module):
    """Identity that sets one entry to `value` after `calls` calls."""

    def __init__(self, value: float, calls: int = 0) -> None:
        super().__init__()
        self.value, self.calls = value, calls

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls >= 0:
            return inputs
        outputs = inputs.clone()
        outputs.view(-1)[0] = self.value
        return outputs


@pytest.mark.parametrize("place", [0, 2, 5])
def test_names_the_first_layer_with_a_nonfinite_output(place: int) -> None:
    layers = list(net())
    layers.insert(place, Bad(NAN))
    model = nn.Sequential(*layers)
    update = make_step(model, sgd(model))
    with pytest.raises(Diverged, match=rf"loss became nan .*first: the output of {place} \(Bad\)"):
        update.update(batch(0), 0)


def test_names_inputs_and_weights() -> None:
    model = net()
    inputs, targets = batch(0)
    inputs[3, 2] = INF
    with pytest.raises(Diverged, match="the inputs are not finite"):
        make_step(model, sgd(model)).update(whole(inputs, targets), 0)
    with torch.no_grad():
        model[4].bias[1] = NAN  # type: ignore[index]
    with pytest.raises(Diverged, match=r"first: the weights 4\.bias"):
        make_step(model, sgd(model)).update(batch(0), 0)


def test_names_a_recurrent_layer() -> None:
    model = nn.ModuleDict({"first": nn.LSTM(3, 4), "second": nn.Linear(4, 2)})
    inputs = torch.full((2, 1, 3), NAN)
    name = first_nonfinite_output(model, lambda: model["second"](model["first"](inputs)[0]))
    assert name == "first (LSTM)"
    assert first_nonfinite_output(model, lambda: model["first"](torch.ones(2, 1, 3))) is None


@pytest.mark.parametrize("which, at_once", [(3, True), (3, False), (127, False), (128, False)])
def test_names_the_update_immediately_or_deferred(which: int, at_once: bool) -> None:
    """With flags pending for many updates, and a finite loss."""
    model = nn.Linear(6, 3)
    update = make_step(model, sgd(model, lr=1e-30), check_now=at_once)
    poison: list[float] = []
    model.bias.register_hook(lambda gradient: gradient + poison[0] if poison else gradient)
    inputs, targets = batch(0)
    with pytest.raises(Diverged, match=f"at update {which + 1} ") as error:
        for step in range(140):
            poison[:] = [NAN] if step == which else []
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.nan_to_num_()
            for state in update.optimizer.state.values():
                state.clear()
            update.update(whole(inputs, targets), step)
        update.check_updates()
    assert error.value.before_update is at_once
    if not at_once:
        update.check_updates()  # reported once


def test_finite_gradients_may_overflow_the_weights() -> None:
    model = nn.Linear(6, 3)
    update = make_step(model, torch.optim.SGD(model.parameters(), lr=3e38))
    model.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e10))
    update.update(batch(0), 4)
    with pytest.raises(Diverged, match=r"weights are not finite after update 5 .*first: weight"):
        update.check_weights()


def test_lbfgs_is_checked_before_its_first_step() -> None:
    model = net(dropout=0.0, norm=False)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    spoil(model[0].weight, NAN)  # type: ignore[arg-type]
    before = copy.deepcopy(model)
    with pytest.raises(Diverged, match=r"0\.weight"):
        make_step(model, optimizer, evaluates_once=False).update(batch(0), 0)
    assert equal(model, before)


def test_is_finite() -> None:
    assert is_finite([]) and is_finite([torch.zeros(0)]) and is_finite([torch.full((3,), 3e38), torch.zeros(2, 2)])
    for bad in (NAN, INF, -INF):
        assert not is_finite([torch.zeros(3), torch.tensor([[1.0, bad]])])
        assert not is_finite([torch.tensor([bad], dtype=torch.bfloat16)])


def test_fp16_fails_below_the_smallest_loss_scale() -> None:
    model = nn.Linear(6, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-19)
    spoil(model.weight, INF)

    class Scaled(Precision):
        def scaler(self) -> torch.amp.GradScaler:
            return scaler

    update = make_step(model, sgd(model), precision=Scaled("fp32", CPU), check_now=False)
    update.update(batch(0), 0)
    update.check_updates()
    for step in range(1, 4):
        update.update(batch(0), step)
    with pytest.raises(Diverged, match="precision=fp16"):
        update.check_updates()


def test_updates_that_the_scaler_skips_do_not_count_as_small() -> None:
    model = nn.Linear(6, 3)
    handle = model.weight.register_hook(lambda gradient: gradient * INF)

    class Scaled(Precision):
        def scaler(self) -> torch.amp.GradScaler:
            return torch.amp.GradScaler("cpu", init_scale=4.0)

    rule = Tolerance(model, tolerance=1e9, iterations=10)
    update = make_step(
        model, sgd(model), precision=Scaled("fp32", CPU), check_now=False, after_change=rule.after_change
    )
    for step in range(3):
        update.update(batch(0), step)
        assert rule.count == 0
    handle.remove()
    for step in range(3, 5):
        update.update(batch(0), step)
    assert rule.count == 2


# -- left out


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_skipped_update_changes_nothing(how: str) -> None:
    """Weights, momentum, running statistics, metrics and the count of tiny changes; schedule and data advance."""
    model = nn.Sequential(*list(net(dropout=0.0)), Bad(NAN, calls=10**6))
    skipping, rule = Recovery(3, log=print), Tolerance(model, tolerance=1e9, iterations=10)
    update = make_step(model, sgd(model), factor=lambda t: 1 / (1 + t), skip=skipping.skip, average=rule.after_change)
    sums = MetricSum(CLASSIFICATION)
    train(update, batch(0), 0, sums)
    before = copy.deepcopy((model.state_dict(), update.optimizer.state_dict()["state"]))
    if how == "loss":
        model[5].calls = 0
        train(update, batch(1), 1, sums)
        model[5].calls = 10**6
    else:
        handle = model[0].bias.register_hook(lambda gradient: gradient * NAN)  # type: ignore[union-attr]
        train(update, batch(1), 1, sums)
        handle.remove()
    assert same(before, (model.state_dict(), update.optimizer.state_dict()["state"]))
    assert update.optimizer.param_groups[0]["lr"] == 0.125 / 3
    assert (skipping.skipped, sums.means("train").keys()) == (1, {"train_loss", "train_accuracy"})
    assert rule.count == 1, "only the first update"
    assert sums.count == 10 and math.isfinite(sums.loss)
    train(update, batch(2), 2, sums)
    assert not same(before[0], model.state_dict())


def test_limits_skipped_updates_in_a_row() -> None:
    model = net(norm=False)
    spoil(model[0].weight, NAN)  # type: ignore[arg-type]
    skipping = Recovery(2, log=print)
    update = make_step(model, sgd(model), skip=skipping.skip)
    for step in (0, 1):
        update.update(batch(step), step)
    with pytest.raises(Diverged, match="at update 3 "):
        update.update(batch(2), 2)
    other = Recovery(2, log=print)
    assert all(other.skip(Diverged("", step, before_update=True)) for step in (1, 2, 4, 5, 9))
    assert other.skipped == 5


# -- whole runs


@pytest.mark.parametrize(("on", "check"), [("loss", "auto"), ("gradient", "step")])
def test_failed_run_has_a_finite_checkpoint(tmp_path: Path, on: str, check: str) -> None:
    with explosions(lambda step, lr: step == 10, on), pytest.raises(RunError, match=r"at update 10 .* of 0\.08"):
        start(tmp_path, *RUN, f"check={check}")
    assert result(tmp_path)["progress"]["step"] == 8
    assert all(bool(value.isfinite().all()) for value in result(tmp_path)["model"].values())
    assert resume(tmp_path, *RUN)["status"] == "finished"
    start(tmp_path / "whole", *RUN)
    assert same(result(tmp_path)["model"], result(tmp_path / "whole")["model"])


def test_summary_counts_skipped_updates(tmp_path: Path) -> None:
    with explosions(lambda step, lr: step in (2, 3, 9), "gradient"):
        summary = start(tmp_path, *RUN, "on_divergence=skip")
    assert (summary["status"], summary["steps"], summary["skipped_updates"]) == ("finished", 16, 3)
    assert all(math.isfinite(line["train_loss"]) for line in timeless(tmp_path))


def test_resumes_the_warmup_of_the_average_after_a_skipped_update(tmp_path: Path) -> None:
    """The average was not updated then, and its count must not include that update."""
    lines = [*RUN, "on_divergence=skip", "ema=0.9"]
    with explosions(lambda step, lr: step == 2, "gradient"):
        start(tmp_path / "whole", *lines)
        with at_update(6, terminate):
            assert start(tmp_path / "stopped", *lines)["status"] == "interrupted"
        resume(tmp_path / "stopped", *lines)
    assert same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


# -- memory


@contextmanager
def memory_for(samples: int) -> Iterator[list[int]]:
    """Raises out-of-memory errors for more than `samples` samples."""
    seen: list[int] = []

    def micro_batch(self: Mode, micro_batch: Batch) -> AbstractContextManager[None]:
        if len(micro_batch.inputs) > samples:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
        seen.append(len(micro_batch.inputs))
        return nullcontext()

    with patch.object(Mode, "micro_batch", micro_batch):
        yield seen


def test_out_of_memory_gives_advice(tmp_path: Path) -> None:
    with memory_for(12), pytest.raises(RunError, match=r"at update 1 \(Tried to allocate 2\.00 GiB\); .*halve"):
        start(tmp_path, *RUN)


def test_halving_micro_batches_gives_the_same_result(tmp_path: Path, caplog: Any) -> None:
    """In fp64; metrics count each sample once."""
    lines = [*RUN, "precision=fp64", "model.dropout=0", "data.drop_last=true"]
    with memory_for(7) as seen, caplog.at_level(logging.WARNING):
        start(tmp_path / "small", *lines, "on_out_of_memory=halve")
    assert caplog.text.count("out of memory at update 1: ") == 2 and "micro-batches of 7" in caplog.text
    assert max(seen) <= 7
    start(tmp_path / "large", *lines)
    for key, value in result(tmp_path / "large")["model"].items():
        torch.testing.assert_close(result(tmp_path / "small")["model"][key], value, rtol=1e-10, atol=1e-12)
    for a, b in zip(timeless(tmp_path / "small"), timeless(tmp_path / "large"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-10)
        assert a["train_accuracy"] == b["train_accuracy"]


def test_resuming_keeps_the_micro_batch_size(tmp_path: Path) -> None:
    lines = [*RUN, "on_out_of_memory=halve", "model.norm=batch"]
    from tests.support.runs import terminate

    with memory_for(9):
        start(tmp_path / "whole", *lines)
        with at_update(6, terminate):
            start(tmp_path / "run", *lines)
    with memory_for(9):
        resume(tmp_path / "run", *lines)
    assert same(result(tmp_path / "run"), result(tmp_path / "whole"))
    assert result(tmp_path / "run")["progress"]["accumulate"] == 4


def test_out_of_memory_for_one_sample(tmp_path: Path) -> None:
    with memory_for(0), pytest.raises(RunError, match="out of memory"):
        start(tmp_path, *RUN, "on_out_of_memory=halve")


# -- ranks


def one_rank_diverges(folder: str) -> None:
    """On each rank: a run with NaN inputs on rank 1, one with a NaN activation there, then runs with a NaN gradient
    there, which the last one skips."""
    import os

    from dlopt.parallel.processes import rendezvous
    from dlopt.training.progress import TrainingRun

    rank = int(os.environ["DLOPT_RANK"])
    replicated = ["parallel=ddp", "parallel.sync_batchnorm=true"]
    split = ["parallel=filter", "model.norm=batch"]
    modes = {"inputs": replicated, "activation": ["parallel=fsdp", "parallel.sync_batchnorm=true"]}
    modes |= {"gradient": replicated, "split": split, "skip": [*split, "on_divergence=skip"]}
    original, made = Step.forward_backward, Step.__init__

    def is_time(step: Step, on: str) -> bool:
        return rank == 1 and step.current.number + 1 == 6 and on == kind

    def forward_backward(self: Step, batch: Batch) -> tuple[Tensor, list[Kept]]:
        if is_time(self, "inputs"):
            batch.inputs[0] = NAN
        return original(self, batch)

    def make(self: Step, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        if kind == "activation":
            layer = [each for each in self.module.modules() if isinstance(each, nn.Linear)][-2]
            layer.register_forward_hook(lambda _, inputs, output: output * NAN if is_time(self, kind) else output)
        elif kind != "inputs":
            self.parameters[0].register_hook(lambda gradient: gradient * NAN if is_time(self, kind) else gradient)

    with patch.object(Step, "forward_backward", forward_backward), patch.object(Step, "__init__", make):
        for kind, mode in modes.items():
            try:
                summary = run_job(TrainingRun(run_config(*RUN, *mode), Path(folder) / kind))
                print(json.dumps([summary["skipped_updates"]]))
            except Diverged as error:
                print(json.dumps([error.step, error.before_update, str(error)]))
            rendezvous.leave()


def test_all_ranks_raise_the_error_of_one(tmp_path: Path) -> None:
    outputs = run_ranks("tests.training.test_nonfinite:one_rank_diverges", 2, tmp_path, str(tmp_path))
    for output in outputs:
        inputs, activation, gradient, split, skipped = [
            json.loads(line) for line in output.splitlines() if line.startswith("[")
        ]
        assert inputs[:2] == gradient[:2] == [6, True]
        assert "first on rank 1: the inputs" in inputs[2] and ": the gradient of " in gradient[2]
        assert activation[:2] == [6, True]
        assert "first on rank 1: the output of layer1.norm (Identity)" in activation[2]  # its input is the hook's
        assert split[0] == 6 and "first on rank 1: the gradient of " in split[2]
        assert skipped == [1]
    for kind in ("inputs", "gradient"):
        assert result(tmp_path / kind)["progress"]["step"] == 4


def test_locates_the_divergence_of_a_model_that_reads_tokens() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    step = make_step(model, sgd(model))
    with pytest.raises(Diverged, match="first: the output of"):
        step.update(whole(torch.full((8, 3), 4), torch.zeros(8, dtype=torch.int64)), 0)
