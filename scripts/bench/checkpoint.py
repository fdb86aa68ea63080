"""What saving costs the training.

    python scripts/bench/checkpoint.py [--model resnet20] [--every 10] [--steps 60] [--rounds 3] [--json FILE]

A model on random images, batch 128, SGD with momentum, on the device that dlopt would take. In turn: without
checkpoints, with one every so many updates, and with the same written behind the training. The cost of a save is the
time beyond the run without, per checkpoint, also in steps. Medians over the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlopt.config.compose import Composer, to_plain
from dlopt.config.parsing import parse
from dlopt.processor import choose_device
from dlopt.training.checkpoint import Checkpoints

BATCH = 128


def measure(module: nn.Module, *, steps: int, every: int | None, asynchronous: bool) -> tuple[float, int]:
    """Seconds for so many updates, and the size of a checkpoint."""
    device = next(module.parameters()).device
    torch.manual_seed(0)
    inputs, targets = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), asynchronous=asynchronous)

        def update(step: int) -> None:
            optimizer.zero_grad()
            loss_of(module(inputs), targets).backward()
            optimizer.step()
            if every is not None and step % every == 0:
                checkpoints.save(state(module, optimizer, step), best=False)

        for step in range(1, 4):  # warm
            update(step)
        checkpoints.settle()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            update(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        checkpoints.settle()
        size = checkpoints.last.stat().st_size if every is not None else 0
    return seconds, size


def state(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    parts: dict[str, Any] = {"schedule": {}, "ema": None, "rng": {}, "config": {}, "normalize": {}}
    return {
        **parts,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {"step": step, "epoch": 0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    lines = [f"model={asked.model}"]
    component = parse(to_plain(Composer().compose(lines), lines)[0]).model
    module = component.build(input_shape=(3, 32, 32), classes=10).to(choose_device("auto"))
    kinds = {"none": (None, False), "before going on": (asked.every, False), "behind": (asked.every, True)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    size = 0
    for _ in range(asked.rounds):
        for name, (every, behind) in kinds.items():
            taken, found = measure(module, steps=asked.steps, every=every, asynchronous=behind)
            seconds[name].append(taken)
            size = max(size, found)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = medians["none"] / asked.steps
    count = asked.steps // asked.every
    figures: dict[str, Any] = {"model": asked.model, "megabytes": round(size / 1e6, 2), "step_ms": round(1e3 * step, 2)}
    for name in ("before going on", "behind"):
        cost = (medians[name] - medians["none"]) / count
        figures[name] = {"save_ms": round(1e3 * cost, 2), "steps": round(cost / step, 2)}
        print(f"{name}: {1e3 * cost:.1f} ms per checkpoint, {cost / step:.2f} steps")
    print(f"{asked.model}: {size / 1e6:.1f} MB, a step takes {1e3 * step:.1f} ms")
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
