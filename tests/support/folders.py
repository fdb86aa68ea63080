"""Run folders for tests, written without training; a count of the work of what reads them."""

import cProfile
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dlopt.basics.folders import FORMAT
from dlopt.results.ranking import Ranking, gather
from dlopt.results.reading import RunReader

TARGETS = {"sgd": "torch.optim.SGD", "adamw": "torch.optim.AdamW"}


def make_run(
    path: Path,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    seed: int = 0,
    accuracies: tuple[float, ...] = (0.5, 0.7, 0.8),
    losses: tuple[float, ...] = (),
    status: str | None = "finished",
    seconds: float = 1.0,
    test: float | None = 0.75,
    reason: str | None = None,
    config: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
) -> Path:
    """Writes a run folder: one epoch per accuracy, ten updates and `seconds` each. `status` None: no summary."""
    path.mkdir(parents=True)
    group_keys = {"momentum": 0.9} if optimizer == "sgd" else {"betas": [0.9, 0.999]}
    full_config: dict[str, Any] = {
        "name": "train", "seed": seed, "init_seed": seed, "order_seed": seed, "augmentation_seed": seed,
        "epochs": len(accuracies), "steps": None, "monitor": "auto", "tracking": ["tensorboard"],
        "optimizer": {"_target_": TARGETS[optimizer], "lr": lr, "weight_decay": 0.0, **group_keys},
        "data": {"_target_": "dlopt.data.images.digits.digits", "batch_size": 64},
        "model": {"_target_": "dlopt.models.mlp.MLP", "widths": [64, 64]},
        "clip": {"_target_": "dlopt.training.clipping.Unclipped"},
    }  # fmt: skip
    for key, value in (config or {}).items():
        group, _, inner = key.partition(".")
        full_config = {**full_config, group: {**full_config[group], inner: value} if inner else value}
    choices = {"optimizer": optimizer, "data": "digits", "model": "mlp", "clip": "none"}
    typed = [f"optimizer={optimizer}", f"optimizer.lr={lr}", f"seed={seed}"] if overrides is None else overrides
    _write(path / "config.yaml", yaml.dump(full_config, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    _write(path / "overrides.yaml", yaml.safe_dump(typed))
    _write(
        path / "environment.json",
        json.dumps({"folder_format": FORMAT, "dlopt": "0.1.0", "git_commit": "c" * 40, "choices": choices}),
    )
    losses = losses or tuple(1 - accuracy for accuracy in accuracies)
    lines = [
        {
            "epoch": i + 1, "step": 10 * (i + 1), "lr": lr * (1 + math.cos(math.pi * i / len(accuracies))) / 2,
            "train_loss": loss, "train_accuracy": accuracy, "val_loss": loss, "val_accuracy": accuracy,
            "seconds": seconds * (i + 1),
        }
        for i, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]  # fmt: skip
    _write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if status == "failed":
        _write(path / "summary.json", json.dumps({"status": status, "reason": reason or "the loss is nan"}))
    elif status is not None:
        best = max(range(len(lines)), key=lambda i: accuracies[i])
        summary = {
            "status": status, "epochs": len(lines), "steps": 10 * len(lines), "best_epoch": best + 1,
            "best_val_loss": losses[best], "best_val_accuracy": accuracies[best], "seconds": seconds * len(lines),
            "parameters": 1000, "parallel": "single", "processes": 1, "resumed_from": [],
        }  # fmt: skip
        summary |= {} if test is None else {"test_loss": 1 - test, "test_accuracy": test}
        _write(path / "summary.json", json.dumps(summary))
    return path


def table(folder: Path, by: str | None = None) -> Ranking:
    """Reads the runs below a folder into a table."""
    return gather(*RunReader().read([folder]), by)


def count_calls(function: Callable[[], object]) -> int:
    """Returns how many functions `function` calls: a measure of its work that does not depend on the machine."""
    profile = cProfile.Profile()
    profile.runcall(function)
    return sum(entry.callcount for entry in profile.getstats())


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
