"""Benchmarks reading a large image folder: start-up, throughput against torchvision, memory, waiting for data.

    python scripts/bench/data.py [--root FOLDER] [--images 20000] [--workers 2] [--rounds 3] [--json FILE]

Without --root, JPEGs of mixed sizes are generated (a few hundred, hard-linked under many names) and removed again.

1. Seconds of the first scan, of a cached scan, and from there to the first batch.
2. Images per second, also per worker, and against torchvision's ImageFolder, v2 transforms and DataLoader on the same
   files. Both take turns in each round; the ratio is the median over the rounds. The same for random crops of 224
   pixels of the whole images (RandomResizedCrop).
3. Private memory (MiB) of the main process and the workers, at the first batch and after --memory-images more images.
4. Fraction of a training step (ResNet-18 on the device, augmented and normalized batches) spent waiting for data.
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

import torch
from jpegs import generate
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from dlopt.augment import HorizontalFlip, Pipeline, RandomResizedCrop, RandomScaleCrop
from dlopt.augment.crops import CropReader
from dlopt.augment.pipeline import crop_when_reading
from dlopt.data.batches import Batches, Delivery
from dlopt.data.images.folder import image_folder
from dlopt.data.loading import Loader
from dlopt.data.normalization import Standardize
from dlopt.data.samplers import Random
from dlopt.data.samples import Reader, Samples


def load(root: Path, size: int) -> tuple[Samples, float]:
    start = time.perf_counter()
    data = image_folder(root=str(root), channels=3, on_error="fail", max_skips=0, image_size=size)
    return data.train, time.perf_counter() - start


def private_mib(process: int) -> float:
    """Returns the private memory of a process in MiB (Linux only)."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def memory() -> dict[str, float]:
    workers = [private_mib(child.pid or 0) for child in multiprocessing.active_children()]
    return {"main": round(private_mib(os.getpid()), 1), "workers": round(sum(workers) / max(1, len(workers)), 1)}


def first_batch_and_memory(samples: Samples, batch: int, workers: int, images: int) -> dict[str, object]:
    order = Random(targets=samples.targets, seed=0, epoch_size=None).order(0)[: images + batch]
    loader = Loader(samples, workers)
    start = time.perf_counter()
    batches = loader.run(order.split(batch))
    next(batches)
    first = time.perf_counter() - start
    memory_use = [memory()]
    every = max(1, images // batch // 4)
    for number, _ in enumerate(batches, 1):
        if number % every == 0:
            memory_use.append(memory())
    loader.close()
    return {"first_batch_seconds": first, "private_memory_mib": memory_use}


def dlopt_rates(samples: Reader, batch: int, workers: int, order: Tensor) -> Iterator[float]:
    """Measures and yields images per second at each `next`."""
    loader = Loader(samples, workers)
    list(loader.run(order[:batch].split(batch)))
    while True:
        start = time.perf_counter()
        for _ in loader.run(order.split(batch)):
            pass
        yield len(order) / (time.perf_counter() - start)


def torchvision_rates(
    root: Path, to_size: list[v2.Transform], batch: int, workers: int, order: Tensor
) -> Iterator[float]:
    dataset = ImageFolder(str(root / "train"), transform=v2.Compose([*to_size, v2.PILToTensor()]))
    subset = torch.utils.data.Subset(dataset, order.tolist())
    loader: DataLoader[Tensor] = DataLoader(
        subset, batch_size=batch, num_workers=workers, persistent_workers=workers > 0
    )
    next(iter(loader))
    while True:
        start = time.perf_counter()
        for _ in loader:
            pass
        yield len(order) / (time.perf_counter() - start)


def waiting_fraction(samples: Samples, batch: int, workers: int, steps: int, device: str) -> dict[str, float]:
    size = 224
    pipeline = Pipeline(
        operations=[RandomScaleCrop(short_side=(256, 480), size=size), HorizontalFlip(p=0.5)],
        border="reflect",
        input_shape=samples.shape,
    )
    reader, augment = crop_when_reading(pipeline, samples, 0)
    normalize = Standardize(per="channel", input_shape=samples.shape)
    batches = Batches(
        samples,
        Delivery(torch.device(device), False, workers, normalize=normalize.to(device)),
        batch_size=batch,
        sampler=Random(targets=samples.targets, seed=0, epoch_size=None),
        augment=augment,
        reader=reader,
    )
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    waiting, start = 0.0, time.perf_counter()
    epoch = batches.epoch(0)
    for step in range(steps + 1):
        requested = time.perf_counter()
        inputs, targets = next(epoch)
        if step == 0:  # excludes the start of the workers
            start = time.perf_counter()
        else:
            waiting += time.perf_counter() - requested
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    total = time.perf_counter() - start
    batches.close()
    return {"step_seconds": total / steps, "waiting_share": waiting / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with train/CLASS/IMAGE")
    parser.add_argument("--images", type=int, default=20_000, help="number of images to generate")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-images", type=int, default=2000)
    parser.add_argument("--memory-images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20, help="training steps (0: skip)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dlopt_bench_") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        if arguments.root is None:
            generate(Path(folder), arguments.images)
            time.sleep(4)  # the scan of a folder that has just changed is not cached
        results = measure(arguments.root or Path(folder), arguments)
    print(json.dumps(results, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, object]:
    batch, workers = arguments.batch, arguments.workers
    _, first_scan = load(root, arguments.size)
    samples, cached_scan = load(root, arguments.size)
    start_up = {"images": len(samples), "first_scan_seconds": first_scan, "cached_scan_seconds": cached_scan}
    results: dict[str, object] = {
        "start": start_up,
        "memory": first_batch_and_memory(samples, batch, workers, arguments.memory_images),
    }
    order = Random(targets=samples.targets, seed=1, epoch_size=None).order(0)[: arguments.round_images]
    shape = 3, arguments.size, arguments.size
    crop = RandomResizedCrop(size=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    requests = torch.stack([order, torch.zeros_like(order), torch.arange(len(order))], 1)
    centre = [v2.Resize(arguments.size), v2.CenterCrop(arguments.size)]
    candidates = {
        "dlopt": dlopt_rates(samples, batch, workers, order),
        "torchvision": torchvision_rates(root, centre, batch, workers, order),
        "dlopt, crops": dlopt_rates(CropReader(samples, crop, shape, 0), batch, workers, requests),
        "torchvision, crops": torchvision_rates(root, [v2.RandomResizedCrop(224)], batch, workers, order),
    }
    rounds = [{name: next(candidate) for name, candidate in candidates.items()} for _ in range(arguments.rounds)]
    speed = {name: statistics.median(rates[name] for rates in rounds) for name in candidates}
    results["images_per_second"] = speed
    results["images_per_second_and_worker"] = {name: value / max(1, workers) for name, value in speed.items()}
    for kind in ("", ", crops"):
        ratios = [rates[f"dlopt{kind}"] / rates[f"torchvision{kind}"] for rates in rounds]
        results[f"dlopt_over_torchvision{kind}"] = statistics.median(ratios)
    for candidate in candidates.values():
        candidate.close()  # type: ignore[attr-defined]
    if arguments.steps:
        results["training"] = waiting_fraction(samples, batch, workers, arguments.steps, arguments.device)
    return results


if __name__ == "__main__":
    main()
