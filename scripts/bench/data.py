"""Reading a large image folder: speed against torchvision's pipeline, start-up, memory, waiting for data.

    python scripts/bench/data.py [--root FOLDER] [--images 20000] [--workers 2] [--rounds 3] [--json FILE]

Without --root, JPEGs of mixed sizes are generated (a few hundred, hard-linked under many names) and removed again.

1. Seconds of the first scan, of a start with the scan in the cache, and from there to the first batch.
2. Images per second and per worker, and against torchvision's ImageFolder, v2 transforms and DataLoader, which bring
   the same files to the same size. They take turns within every round; the ratio is the median over the rounds.
3. Memory of the main process and of the workers, in MiB that they share with no other process, at the first batch and
   after --memory-images more images.
4. The share of a training step (ResNet-18 on the device, augmented and normalized batches) spent waiting for data.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from dlopt.augment import HorizontalFlip, Pipeline, RandomScaleCrop
from dlopt.data.batches import Batches, Delivery
from dlopt.data.folder import image_folder
from dlopt.data.loading import Loader
from dlopt.data.normalization import Standardize
from dlopt.data.samplers import Random
from dlopt.data.samples import Samples

REAL = 300  # distinct images
CLASSES = 100


def generate(folder: Path, images: int) -> None:
    """Textured JPEGs with sides between 200 and 700 pixels, some 90 KB each, as photographs have."""
    draw = np.random.default_rng(0)
    real = [folder / "real" / f"{number}.jpg" for number in range(REAL)]
    real[0].parent.mkdir()
    for path in real:
        height, width = (int(side) for side in draw.integers(200, 700, 2))
        coarse = Image.fromarray(draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + draw.normal(0, 8, (height, width, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    for label in range(CLASSES):
        (folder / "train" / f"class{label:03d}").mkdir(parents=True)
    for number in range(images):
        name = folder / "train" / f"class{number % CLASSES:03d}" / f"{number:07d}.JPEG"
        os.link(real[number % REAL], name)
    time.sleep(4)  # a folder that has just changed is not kept in the cache


def load(root: Path, size: int) -> tuple[Samples, float]:
    begun = time.perf_counter()
    data = image_folder(root=str(root), channels=3, on_error="fail", max_skips=0, image_size=size)
    return data.train, time.perf_counter() - begun


def private_mib(process: int) -> float:
    """Memory that `process` shares with no other (Linux only)."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def memory() -> dict[str, float]:
    workers = [private_mib(child.pid or 0) for child in multiprocessing.active_children()]
    return {"main": round(private_mib(os.getpid()), 1), "workers": round(sum(workers) / max(1, len(workers)), 1)}


def first_batch_and_memory(samples: Samples, batch: int, workers: int, images: int) -> dict[str, object]:
    order = Random(targets=samples.targets, seed=0).order(0)[: images + batch]
    loader = Loader(samples, workers)
    begun = time.perf_counter()
    run = loader.run(order.split(batch))
    next(run)
    first = time.perf_counter() - begun
    points = [memory()]
    every = max(1, images // batch // 4)
    for number, _ in enumerate(run, 1):
        if number % every == 0:
            points.append(memory())
    loader.close()
    return {"first_batch_seconds": first, "private_memory_mib": points}


def ours(samples: Samples, batch: int, workers: int, order: Tensor) -> Iterator[float]:
    """Images per second, a figure for each time that it is asked for."""
    loader = Loader(samples, workers)
    list(loader.run(order[:batch].split(batch)))
    while True:
        begun = time.perf_counter()
        for _ in loader.run(order.split(batch)):
            pass
        yield len(order) / (time.perf_counter() - begun)


def torchvisions(root: Path, size: int, batch: int, workers: int, order: Tensor) -> Iterator[float]:
    to_size = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    dataset = ImageFolder(str(root / "train"), transform=to_size)
    picked = torch.utils.data.Subset(dataset, order.tolist())
    loader: DataLoader[Tensor] = DataLoader(
        picked, batch_size=batch, num_workers=workers, persistent_workers=workers > 0
    )
    next(iter(loader))
    while True:
        begun = time.perf_counter()
        for _ in loader:
            pass
        yield len(order) / (time.perf_counter() - begun)


def waiting_share(samples: Samples, batch: int, workers: int, steps: int, device: str) -> dict[str, float]:
    size = 224
    pipeline = Pipeline(
        operations=[RandomScaleCrop(short_side=(256, 480), size=size), HorizontalFlip(p=0.5)],
        border="reflect",
        input_shape=samples.shape,
    )
    batches = Batches(
        samples,
        Delivery(torch.device(device), False, workers, normalize=Standardize(input_shape=samples.shape).to(device)),
        batch_size=batch,
        sampler=Random(targets=samples.targets, seed=0),
        augment=pipeline,
    )
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    waited, begun = 0.0, time.perf_counter()
    epoch = batches.epoch(0)
    for step in range(steps + 1):
        asked = time.perf_counter()
        inputs, targets = next(epoch)
        if step == 0:  # the workers start
            begun = time.perf_counter()
        else:
            waited += time.perf_counter() - asked
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    total = time.perf_counter() - begun
    batches.close()
    return {"step_seconds": total / steps, "waiting_share": waited / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with train/CLASS/IMAGE")
    parser.add_argument("--images", type=int, default=20_000, help="how many to generate")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-images", type=int, default=2000)
    parser.add_argument("--memory-images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20, help="training steps; 0: leave them out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dlopt_bench_") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        if arguments.root is None:
            generate(Path(folder), arguments.images)
        figures = measure(arguments.root or Path(folder), arguments)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, object]:
    batch, workers = arguments.batch, arguments.workers
    _, first_scan = load(root, arguments.size)
    samples, cached_scan = load(root, arguments.size)
    start = {"images": len(samples), "first_scan_seconds": first_scan, "cached_scan_seconds": cached_scan}
    figures: dict[str, object] = {
        "start": start,
        "memory": first_batch_and_memory(samples, batch, workers, arguments.memory_images),
    }
    order = Random(targets=samples.targets, seed=1).order(0)[: arguments.round_images]
    contestants = {
        "dlopt": ours(samples, batch, workers, order),
        "torchvision": torchvisions(root, arguments.size, batch, workers, order),
    }
    rounds = [{name: next(contestant) for name, contestant in contestants.items()} for _ in range(arguments.rounds)]
    speed = {name: statistics.median(each[name] for each in rounds) for name in contestants}
    figures["images_per_second"] = speed
    figures["images_per_second_and_worker"] = {name: value / max(1, workers) for name, value in speed.items()}
    figures["dlopt_over_torchvision"] = statistics.median(each["dlopt"] / each["torchvision"] for each in rounds)
    for contestant in contestants.values():
        contestant.close()  # type: ignore[attr-defined]
    if arguments.steps:
        figures["training"] = waiting_share(samples, batch, workers, arguments.steps, arguments.device)
    return figures


if __name__ == "__main__":
    main()
