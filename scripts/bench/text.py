"""Benchmarks training on text: dlopt, the bare computation, and nanoGPT's loop, in tokens per second.

    python scripts/bench/text.py [--rounds 5] [--steps 30] [--threads 2] [--compile] [--nanogpt CHECKOUT]
                                  [--json FILE]

The job is nanoGPT's recipe for CPUs (its README): 4 layers, 4 heads, 128 features, 64 bytes of context, 12 windows per
update, no biases, no dropout, AdamW, fp32, on the source code of Python's standard library.

    bare         forward, backward and fused AdamW on one fixed batch, with dlopt's model and malloc settings
    dlopt        the training step of `dlopt train`: batches, metrics, checks for NaN, schedule, fused AdamW
    dlopt clip   the same with clip=norm
    nanogpt      with --nanogpt CHECKOUT: nanoGPT's own train.py, which clips gradients and prints each loss

The candidates take turns, in both orders. Each measurement is a new process, because dlopt's malloc settings would also
speed up the others, and because the same program differs by some percent from process to process. Reports medians by
processor time, which other jobs on the machine disturb little, and by wall time.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import pickle
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.data.texts.text import python_source
from dlopt.machine.threads import set_threads
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import Workload, build_workload

BATCH, CONTEXT, WIDTH, DEPTH, HEADS = 12, 64, 128, 4, 4
WARM_UP = 10  # updates
RATE, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1
RECIPE = [
    "data=python_source", f"data.sequence_length={CONTEXT}", f"data.batch_size={BATCH}", "model=gpt",
    "model.bias=false", "optimizer=adamw", f"optimizer.lr={RATE}", f"optimizer.betas=[{BETAS[0]},{BETAS[1]}]",
    f"optimizer.weight_decay={DECAY}", "decay_norm_and_bias=false", "schedule=cosine_warmup", "steps=100000",
    "tracking=[]", "device=cpu",
]  # fmt: skip

Steps = Callable[[int], None]


def compiled(model: nn.Module, overrides: Sequence[str]) -> nn.Module:
    return torch.compile(model) if "compile=true" in overrides else model  # type: ignore[return-value]


def workload(*overrides: str) -> Workload:
    lines = [*RECIPE, *overrides]
    return build_workload(parse(*to_plain(Composer(words=lines).compose(lines))))


def dlopt_steps(*overrides: str) -> Steps:
    trainer = probe_trainer(workload(*overrides), Path("."))
    trainer.module.train()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
    numbers = itertools.count()

    def run(steps: int) -> None:
        for batch, number in zip(itertools.islice(batches, steps), numbers, strict=False):
            trainer.run_update(batch, number)
        trainer.train_metrics.sync()

    return run


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as in nanoGPT."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def bare_steps(*overrides: str) -> Steps:
    source = workload(*overrides)
    model = compiled(source.module.train(), overrides)
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=BETAS, fused=True)
    tokens = source.dataset.train.fetch(torch.arange(BATCH)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs).view(-1, 256), targets.view(-1)).backward()
            optimizer.step()

    return run


def measure_nanogpt(checkout: Path, threads: int, compile: bool, steps: int) -> tuple[float, float]:
    """Runs nanoGPT's own train.py, unchanged, and returns the seconds of `steps` updates after a warm-up.

    It prints a line after each update, at which the clocks are read.
    """
    set_threads(threads)  # beside other processes, waiting threads sleep in all candidates: they would take their time
    marks: list[tuple[float, float]] = []

    def mark(line: object = "", *_: object, **__: object) -> None:
        if str(line).startswith("iter "):
            marks.append((time.process_time(), time.perf_counter()))

    dataset = python_source(sequence_length=CONTEXT, val_split=0.05, test_split=0.05)
    keys = {
        "dataset": "python", "device": "cpu", "dtype": "float32", "compile": compile, "eval_iters": 1,
        "log_interval": 1, "block_size": CONTEXT, "batch_size": BATCH, "gradient_accumulation_steps": 1,
        "n_layer": DEPTH, "n_head": HEADS, "n_embd": WIDTH, "dropout": 0.0, "bias": False, "learning_rate": RATE,
        "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": DECAY, "max_iters": WARM_UP + steps - 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), patch("builtins.print", mark):
        for file in ("train.py", "model.py", "configurator.py"):
            Path(file).symlink_to(checkout / file)
        data = Path("data/python")
        data.mkdir(parents=True)
        for name, part in (("train", dataset.train), ("val", dataset.val)):
            np.asarray(part.tokens, dtype=np.uint16).tofile(data / f"{name}.bin")  # type: ignore[union-attr]
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
        sys.argv = ["train.py", *(f"--{key}={value}" for key, value in keys.items())]
        sys.path.insert(0, folder)  # for `from model import GPT`
        runpy.run_path("train.py", run_name="__main__")
    (cpu, wall), (last_cpu, last_wall) = marks[WARM_UP - 1], marks[-1]
    assert len(marks) == WARM_UP + steps, len(marks)
    return last_cpu - cpu, last_wall - wall


def measure(build: Callable[[], Steps], steps: int) -> tuple[float, float]:
    """Runs `steps` updates after a warm-up; returns seconds of processor time and of wall time."""
    run = build()
    run(WARM_UP)
    cpu, wall = time.process_time(), time.perf_counter()
    run(steps)
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--nanogpt", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.nanogpt is not None and not (options.nanogpt / "train.py").is_file():
        parser.error(f"--nanogpt {options.nanogpt}: must be a checkout of nanoGPT; it has no train.py")
    keys = (f"threads={options.threads}", f"compile={str(options.compile).lower()}")
    candidates: dict[str, Callable[[int], tuple[float, float]]] = {
        "bare": functools.partial(measure, functools.partial(bare_steps, *keys)),
        "dlopt": functools.partial(measure, functools.partial(dlopt_steps, *keys)),
        "dlopt clip": functools.partial(measure, functools.partial(dlopt_steps, *keys, "clip=norm")),
    }
    if options.nanogpt is not None:
        original = (options.nanogpt.resolve(), options.threads, options.compile)
        candidates["nanogpt"] = functools.partial(measure_nanogpt, *original)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    spawn = multiprocessing.get_context("spawn")
    for number in range(options.rounds):
        for name in list(candidates)[:: 1 if number % 2 else -1]:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                times[name].append(process.submit(candidates[name], options.steps).result())
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
