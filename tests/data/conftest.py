from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.data.samples import InMemory
from dlopt.data.splits import DataSettings
from tests.support.data import data_settings


@pytest.fixture
def settings() -> Callable[..., DataSettings]:
    return data_settings


@pytest.fixture
def write_images() -> Callable[..., list[Path]]:
    """Writes `count` random images into a folder."""

    def write(
        folder: Path, count: int, size: tuple[int, int] = (6, 5), suffix: str = ".png", mode: str = "RGB", seed: int = 0
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(seed)
        paths = []
        for number in range(count):
            shape = (*size, 3) if mode == "RGB" else size
            path = folder / f"{number:03d}{suffix}"
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
            paths.append(path)
        return paths

    return write


@pytest.fixture
def numbered() -> Callable[..., InMemory]:
    """Returns images whose pixels equal their index, which identifies the samples of a batch."""

    def make(count: int, classes: int = 3) -> InMemory:
        inputs = torch.arange(count).view(count, 1, 1, 1).expand(count, 1, 2, 2).to(torch.uint8)
        return InMemory(inputs.contiguous(), torch.arange(count) % classes)

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Uses a temporary cache folder instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dlopt"
