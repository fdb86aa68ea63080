"""Benchmarks the cost of saving checkpoints during training.

    python scripts/bench/checkpoint.py [--model resnet20] [--every 10] [--steps 60] [--rounds 3] [--json FILE]

Trains a model on random images (batch 128, SGD with momentum, device=auto) in turn without checkpoints, with
synchronous and with asynchronous checkpoints every N steps. The cost of a checkpoint is the extra time over the run
without, in ms and in steps. Reports medians over the rounds.
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

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.machine.device import choose_device
from dlopt.training.checkpoint.checkpoints import Checkpoints

BATCH = 128


def measure(module: nn.Module, *, steps: int, every: int | None, asynchronous: bool) -> tuple[float, int]:
    """Returns the seconds of `steps` updates, and the size of a checkpoint in bytes."""
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

        for step in range(1, 4):  # warm-up
            update(step)
        checkpoints.wait()
        start = time.perf_counter()
        for step in range(1, steps + 1):
            update(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        checkpoints.wait()
        size = checkpoints.last.stat().st_size if every is not None else 0
    return seconds, size


def state(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    empty: dict[str, Any] = {"schedule": {}, "ema": None, "rng": {}, "config": {}, "normalize": {}}
    return {
        **empty,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {"step": step, "epoch": 0, "position": 0, "best": {"epoch": None}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines = [f"model={arguments.model}"]
    component = parse(to_plain(Composer().compose(lines), lines)[0]).model
    module = component.build(input_shape=(3, 32, 32), classes=10).to(choose_device("auto"))
    modes = {"none": (None, False), "synchronous": (arguments.every, False), "asynchronous": (arguments.every, True)}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    size = 0
    for _ in range(arguments.rounds):
        for name, (every, asynchronous) in modes.items():
            mode_seconds, mode_size = measure(module, steps=arguments.steps, every=every, asynchronous=asynchronous)
            seconds[name].append(mode_seconds)
            size = max(size, mode_size)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = medians["none"] / arguments.steps
    count = arguments.steps // arguments.every
    results: dict[str, Any] = {
        "model": arguments.model,
        "megabytes": round(size / 1e6, 2),
        "step_ms": round(1e3 * step, 2),
    }
    for name in ("synchronous", "asynchronous"):
        cost = (medians[name] - medians["none"]) / count
        results[name] = {"save_ms": round(1e3 * cost, 2), "steps": round(cost / step, 2)}
        print(f"{name}: {1e3 * cost:.1f} ms per checkpoint, {cost / step:.2f} steps")
    print(f"{arguments.model}: {size / 1e6:.1f} MB, {1e3 * step:.1f} ms/step")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
