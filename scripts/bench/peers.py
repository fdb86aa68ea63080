"""Benchmarks the same training job with dlopt, a hand-written loop and other trainers, in samples per second.

    python scripts/bench/peers.py [--venvs FOLDER] [--rounds 3] [--steps 40] [--json FILE] [--plot FILE]

The job: ResNet-20, batch 128, 32x32 images in memory, flip and pad-4 crop, SGD with momentum, two threads, two loader
workers. All trainers except dlopt use a DataLoader with torchvision's transforms, image by image; timm uses its loader.

Lightning, Composer and timm are used through their public APIs, each in its own virtual environment under FOLDER, which
is created on first use and shares this environment's torch. timm's package has no train script; its loader, optimizer
and a plain loop replace it. Reports trainers that cannot be installed with the reason. Each candidate is one process
for all rounds; candidates take turns. The first round is a warm-up; medians are compared.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

WARM = 5  # warm-up steps of each measurement
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]

# Requirements of each trainer without torch: their pins would install another version of torch.
PACKAGES = {
    "lightning": ["lightning"],
    "composer": [
        "mosaicml==0.32.1", "mosaicml-cli==0.7.5", "gql==3.5.3", "graphql-core==3.2.6", "websockets==11.0.3",
        "argcomplete", "arrow", "backoff", "coolname", "pytorch-ranger", "torch-optimizer", "torchmetrics",
        "lightning-utilities", "tabulate", "tenacity", "termcolor", "py-cpuinfo", "questionary", "prompt-toolkit",
        "ruamel.yaml", "validators", "psutil",
    ],
    "timm": ["timm"],
}  # fmt: skip
PIP_OPTIONS = {"composer": ["--no-deps"]}


class Job:
    """The job of a worker, and the timer that its steps advance."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.precision: str = options.precision
        self.steps: int = options.steps
        self.batch: int = options.batch
        self.start_time = self.end_time = 0.0
        self.count = 0

    def count_step(self, *_: Any) -> None:
        """Counts a step; must be called once per step, always at the same point of it."""
        self.count += 1
        if self.count in (WARM + 1, self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.start_time, self.end_time = self.end_time, time.perf_counter()

    def rate(self) -> float:
        """Returns the samples per second from step WARM + 1 to the last, and resets the timer."""
        if self.count < self.steps:
            raise RuntimeError(f"made only {self.count} of {self.steps} steps")
        rate = (self.steps - WARM - 1) * self.batch / (self.end_time - self.start_time)
        self.count = 0
        return rate

    @functools.cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(0)
        count = min(self.steps * self.batch, 12_800)
        inputs = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=draws)
        return inputs, torch.randint(10, (count,), generator=draws)

    def fresh_loader(self) -> DataLoader[Any]:
        """Builds a typical DataLoader: PIL images, two persistent workers."""
        from torchvision.transforms import v2

        transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
            ]
        )  # fmt: skip
        return DataLoader(
            PILImages(*self.images, transform), batch_size=self.batch, shuffle=True, drop_last=True, num_workers=2,
            persistent_workers=True, pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    @functools.cached_property
    def loader(self) -> DataLoader[Any]:
        return self.fresh_loader()

    def all_epochs(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def model(self) -> nn.Module:
        model = ResNet20()
        model.register_forward_pre_hook(lambda *_: self.count_step() if model.training else None)
        return model


class PILImages(Dataset[tuple[Any, int]]):
    """In-memory images like torchvision's datasets: converts each to a PIL image and transforms it."""

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Any], Any] | None = None) -> None:
        self.inputs = inputs.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self.inputs[index])
        return image if self.transform is None else self.transform(image), self.targets[index]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.extra = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra)) if self.extra else x
        return F.relu(y + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 (He et al. 2016, section 4.2) with option A shortcuts: the same model as `model=resnet20`."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def by_hand(job: Job) -> Callable[[], None]:
    def run() -> None:
        model = job.model().to(job.device).train()
        optimizer, loss_of = sgd(model), nn.CrossEntropyLoss()
        for _, (x, y) in zip(range(job.steps), job.all_epochs(), strict=False):
            x, y = x.to(job.device, non_blocking=True), y.to(job.device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
                loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()

    return run


def dlopt(job: Job) -> Callable[[], None]:
    """Runs dlopt's trainer as `dlopt train` builds it, with logging, on the job's images."""
    import dataclasses

    from dlopt.basics.interruption import Interruption
    from dlopt.config.compose import Composer
    from dlopt.config.parsing import parse
    from dlopt.config.resolve import to_plain
    from dlopt.config.schema import Component
    from dlopt.data.samples import Dataset as Samples
    from dlopt.data.samples import InMemory
    from dlopt.training.builders.trainer import probe_trainer
    from dlopt.training.builders.workload import build_workload

    typed = [
        "model=resnet20", "augmentation=crop_flip", f"precision={job.precision}", f"data.batch_size={job.batch}",
        f"steps={job.steps}", f"device={job.device.type}", "threads=2", "data.val_split=0", "data.drop_last=true",
        "optimizer.lr=0.01", "optimizer.weight_decay=1e-4",
    ]  # fmt: skip
    data = Samples(InMemory(*job.images), None, None, tuple("0123456789"), in_memory=True)
    run_config = parse(to_plain(Composer(words=typed).compose(typed))[0])
    run_config = dataclasses.replace(run_config, data=Component("data", lambda: data, {}))

    def run() -> None:
        workload = build_workload(run_config)
        with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
            training = probe_trainer(workload, Path(folder))
            training.tracking.advance = job.count_step  # type: ignore[method-assign, assignment]
            training.fit(interruption)

    return run


def lightning(job: Job) -> Callable[[], None]:
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    def run() -> None:
        trainer = L.Trainer(
            max_steps=job.steps, accelerator="gpu" if job.device.type == "cuda" else "cpu", devices=1, logger=False,
            precision="bf16-mixed" if job.precision == "bf16" else "32-true", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), job.loader)

    return run


def composer(job: Job) -> Callable[[], None]:
    from composer import Trainer
    from composer.models import ComposerClassifier

    def run() -> None:
        model = job.model()
        trainer = Trainer(
            model=ComposerClassifier(model, num_classes=10), train_dataloader=job.fresh_loader(), optimizers=sgd(model),
            max_duration=f"{job.steps}ba", device="gpu" if job.device.type == "cuda" else "cpu",
            precision="amp_bf16" if job.precision == "bf16" else "fp32", progress_bar=False,
        )  # fmt: skip
        trainer.fit()
        trainer.close()

    return run


def timm(job: Job) -> Callable[[], None]:
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    on_gpu = job.device.type == "cuda"
    images: Any = PILImages(*job.images)  # any dataset will do, whatever the annotation says
    unchanged: Any = None
    loader = create_loader(
        images, input_size=(3, 32, 32), batch_size=job.batch, is_training=True, use_prefetcher=on_gpu,
        hflip=0.5, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=unchanged, interpolation="bilinear",
        mean=tuple(MEAN), std=tuple(STD), num_workers=2, persistent_workers=True, pin_memory=on_gpu, device=job.device,
    )  # fmt: skip

    def all_epochs() -> Iterator[Any]:
        while True:
            yield from loader

    def run() -> None:
        model = job.model().to(job.device).train()
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
        losses, loss_of = AverageMeter(), nn.CrossEntropyLoss()
        for number, (x, y) in zip(range(job.steps), all_epochs(), strict=False):
            with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
                loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % 50 == 0:
                losses.update(loss.item(), len(y))

    return run


WORKERS: dict[str, Callable[[Job], Callable[[], None]]] = {
    "by hand": by_hand, "dlopt": dlopt, "lightning": lightning, "timm": timm, "composer": composer,
}  # fmt: skip


def serve_measurements(options: argparse.Namespace) -> None:
    """Worker process: makes a measurement for each line on stdin and answers with a line of JSON."""
    torch.set_num_threads(2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect what trainers print to stderr
    job = Job(options)
    run = WORKERS[options.worker](job)
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        torch.manual_seed(0)
        run()
        answers.write(json.dumps(job.rate()) + "\n")
        answers.flush()


class Candidate:
    """A worker process. Raises `RuntimeError` with the last line of stderr if it fails."""

    def __init__(self, python: str, name: str, precision: str, options: argparse.Namespace) -> None:
        keys = {"worker": name, "precision": precision, "device": options.device, "steps": options.steps}
        words = [f"--{key}={value}" for key, value in {**keys, "batch": options.batch}.items()]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [python, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        self._answer()

    def measure(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.stderr.seek(0)
            lines = [entry for entry in self.stderr.read().splitlines() if entry.strip()]
            raise RuntimeError(lines[-1] if lines else "exited without a message")
        return line

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def python_of(name: str, venvs: Path | None) -> str:
    """Returns the interpreter of a trainer; installs the trainer if `venvs` is given. Raises `RuntimeError`."""
    if name not in PACKAGES or venvs is None:
        return sys.executable
    folder = venvs / name
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        print(f"installing {name} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # share this environment's torch
        command = [str(python), "-m", "pip", "install", "-q", *PIP_OPTIONS.get(name, []), *PACKAGES[name]]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"installation failed: {result.stderr.strip().splitlines()[-1]}")
        (folder / "done").touch()
    return str(python)


def draw(rates: dict[str, float], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.45 * len(rates) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = sorted(rates, key=lambda name: rates[name])
    colours = ["#D55E00" if name.startswith("dlopt") else "#0072B2" for name in names]
    axes.barh(names, [rates[name] for name in names], color=colours)
    for position, name in enumerate(names):
        axes.text(rates[name], position, f" {rates[name]:.0f}", va="center")
    axes.margins(x=0.12)
    axes.set_xlabel("samples per second")
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    candidates: dict[str, Candidate] = {}
    missing: dict[str, str] = {}
    for name in options.only.split(","):
        for precision in options.precisions.split(","):
            label = f"{name} {precision}"
            try:
                candidates[label] = Candidate(python_of(name, options.venvs), name, precision, options)
            except RuntimeError as error:
                missing[label] = str(error)
    measured: dict[str, list[float]] = {label: [] for label in candidates}
    for round_number in range(options.rounds + 1):
        for label, candidate in candidates.items():
            if label in missing:
                continue
            try:
                rate = candidate.measure()
            except RuntimeError as error:
                missing[label] = str(error)
                continue
            print(f"round {round_number}: {label}: {rate:.0f}", flush=True)
            if round_number:
                measured[label].append(rate)
    for candidate in candidates.values():
        candidate.end()
    medians = {label: statistics.median(rates) for label, rates in measured.items() if rates and label not in missing}
    base = measured.get("by hand fp32", [])
    ratios = {
        label: statistics.median(a / b for a, b in zip(measured[label], base, strict=True)) for label in medians if base
    }
    return {"samples_per_second": medians, "ratio": ratios, "missing": missing, "rounds": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="folder of the trainers' virtual environments (default: this one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", default=",".join(WORKERS))
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < WARM + 2:
        parser.error(f"--steps {options.steps}: must be >= {WARM + 2} (the first {WARM} are warm-up)")
    if options.worker is not None:
        serve_measurements(options)
        return
    results = compare(options)
    rates, ratios = results["samples_per_second"], results["ratio"]
    print(f"\nResNet-20, batch {options.batch}, {options.device}, torch {torch.__version__}, medians\n")
    for label, rate in sorted(rates.items(), key=lambda item: -item[1]):
        ratio_text = f"{ratios[label]:6.2f} x by hand fp32" if label in ratios else ""
        print(f"{label:18} {rate:10.0f} samples/s {ratio_text}")
    for label, reason in results["missing"].items():
        print(f"{label:18} {reason}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot is not None:
        draw(rates, options.plot, f"ResNet-20, batch {options.batch}, {options.device}")


if __name__ == "__main__":
    main()
