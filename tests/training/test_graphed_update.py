"""Tests of replayed against eager updates, with a recorder that simulates CUDA graphs on the CPU."""

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dlopt.data.batches import Batch
from dlopt.machine.cuda_graphs import GraphedFunction
from dlopt.metrics.sums import MetricSum
from dlopt.models.airbench import AirBench
from dlopt.optim import SAM, SGDW, Lion, Muon, Signum
from dlopt.optim.cautious_decay import make_decay_cautious
from dlopt.parallel.mode import Mode
from dlopt.schedules import Horizon, OneCycle, Scheduler
from dlopt.schedules.decay import WeightDecay, independent, linear
from dlopt.training.averaging import ExponentialAverage
from dlopt.training.builders.precision import Precision
from dlopt.training.builders.workload import build_workload
from dlopt.training.clipping import ByNorm, Clip, Unclipped
from dlopt.training.graphed_update import GraphedUpdate, layer_obstacle, obstacle
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Diverged
from dlopt.training.step import Step, StepSettings, UpdateFunction, UpdateResult
from tests.support.norm import NORM
from tests.support.recorded import SimulatedRecorder
from tests.support.runs import result, run_config, same, start, timeless
from tests.support.sizes import SMALL
from tests.support.steps import train, whole
from tests.support.tasks import CLASSIFICATION

SIZE = 8
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.125, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0625, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0625, weight_decay=0.1, fused=True),
    "muon": lambda p: Muon(p, lr=0.125, rest="sgd", rest_lr=0.125, normalize_weights=True),
    "adamw, cautious decay": lambda p: with_cautious_decay(torch.optim.AdamW(p, 0.0625, weight_decay=0.5, fused=True)),
    "sgdw": lambda p: SGDW(p, lr=0.125, weight_decay=0.5),
    "lion": lambda p: Lion(p, lr=0.125, weight_decay=0.5),
    "signum": lambda p: Signum(p, lr=0.125, weight_decay=0.5),
    "muon_sphere": lambda p: Muon(p, lr=0.125, rest="sgd", weight_decay=0.0, row_beta=0.5, hyperball=True),
}


def with_cautious_decay(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    make_decay_cautious(optimizer)
    return optimizer


def net(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers)


def batch(number: int, size: int = SIZE) -> Batch:
    draws = torch.Generator().manual_seed(number)
    return whole(torch.randn(size, 3, 6, 6, generator=draws), torch.randint(5, (size,), generator=draws))


class Run:
    """Runs eager or captured updates, and returns all results."""

    def __init__(
        self,
        make: Make,
        recorder: SimulatedRecorder | None,
        *,
        accumulate: int = 1,
        clip: Clip | None = None,
        schedule: Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    ) -> None:
        self.model = net()
        self.optimizer = make(self.model.parameters())
        # Exact in single precision.
        self.schedule = (schedule or (lambda each: Scheduler(each, lambda t: 0.5 ** (t // 3))))(self.optimizer)
        self.average = ExponentialAverage(self.model, 0.9)
        arguments: Any = (
            Network(self.model, self.model, nn.CrossEntropyLoss()), self.optimizer, self.schedule, Mode(CPU),
            StepSettings(accumulate=accumulate, seed=3, check_now=False),
        )  # fmt: skip
        self.sums, self.rates = MetricSum(CLASSIFICATION), []
        self.result: UpdateResult | None = None
        keys: Any = {
            "precision": Precision("fp32", CPU), "metrics": self.sums, "clip": clip or ByNorm(max_norm=1.0),
            "average": self.average.update,
        }  # fmt: skip
        self.step = Step(*arguments, **keys)
        self.update: UpdateFunction = self.step.update
        if recorder is not None:
            self.update = GraphedUpdate(self.step, recorder, SIZE, log_norm=True, averages=True)

    def go(self, steps: range, sizes: Callable[[int], int] = lambda step: SIZE) -> "Run":
        for step in steps:
            self.result = self.update(batch(step, sizes(step)), step, log_norm=True)
            self.rates.append(float(self.step.rate))
        return self

    def left(self) -> list[Tensor]:
        tensors = [*self.model.state_dict().values(), *self.average._averages]
        assert self.result is not None and self.result.norm is not None
        means = torch.tensor([*self.sums.means("train").values(), *self.rates])
        return [*(each.clone() for each in tensors), means, self.result.norm]


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.left(), b.left(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_updates_equal_eager_ones(name: str, accumulate: int) -> None:
    """Bitwise: weights, running statistics, averages, dropout, clipping, metrics and changing learning rates."""
    recorder = SimulatedRecorder()
    plain = Run(OPTIMIZERS[name], None, accumulate=accumulate).go(range(10))
    replayed = Run(OPTIMIZERS[name], recorder, accumulate=accumulate).go(range(10))
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 8)
    assert equal(plain, replayed)
    assert len({float(x) for x in plain.rates}) == 4


def test_smaller_last_batch_runs_eagerly() -> None:
    recorder = SimulatedRecorder()

    def sizes(step: int) -> int:
        return 5 if step % 4 == 3 else SIZE

    plain, replayed = Run(OPTIMIZERS["sgd"], None), Run(OPTIMIZERS["sgd"], recorder)
    assert equal(plain.go(range(12), sizes), replayed.go(range(12), sizes))
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captures_again_after_loading_and_saves_float_rates(name: str) -> None:
    recorder = SimulatedRecorder()
    plain, replayed = Run(OPTIMIZERS[name], None), Run(OPTIMIZERS[name], recorder)
    for run in (plain, replayed):
        run.go(range(6))
        kept = copy.deepcopy((run.optimizer.state_dict(), run.schedule.state_dict(), run.model.state_dict()))
        run.go(range(6, 9))
        run.optimizer.load_state_dict(kept[0])
        run.schedule.load_state_dict(kept[1])
        run.model.load_state_dict(kept[2])
        run.go(range(6, 12))
        assert all(type(group["lr"]) is float for group in kept[0]["param_groups"])
    assert recorder.recorded == 2
    assert equal(plain, replayed)


@pytest.mark.parametrize("name", ["adamw", "sgdw", "muon", "adamw, cautious decay"])
def test_replays_a_weight_decay_that_changes(name: str) -> None:
    """In eager updates of a smaller batch, in replays, and after a state is loaded; fused AdamW rounds otherwise."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return Muon(parameters, lr=0.125, weight_decay=0.5) if name == "muon" else OPTIMIZERS[name](parameters)

    def schedule(optimizer: torch.optim.Optimizer) -> Scheduler:
        decay = WeightDecay(lambda t, factor, peak: 1 - t / 16)
        return Scheduler(optimizer, lambda t: 0.5 ** (t // 3), decay=decay)

    def go(run: Run) -> list[float]:
        run.go(range(7), lambda step: 5 if step == 4 else SIZE)
        kept = copy.deepcopy((run.optimizer.state_dict(), run.schedule.state_dict()))
        assert all(type(group["weight_decay"]) is float for group in kept[0]["param_groups"])
        run.optimizer.load_state_dict(kept[0])
        run.schedule.load_state_dict(kept[1])
        run.go(range(7, 12))
        return [float(group["weight_decay"]) for group in run.optimizer.param_groups]

    recorder = SimulatedRecorder()
    plain, replayed = Run(make, None, schedule=schedule), Run(make, recorder, schedule=schedule)
    assert go(replayed) == pytest.approx(go(plain))
    assert recorder.recorded == 2 and recorder.replayed == 7
    atol = 2e-4 if name == "muon" else 1e-6  # some processors round differently when bf16 matrices are elsewhere
    for one, other in zip(plain.left(), replayed.left(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_momentum_that_changes_stays_outside_of_the_graph(name: str) -> None:
    """The optimizer's update is eager, with the gradients of the graph, also after the eager update of a smaller batch:
    bitwise equal, although rates and decays are no powers of two."""

    def schedule(optimizer: torch.optim.Optimizer) -> Scheduler:
        keys: Any = {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4, "anneal": "cosine"}
        keys |= {"three_phase": False, "cycle_momentum": "auto", "base_momentum": 0.85, "max_momentum": 0.95}
        cycle = OneCycle(**keys, horizon=Horizon(0, 12, 3))
        return Scheduler(optimizer, cycle, decay=WeightDecay(lambda t, factor, peak: 1 - t / 16))

    def go(run: Run) -> set[float]:
        momenta = set()
        for step in range(12):
            run.go(range(step, step + 1), lambda step: 5 if step == 4 else SIZE)
            group = run.optimizer.param_groups[0]
            momenta.add(group["betas"][0] if "betas" in group else group["momentum"])
            if step == 7:
                run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        return momenta

    recorder = SimulatedRecorder()
    plain, replayed = (Run(OPTIMIZERS[name], each, schedule=schedule) for each in (None, recorder))
    momenta = go(plain)
    assert go(replayed) == momenta and len(momenta) > 1
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 9)
    assert equal(plain, replayed)


def test_captures_again_after_freezing() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        groups = [{"params": others}, {"params": [first], "horizon": 0.5}]
        return torch.optim.SGD(groups, lr=0.125, momentum=0.5, fused=True)

    recorder = SimulatedRecorder()

    def schedule(optimizer: torch.optim.Optimizer) -> Scheduler:
        return Scheduler(optimizer, lambda t: max(1 - t / 16, 0.0), freezes=True)

    plain = Run(make, None, schedule=schedule).go(range(14))
    replayed = Run(make, recorder, schedule=schedule).go(range(14))
    assert not next(replayed.model.parameters()).requires_grad
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2 + 1, 2, 14 - 3)
    assert equal(plain, replayed)


def test_a_former_graph_keeps_its_memory_until_the_next_capture() -> None:
    """The next graph then allocates from it; a graph in use must not be released during a capture that fails."""
    graphs: list[Any] = []

    class Recording(SimulatedRecorder):
        def capture(self, work: Any, generators: Any) -> Any:
            self.alive = [graph() is not None for graph in graphs]
            replay, results = super().capture(work, generators)
            graphs.append(weakref.ref(replay))
            return replay, results

    recorder, value = Recording(), torch.zeros(())
    function = GraphedFunction("a sum", lambda: value.add_(1), recorder)
    for calls in (4, 1, 3):
        for _ in range(calls):
            function()
        function.reset(warmup_runs=1)
    gc.collect()
    assert recorder.recorded == 2 and recorder.alive == [True]
    assert graphs[0]() is None and graphs[1]() is not None


def test_deferred_check_detects_nonfinite_updates() -> None:
    recorder = SimulatedRecorder()
    run = Run(OPTIMIZERS["sgd"], recorder, clip=Unclipped()).go(range(6))
    run.step.check_updates()
    inputs, targets = batch(6)
    train(run.step, whole(inputs * float("nan"), targets), 6, run.sums)
    run.go(range(7, 9))
    with pytest.raises(Diverged, match="update 7") as caught:
        run.step.check_updates()
    assert caught.value.step == 7 and not caught.value.before_update


def test_failed_capture_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.mean().item() > 0 else x

    def run(recorder: SimulatedRecorder | None) -> Run:
        made = Run(OPTIMIZERS["sgd"], recorder)
        made.model.append(Deciding())
        return made.go(range(6))

    recorder = SimulatedRecorder()
    assert equal(run(None), run(recorder))
    assert recorder.replayed == 0 and "could not be captured as a CUDA graph" in caplog.text


@pytest.mark.parametrize("warmup", [True, False])
def test_runs_with_replayed_updates_have_the_same_average(tmp_path: Path, warmup: bool) -> None:
    """A graph repeats the numbers of the captured update: the decay must not be one of them while it warms up."""
    lines = [*SMALL, "ema=0.9", f"ema_warmup={warmup}", "epochs=3"]
    start(tmp_path / "eager", *lines)
    recorder = SimulatedRecorder()
    with (
        patch("dlopt.training.graphed_update.obstacle", return_value=None),
        patch("dlopt.training.builders.step.Recorder", return_value=recorder),
    ):
        start(tmp_path / "replayed", *lines)
    assert recorder.replayed > 0
    assert timeless(tmp_path / "eager") == timeless(tmp_path / "replayed")
    assert same(result(tmp_path / "eager"), result(tmp_path / "replayed"))


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def obstacle_of(
    make: Make = OPTIMIZERS["sgd"],
    *,
    model: nn.Module | None = None,
    mode: Mode | None = None,
    precision: str = "fp32",
    observed: bool = False,
    compile: bool | str = True,
    decay: WeightDecay | None = None,
    parts: Sequence[object] = (nn.CrossEntropyLoss(), Unclipped()),
    **settings: Any,
) -> str | None:
    model = net() if model is None else model
    optimizer = make(model.parameters())
    step: Any = SimpleNamespace(
        module=model,
        optimizer=optimizer,
        schedule=Scheduler(optimizer, lambda t: 1.0, decay=decay),
        mode=mode or Mode(CUDA),
        settings=StepSettings(**{"check_now": False, **settings}),
        precision=Precision(precision, CUDA),
    )
    return obstacle(step, parts, observed=observed, compile=compile)


def test_no_obstacle() -> None:
    for name, make in OPTIMIZERS.items():
        assert obstacle_of(make) is None, name
    keys: Any = {"input_shape": (3, 8, 8), "classes": 3, "whiten_kernel": 2, "widths": (4, 4, 4), "activation": "gelu"}
    model = AirBench(**keys, **NORM)
    assert obstacle_of(model=model) is None
    assert obstacle_of(OPTIMIZERS["adamw"], decay=independent(horizon=Horizon(0, 9, 3))) is None


@pytest.mark.parametrize(
    "typed",
    [
        ["model=resnet20"], ["model=mlp", "model.dropout=0.5"], ["model=vit", "model.patch=2"],
        ["model=mlp", "adapt=lora", "adapt.rank=2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_graphs_record_the_layers_that_a_run_has(typed: list[str]) -> None:
    """Placing a model on a device converts its dropouts."""
    workload = build_workload(run_config(*typed, "device=cpu"))
    assert layer_obstacle(workload.module) is None


class Theirs(nn.Linear):
    pass


class Annealed(nn.CrossEntropyLoss):
    """A loss whose weight may be a number of Python, which a graph would repeat."""


def of_two_processes() -> Mode:
    mode = Mode(CUDA)
    mode.ranks.processes = 2
    return mode


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mode": Mode(CPU)}, "not available on cpu"),
        ({"mode": of_two_processes()}, "communicates between processes"),
        ({"observed": True}, "diagnostics"),
        ({"make": lambda p: torch.optim.SGD(p, lr=0.1, fused=False)}, "SGD has control flow on the host"),
        ({"make": lambda p: torch.optim.LBFGS(p)}, "LBFGS"),
        ({"make": lambda p: SAM(base=torch.optim.SGD(p, lr=0.1))}, "SAM"),
        ({"precision": "fp16"}, "fp16"),
        ({"compile": "max-autotune"}, "compile=max-autotune records graphs of its own"),
        ({"check_now": True}, "check=step"),
        ({"precision": "bf16_pure", "decay": linear(final=0.0, horizon=Horizon(0, 9, 3))}, "bf16_pure would round"),
        ({"halve_on_out_of_memory": True}, "halve"),
        ({"grows": True}, "accumulate grows the batch"),
        ({"model": nn.Sequential(nn.Flatten(), Theirs(4, 2))}, "Theirs"),
        ({"model": nn.LSTM(3, 2)}, "LSTM"),
        ({"parts": [Annealed()]}, "Annealed may have control flow on the host"),
        ({"parts": [nn.Sequential(Annealed())]}, "Annealed"),
        ({"parts": [nn.CrossEntropyLoss(), of_two_processes]}, "of_two_processes"),
    ],
)
def test_obstacles(changed: dict[str, Any], reason: str) -> None:
    found = obstacle_of(**changed)
    assert found is not None and reason in found
