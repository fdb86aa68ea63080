"""Settings of data sets."""

from typing import Any

from dlopt.data.splits import DataSettings


def data_settings(**changed: Any) -> DataSettings:
    defaults: dict[str, Any] = {
        "batch_size": 8, "val_split": 0.0, "subset": None, "split_seed": 0, "label_noise": 0.0, "image_size": None,
        "memory": "auto", "workers": 0, "statistics_samples": None, "drop_last": False,
    }  # fmt: skip
    return DataSettings(**defaults | changed)
