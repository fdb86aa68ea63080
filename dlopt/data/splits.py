"""From a dataset to the parts that a run uses: subset, validation split, one image size, in memory or not."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from dlopt.data.images import resize, size_pair
from dlopt.data.loading import materialize, worker_count
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.errors import UserError
from dlopt.random import generator
from dlopt.ranges import Count, Fraction, Natural, PositiveFraction, Seed

BatchSize = Annotated[int, Interval(ge=1, le=1 << 24)]  # more is a slip of the pen


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Checked against `conf/data/_common.yaml`, where the defaults and the meaning of each key stand."""

    batch_size: BatchSize | Literal["full"]
    val_split: Fraction
    subset: Count | PositiveFraction | None
    split_seed: Seed
    image_size: Count | tuple[Count, Count] | None
    memory: Literal["auto"] | bool
    workers: Natural | Literal["auto"]
    statistics_samples: Count | None
    drop_last: bool


MEMORY_FRACTION = 0.25  # of the free memory, main or GPU: what data.memory=auto may fill with samples
_SUBSET, _VAL = 1, 2  # streams: the subset and the validation split are drawn independently


def prepare(
    dataset: Dataset, settings: DataSettings, *, device: torch.device | str = "cpu", processes: int = 1
) -> Dataset:
    """What the training loop needs of `dataset`, as the settings ask for it.

    The training set is cut down to `subset`, the validation set is cut from what is left (unless the dataset brings
    its own), images are brought to `image_size`, and training and validation samples are decoded into memory where
    that is asked for or fits. The test set is left alone until it is used.

    Where no class has two samples to divide there is no validation set, and `val` is None.

    Args:
        device: where samples in memory will live; its free memory counts.
        processes: training processes that share this machine.

    Raises:
        UserError: the settings do not suit the data, or a sample cannot be read.
    """
    train, val, test = dataset.train, dataset.val, dataset.test
    regression = dataset.classes is None
    if settings.subset is not None:
        chosen, _ = split(train, _subset_count(train, settings.subset, regression), settings.split_seed, _SUBSET)
        train = train.select(chosen)
    if val is None and settings.val_split > 0:
        count = max(1, round(settings.val_split * len(train)))
        held_out, kept = split(train, count, settings.split_seed, _VAL, spare=True)
        if len(held_out):
            train, val = train.select(kept), train.select(held_out)
    size = size_pair(settings.image_size)
    train = _resized(train, size)
    val = None if val is None else _resized(val, size)
    test = None if test is None else _resized(test, size)
    for name, part in (("validation", val), ("test", test)):
        if part is not None and part.shape != train.shape:
            raise UserError(
                f"data.image_size=null: {name} samples have the shape {list(part.shape)}, training samples "
                f"{list(train.shape)}; bring images to one size, for example data.image_size=224"
            )
    parts = [part for part in (train, val, test) if part is not None]
    in_memory = _fits(parts, settings, torch.device(device), processes)
    if in_memory:
        train = materialize(train, _workers(settings, train, processes))
        val = None if val is None else materialize(val, _workers(settings, val, processes))
    return Dataset(train, val, test, dataset.classes, in_memory, dataset.notes)


def split(samples: Samples, count: int, seed: int, *counters: int, spare: bool = False) -> tuple[Tensor, Tensor]:
    """`stratified` for samples of either kind; continuous targets are drawn without regard to their values."""
    targets = samples.targets
    if targets.is_floating_point():
        targets = torch.zeros(len(targets), dtype=torch.int64)
    return stratified(targets, count, seed, *counters, spare=spare)


def stratified(targets: Tensor, count: int, seed: int, *counters: int, spare: bool = False) -> tuple[Tensor, Tensor]:
    """Indices (chosen, rest), ascending, of `count` samples with the class proportions of `targets` [N], and the rest.

    Every class gets its exact proportion, rounded by largest remainders, but at least one sample, so that more than
    `count` may be chosen where classes are many and small. `spare`: at least one sample of each class is left too,
    and a class with a single sample keeps it in the rest.
    """
    _, classes = targets.unique(return_inverse=True)
    available = torch.bincount(classes).tolist()
    wanted = _allocate(available, count, spare)
    order = torch.randperm(len(targets), generator=generator("cpu", seed, *counters))
    grouped = order[classes[order].argsort(stable=True)]  # class by class, shuffled within each
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    start = 0
    for number, total in zip(wanted, available, strict=True):
        chosen[grouped[start : start + number]] = True
        start += total
    return chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)


def available_memory() -> int:
    """Bytes of main memory that this process can still take, a container's limit considered."""
    free = [_sysconf_memory()]
    for path, read in (
        (Path("/proc/meminfo"), _meminfo),
        (Path("/sys/fs/cgroup/memory.max"), _cgroup_memory),
    ):
        try:
            free.append(read(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(free)


def _allocate(available: list[int], count: int, spare: bool) -> list[int]:
    """How many of each class: `count` in all by largest remainders, within 1 (where possible) and what there is."""
    upper = [total - 1 for total in available] if spare else available
    lower = [min(1, limit) if count > 0 else 0 for limit in upper]
    exact = [count * total / sum(available) for total in available]
    result = [min(max(math.floor(share), low), high) for share, low, high in zip(exact, lower, upper, strict=True)]
    while sum(result) != count:
        step = 1 if sum(result) < count else -1
        bound = upper if step > 0 else lower
        open_ = [i for i in range(len(result)) if result[i] != bound[i]]
        if not open_:
            break
        # of equal remainders the first class wins: the result depends on the counts alone
        best = max(open_, key=lambda i: (step * (exact[i] - result[i]), -i))
        result[best] += step
    return result


def _subset_count(train: Samples, subset: int | float, regression: bool) -> int:
    count = subset if isinstance(subset, int) else max(1, round(subset * len(train)))
    if count > len(train):
        raise UserError(f"data.subset={subset}: the training set has only {len(train)} samples")
    classes = 1 if regression else len(train.targets.unique())
    if count < classes:
        raise UserError(
            f"data.subset={subset}: {count} samples cannot hold one of each of the {classes} classes; "
            f"at least {classes} are needed"
        )
    return count


def _resized(samples: Samples, size: tuple[int, int] | None) -> Samples:
    """Samples in memory brought to `size`; all others do that themselves when they are fetched."""
    if size is None or not isinstance(samples, InMemory) or samples.shape[1:] == size:
        return samples
    if len(samples.shape) != 3:
        raise UserError(f"data.image_size={list(size)}: the samples are vectors, not images; use data.image_size=null")
    needed = len(samples) * samples.shape[0] * size[0] * size[1]
    if needed > available_memory():
        raise UserError(
            f"data.image_size={list(size)}: {len(samples):,} images of this size take {needed / 2**30:,.1f} GiB, "
            "more than the memory that is free; use a smaller image_size or data.subset"
        )
    chunks = samples.inputs.split(1024)
    return InMemory(torch.cat([resize(chunk, size) for chunk in chunks]), samples.targets)


def _fits(parts: list[Samples], settings: DataSettings, device: torch.device, processes: int) -> bool:
    if settings.memory is False:
        return False
    image_bytes = 1 if len(parts[0].shape) == 3 else 4
    needed = sum(len(part) * math.prod(part.shape) * image_bytes for part in parts)
    free = available_memory() // processes
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if settings.memory == "auto":
        return needed <= MEMORY_FRACTION * free
    missing = 0 if all(isinstance(part, InMemory) for part in parts) else needed
    if missing > free:
        raise UserError(
            f"data.memory=true: the samples need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            "use data.memory=auto, a smaller data.image_size, or data.subset"
        )
    return True


def _workers(settings: DataSettings, samples: Samples, processes: int) -> int:
    return worker_count(settings.workers, samples, processes)


def _sysconf_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # no such figure on this system
        return 4 << 30


def _meminfo(text: str) -> int:
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _cgroup_memory(text: str) -> int:
    """The limit less what is in use ("max": no limit, a ValueError)."""
    return int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text())
