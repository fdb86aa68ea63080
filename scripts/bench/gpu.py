"""Benchmarks dlopt on a GPU against hand-written loops and published results. See gpu.sh.

    python scripts/bench/gpu.py [--data CIFAR] [--out FOLDER] [--minutes 8] [--runs 20] [--only a,b] [--airbench FILE]

Benchmarks, most important first; skips and reports those that, by their times on an H100, would not end before the
limit:

- card: bf16 throughput of an 8192 x 8192 matrix product, the reference for model utilization;
- step: ResNet-20, batch 128, flip and crop: samples per second and peak memory of dlopt (with CUDA graphs, without,
  compiled), of a hand-written loop with a DataLoader, and of one with the data on the device;
- recipe: `experiment=resnet20_cifar10`, 200 epochs, with the compiled model of `step`: time and error;
- peers: `peers.py --device cuda` with all installed trainers;
- speed: `experiment=cifar10_speed`: mean accuracy and time of --runs runs of one compiled model; one more run, split
  into set-up, captures of CUDA graphs, updates and evaluation; the fraction of an update spent on its batch; with
  --airbench FILE, also the published airbench94_muon.py on the same data;
- pure: the same with precision=bf16_pure and compile=max-autotune-no-cudagraphs;
- wide: ResNet-18 and WRN-28-10 at batch 512 and 128: utilization, time of 200 epochs, memory, data path.
"""

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dlopt.basics.interruption import Interruption
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.config.run_config import RunConfig
from dlopt.config.schema import Component
from dlopt.data.loading import materialize
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.machine.cuda_graphs import Recorder
from dlopt.optim.parameters import freeze
from dlopt.training.builders import speed
from dlopt.training.builders.workload import Workload, build_model, build_workload
from dlopt.training.evaluate import test_metrics
from dlopt.training.loop import Trainer
from dlopt.training.progress import Run, endless_batches
from dlopt.training.run import probe_trainer, train_run

Row = dict[str, Any]  # name, value, unit, goal


class Bench:
    """Device, data and size of the benchmarks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rehearse: bool = options.rehearse
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not self.rehearse:
            raise SystemExit("gpu.py: no CUDA device found; use --rehearse for a small run on a CPU")
        self.folder = Path(options.scratch)
        self.runs: int = 2 if self.rehearse else options.runs
        self.airbench: Path | None = options.airbench
        self.compiled = self.device.type == "cuda"
        self.dataset = generated_images() if self.rehearse else read(options.data, self.folder)
        self.rate = 0.0  # throughput of the card in FLOP/s

    def run_config(self, *overrides: str) -> RunConfig:
        """Builds an experiment on the in-memory data."""
        typed = [*overrides, f"device={self.device.type}"]
        if self.rehearse:
            typed += ["threads=2"]
        plain = to_plain(Composer().compose(typed), [])[0]
        run_config = parse(plain)
        data = self.dataset
        return dataclasses.replace(run_config, data=Component("data", lambda: data, {}))

    def training(self, *overrides: str) -> tuple[Workload, Trainer]:
        workload = build_workload(self.run_config(*overrides))
        return workload, probe_trainer(workload, self.folder)

    def wait(self) -> float:
        """Synchronizes with the device; returns the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_per_call(self, call: Callable[[], object], *, warm: int, calls: int) -> float:
        """Returns the median of three rounds, in seconds."""
        warm, rounds, calls = (1, 1, 1) if self.rehearse else (warm, 3, calls)
        for _ in range(warm):
            call()
        seconds = []
        for _ in range(rounds):
            start = self.wait()
            for _ in range(calls):
                call()
            seconds.append((self.wait() - start) / calls)
        return statistics.median(seconds)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[float]]:
        """Context that measures the peak allocated memory in GiB, as the only entry of the list."""
        gibibytes: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield gibibytes
        gibibytes.append(torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0)


def generated_images() -> Dataset:
    """Generates images of ten separable classes."""
    draws = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (10, 3, 32, 32), generator=draws)

    def samples(count: int) -> InMemory:
        targets = torch.randint(10, (count,), generator=draws)
        noisy = patterns[targets] + torch.randint(-60, 60, (count, 3, 32, 32), generator=draws)
        return InMemory(noisy.clamp(0, 255).to(torch.uint8), targets)

    return Dataset(samples(256), None, samples(64), tuple("abcdefghij"), in_memory=True)


def read(path: Path | None, scratch: Path) -> Dataset:
    """Reads CIFAR-10 into memory, from its Python batches or from images."""
    if path is None:
        raise SystemExit("gpu.py: --data CIFAR is required: the folder of CIFAR-10, or an archive of its images")
    if path.is_file():
        print(f"unpacking {path.name} ...")
        with tarfile.open(path) as archive:
            archive.extractall(scratch / "images", filter="data")
        path = scratch / "images"
    batches = any((folder / "data_batch_1").is_file() for folder in (path, path / "cifar-10-batches-py"))
    typed = ["data=cifar10", f"data.root={path}", "data.download=false"]
    if not batches:
        typed = ["data=image_folder", f"data.root={path}"]
    run_config = parse(to_plain(Composer().compose(typed), [])[0])
    dataset: Dataset = run_config.read_data()
    assert dataset.test is not None
    print("reading the images ...")
    return Dataset(loaded(dataset.train), None, loaded(dataset.test), dataset.classes, in_memory=True)


def loaded(samples: Samples | None) -> InMemory:
    """Reads all images into memory."""
    assert samples is not None
    images = materialize(samples)
    assert isinstance(images, InMemory)  # not a text
    return images


def updates(training: Trainer) -> Callable[[], None]:
    """Returns a function that makes the next update, with full batches only."""
    size = training.batches.batch_size  # type: ignore[attr-defined]
    source = (batch for batch in endless_batches(training.batches, training.progress) if len(batch.targets) == size)
    step = itertools.count()
    training.module.train()

    def update() -> None:
        training.update(next(source), next(step))

    return update


def card(bench: Bench) -> list[Row]:
    size = 256 if bench.rehearse else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.rate = 2 * size**3 / bench.seconds_per_call(lambda: a @ b, warm=10, calls=50)
    return [entry(f"matrix product {size} x {size}, bf16", bench.rate / 1e12, "TFLOP/s")]


def entry(name: str, value: float | None, unit: str, goal: str = "") -> Row:
    return {"name": name, "value": value, "unit": unit, "goal": goal}


STEP = ("model=resnet20", "augmentation=crop_flip", "precision=bf16", "data.batch_size=128", "data.val_split=0")


def step(bench: Bench) -> list[Row]:
    """Benchmarks loops on the same job one after the other, as they share the caches of cuDNN and the allocator."""
    kinds = {
        "dlopt": ("cuda_graphs=auto", "compile=false"),
        "dlopt, no CUDA graphs": ("cuda_graphs=false", "compile=false"),
        **({"dlopt, compiled": ("cuda_graphs=auto", "compile=true")} if bench.compiled else {}),
    }
    rates: dict[str, float] = {}
    memory: dict[str, float] = {}
    small = ("data.batch_size=16",) if bench.rehearse else ()
    for name, typed in kinds.items():
        with bench.peak() as peak:
            _, training = bench.training(*STEP, *typed, *small)
            size = training.batches.batch_size  # type: ignore[attr-defined]
            rates[name] = size / bench.seconds_per_call(updates(training), warm=30, calls=400)
        memory[name] = peak[0]
    for name, make in {"by hand, DataLoader": loader_loop, "by hand, data on the device": device_loop}.items():
        with bench.peak() as peak:
            size, call = make(bench)
            rates[name] = size / bench.seconds_per_call(call, warm=30, calls=200)
        memory[name] = peak[0]
    rows = [entry(f"ResNet-20, batch 128: {name}", rate, "samples/s") for name, rate in rates.items()]
    ratio = rates["dlopt"] / rates["by hand, DataLoader"]
    rows.append(entry("ResNet-20: dlopt over the DataLoader loop", ratio, "x", ">= 3"))
    ratio = rates["dlopt"] / rates["by hand, data on the device"]
    rows.append(entry("ResNet-20: dlopt over the loop with data on the device", ratio, "x"))
    rows += [entry(f"peak memory, ResNet-20: {name}", peak_memory, "GiB") for name, peak_memory in memory.items()]
    return rows


def plain_step(bench: Bench) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """Builds the update of a hand-written loop: SGD, bf16 autocast, channels-last."""
    model: nn.Module = bench.run_config("model=resnet20").model.build(input_shape=(3, 32, 32), classes=10)
    model = model.to(device=bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss_of = nn.CrossEntropyLoss()

    def update(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()

    return model, update


def loader_loop(bench: Bench) -> tuple[int, Callable[[], None]]:
    """Builds a loop with a DataLoader whose workers transform image by image."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]),
        ]
    )  # fmt: skip

    class Images(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, target = super().__getitem__(index)
            return transform(image), target

    train_set = loaded(bench.dataset.train)
    size = 16 if bench.rehearse else 128
    loader = DataLoader(
        Images(train_set.inputs, train_set.targets), batch_size=size, shuffle=True, drop_last=True,
        num_workers=0 if bench.rehearse else 8, persistent_workers=not bench.rehearse,
        pin_memory=bench.device.type == "cuda",
    )  # fmt: skip
    _, update = plain_step(bench)

    def all_epochs() -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield from loader

    source = all_epochs()

    def call() -> None:
        inputs, targets = next(source)
        inputs = inputs.to(bench.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        update(inputs, targets.to(bench.device, non_blocking=True))

    return size, call


def device_loop(bench: Bench) -> tuple[int, Callable[[], None]]:
    """Builds a minimal loop: all images on the device, one random shift and flip per batch."""
    train_set = loaded(bench.dataset.train)
    images, labels = train_set.inputs.to(bench.device), train_set.targets.to(bench.device)
    size = 16 if bench.rehearse else 128
    _, update = plain_step(bench)

    def call() -> None:
        indices = torch.randint(len(labels), (size,), device=bench.device)
        batch = nn.functional.pad(images[indices].float().sub_(122).div_(63), (4, 4, 4, 4))
        y, x, flip = torch.randint(0, 9, (3,)).tolist()
        batch = batch[:, :, y : y + 32, x : x + 32]
        batch = batch.flip(3) if flip % 2 else batch
        update(batch.contiguous(memory_format=torch.channels_last), labels[indices])

    return size, call


def initialize(bench: Bench, workload: Workload, run_config: RunConfig) -> float:
    """Gives the (compiled) model new initial weights, as in a new run; returns the seconds of the initialization."""
    seconds = 0.0
    function = run_config.init.target

    def timed(**arguments: Any) -> None:
        nonlocal seconds
        start = bench.wait()
        function(**arguments)
        seconds += bench.wait() - start

    timed.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    timed_init = dataclasses.replace(run_config, init=dataclasses.replace(run_config.init, target=timed))
    fresh = build_model(timed_init, workload.dataset, workload.normalize, workload.shape)
    workload.module.load_state_dict(fresh.state_dict())
    workload.module.requires_grad_(True)  # the schedule of the former run has frozen parameters
    freeze(workload.module, run_config.grouping)
    return seconds


def speed_runs(bench: Bench, name: str, *overrides: str) -> tuple[float, list[Row]]:
    """Times initialization, training and test like the published benchmark, without reading, moving the data to the
    device, and the compilation in the first run. All runs use one compiled model. Returns the mean and the rows."""
    typed = ["experiment=cifar10_speed", *overrides, "tracking=[]"]
    if bench.rehearse:
        typed += ["data.batch_size=64", "model.widths=[8,8,16]", "optimizer.rest_lr=0.5", "epochs=2"]
    first = bench.run_config(*typed, "seed=0")
    workload = build_workload(first)
    seconds, accuracies, training_seconds = [], [], []
    for number in range(bench.runs + 1):
        run_config = bench.run_config(*typed, f"seed={number}")
        workload = dataclasses.replace(workload, run_config=run_config)
        init_seconds = initialize(bench, workload, run_config)
        training = probe_trainer(workload, bench.folder / f"{name}{number}")
        start = bench.wait()
        training.fit(Interruption())  # not entered: signals end the script
        training_end = bench.wait()
        metrics = test_metrics(workload) or {}
        if number:  # the first run compiles
            seconds.append(init_seconds + bench.wait() - start)
            training_seconds.append(training_end - start)
            accuracies.append(metrics["test_accuracy"])
    mean = statistics.mean(seconds)
    rows = [
        entry(f"{name}, mean of {len(seconds)} runs", mean, "s", "published: 2.59 (A100)"),
        entry(f"{name}, training only", statistics.mean(training_seconds), "s"),
        entry(f"{name}, mean accuracy", 100 * statistics.mean(accuracies), "%", "published: 94.01"),
        entry(f"{name}, standard deviation of the accuracy", 100 * statistics.pstdev(accuracies), "%"),
    ]
    return mean, rows + split(bench, name, workload)


def split(bench: Bench, name: str, workload: Workload) -> list[Row]:
    """Splits the time of one more run into its parts. Synchronizes around each part, which the timed runs do not."""
    captures: list[float] = []
    updates: list[float] = []
    capture = Recorder.capture

    def timed_capture(recorder: Recorder, *arguments: Any) -> Any:
        start = bench.wait()
        captured = capture(recorder, *arguments)
        captures.append(bench.wait() - start)
        return captured

    with patch.object(Recorder, "capture", timed_capture):
        start = bench.wait()
        init_seconds = initialize(bench, workload, workload.run_config)
        training = probe_trainer(workload, bench.folder / f"{name} split")
        set_up = bench.wait() - start
        update = training.run_update

        def timed_update(*arguments: Any, **keys: Any) -> Any:
            start, captured = bench.wait(), sum(captures)
            record = update(*arguments, **keys)
            updates.append(bench.wait() - start - (sum(captures) - captured))
            return record

        training.run_update = timed_update
        start = bench.wait()
        training.fit(Interruption())  # not entered: signals end the script
        total = bench.wait() - start
        start = bench.wait()
        test_metrics(workload)
        evaluation = bench.wait() - start
    steady = statistics.median(updates)
    first = max(sum(updates) - steady * len(updates), 0.0)
    rest = max(total - sum(updates) - sum(captures), 0.0)
    return [
        entry(f"{name}, split: set-up", set_up, "s"),
        entry(f"{name}, split: initial weights (part of the set-up)", init_seconds, "s"),
        entry(f"{name}, split: CUDA graphs captured", len(captures), ""),
        *(entry(f"{name}, split: capture {n}", 1e3 * each, "ms") for n, each in enumerate(captures, 1)),
        entry(f"{name}, split: eager updates before captures, beyond {len(updates)} steady ones", first, "s"),
        entry(f"{name}, split: steady updates", steady * len(updates), "s"),
        entry(f"{name}, split: one steady update", 1e3 * steady, "ms"),
        entry(f"{name}, split: batches, epoch ends and checkpoint", rest, "s"),
        entry(f"{name}, split: evaluation", evaluation, "s"),
        data_path(bench, probe_trainer(workload, bench.folder / f"{name} data"), name, "<= 10"),
    ]


def speed_recipe(bench: Bench) -> list[Row]:
    ours, rows = speed_runs(bench, "speed recipe", "precision=bf16", f"compile={str(bench.compiled).lower()}")
    return rows + (published(bench, ours) if bench.airbench is not None else [])


def pure(bench: Bench) -> list[Row]:
    """As `speed_recipe`, with what airbench does: weights in half precision, and tuned kernels."""
    mode = "max-autotune-no-cudagraphs" if bench.compiled else "false"
    return speed_runs(bench, "speed recipe in bf16_pure", "precision=bf16_pure", f"compile={mode}")[1]


def published(bench: Bench, ours: float) -> list[Row]:
    """Runs the published file unchanged, except for its number of runs, on the same images."""
    assert bench.airbench is not None
    folder = bench.folder / "airbench"
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for name, split in (("train", bench.dataset.train), ("test", bench.dataset.test)):
        samples = loaded(split)
        content = {"images": samples.inputs.permute(0, 2, 3, 1).contiguous(), "labels": samples.targets}
        torch.save({**content, "classes": bench.dataset.classes}, folder / "cifar10" / f"{name}.pt")
    code = bench.airbench.read_text().replace("range(200)", f"range({bench.runs})")
    (folder / "airbench94_muon.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "airbench94_muon.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    lines = [line.split("|")[1:-1] for line in result.stdout.splitlines() if "eval" in line]
    if result.returncode or not lines:
        return [entry(f"airbench94_muon failed: {result.stderr.strip().splitlines()[-1:]}", None, "")]
    times = [float(line[-1]) for line in lines][-bench.runs :]
    accuracies = [float(line[-2]) for line in lines][-bench.runs :]
    mean = statistics.mean(times)
    return [
        entry(f"published airbench94_muon, mean of {len(times)} runs", mean, "s"),
        entry("published airbench94_muon, mean accuracy", 100 * statistics.mean(accuracies), "%"),
        entry("speed recipe, time relative to airbench94_muon", ours / mean, "x", "<= 1.02"),
    ]


WIDE = ("augmentation=crop_flip", "precision=bf16", "data.val_split=0", "log_every_steps=null")


def data_path(bench: Bench, training: Trainer, name: str, goal: str, update_seconds: float | None = None) -> Row:
    """Measures the fraction of an update that is spent on its batch. `update_seconds`: None: measured, too."""
    if update_seconds is None:
        update_seconds = bench.seconds_per_call(updates(training), warm=8, calls=20)
    source = endless_batches(training.batches, training.progress)
    fetch_seconds = bench.seconds_per_call(lambda: next(source), warm=8, calls=100)
    return entry(f"data path, fraction of an update of {name}", 100 * fetch_seconds / update_seconds, "%", goal)


def wide(bench: Bench) -> list[Row]:
    rows = [] if bench.rate else card(bench)
    jobs = {"ResNet-18": ("resnet18", 512, ">= 30"), "WRN-28-10": ("wrn_28_10", 128, ">= 40")}
    if bench.rehearse:
        jobs = {"ResNet-20": ("resnet20", 16, "")}
    for name, (model, size, goal) in jobs.items():
        keys = (f"model={model}", f"data.batch_size={size}", f"compile={str(bench.compiled).lower()}", *WIDE)
        with bench.peak() as peak:
            workload, training = bench.training(*keys)
            seconds = bench.seconds_per_call(updates(training), warm=10, calls=30)
        operations = 3 * speed.forward_flops(workload.module, (3, 32, 32)) * size
        rows += [
            entry(f"{name}, batch {size}: utilization of the card", 100 * operations / seconds / bench.rate, "%", goal),
            entry(f"{name}: 200 epochs of 50,000 images", 200 * 50_000 / size * seconds / 60, "min",
                "<= 17" if name == "WRN-28-10" else ""),
            entry(f"{name}: peak memory", peak[0], "GiB"),
        ]  # fmt: skip
        if model == "wrn_28_10":
            rows.append(data_path(bench, training, name, "<= 3", seconds))
    return rows


def recipe(bench: Bench) -> list[Row]:
    typed = ["experiment=resnet20_cifar10", "precision=bf16", "tracking=[]", "log_every_steps=null"]
    typed += [f"compile={str(bench.compiled).lower()}"]  # as in `step`, which has compiled it
    typed += ["evaluate.every_epochs=10", "checkpoint.every_epochs=50"]
    if bench.rehearse:
        typed += ["epochs=1", "data.batch_size=32"]
    folder = bench.folder / "recipe"
    folder.mkdir()
    start = bench.wait()
    summary = train_run(Run(bench.run_config(*typed), folder), Interruption(), console=False)
    return [
        entry("ResNet-20 recipe, 200 epochs including test", bench.wait() - start, "s", "<= 90"),
        entry("ResNet-20 recipe, error", 100 * (1 - summary["test_accuracy"]), "%", "published: 8.75"),
    ]


def peers(bench: Bench) -> list[Row]:
    script = Path(__file__).with_name("peers.py")
    result = bench.folder / "peers.json"
    command = [sys.executable, str(script), "--device", bench.device.type, "--json", str(result), "--rounds", "1"]
    command += ["--steps", "8", "--batch", "8", "--only", "by hand,dlopt"] if bench.rehearse else ["--steps", "200"]
    subprocess.run(command, check=True)
    results = json.loads(result.read_text())
    return [entry(f"peers: {name}", rate, "samples/s") for name, rate in results["samples_per_second"].items()]


BENCHMARKS: dict[str, Callable[[Bench], list[Row]]] = {
    "card": card, "step": step, "recipe": recipe, "peers": peers, "speed": speed_recipe, "pure": pure, "wide": wide,
}  # fmt: skip
# On an H100; a benchmark starts only if it would end before the time limit.
SECONDS = {"card": 5, "step": 50, "recipe": 140, "peers": 50, "speed": 110, "pure": 70, "wide": 55}


def show(rows: list[Row]) -> None:
    width = max(len(entry["name"]) for entry in rows)
    for entry in rows:
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        print(f"{entry['name']:{width}}  {value:>12} {entry['unit']:10} {entry['goal']}")


def draw(rows: list[Row], path: Path) -> None:
    """Plots the samples per second of the loops."""
    from matplotlib.figure import Figure

    rates = [entry for entry in rows if entry["unit"] == "samples/s"]
    if not rates:
        return
    figure = Figure(figsize=(8, 0.5 * len(rates) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([entry["name"] for entry in rates][::-1], [entry["value"] for entry in rates][::-1], color="#0072B2")
    axes.set_xlabel("samples per second")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default=",".join(BENCHMARKS))
    parser.add_argument("--airbench", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    selected = options.only.split(",")
    if unknown := set(selected) - set(BENCHMARKS):
        parser.error(f"--only {','.join(sorted(unknown))}: unknown; allowed: {','.join(BENCHMARKS)}")
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    about = {"torch": torch.__version__, "device": "cpu", "command": " ".join(sys.argv), "rows": rows}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name(0)
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = scratch
        bench = Bench(options)
        for name in [name for name in BENCHMARKS if name in selected]:
            elapsed = time.monotonic() - start
            if elapsed + SECONDS[name] > 60 * options.minutes and not options.rehearse:
                print(f"{name}: skipped after {elapsed / 60:.1f} minutes: takes about {SECONDS[name]} s; see --minutes")
                continue
            try:
                results = BENCHMARKS[name](bench)
            except Exception as error:  # a failed benchmark does not affect the others
                if options.rehearse:
                    raise
                results = [entry(f"{name}: failed: {type(error).__name__}: {str(error)[:200]}", None, "")]
            rows += results
            show(results)
            print(f"({name}: {time.monotonic() - start - elapsed:.0f} s)")
            (options.out / "gpu.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(rows, options.out / "gpu.png")
    print(f"\n{about['device']}, torch {torch.__version__}")
    show(rows)


if __name__ == "__main__":
    main()
