"""Small checkpoints, their file names, and crashes while they are written."""

import io
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dlopt.basics.files import sha256, write
from dlopt.tasks.regression import Regression
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.stopping import Best
from tests.support.lengths import constant


def state(step: int, *, best_epoch: int | None = None, epoch: int | None = None) -> dict[str, Any]:
    weights = torch.full((300,), float(step))
    return {
        "model": {"weight": weights},
        "optimizer": {"state": {}, "param_groups": []},
        "schedule": {},
        "ema": None,
        "rng": {},
        "progress": {
            "epoch": step if epoch is None else epoch,
            "position": 0,
            "step": step,
            "seconds": 1.0,
            "length": constant(100, 1).state_dict(),
            "resumed_from": [],
            "found_lr": None,
            "evaluated": step if epoch is None else epoch,
            "best": asdict(Best("val_loss", epoch=best_epoch)),
            "data": {"classes": None, "task": Regression(1).saved, "sample": [3], "window": [3], "identity": None},
        },
        "config": {"name": "try", "run_id": "a"},
        "normalize": {},
    }


def names(checkpoints: Checkpoints) -> set[str]:
    return {path.name for path in checkpoints.folder.iterdir()}


def with_checksums(*files: str) -> set[str]:
    return {name for file in files for name in (file, f"{file}.sha256")}


class Crashes:
    """Kills the process at the n-th call that changes the file system, before or after it."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after = at, after

    def install(self) -> None:
        for name in ("replace", "fsync", "link", "unlink"):
            setattr(os, name, self._wrap(getattr(os, name)))
        torch.save = self._half(torch.save)

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                self._die()
            try:
                return function(*arguments, **named)
            finally:
                if self.left == 0:
                    self._die()

        return call

    def _half(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, file: Any) -> None:
            buffer = io.BytesIO()
            save(value, buffer)
            data = buffer.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            self.left -= 1
            if self.left == 0:
                self._die()
            file.write(data[len(data) // 2 :])

        return call

    @staticmethod
    def _die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Payload:
    """An object whose pickle creates the file `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def poison(path: Path, marker: Path) -> None:
    """Makes a checkpoint one with shards that are pickled payloads, as of torch.distributed, with valid checksums."""
    folder = path.parent / f"shards/{path.stem}"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    state = torch.load(path, weights_only=True)
    files = {each.name: sha256(each) for each in folder.iterdir()}
    state["shards"] = {"folder": folder.name, "files": files, "tensors": {}}
    path.unlink()
    write(path, lambda file: torch.save(state, file))


class Quantized(Tensor):
    """A tensor of a class of its own around another, as the states of quantized optimizers are."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Quantized":
        made: Quantized = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*tree_map_only(cls, lambda each: each.values, args), **(kwargs or {}))
        return args[0] if found is getattr(args[0], "values", None) else found  # in place


class QuantizedMomentum(torch.optim.Optimizer):
    def __init__(self, params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", Quantized(torch.zeros_like(p)))
                momentum.mul_(0.9).add_(p.grad)
                p.sub_(momentum.values, alpha=group["lr"])
        return loss
