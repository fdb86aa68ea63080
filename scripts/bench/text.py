"""Benchmarks training on text: dlopt, the bare computation, and nanoGPT's loop, in tokens per second.

    python scripts/bench/text.py [--rounds 5] [--steps 30] [--threads 2] [--compile] [--json FILE]

The job is nanoGPT's recipe for CPUs (its README): 4 layers, 4 heads, 128 features, 64 bytes of context, 12 windows per
update, no biases, no dropout, AdamW, fp32, on the source code of Python's standard library.

    bare         forward, backward and fused AdamW on one fixed batch
    dlopt        the training step of `dlopt train`: batches, metrics, checks for NaN, schedule, fused AdamW
    dlopt clip   the same with clip=norm
    nanogpt      the loop of nanoGPT's train.py with the same model: get_batch, clipping, AdamW as it is on a CPU,
                 the loss printed in every update (log_interval=1 in its recipe)

nanoGPT is not a package, so its loop is written here. All candidates take turns in one process; the first round is a
warm-up. Reports medians by processor time, which other jobs on the machine disturb little, and by wall time.
"""

import argparse
import copy
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.training.build import Workload, build_workload
from dlopt.training.trainer import dry_run

BATCH, CONTEXT = 12, 64
RATE, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1
RECIPE = [
    "data=python_source", f"data.sequence_length={CONTEXT}", f"data.batch_size={BATCH}", "model=gpt",
    "model.bias=false", "optimizer=adamw", f"optimizer.lr={RATE}", f"optimizer.betas=[{BETAS[0]},{BETAS[1]}]",
    f"optimizer.weight_decay={DECAY}", "decay_norm_and_bias=false", "schedule=cosine_warmup", "steps=100000",
    "tracking=[]", "device=cpu",
]  # fmt: skip

Steps = Callable[[int], None]


def workload(*overrides: str) -> Workload:
    lines = [*RECIPE, *overrides]
    return build_workload(parse(*to_plain(Composer().compose(lines), lines)))


def dlopt_steps(*overrides: str) -> Steps:
    trainer = dry_run(workload(*overrides), Path("."))
    trainer.module.train()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
    numbers = itertools.count()

    def run(steps: int) -> None:
        for (inputs, targets), number in zip(itertools.islice(batches, steps), numbers, strict=False):
            trainer.step.update(inputs, targets, number, trainer.train_metrics)
        trainer.train_metrics.sync()

    return run


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as in nanoGPT."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def bare_steps(source: Workload, model: nn.Module) -> Steps:
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=BETAS, fused=True)
    tokens = source.dataset.train.fetch(torch.arange(BATCH)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs).view(-1, 256), targets.view(-1)).backward()
            optimizer.step()

    return run


def nanogpt_steps(source: Workload, model: nn.Module) -> Steps:
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=BETAS)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    data = np.asarray(source.dataset.train.tokens, dtype=np.uint16)  # type: ignore[attr-defined]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        ix = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in ix])
        return x, y

    def run(steps: int) -> None:
        sink = io.StringIO()
        inputs, targets = get_batch()
        for number in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE
            loss = F.cross_entropy(model(inputs).view(-1, 256), targets.view(-1), ignore_index=-1)
            inputs, targets = get_batch()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            print(f"iter {number}: loss {loss.item():.4f}", file=sink)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keys = [f"threads={options.threads}", f"compile={str(options.compile).lower()}"]
    source = workload(*keys)

    def model() -> nn.Module:
        copied = copy.deepcopy(source.module).train()
        return torch.compile(copied) if options.compile else copied  # type: ignore[return-value]

    candidates: dict[str, Steps] = {
        "bare": bare_steps(source, model()),
        "dlopt": dlopt_steps(*keys),
        "dlopt clip": dlopt_steps(*keys, "clip=norm"),
        "nanogpt": nanogpt_steps(source, model()),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(options.rounds + 1):
        for name, run in candidates.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run(options.steps)
            if number:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    tokens = options.steps * BATCH * CONTEXT
    rates = {
        name: {
            kind: tokens / statistics.median(each[index] for each in measured)
            for index, kind in enumerate(("per_cpu_second", "per_second"))
        }
        for name, measured in times.items()
    }
    for name, rate in rates.items():
        ratio = rate["per_cpu_second"] / rates["bare"]["per_cpu_second"]
        print(f"{name:10} {rate['per_cpu_second']:9,.0f} tokens per CPU second ({ratio:.2f} of bare), "
              f"{rate['per_second']:9,.0f} per second")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": options.threads, "compile": options.compile, "rates": rates}))


if __name__ == "__main__":
    main()
