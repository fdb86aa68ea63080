"""Values of a regression with mean 0 and standard deviation 1."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.config.parsing import parse
from dlopt.data.normalization import standardized
from dlopt.data.rows.custom import custom
from dlopt.data.samples import Dataset
from dlopt.data.tables.columns import FeatureColumns
from tests.support.runs import composed, run_config

VALUES = np.random.default_rng(0).normal(1005, 2, 40)


class Items(list[tuple[torch.Tensor, object]]):
    """A map-style dataset."""


def of(values: np.ndarray) -> Dataset:
    items = Items((torch.full((1, 2, 2), 7, dtype=torch.uint8), torch.tensor(each)) for each in values)
    return custom(train=items, val=Items(items[:5]), test=None, classes=None, image_size=None)


@pytest.mark.parametrize("shape", [(40,), (20, 2)])
def test_values_of_the_training_set(shape: tuple[int, ...]) -> None:
    values = VALUES.reshape(shape)
    found = standardized(of(values), None)
    expected = torch.from_numpy((values - VALUES.mean()) / VALUES.std()).float()
    torch.testing.assert_close(found.train.targets, expected, rtol=0, atol=1e-4)
    assert found.val is not None
    torch.testing.assert_close(found.val.targets, expected[:5], rtol=0, atol=1e-4)
    assert found.columns is not None and found.notes[-1].startswith("targets and outputs: (value - 100")
    assert (found.columns.mean, found.columns.scale) == pytest.approx((VALUES.mean(), VALUES.std()), rel=1e-5)


def test_other_data_have_the_scale_of_the_training_data() -> None:
    found = standardized(of(VALUES), FeatureColumns((), "y", mean=1000.0, scale=5.0))
    torch.testing.assert_close(found.train.targets, torch.from_numpy((VALUES - 1000) / 5).float(), rtol=0, atol=1e-4)


def test_classes_stay_as_they_are() -> None:
    found = standardized(of(np.arange(40) % 2), None)
    assert found.train.targets.tolist() == [0, 1] * 20 and found.columns is None and not found.notes


@pytest.mark.parametrize("is_on", [True, False, None])
def test_images_of_a_csv_file(tmp_path: Path, is_on: bool | None) -> None:
    """None: a config from before the key."""
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("path,label\na.png,1003\na.png,1007\n")
    keys = ["data=csv", f"data.file={tmp_path / 'a.csv'}", "data.labels=value", "loss=mse", "model=mlp"]
    if is_on is None:
        config = copy.deepcopy(composed(*keys))
        del config[0]["data"]["standardize_target"]
        data = parse(*config).read_data()
    else:
        data = run_config(*keys, f"data.standardize_target={str(is_on).lower()}").read_data()
    assert data.train.targets.tolist() == ([-1.0, 1.0] if is_on else [1003.0, 1007.0])
