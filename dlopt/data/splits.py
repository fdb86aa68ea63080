"""Prepares a dataset for a run: subset, validation split, image size, and loading into memory."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.data.checks import WARNING
from dlopt.data.division import GROUP, ORDER, divide, partition, split
from dlopt.data.equal_samples import equal_sample_warnings
from dlopt.data.images.decoding import size_pair
from dlopt.data.inspection import notes
from dlopt.data.loading import materialize, worker_count
from dlopt.data.near_duplicates import near_duplicate_warnings
from dlopt.data.samples import Dataset, Samples
from dlopt.data.settings import DataSettings as DataSettings
from dlopt.machine.memory import available_memory

MEMORY_FRACTION = 0.25  # of the free memory, main or GPU, that data.memory=auto may fill with samples
_UNEVEN = 0.2  # relative error of a requested fraction, from which on a line says so
_TEST_SEED = 0  # fixed, so that test metrics of all runs can be compared, and folds are parts of one division
_SUBSET, _VAL, _NOISE, _EVALUATED = 1, 2, 3, 4  # RNG streams: each is drawn independently of the others


def with_test_set(dataset: Dataset, fraction: float, source: str) -> Dataset:
    """Returns a dataset as read with a fraction of its training set as the test set, divided as `divide` does.

    It is the same for all seeds. If no class has two samples, there is no test set.

    Args:
        source: key and value that name the data, for messages.

    Raises:
        UserError: the dataset has a test set.
    """
    if dataset.test is not None:
        found = f"{source} has a test set of {len(dataset.test):,} samples"
        raise UserError(f"data.test_split={fraction:g}: {found}; use 0")
    count = max(1, round(fraction * len(dataset.train)))
    held_out, kept = divide(dataset.train.targets, dataset.train.further, count, _TEST_SEED, keep_one=True)
    if not len(held_out):
        return dataset
    return replace(dataset, train=dataset.train.select(kept), test=dataset.train.select(held_out))


def prepare(
    dataset: Dataset,
    settings: DataSettings,
    *,
    device: torch.device | str = "cpu",
    processes: int = 1,
    random_crops: bool = False,
    compare: bool = True,
) -> Dataset:
    """Applies the settings to `dataset`.

    In this order: selects `subset` of the training set, splits off the validation set (unless the dataset has one) or
    the part `fold` of `folds`, which with `subset` are the same for all seeds,
    makes features of the columns of a table, replaces a fraction of the training labels (`label_noise`),
    resizes images to `image_size`, and decodes training and validation samples into memory if requested or if they
    fit. Test samples are decoded when they are used.

    The notes of the result are those of `dlopt.data.inspection`. If no class has two samples, there is no validation
    set and `val` is None.

    Args:
        device: device of samples in memory; its free memory counts.
        processes: training processes that share this machine.
        random_crops: training images are cropped at random. Images that `image_size` would cut are then read from their
            files in every epoch, because decoded ones have lost their margins.
        compare: look for equal samples and nearly equal rows, see `equal_samples`.

    Raises:
        UserError: the settings do not fit the data, or a sample cannot be read.
    """
    dataset = replace(dataset, notes=notes(dataset))
    train, val, test = dataset.train, dataset.val, dataset.test
    requested: dict[str, tuple[str, float, int]] = {}
    if test is not None and (fraction := settings.test_split):
        requested["test"] = f"data.test_split={fraction:g}", fraction, len(train) + len(test)
    is_stratified = dataset.classes is not None and not dataset.has_several_labels
    seed = settings.split_seed if settings.folds is None else _TEST_SEED
    if settings.folds is not None and ORDER in train.further and settings.order is None:
        raise UserError(f"data.folds={settings.folds}: the samples have an order, which folds would mix; use null")
    if settings.folds is not None and val is not None:
        own = f"the data have a validation set of {len(val):,} samples"
        raise UserError(f"data.folds={settings.folds}: {own}, which no fold replaces; use null")
    if settings.subset is not None:
        count = _subset_count(train, settings.subset, is_stratified=is_stratified)
        selected, _ = divide(train.targets, train.further, count, seed, _SUBSET)
        train = train.select(selected)
    if settings.folds is not None:
        parts = partition(train.targets, train.further, settings.folds, seed)
        requested["validation"] = f"data.folds={settings.folds}", 1 / settings.folds, len(train)
        is_kept = parts != (settings.fold or 0)
        train, val = (train.select(each.nonzero().squeeze(1)) for each in (is_kept, ~is_kept))
    elif val is None and settings.val_split > 0:
        count = max(1, round(settings.val_split * len(train)))
        held_out, kept = divide(train.targets, train.further, count, seed, _VAL, keep_one=True)
        if len(held_out):
            requested["validation"] = f"data.val_split={settings.val_split:g}", settings.val_split, len(train)
            train, val = train.select(kept), train.select(held_out)
    dataset = replace(dataset, notes=(*dataset.notes, *_division_notes(settings, train, val, test, requested)))
    dataset, train, val, test = train.encode(dataset, val, test)
    stored: dict[str, Any] = {"train": train, "val": val, "test": test}  # at their size, and without noise
    if settings.label_noise > 0:
        if not is_stratified or dataset.unlabelled is not None:
            raise UserError(
                f"data.label_noise={settings.label_noise}: the targets are not classes, one per sample; use 0"
            )
        train = train.with_targets(corrupted(train.targets, len(dataset.classes or ()), settings))
    size = size_pair(settings.image_size)
    train = _resized(train, size)
    val, test = (None if samples is None else _resized(samples, size) for samples in (val, test))
    for name, samples in (("validation", val), ("test", test)):
        if samples is not None and samples.shape != train.shape:
            raise UserError(
                f"data.image_size=null: {name} samples have the shape {list(samples.shape)}, training samples "
                f"{list(train.shape)}; resize images to one size, for example data.image_size=224"
            )
    if random_crops and train.is_cut:
        if settings.memory is True:
            raise UserError(
                "data.memory=true: keeps the centre of each image only, but the augmentation crops from the whole "
                "image; use data.memory=auto"
            )
        found = equal_samples(dataset, stored) if compare else ()
        return replace(dataset, train=train, val=val, test=test, notes=(*dataset.notes, *found))
    present = [samples for samples in (train, val, test) if samples is not None]
    in_memory = _load_into_memory(present, settings, torch.device(device), processes)
    if in_memory:
        train = materialize(train, worker_count(settings.workers, train, processes))
        val = None if val is None else materialize(val, worker_count(settings.workers, val, processes))
    found = equal_samples(dataset, {"train": train, "val": val, "test": test}, stored) if compare else ()
    return replace(dataset, train=train, val=val, test=test, in_memory=in_memory, notes=(*dataset.notes, *found))


def _division_notes(
    settings: DataSettings,
    train: Samples,
    val: Samples | None,
    test: Samples | None,
    requested: Mapping[str, tuple[str, float, int]],
) -> Iterator[str]:
    """Yields what groups, an order or folds have made of the splits, and warnings where these do not keep to it.

    `requested`: of the splits that dlopt has made, the key with its value, the fraction, and of how many samples.
    """
    held_out = {"validation": val, "test": test}
    if settings.folds is not None and val is not None and not train.targets.is_floating_point():
        count = int((~torch.isin(val.targets, train.targets)).sum())
        if count:
            classes = "are of classes" if count > 1 else "is of a class"
            yield f"{WARNING}{count:,} of {len(val):,} validation samples {classes} that no training sample has"
    divided = {"training": train} | {name: each for name, each in held_out.items() if each is not None}
    if GROUP in train.further:
        groups = {name: each.further[GROUP] for name, each in divided.items() if GROUP in each.further}
        counts = ", ".join(f"{len(each.unique()):,} {name}" for name, each in groups.items())
        yield f"{_divider(GROUP, settings.group)}: {counts} groups"
        for (first, known), (name, each) in combinations(groups.items(), 2):
            if count := int(torch.isin(each, known).sum()):
                yield f"{WARNING}{count:,} of {len(each):,} {name} samples share a group with {first} samples"
        largest = int(torch.cat([*groups.values()]).unique(return_counts=True)[1].max())
        for name, (setting, fraction, total) in requested.items():
            if abs((share := len(groups[name]) / total) / fraction - 1) > _UNEVEN:
                yield (
                    f"{setting}: groups stay together, so the {name} set has {100 * share:.3g} % of the samples, not "
                    f"{100 * fraction:.3g} %; the largest group has {largest:,}"
                )
    if ORDER in train.further:
        yield f"{_divider(ORDER, settings.order)}: training before validation before test, not stratified by class"
        last = train.further[ORDER].max()
        for name, values in ((name, each.further[ORDER]) for name, each in divided.items() if ORDER in each.further):
            if name != "training" and (count := int((values <= last).sum())):
                yield f"{WARNING}{count:,} of {len(values):,} {name} samples are not after those before them"
            last = torch.maximum(last, values.max())


def _divider(name: str, column: str | None) -> str:
    """Names what divides the samples: the key of a column, or a tensor of a source of the user's own."""
    return f"{name} of the samples" if column is None else f"data.{name}={column}"


def with_validation_set(
    dataset: Dataset, samples: Samples, settings: DataSettings, *, device: torch.device, processes: int
) -> Dataset:
    """Returns a prepared dataset with other samples as its validation set, at its image size.

    They are kept in memory if its own samples are, and if these fit as well. Raises `UserError`.
    """
    samples = _resized(samples, size_pair(settings.image_size))
    shape = dataset.train.shape
    if samples.shape != shape:
        images = "; for images of several sizes, set data.image_size" if len(shape) == 3 else ""
        raise UserError(f"its samples have the shape {list(samples.shape)}, training samples {list(shape)}{images}")
    if (largest := samples.white()) != dataset.task.white:
        raise UserError(f"its pixels are in 0..{largest:g}, those of the training images in 0..{dataset.task.white:g}")
    in_memory = dataset.in_memory and _load_into_memory([samples], settings, device, processes)
    return replace(dataset, val=samples, in_memory=in_memory)


def equal_samples(
    dataset: Dataset, splits: Mapping[str, Samples | None], stored: Mapping[str, Samples | None] | None = None
) -> tuple[str, ...]:
    """Returns the warnings of equal samples and nearly equal rows; none of generated data, which may have few inputs.

    `stored`: the splits as read, with clean labels, if those of `splits` have noise or other sizes. Their digests are
    used if they are known.
    """
    if dataset.is_generated:
        return ()
    stored = stored or splits
    targets = {name: each.targets for name, each in stored.items() if each is not None}
    known = splits if getattr(stored["train"], "digests", None) is None else stored
    rows = {name: None if each is None else each.digests for name, each in known.items()}
    found = equal_sample_warnings(rows, targets, has_classes=dataset.classes is not None)
    return (*found, *near_duplicate_warnings(splits))


def evaluation_subset(val: Samples, count: int | None, seed: int) -> Samples:
    """Returns `count` of the validation samples, with their class proportions (None for all), in the order of `val`.

    A function of `seed` (`data.split_seed`) and of the samples only: all ranks and modes draw the same. Raises
    `UserError`.
    """
    if count is None:
        return val
    if count > len(val):
        raise UserError(f"evaluate.samples={count}: the validation set has only {len(val):,} samples; null: all")
    classes = 1 if val.targets.is_floating_point() else len(val.targets.unique())
    _refuse_few(f"evaluate.samples={count}", count, classes)
    selected, _ = split(val.targets, count, seed, _EVALUATED)
    return val.select(selected)


def corrupted(targets: Tensor, classes: int, settings: DataSettings) -> Tensor:
    """Replaces a fraction `label_noise` of the class indices by other classes, drawn uniformly (symmetric noise)."""
    rng = generator("cpu", settings.split_seed, _NOISE)
    chosen = torch.randperm(len(targets), generator=rng)[: round(settings.label_noise * len(targets))]
    shift = torch.randint(1, max(classes, 2), chosen.shape, generator=rng)
    return targets.index_put((chosen,), (targets[chosen] + shift) % classes)


def _subset_count(train: Samples, subset: int | float, *, is_stratified: bool) -> int:
    count = subset if isinstance(subset, int) else max(1, round(subset * len(train)))
    if count > len(train):
        raise UserError(f"data.subset={subset}: the training set has only {len(train)} samples")
    _refuse_few(f"data.subset={subset}", count, len(train.targets.unique()) if is_stratified else 1)
    return count


def _refuse_few(key: str, count: int, classes: int) -> None:
    if count < classes:
        least = f"use at least {classes}"
        raise UserError(f"{key}: {count} samples cannot include one of each of the {classes} classes; {least}")


def _resized(samples: Samples, size: tuple[int, int] | None) -> Samples:
    return samples if size is None or samples.shape[1:] == size else samples.resized(size)


def _load_into_memory(splits: list[Samples], settings: DataSettings, device: torch.device, processes: int) -> bool:
    if settings.memory is False:
        return False
    needed = sum(samples.nbytes for samples in splits)
    free = available_memory() // processes
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if settings.memory == "auto":
        return needed <= MEMORY_FRACTION * free
    # Samples already in memory need no further check: they have been loaded.
    if not all(samples.is_loaded for samples in splits) and needed > free:
        raise UserError(
            f"data.memory=true: the samples need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            "use data.memory=auto, a smaller data.image_size, or data.subset"
        )
    return True
