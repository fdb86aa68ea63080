"""Configs that older versions of dlopt have saved, in today's form."""

from collections.abc import Mapping
from typing import Any

from dlopt.basics.errors import UserError

# Modules of data that have moved: the configs of runs name their callables.
_MOVED = {
    "arrow": "rows.arrow",
    "custom": "rows.custom",
    "digits": "images.digits",
    "downloads": "images.downloads",
    "features": "tables.table",
    "folder": "images.folder",
    "table": "images.csv_images",
    "text": "texts.text",
    "webdataset": "rows.webdataset",
}


def moved(target: str) -> str:
    """Returns the dotted name that a callable of data has today."""
    package, _, name = target.rpartition(".")
    module = package.removeprefix("dlopt.data.")
    return f"dlopt.data.{_MOVED[module]}.{name}" if module in _MOVED and module != package else target


def with_moved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config with the names that callables of data have today."""
    config = dict(saved)
    if isinstance(data := saved.get("data"), Mapping) and isinstance(target := data.get("_target_"), str):
        config["data"] = {**data, "_target_": moved(target)}
    return config


def of_today(saved: Mapping[str, Any], *, trains: bool = False) -> dict[str, Any]:
    """Returns a saved config without the keys that are gone, with the names that callables of data have today.

    `trains`: for more training; raises `UserError` if one of them would change it.
    """
    config, recovery = with_moved(saved), saved.get("recovery")
    if not isinstance(recovery, Mapping) or "lr_factor" not in recovery:  # a config of today
        return config
    config["recovery"] = {key: value for key, value in recovery.items() if key != "lr_factor"}
    if saved.get("on_divergence") == "rollback":
        if trains:
            raise UserError(
                "on_divergence=rollback: the run began with it, and it is gone; start a new run: from=RUN "
                "on_divergence=stop, with init_from=RUN for its weights"
            )
        config["on_divergence"] = "stop"
    if isinstance(optimizer := saved.get("optimizer"), Mapping):
        if trains and (dtype := optimizer.get("state_dtype")) is not None:
            raise UserError(
                f"optimizer.state_dtype={dtype}: the run was trained with it, and it is gone; train it again, with "
                "precision=bf16_pure where memory is short, or use the version of dlopt in its environment.json"
            )
        config["optimizer"] = {key: value for key, value in optimizer.items() if key != "state_dtype"}
    return config
