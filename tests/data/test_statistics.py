from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dlopt.data import normalization
from dlopt.data.images.files import Files, ImageList
from dlopt.data.normalization import Standardize
from dlopt.data.samples import Dataset, InMemory, Samples
from tests.support.runs import same


class Counted(Standardize):
    """Remembers how many samples it was fitted to."""

    seen: ClassVar[list[int]] = []

    def fit(self, samples: Samples) -> None:
        self.seen.append(len(samples))
        super().fit(samples)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """24 images with increasing grey values; their statistics are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(normalization, "_CACHE_MIN_SAMPLES", 2)
    Counted.seen.clear()
    paths = []
    for number in range(24):
        pixels = np.random.default_rng(number).integers(10 * number, 10 * number + 20, (6, 6, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number:02}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return Files(ImageList.of(paths, torch.zeros(24, dtype=torch.long)), None, 3)


def fitted(samples: Samples, count: int | None, kind: str = "a", in_memory: bool = False) -> dict[str, Tensor]:
    normalize = Counted(per="channel", input_shape=samples.shape)
    normalization.fit(normalize, Dataset(samples, None, None, ("x",), in_memory), count=count, kind=kind)
    return normalize.state_dict()


def test_streamed_statistics_use_evenly_spaced_samples(files: Files) -> None:
    whole, part = fitted(files, None, "whole"), fitted(files, 8)
    assert Counted.seen == [24, 8]
    assert not same(whole, part)
    means = [(-state["shift"] / state["scale"]).mean().item() for state in (part, whole)]
    assert means[0] == pytest.approx(means[1], rel=0.05)  # the first third alone would be a third as bright


def test_statistics_in_memory_use_all_samples(files: Files) -> None:
    samples = InMemory(files.fetch(torch.arange(24)), files.targets)
    assert same(fitted(samples, 8, in_memory=True), fitted(files, None))
    assert Counted.seen == [24, 24]


def test_second_run_uses_cached_statistics(files: Files) -> None:
    first = fitted(files, 8)
    assert same(first, fitted(files, 8)) and Counted.seen == [8]
    fitted(files, 8, "another normalization")
    fitted(files.select(torch.arange(1, 24)), 8)
    assert Counted.seen == [8, 8, 8]


def test_changed_image_invalidates_the_cache(files: Files) -> None:
    first = fitted(files, None)
    Image.fromarray(np.full((6, 6, 3), 255, dtype=np.uint8)).save(files.path(3))
    assert not same(first, fitted(files, None))
    assert Counted.seen == [24, 24]


def test_damaged_cache_is_ignored(files: Files, tmp_path: Path) -> None:
    first = fitted(files, 8)
    [kept] = (tmp_path / "cache/dlopt").glob("statistics-*.npz")
    kept.write_bytes(kept.read_bytes()[:-3] + b"abc")
    assert same(first, fitted(files, 8)) and Counted.seen == [8, 8]
