"""Benchmarks a step of dlopt against a hand-written PyTorch loop.

    python scripts/bench/step.py [--json FILE] [--rounds 5] [--only overhead,throughput,synchronization]

- overhead: a tiny MLP on fixed batches, one thread: overhead per step in microseconds over the hand-written loop, with
  logging off and on (TensorBoard every 50 steps), and over a loop with fused=True, which dlopt uses by default;
- throughput: ResNet-20, batch 128, flip and pad-4 crop on 32x32 images: samples per second of dlopt in fp32 and bf16
  against a DataLoader with two workers and torchvision's transforms, image by image;
- synchronization: number of host-device synchronizations between two logging points.

The candidates take turns for several rounds and medians are compared, because the machine may be shared.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PILImages
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from dlopt.basics.interruption import Interruption
from dlopt.basics.length import BatchCount, Length, SampleCount, UpdateCount
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import RunConfig
from dlopt.data.batches import Batch, Batches, Delivery
from dlopt.data.samples import InMemory
from dlopt.machine.memory import keep_freed_memory
from dlopt.machine.threads import set_threads
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.mode import Mode
from dlopt.schedules import Horizon, Scheduler, constant
from dlopt.tasks.classification import Classification
from dlopt.tracking.tracking import Tracking
from dlopt.training.builders.optimizer import can_fuse
from dlopt.training.builders.precision import Precision
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.loop import Trainer
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import Intervals, Progress
from dlopt.training.step import Step, StepSettings
from dlopt.training.stopping import Best, Never

CPU = torch.device("cpu")


def run_config(*overrides: str) -> RunConfig:
    return parse(to_plain(Composer(words=overrides).compose(overrides))[0])


class FixedBatches:
    """Repeats the same few batches."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
        self.batches = [Batch(inputs, targets, len(targets)) for inputs, targets in batches]
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self.batches), self.steps)


# What a checkpoint says about its data: see `data_spec`.
DATA = {
    "classes": None,
    "task": Classification(10).saved,
    "sample": [3, 32, 32],
    "window": [3, 32, 32],
    "identity": None,
}


def training(
    module: nn.Module,
    batches: Any,
    folder: Path,
    *,
    precision: str = "fp32",
    log_every: int | None = None,
    steps: int | None = None,
    check_now: bool = True,
) -> tuple[Trainer, Tracking]:
    """Builds a trainer like `dlopt train`, without console and evaluation."""
    parameters = list(module.parameters())
    optimizer_component = run_config("optimizer=sgd", "optimizer.lr=0.01").optimizer
    optimizer = optimizer_component.build(params=parameters, fused=can_fuse(optimizer_component, parameters))
    steps = steps if steps is not None else len(batches)
    schedule = Scheduler(optimizer, constant(horizon=Horizon(0, steps, len(batches))))
    tracking = Tracking(
        folder, sinks=[] if log_every is None else ["tensorboard"], console=False, log_every_steps=log_every
    )
    length = Length(
        UpdateCount(steps),
        BatchCount(steps),
        BatchCount(len(batches)),
        SampleCount(128),
        SampleCount(128 * len(batches)),
    )
    tracking.begin({}, {}, length)
    train_metrics = MetricSum(Classification(10))
    step = Step(
        Network(module, module, nn.CrossEntropyLoss()),
        optimizer,
        schedule,
        Mode(CPU),
        StepSettings(check_now=check_now),
        precision=Precision(precision, CPU),
        metrics=train_metrics,
    )
    return Trainer(
        step=step,
        run_update=step.update,
        batches=batches,
        validate=None,
        tracking=tracking,
        checkpoints=Checkpoints(folder / "checkpoints", 1),
        stopping=Never(),
        best=Best("auto"),
        normalize=nn.Identity(),
        config={},
        recovery=Recovery(attempts=1, log=print),
        length=length,
        intervals=Intervals(save_every_epochs=None, log_every_steps=log_every),
        progress=Progress(data=DATA),
        train_metrics=train_metrics,
    ), tracking


def interleave(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the candidates in turn, after a warm-up round; returns their measurements."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, measure in candidates.items():
            value = measure()
            if number:
                values[name].append(value)
    return values


def overhead(rounds: int, steps: int = 2000) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(16)]

    mlp = run_config("model=mlp", "model.widths=[32]", "model.norm=none").model

    def model() -> nn.Module:
        return mlp.build(input_shape=(1, 8, 8), classes=10)

    def by_hand(**options: bool) -> float:
        module, loss_of = model(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, **options)
        batches = FixedBatches(data, steps).epoch(0)
        start = time.perf_counter()
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = loss_of(module(inputs), targets)
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps * 1e6

    def engine(log_every: int | None) -> Callable[[], float]:
        def measure() -> float:
            with tempfile.TemporaryDirectory() as folder:
                run, tracking = training(model(), FixedBatches(data, steps + 1), Path(folder), log_every=log_every)
                marks: list[float] = []
                timed = run.batches.epoch

                def marked(epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
                    source = timed(epoch, start, step)
                    marks.append(time.perf_counter())
                    yield from source  # the epoch's end (a checkpoint) is not part of a step
                    marks.append(time.perf_counter())

                run.batches.epoch = marked  # type: ignore[method-assign]
                with tracking, Interruption() as interruption:
                    run.fit(interruption)
                return (marks[1] - marks[0]) / (steps + 1) * 1e6

        return measure

    fused = functools.partial(by_hand, fused=True)
    candidates: dict[str, Callable[[], float]] = {
        "by hand": by_hand,
        "by hand, fused": fused,
        "logging off": engine(None),
        "logging on": engine(50),
    }
    measurements = interleave(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in measurements.items()}
    over_plain = {
        name: statistics.median(a - b for a, b in zip(measurements[name], measurements["by hand"], strict=True))
        for name in ("logging off", "logging on")
    }
    over_fused = {
        name: statistics.median(a - b for a, b in zip(measurements[name], measurements["by hand, fused"], strict=True))
        for name in ("logging off", "logging on")
    }
    return {
        "microseconds_per_step": medians,
        "overhead_microseconds": over_plain,
        "beyond_fused_microseconds": over_fused,
    }


def resnet20() -> nn.Module:
    return run_config("model=resnet20").model.build(input_shape=(3, 32, 32), classes=10)


COUNT = 2560  # images of one measurement


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8))
    return inputs, torch.from_numpy(rng.integers(0, 10, COUNT))


@functools.cache
def loader() -> DataLoader[tuple[Any, int]]:
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    data = PILImages(*images(), transform)
    return DataLoader(data, batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)


def rate_by_hand() -> float:
    """Returns the samples per second of the hand-written loop, with two threads."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    module, loss_of = resnet20(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    module.train()
    start = time.perf_counter()
    for x, y in loader():
        optimizer.zero_grad()
        loss = loss_of(module(x), y)
        loss.backward()
        optimizer.step()
    return COUNT / (time.perf_counter() - start)


def rate_of_dlopt(precision: str) -> float:
    """Returns the samples per second of dlopt's trainer, built like `dlopt train`."""
    set_threads(2)
    keep_freed_memory()
    torch.manual_seed(0)
    inputs, targets = images()
    config = run_config("augmentation=crop_flip")
    samples = InMemory(inputs, targets)
    normalize = config.normalize.build(input_shape=(3, 32, 32))
    normalize.fit(samples)
    module = resnet20().to(memory_format=torch.channels_last)
    batches = Batches(
        samples, Delivery(CPU, True, 0, normalize=normalize, memory_format=torch.channels_last), batch_size=128,
        sampler=config.sampler.build(targets=targets, seed=0),
        augment=config.augmentation.build(input_shape=(3, 32, 32), classes=10, train=samples),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run, tracking = training(module, batches, Path(folder), precision=precision, log_every=50)
        start = time.perf_counter()
        with tracking, Interruption() as interruption:
            run.fit(interruption)
        return COUNT / (time.perf_counter() - start)


def throughput(rounds: int) -> dict[str, Any]:
    """Runs each loop in its own process, because dlopt's malloc settings would also speed up the other loop."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def in_process(measure: Callable[..., float], *arguments: str) -> Callable[[], float]:
            process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            return lambda: process.submit(measure, *arguments).result()

        candidates = {
            "by hand": in_process(rate_by_hand),
            "dlopt fp32": in_process(rate_of_dlopt, "fp32"),
            "dlopt bf16": in_process(rate_of_dlopt, "bf16"),
        }
        measurements = interleave(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in measurements.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(measurements[name], measurements["by hand"], strict=True))
        for name in ("dlopt fp32", "dlopt bf16")
    }
    return {"samples_per_second": medians, "ratio": ratios}


class SynchronizationCounter(TorchDispatchMode):
    """Counts operations that synchronize the host with a device: reading scalars, data-dependent shapes."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def synchronization(steps: int = 40) -> dict[str, Any]:
    """Counts synchronizations in `steps` updates without logging, and without per-step loss checks as on a GPU."""
    data = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    if torch.cuda.is_available():
        return _synchronization_on_cuda(data, steps)
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        run, tracking = training(resnet20(), FixedBatches(data, steps), Path(folder), log_every=10**6, check_now=False)
        waits = SynchronizationCounter()
        counts: list[int] = []
        advance = tracking.advance

        def counting(step: UpdateCount) -> None:
            advance(step)
            counts.append(waits.count)

        tracking.advance = counting  # type: ignore[method-assign]
        with tracking, waits:
            run.fit(interruption)
    return {"steps": steps, "waits": counts[-1] - counts[0], "how": "operations counted on the CPU"}


def _synchronization_on_cuda(data: list[tuple[Tensor, Tensor]], steps: int) -> dict[str, Any]:
    import warnings

    module = resnet20().cuda()
    batches = FixedBatches([(x.cuda(), y.cuda()) for x, y in data], steps)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, tracking = training(module, batches, Path(folder), log_every=10**6, check_now=False)
        with tracking, Interruption():
            for step, batch in enumerate(batches.epoch(0)):
                torch.cuda.set_sync_debug_mode("warn" if step else "default")
                run.run_update(batch, step)
                tracking.advance(UpdateCount(step + 1))
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"steps": steps, "waits": waits, "how": "torch.cuda.set_sync_debug_mode"}


def show(results: dict[str, Any]) -> None:
    table = Table(title=f"torch {torch.__version__}, medians")
    for name in ("benchmark", "result", "goal"):
        table.add_column(name)
    if "overhead" in results:
        plain_overhead = results["overhead"]["overhead_microseconds"]
        base = results["overhead"]["microseconds_per_step"]
        table.add_row("tiny MLP by hand", f"{base['by hand']:.0f} us/step", "")
        table.add_row("dlopt overhead, logging off", f"{plain_overhead['logging off']:+.1f} us/step", "<= 20")
        table.add_row("dlopt overhead, logging on", f"{plain_overhead['logging on']:+.1f} us/step", "<= 50")
        fused, fused_overhead = base["by hand, fused"], results["overhead"]["beyond_fused_microseconds"]
        table.add_row("tiny MLP by hand, fused=True", f"{fused:.0f} us/step", "")
        off, on = fused_overhead["logging off"], fused_overhead["logging on"]
        table.add_row("dlopt overhead over it, logging off / on", f"{off:+.1f} / {on:+.1f} us/step", "")
    if "throughput" in results:
        rates, ratio = results["throughput"]["samples_per_second"], results["throughput"]["ratio"]
        table.add_row("ResNet-20, DataLoader loop fp32", f"{rates['by hand']:.0f} samples/s", "")
        for name, goal in (("dlopt fp32", ">= 1.5 x"), ("dlopt bf16", ">= 2.3 x")):
            table.add_row(f"ResNet-20, {name}", f"{rates[name]:.0f} samples/s ({ratio[name]:.2f} x)", goal)
    if "synchronization" in results:
        waits = results["synchronization"]
        table.add_row("synchronizations between logging points", f"{waits['waits']} in {waits['steps']} steps", "0")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="overhead,throughput,synchronization")
    options = parser.parse_args()
    selected = options.only.split(",")
    results: dict[str, Any] = {}
    if "overhead" in selected:
        results["overhead"] = overhead(options.rounds)
    if "throughput" in selected:
        results["throughput"] = throughput(options.rounds)
    if "synchronization" in selected:
        results["synchronization"] = synchronization()
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
