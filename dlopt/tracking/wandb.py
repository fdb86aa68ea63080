"""Weights & Biases: as WANDB_MODE, WANDB_API_KEY and its other variables say; the project has the run's `name`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.files import write_atomically
from dlopt.tracking.remote import Point


class Wandb:
    """One run. A resumed one goes on under the same id. Without an account, WANDB_MODE=offline writes to the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Any = None

    def begin(self, hparams: Mapping[str, str | bool | float]) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise PermissionError("no account: set WANDB_API_KEY, or WANDB_MODE=offline")
        kept = self._folder / "wandb.id"
        self._run = wandb.init(
            project=str(hparams["name"]),
            name=self._folder.name,
            id=kept.read_text().strip() if kept.exists() else None,
            resume="allow",
            dir=str(self._folder),
            config=dict(hparams),
            settings=wandb.Settings(console="off", silent=True),
        )
        write_atomically(kept, f"{self._run.id}\n".encode())

    def send(self, points: list[Point]) -> None:
        for step, _, values in points:
            self._run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "stopped_early") else 1)
