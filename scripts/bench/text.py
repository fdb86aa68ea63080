"""Benchmarks training on text: dlopt, the bare computation, and nanoGPT's loop, in tokens per second.

    python scripts/bench/text.py [--rounds 5] [--steps 30] [--threads 2] [--compile] [--json FILE]

The job is nanoGPT's recipe for CPUs (its README): 4 layers, 4 heads, 128 features, 64 bytes of context, 12 windows per
update, no biases, no dropout, AdamW, fp32, on the source code of Python's standard library.

    bare         forward, backward and fused AdamW on one fixed batch, with dlopt's model and malloc settings
    dlopt        the training step of `dlopt train`: batches, metrics, checks for NaN, schedule, fused AdamW
    dlopt clip   the same with clip=norm
    nanogpt      nanoGPT's model.py and the loop of its train.py: get_batch, clipping, AdamW as it is on a CPU, the loss
                 printed in every update (log_interval=1 in its recipe)

nanoGPT is not a package, so its model and loop are written here. The candidates take turns, in both orders. Each
measurement is a new process, because dlopt's malloc settings would also speed up the others, and because the same
program differs by some percent from process to process. Reports medians by processor time, which other jobs on the
machine disturb little, and by wall time.
"""

import argparse
import functools
import io
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.data.text import python_source
from dlopt.processor import set_threads
from dlopt.training.build import Workload, build_workload
from dlopt.training.trainer import probe_trainer

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
    return build_workload(parse(*to_plain(Composer().compose(lines), lines)))


def dlopt_steps(*overrides: str) -> Steps:
    trainer = probe_trainer(workload(*overrides), Path("."))
    trainer.module.train()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
    numbers = itertools.count()

    def run(steps: int) -> None:
        for batch, number in zip(itertools.islice(batches, steps), numbers, strict=False):
            trainer.update(batch, number)
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


class NanoBlock(nn.Module):
    """A block of nanoGPT's model.py."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (each.view(B, T, HEADS, C // HEADS).transpose(1, 2) for each in self.c_attn(self.ln_1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        x = x + self.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))
        return x + self.dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """nanoGPT's model.py without biases, with a vocabulary of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH), nn.Dropout(0.0)
        self.h = nn.ModuleList([NanoBlock() for _ in range(DEPTH)])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, 256, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * DEPTH) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def nanogpt_steps(threads: int, *overrides: str) -> Steps:
    dataset = python_source(sequence_length=CONTEXT, val_split=0.05, test_split=0.05)
    data = np.asarray(dataset.train.tokens, dtype=np.uint16)  # type: ignore[attr-defined]
    set_threads(threads)
    torch.manual_seed(1337)
    model = compiled(NanoGPT(), overrides)
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=BETAS)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

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
            _, loss = model(inputs, targets)
            inputs, targets = get_batch()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            print(f"iter {number}: loss {loss.item():.4f}", file=sink)

    return run


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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keys = (f"threads={options.threads}", f"compile={str(options.compile).lower()}")
    builds: dict[str, Callable[[], Steps]] = {
        "bare": functools.partial(bare_steps, *keys),
        "dlopt": functools.partial(dlopt_steps, *keys),
        "dlopt clip": functools.partial(dlopt_steps, *keys, "clip=norm"),
        "nanogpt": functools.partial(nanogpt_steps, options.threads, *keys),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in builds}
    spawn = multiprocessing.get_context("spawn")
    for number in range(options.rounds):
        for name in list(builds)[:: 1 if number % 2 else -1]:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                times[name].append(process.submit(measure, builds[name], options.steps).result())
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
