"""The 8x8 handwritten digits bundled with scikit-learn (Alpaydin & Kaynak 1998, UCI's test set)."""

import gzip
import importlib.util
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import Count, Natural
from dlopt.data.division import stratified
from dlopt.data.samples import Dataset, InMemory, Samples

_TEST_FRACTION = 0.2
_SLOPE_SEED = 0
_TEST_SEED = 0  # fixed, so that test metrics of all runs can be compared
_VAL_SEED = 1


def digits() -> Dataset:
    """Loads 1,797 grey images [1, 8, 8] of ten classes; a fixed, stratified fifth is the test set.

    The 17 grey levels are scaled to 0..255.

    Raises:
        UserError: scikit-learn is not installed.
    """
    table = np.loadtxt(read_bundled("digits.csv.gz", "data=digits", "data file"), np.uint8, delimiter=",")
    inputs = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    samples = InMemory(inputs, torch.from_numpy(table[:, -1].astype(np.int64)))
    test, train = stratified(samples.targets, round(_TEST_FRACTION * len(samples)), _TEST_SEED)
    return Dataset(samples.select(train), None, samples.select(test), tuple(str(digit) for digit in range(10)))


def digit_pairs(*, train_size: Count, val_size: Natural, test_size: Natural) -> Dataset:
    """Pairs of digits [1, 8, 16], side by side; float32 [N, 10] is 1 for the one or two digits that occur.

    The pairs of a split are drawn at random, always the same, from digits of its own: the test set of `digits`, and
    for validation a stratified fifth of the others. A size of 0 omits a split; the size of one does not change the
    others.

    Raises:
        UserError: scikit-learn is not installed.
    """
    source = digits()
    assert source.test is not None
    val, train = stratified(source.train.targets, round(_TEST_FRACTION * len(source.train)), _VAL_SEED)
    pools = source.train.select(train), source.train.select(val), source.test
    splits = []
    for split, (pool, size) in enumerate(zip(pools, (train_size, val_size, test_size), strict=True)):
        pairs = torch.randint(len(pool), (size, 2), generator=generator("cpu", _TEST_SEED, split))
        images = torch.cat([pool.fetch(column) for column in pairs.unbind(1)], dim=3)
        labels = torch.zeros(size, 10).scatter_(1, pool.targets[pairs], 1.0)
        splits.append(InMemory(images, labels) if size else None)
    assert splits[0] is not None
    return Dataset(splits[0], splits[1], splits[2], source.classes)


def shaded_digits() -> Dataset:
    """Loads the digits under uneven light: a new task for a network trained on `digits`.

    A pixel x at column and row c, r (from -1 to 1) becomes 0.4 x + 76.5 (1 + a c + b r). The slopes of an image are
    random, |a| + |b| <= 1, and the same in every run: all images together leave the space of digits in two directions.
    """
    dataset = digits()
    random = torch.Generator().manual_seed(_SLOPE_SEED)
    place = torch.linspace(-1, 1, 8)

    def shaded(samples: Samples) -> InMemory:
        a, b = 2 * torch.rand(2, len(samples), 1, 1, 1, generator=random) - 1
        light = 76.5 * (1 + a * place + (1 - a.abs()) * b * place[:, None])
        return InMemory((0.4 * samples.fetch_range(0, len(samples)) + light).round().to(torch.uint8), samples.targets)

    assert dataset.test is not None
    return replace(dataset, train=shaded(dataset.train), test=shaded(dataset.test))


def read_bundled(name: str, key: str = "data", description: str | None = None) -> io.StringIO:
    """Reads a file of scikit-learn directly: importing sklearn.datasets takes 10x as long.

    `key` and `description` of the file: for the error message. Raises `UserError`.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError(f"{key}: needs scikit-learn's {description or f'file {name}'}; pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / name
    try:
        data = path.read_bytes()
        return io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    except (OSError, EOFError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); reinstall scikit-learn") from error
