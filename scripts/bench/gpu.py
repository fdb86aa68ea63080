"""What a GPU run of dlopt takes, against loops written by hand and against published figures. See gpu.sh.

    python scripts/bench/gpu.py [--data CIFAR] [--out FOLDER] [--minutes 10] [--runs 50] [--only a,b] [--airbench FILE]

Parts, the most telling first; one that would begin behind the time limit is left out and named:

- card: the bf16 rate of a matrix product of 8192 x 8192, against which the nets' rates are given;
- step: ResNet-20, batch 128, flip and crop: samples per second and peak memory of dlopt (recorded updates; without;
  compiled), of a hand-written loop with a DataLoader, and of one whose data lie on the device;
- speed: `experiment=cifar10_speed`: mean accuracy and time of --runs runs, and where --airbench names the file of the
  published airbench94_muon.py, that on the same data;
- data: the data path's share of an update, for the speed recipe and for WRN-28-10;
- wide: ResNet-18 and WRN-28-10 at batch 512 and 128: their share of the card's rate, time of 200 epochs, memory;
- recipe: `experiment=resnet20_cifar10`, 200 epochs: time and error;
- peers: `peers.py --device cuda` with whatever is installed.
"""

import argparse
import contextlib
import dataclasses
import inspect
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

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dlopt.config.compose import Composer, to_plain
from dlopt.config.experiment import Experiment
from dlopt.config.parsing import parse
from dlopt.config.schema import Component
from dlopt.data.loading import materialize
from dlopt.data.samples import Dataset, InMemory
from dlopt.interruption import Interruption
from dlopt.training import speed
from dlopt.training.build import Workload, build_workload
from dlopt.training.evaluate import test_metrics
from dlopt.training.trainer import Run, Trainer, dry_run, train

Row = dict[str, Any]  # what, figure, unit, goal


class Bench:
    """The device, the data, and how much of everything is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rehearse: bool = options.rehearse
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not self.rehearse:
            raise SystemExit("gpu.py: there is no CUDA device here; --rehearse runs it in small on a CPU")
        self.folder = Path(options.scratch)
        self.runs: int = 2 if self.rehearse else options.runs
        self.airbench: Path | None = options.airbench
        self.compiled = self.device.type == "cuda"
        self.dataset = generated() if self.rehearse else read(options.data, self.folder)
        self.rate = 0.0  # of the card, in operations per second

    def experiment(self, *overrides: str) -> Experiment:
        """With the data in memory, and in small where it is a rehearsal."""
        typed = [*overrides, f"device={self.device.type}"]
        if self.rehearse:
            typed += ["threads=2"]
        plain = to_plain(Composer().compose(typed), [])[0]
        made = parse(plain)
        data = self.dataset
        return dataclasses.replace(made, data=Component("data", lambda: data, {}))

    def training(self, *overrides: str) -> tuple[Workload, Trainer]:
        workload = build_workload(self.experiment(*overrides))
        return workload, dry_run(workload, self.folder)

    def wait(self) -> float:
        """Now, with all work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_per_call(self, call: Callable[[], object], *, warm: int, calls: int) -> float:
        """The median of three rounds."""
        for _ in range(1 if self.rehearse else warm):
            call()
        found = []
        for _ in range(1 if self.rehearse else 3):
            began = self.wait()
            for _ in range(1 if self.rehearse else calls):
                call()
            found.append((self.wait() - began) / (1 if self.rehearse else calls))
        return statistics.median(found)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[float]]:
        """GiB that were allocated at most within, as the one entry of the list."""
        found: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield found
        found.append(torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0)


def generated() -> Dataset:
    """Images of ten classes that can be told apart."""
    draws = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (10, 3, 32, 32), generator=draws)

    def part(count: int) -> InMemory:
        targets = torch.randint(10, (count,), generator=draws)
        noisy = patterns[targets] + torch.randint(-60, 60, (count, 3, 32, 32), generator=draws)
        return InMemory(noisy.clamp(0, 255).to(torch.uint8), targets)

    return Dataset(part(256), None, part(64), tuple("abcdefghij"), in_memory=True)


def read(path: Path | None, scratch: Path) -> Dataset:
    """CIFAR-10 in memory, from its Python batches or from images."""
    if path is None:
        raise SystemExit("gpu.py: --data CIFAR is needed: the folder of CIFAR-10, or an archive of its images")
    if path.is_file():
        print(f"unpacking {path.name} ...")
        with tarfile.open(path) as archive:
            archive.extractall(scratch / "images", filter="data")
        path = scratch / "images"
    batches = any((each / "data_batch_1").is_file() for each in (path, path / "cifar-10-batches-py"))
    typed = ["data=cifar10", f"data.root={path}", "data.download=false"]
    if not batches:
        typed = ["data=image_folder", f"data.root={path}"]
    made = parse(to_plain(Composer().compose(typed), [])[0])
    found: Dataset = made.data.build(**vars(made.data_settings))
    assert found.test is not None
    print("reading the images ...")
    return Dataset(materialize(found.train), None, materialize(found.test), found.classes, in_memory=True)


def updates(training: Trainer) -> Callable[[], None]:
    """A function that makes the next update, of a full batch."""

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = step = 0
        while True:
            for inputs, targets in training.batches.epoch(epoch, 0, step):
                step += 1
                if len(targets) == training.batches.batch_size:  # type: ignore[attr-defined]
                    yield inputs, targets
            epoch += 1

    source, step = endless(), iter(range(10**9))
    training.module.train()

    def update() -> None:
        inputs, targets = next(source)
        training.step.update(inputs, targets, next(step), training.sums)

    return update


def card(bench: Bench) -> list[Row]:
    size = 256 if bench.rehearse else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.rate = 2 * size**3 / bench.seconds_per_call(lambda: a @ b, warm=10, calls=50)
    return [row(f"matrix product {size} x {size}, bf16", bench.rate / 1e12, "TFLOP/s")]


def row(what: str, figure: float | None, unit: str, goal: str = "") -> Row:
    return {"what": what, "figure": figure, "unit": unit, "goal": goal}


STEP = ("model=resnet20", "augmentation=crop_flip", "precision=bf16", "data.batch_size=128", "data.val_split=0")


def step(bench: Bench) -> list[Row]:
    """Loops over the same job, each by itself: they would share the caches of cuDNN and of the allocator anyway."""
    kinds = {
        "dlopt": ("cuda_graphs=auto", "compile=false"),
        "dlopt, not recorded": ("cuda_graphs=false", "compile=false"),
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
    rows = [row(f"ResNet-20, batch 128: {name}", rate, "samples/s") for name, rate in rates.items()]
    ratio = rates["dlopt"] / rates["by hand, DataLoader"]
    rows.append(row("ResNet-20: dlopt against the DataLoader loop", ratio, "x", ">= 3"))
    ratio = rates["dlopt"] / rates["by hand, data on the device"]
    rows.append(row("ResNet-20: dlopt against the loop with data on the device", ratio, "x"))
    rows += [row(f"peak memory, ResNet-20: {name}", peak_memory, "GiB") for name, peak_memory in memory.items()]
    return rows


def plain_step(bench: Bench) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """What one writes: a model, SGD, bf16 autocast, channels-last."""
    model: nn.Module = bench.experiment("model=resnet20").model.build(input_shape=(3, 32, 32), classes=10)
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
    """A DataLoader whose workers transform image by image."""
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

    train_set = materialize(bench.dataset.train)
    size = 16 if bench.rehearse else 128
    loader = DataLoader(
        Images(train_set.inputs, train_set.targets), batch_size=size, shuffle=True, drop_last=True,
        num_workers=0 if bench.rehearse else 8, persistent_workers=not bench.rehearse,
        pin_memory=bench.device.type == "cuda",
    )  # fmt: skip
    _, update = plain_step(bench)

    def endless() -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield from loader

    source = endless()

    def call() -> None:
        inputs, targets = next(source)
        inputs = inputs.to(bench.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        update(inputs, targets.to(bench.device, non_blocking=True))

    return size, call


def device_loop(bench: Bench) -> tuple[int, Callable[[], None]]:
    """All images on the device, one random shift and flip for each batch: the least that a loop can do."""
    train_set = materialize(bench.dataset.train)
    images, labels = train_set.inputs.to(bench.device), train_set.targets.to(bench.device)
    size = 16 if bench.rehearse else 128
    _, update = plain_step(bench)

    def call() -> None:
        own = torch.randint(len(labels), (size,), device=bench.device)
        batch = nn.functional.pad(images[own].float().sub_(122).div_(63), (4, 4, 4, 4))
        y, x, flip = torch.randint(0, 9, (3,)).tolist()
        batch = batch[:, :, y : y + 32, x : x + 32]
        batch = batch.flip(3) if flip % 2 else batch
        update(batch.contiguous(memory_format=torch.channels_last), labels[own])

    return size, call


def speed_recipe(bench: Bench) -> list[Row]:
    """The timer runs over initialization, training and test, as the published one's does; reading, moving the data to
    the device, and what the first run compiles, are outside."""
    typed = ["experiment=cifar10_speed", "precision=bf16", f"compile={str(bench.compiled).lower()}", "tracking=[]"]
    if bench.rehearse:
        typed += ["data.batch_size=64", "model.widths=[8,8,16]", "optimizer.rest_lr=0.5", "epochs=2"]
    seconds, accuracies, training_seconds = [], [], []
    for number in range(bench.runs + 1):
        made = bench.experiment(*typed, f"seed={number}")
        spent = [0.0]
        built = made.init.target

        def timed(built: Any = built, spent: list[float] = spent, **arguments: Any) -> None:
            began = bench.wait()
            built(**arguments)
            spent[0] += bench.wait() - began

        timed.__signature__ = inspect.signature(built)  # type: ignore[attr-defined]
        workload = build_workload(dataclasses.replace(made, init=dataclasses.replace(made.init, target=timed)))
        training = dry_run(workload, bench.folder / f"speed{number}")
        began = bench.wait()
        with Interruption() as interruption:
            training.fit(interruption)
        trained = bench.wait()
        figures = test_metrics(workload)
        if number:  # the first run compiles
            seconds.append(spent[0] + bench.wait() - began)
            training_seconds.append(trained - began)
            accuracies.append(figures["test_accuracy"])
    rows = [
        row(f"speed recipe, mean of {len(seconds)} runs", statistics.mean(seconds), "s", "published: 2.59 on an A100"),
        row("speed recipe, its training alone", statistics.mean(training_seconds), "s"),
        row("speed recipe, mean accuracy", 100 * statistics.mean(accuracies), "%", "published: 94.01"),
        row("speed recipe, standard deviation of the accuracy", 100 * statistics.pstdev(accuracies), "%"),
    ]
    return rows + (published(bench, statistics.mean(seconds)) if bench.airbench is not None else [])


def published(bench: Bench, ours: float) -> list[Row]:
    """The published file as it is, but for its number of runs, on the same images."""
    assert bench.airbench is not None
    folder = bench.folder / "airbench"
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", bench.dataset.train), ("test", bench.dataset.test)):
        samples = materialize(part)  # type: ignore[arg-type]
        content = {"images": samples.inputs.permute(0, 2, 3, 1).contiguous(), "labels": samples.targets}
        torch.save({**content, "classes": bench.dataset.classes}, folder / "cifar10" / f"{name}.pt")
    code = bench.airbench.read_text().replace("range(200)", f"range({bench.runs})")
    (folder / "airbench94_muon.py").write_text(code)
    told = subprocess.run(
        [sys.executable, "airbench94_muon.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    lines = [line.split("|")[1:-1] for line in told.stdout.splitlines() if "eval" in line]
    if told.returncode or not lines:
        return [row(f"published file failed: {told.stderr.strip().splitlines()[-1:]}", None, "")]
    times = [float(line[-1]) for line in lines][-bench.runs :]
    accuracies = [float(line[-2]) for line in lines][-bench.runs :]
    mean = statistics.mean(times)
    return [
        row(f"published airbench94_muon, mean of {len(times)} runs", mean, "s"),
        row("published airbench94_muon, mean accuracy", 100 * statistics.mean(accuracies), "%"),
        row("speed recipe's time against it", ours / mean, "x", "<= 1.02"),
    ]


WIDE = ("augmentation=crop_flip", "precision=bf16", "data.val_split=0", "log_every_steps=null")


def data_path(bench: Bench) -> list[Row]:
    rows = []
    small = ("data.batch_size=64", "model.widths=[8,8,16]") if bench.rehearse else ()
    jobs = {"the speed recipe": (("experiment=cifar10_speed", "precision=bf16", *small), "<= 10")}
    if not bench.rehearse:
        jobs["WRN-28-10"] = (("model=wrn_28_10", "data.batch_size=128", *WIDE), "<= 3")
    for name, (typed, goal) in jobs.items():
        _, training = bench.training(*typed)
        whole = bench.seconds_per_call(updates(training), warm=8, calls=20)

        def endless(training: Trainer = training) -> Iterator[Any]:
            epoch = 0
            while True:
                yield from training.batches.epoch(epoch)
                epoch += 1

        source = endless()
        alone = bench.seconds_per_call(lambda source=source: next(source), warm=8, calls=100)  # type: ignore[misc]
        rows.append(row(f"data path, share of an update of {name}", 100 * alone / whole, "%", goal))
    return rows


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
        operations = 3 * speed.forward_operations(workload.module, (3, 32, 32)) * size
        rows += [
            row(f"{name}, batch {size}: share of the card's rate", 100 * operations / seconds / bench.rate, "%", goal),
            row(f"{name}: 200 epochs of 50,000 images", 200 * 50_000 / size * seconds / 60, "min",
                "<= 17" if name == "WRN-28-10" else ""),
            row(f"{name}: peak memory", peak[0], "GiB"),
        ]  # fmt: skip
    return rows


def recipe(bench: Bench) -> list[Row]:
    typed = ["experiment=resnet20_cifar10", "precision=bf16", "compile=false", "tracking=[]", "log_every_steps=null"]
    typed += ["evaluate.every_epochs=10", "checkpoint.every_epochs=50"]
    if bench.rehearse:
        typed += ["epochs=1", "data.batch_size=32"]
    folder = bench.folder / "recipe"
    folder.mkdir()
    began = bench.wait()
    summary = train(Run(bench.experiment(*typed), folder), console=False)
    return [
        row("ResNet-20 recipe, 200 epochs, test included", bench.wait() - began, "s", "<= 90"),
        row("ResNet-20 recipe, error", 100 * (1 - summary["test_accuracy"]), "%", "published: 8.75"),
    ]


def peers(bench: Bench) -> list[Row]:
    script = Path(__file__).with_name("peers.py")
    result = bench.folder / "peers.json"
    command = [sys.executable, str(script), "--device", bench.device.type, "--json", str(result), "--rounds", "2"]
    command += ["--steps", "8", "--batch", "8", "--only", "by hand,dlopt"] if bench.rehearse else ["--steps", "200"]
    subprocess.run(command, check=True)
    found = json.loads(result.read_text())
    return [row(f"peers: {name}", rate, "samples/s") for name, rate in found["samples_per_second"].items()]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "card": card, "step": step, "speed": speed_recipe, "data": data_path, "wide": wide, "recipe": recipe,
    "peers": peers,
}  # fmt: skip


def show(rows: list[Row]) -> None:
    width = max(len(each["what"]) for each in rows)
    for each in rows:
        figure = "-" if each["figure"] is None else f"{each['figure']:.4g}"
        print(f"{each['what']:{width}}  {figure:>12} {each['unit']:10} {each['goal']}")


def draw(rows: list[Row], path: Path) -> None:
    """Samples per second of the loops."""
    from matplotlib.figure import Figure

    rates = [each for each in rows if each["unit"] == "samples/s"]
    if not rates:
        return
    figure = Figure(figsize=(8, 0.5 * len(rates) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([each["what"] for each in rates][::-1], [each["figure"] for each in rates][::-1], color="#0072B2")
    axes.set_xlabel("samples per second")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--airbench", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: the parts are {','.join(PARTS)}")
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    about = {"torch": torch.__version__, "device": "cpu", "command": " ".join(sys.argv), "rows": rows}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name(0)
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = scratch
        bench = Bench(options)
        for name in [each for each in PARTS if each in wanted]:
            spent = time.monotonic() - began
            if spent > 60 * options.minutes * 0.9:
                print(f"{name}: left out, {spent / 60:.1f} minutes are over")
                continue
            try:
                found = PARTS[name](bench)
            except Exception as error:  # one part less, and the others are still measured
                if options.rehearse:
                    raise
                found = [row(f"{name}: failed: {type(error).__name__}: {str(error)[:200]}", None, "")]
            rows += found
            show(found)
            print(f"({name}: {time.monotonic() - began - spent:.0f} s)")
            (options.out / "gpu.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(rows, options.out / "gpu.png")
    print(f"\n{about['device']}, torch {torch.__version__}")
    show(rows)


if __name__ == "__main__":
    main()
