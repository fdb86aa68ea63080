#!/usr/bin/env python
"""Measures the best learning rate at four widths, with init=mup and with a standard initialization.

Trains MLPs on digits, with learning rates 2^n around the best one of each optimizer, initialization and width. Writes
the mean training losses of the last updates to docs/mup/results.json, which `scripts/gallery width_transfer` draws;
losses in this file are not measured again.

.venv/bin/python scripts/width_transfer.py             measure all (about 6 minutes on one core)
.venv/bin/python scripts/width_transfer.py muon        measure one optimizer
"""

import argparse
import json
import math
import re
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

from dlopt.extend import Composer, RunConfig, build_workload, plan, probe_trainer
from dlopt.training.progress import endless_batches

FILE = Path(__file__).resolve().parents[1] / "docs" / "mup" / "results.json"
WIDTHS, UPDATES, LAST, SEEDS = (16, 32, 64, 128), 60, 15, (20, 21)
LAYERS = 3
INITS = {"mup": ("init=mup", "init.base_width=16", "init.std=0.25"), "standard": ("init=kaiming_normal",)}
OPTIMIZERS = {  # keys, and the exponent n of the first rate to try
    "adamw": ((), -5),
    "muon": (("optimizer.rest_lr=0.004",), -4),
    "soap": ((), -4),
    "shampoo": ((), -1),
    "scion": (("optimizer.radius=8", "optimizer.constrained=false"), -6),
}
Losses = dict[str, dict[str, dict[str, dict[str, list[float | None]]]]]
"""By optimizer, initialization, width and exponent: of each seed; None: not finite."""

COMMON = ("data=digits", "model=mlp", "model.norm=none", "data.batch_size=64", "schedule=linear", "threads=1",
    "device=cpu", "tracking=[]", f"steps={UPDATES}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the best learning rate at four widths")
    parser.add_argument("names", nargs="*", metavar="OPTIMIZER", help=f"default: {' '.join(OPTIMIZERS)}")
    names = parser.parse_args().names or list(OPTIMIZERS)
    losses: Losses = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name, init in product(names, INITS):
        keys, exponent = OPTIMIZERS[name]
        base = plan(Composer(), [*COMMON, *INITS[init], f"optimizer={name}", *keys]).run_config
        for width in WIDTHS:
            found = losses.setdefault(name, {}).setdefault(init, {}).setdefault(str(width), {})
            exponent = measure(base, width, exponent, found)
            save(losses)
            print(name, init, width, exponent, found, flush=True)


def measure(base: RunConfig, width: int, exponent: int, losses: dict[str, list[float | None]]) -> int:
    """Adds losses by exponent until the best rate has two greater and two smaller ones; returns its exponent."""
    waiting = {exponent}
    while waiting := {each for each in waiting if str(each) not in losses}:
        for each in sorted(waiting):
            losses[str(each)] = [final_loss(base, width, 2.0**each, seed) for seed in SEEDS]
        exponent = best(losses)
        waiting = set(range(exponent - 2, exponent + 3))
    return best(losses)


def final_loss(base: RunConfig, width: int, lr: float, seed: int) -> float | None:
    """Trains an MLP; returns the mean training loss of the last updates, None if it is not finite."""
    model = base.model.partial(widths=[width] * LAYERS)
    settings = replace(base.settings, seed=seed, init_seed=seed)
    config = replace(base, model=model, settings=settings, optimizer=base.optimizer.partial(lr=lr))
    trainer, losses = probe_trainer(build_workload(config), FILE.parent, checks=False), []
    for number, batch in enumerate(islice(endless_batches(trainer.batches, trainer.progress), UPDATES)):
        trainer.run_update(batch, number)
        losses.append(trainer.train_metrics.since_last()["loss"])
    mean = sum(losses[-LAST:]) / LAST
    return round(mean, 5) if math.isfinite(mean) else None


def best(losses: dict[str, list[float | None]]) -> int:
    """Returns the exponent of the rate with the smallest mean loss over the seeds."""
    means = {exponent: sum(math.inf if loss is None else loss for loss in of) for exponent, of in losses.items()}
    return int(min(means, key=means.__getitem__))


def save(losses: Losses) -> None:
    """Writes a line for each width."""
    text = re.sub(r"\n {4,}", " ", json.dumps(losses, indent=1))
    FILE.write_text(re.sub(r"\n   \}", " }", text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
