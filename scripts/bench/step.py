"""What a step of the runner costs, against a hand-written PyTorch loop in the same process.

    python scripts/bench/step.py [--json FILE] [--rounds 5] [--only overhead,throughput,synchronization]

- overhead: a tiny MLP on fixed batches, one thread: microseconds per step beyond the hand-written loop, with logging
  off and on (TensorBoard every 50 steps); and beyond one whose author has thought of fused=True, as dlopt does;
- throughput: ResNet-20, batch 128, flip and pad-4 crop on 32x32 images: samples per second of dlopt in fp32 and bf16
  against a loop over a DataLoader with two workers and torchvision's transforms image by image;
- synchronization: operations between two logging points that make the host wait for the device: counted.

Both loops of a comparison run in turn, several rounds, and medians are compared: the machine may be shared.
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
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from dlopt.config.compose import Composer, to_plain
from dlopt.config.experiment import Experiment
from dlopt.config.parsing import parse
from dlopt.data.batches import Batches, Delivery
from dlopt.data.samples import InMemory
from dlopt.interruption import Interruption
from dlopt.parallel.mode import Mode
from dlopt.processor import keep_freed_memory, set_threads
from dlopt.schedules import Horizon, Scheduler, constant
from dlopt.tracking.tracking import Tracking
from dlopt.training.checkpoint import Checkpoints
from dlopt.training.metrics import MetricSum
from dlopt.training.nonfinite import Recovery
from dlopt.training.optimizer import can_fuse
from dlopt.training.precision import Precision
from dlopt.training.progress import Intervals, Progress
from dlopt.training.step import Network, Step, StepSettings
from dlopt.training.stopping import Best, Never
from dlopt.training.trainer import Trainer

CPU = torch.device("cpu")


def experiment(*overrides: str) -> Experiment:
    return parse(to_plain(Composer().compose(list(overrides)), overrides)[0])


class FixedBatches:
    """The same few batches over and over."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(itertools.cycle(self.batches), self.steps)


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
    """A trainer as `dlopt train` builds it, without console and evaluation."""
    parameters = list(module.parameters())
    chosen = experiment("optimizer=sgd", "optimizer.lr=0.01").optimizer
    optimizer = chosen.build(params=parameters, fused=can_fuse(chosen, parameters))
    steps = steps if steps is not None else len(batches)
    schedule = Scheduler(optimizer, constant(horizon=Horizon(0, steps, len(batches))))
    tracking = Tracking(
        folder, sinks=[] if log_every is None else ["tensorboard"], console=False, log_every_steps=log_every
    )
    tracking.begin({}, {}, epochs=1, steps_per_epoch=len(batches), steps=steps)
    step = Step(
        Network(module, module, nn.CrossEntropyLoss()),
        optimizer,
        schedule,
        Mode(CPU),
        StepSettings(check_now=check_now),
        precision=Precision(precision, CPU),
    )
    return Trainer(
        step=step,
        batches=batches,
        validate=None,
        tracking=tracking,
        checkpoints=Checkpoints(folder / "checkpoints", 1),
        stopping=Never(),
        best=Best("auto"),
        normalize=nn.Identity(),
        config={},
        recovery=Recovery("stop", attempts=1, lr_factor=1.0, load_newest=lambda: None, log=print),
        intervals=Intervals(steps, save_every_epochs=None, log_every_steps=log_every),
        progress=Progress(horizon=steps),
        train_metrics=MetricSum(classify=True),
    ), tracking


def interleave(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the candidates in turn; one round first that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, measure in candidates.items():
            value = measure()
            if number:
                figures[name].append(value)
    return figures


def overhead(rounds: int, steps: int = 2000) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(16)]

    mlp = experiment("model=mlp", "model.widths=[32]", "model.norm=none").model

    def model() -> nn.Module:
        return mlp.build(input_shape=(1, 8, 8), classes=10)  # type: ignore[no-any-return]

    def by_hand(**options: bool) -> float:
        module, loss_of = model(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, **options)
        batches = FixedBatches(data, steps).epoch(0)
        began = time.perf_counter()
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = loss_of(module(inputs), targets)
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - began) / steps * 1e6

    def engine(log_every: int | None) -> Callable[[], float]:
        def measure() -> float:
            with tempfile.TemporaryDirectory() as folder:
                run, tracking = training(model(), FixedBatches(data, steps + 1), Path(folder), log_every=log_every)
                marks: list[float] = []
                timed = run.batches.epoch

                def marked(epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
                    source = timed(epoch, start, step)
                    marks.append(time.perf_counter())
                    yield from source  # the epoch's end (a checkpoint) is not part of a step
                    marks.append(time.perf_counter())

                run.batches.epoch = marked
                with tracking, Interruption() as interruption:
                    run.fit(interruption)
                return (marks[1] - marks[0]) / (steps + 1) * 1e6

        return measure

    fused = functools.partial(by_hand, fused=True)
    candidates = {"by hand": by_hand, "by hand, fused": fused, "logging off": engine(None), "logging on": engine(50)}
    figures = interleave(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    over = {
        name: statistics.median(a - b for a, b in zip(figures[name], figures["by hand"], strict=True))
        for name in ("logging off", "logging on")
    }
    beyond = {
        name: statistics.median(a - b for a, b in zip(figures[name], figures["by hand, fused"], strict=True))
        for name in ("logging off", "logging on")
    }
    return {"microseconds_per_step": medians, "overhead_microseconds": over, "beyond_fused_microseconds": beyond}


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's datasets hold them: an array, made a PIL image and transformed one by one."""

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.inputs = inputs.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.inputs[index])), self.targets[index]


def resnet20() -> nn.Module:
    return experiment("model=resnet20").model.build(input_shape=(3, 32, 32), classes=10)  # type: ignore[no-any-return]


COUNT = 2560  # images of one measurement


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8))
    return inputs, torch.from_numpy(rng.integers(0, 10, COUNT))


@functools.cache
def loader() -> DataLoader[tuple[Tensor, int]]:
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
    data = Images(*images(), transform)
    return DataLoader(data, batch_size=128, shuffle=True, num_workers=2, persistent_workers=True)


def rate_by_hand() -> float:
    """Samples per second of the loop that one writes, with two threads."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    module, loss_of = resnet20(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    module.train()
    began = time.perf_counter()
    for x, y in loader():
        optimizer.zero_grad()
        loss = loss_of(module(x), y)
        loss.backward()
        optimizer.step()
    return COUNT / (time.perf_counter() - began)


def rate_of_dlopt(precision: str) -> float:
    """Samples per second of the engine, set up as `dlopt train` does."""
    set_threads(2)
    keep_freed_memory()
    torch.manual_seed(0)
    inputs, targets = images()
    config = experiment("augmentation=crop_flip")
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
        began = time.perf_counter()
        with tracking, Interruption() as interruption:
            run.fit(interruption)
        return COUNT / (time.perf_counter() - began)


def throughput(rounds: int) -> dict[str, Any]:
    """Each loop in a process of its own: dlopt tells the C library to keep memory, which would help the other too."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def apart(measure: Callable[..., float], *arguments: str) -> Callable[[], float]:
            process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            return lambda: process.submit(measure, *arguments).result()

        candidates = {
            "by hand": apart(rate_by_hand),
            "dlopt fp32": apart(rate_of_dlopt, "fp32"),
            "dlopt bf16": apart(rate_of_dlopt, "bf16"),
        }
        figures = interleave(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(figures[name], figures["by hand"], strict=True))
        for name in ("dlopt fp32", "dlopt bf16")
    }
    return {"samples_per_second": medians, "ratio": ratios}


class Waits(TorchDispatchMode):
    """Counts operations at which a host would wait for a device: reading a number, shapes that depend on values."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def synchronization(steps: int = 40) -> dict[str, Any]:
    """Waits within `steps` updates, as a GPU run has them (no check of each loss), before the first logging point."""
    data = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    if torch.cuda.is_available():
        return _synchronization_on_cuda(data, steps)
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        run, tracking = training(resnet20(), FixedBatches(data, steps), Path(folder), log_every=10**6, check_now=False)
        waits = Waits()
        counts: list[int] = []
        advance = tracking.advance

        def counting(step: int) -> None:
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
            for step, (x, y) in enumerate(batches.epoch(0)):
                torch.cuda.set_sync_debug_mode("warn" if step else "default")
                run.step.update(x, y, step, run.train_metrics)
                tracking.advance(step + 1)
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(each.message) for each in caught)
    return {"steps": steps, "waits": waits, "how": "torch.cuda.set_sync_debug_mode"}


def show(results: dict[str, Any]) -> None:
    table = Table(title=f"torch {torch.__version__}, medians")
    for name in ("measured", "figure", "goal"):
        table.add_column(name)
    if "overhead" in results:
        over = results["overhead"]["overhead_microseconds"]
        base = results["overhead"]["microseconds_per_step"]
        table.add_row("tiny MLP by hand", f"{base['by hand']:.0f} us a step", "")
        table.add_row("runner overhead, logging off", f"{over['logging off']:+.1f} us a step", "<= 20")
        table.add_row("runner overhead, logging on", f"{over['logging on']:+.1f} us a step", "<= 50")
        fused, beyond = base["by hand, fused"], results["overhead"]["beyond_fused_microseconds"]
        table.add_row("tiny MLP by hand, fused=True", f"{fused:.0f} us a step", "")
        table.add_row("beyond it, logging off / on", f"{beyond['logging off']:+.1f} / {beyond['logging on']:+.1f}", "")
    if "throughput" in results:
        rates, ratio = results["throughput"]["samples_per_second"], results["throughput"]["ratio"]
        table.add_row("ResNet-20, DataLoader loop fp32", f"{rates['by hand']:.0f} samples/s", "")
        for name, goal in (("dlopt fp32", ">= 1.5 x"), ("dlopt bf16", ">= 2.3 x")):
            table.add_row(f"ResNet-20, {name}", f"{rates[name]:.0f} samples/s ({ratio[name]:.2f} x)", goal)
    if "synchronization" in results:
        waits = results["synchronization"]
        table.add_row("host waits between logging points", f"{waits['waits']} in {waits['steps']} steps", "0")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="overhead,throughput,synchronization")
    options = parser.parse_args()
    wanted = options.only.split(",")
    results: dict[str, Any] = {}
    if "overhead" in wanted:
        results["overhead"] = overhead(options.rounds)
    if "throughput" in wanted:
        results["throughput"] = throughput(options.rounds)
    if "synchronization" in wanted:
        results["synchronization"] = synchronization()
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
