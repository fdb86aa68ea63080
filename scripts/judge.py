#!/usr/bin/env python
"""Tests `dlopt judge` on 200 changes that do nothing and on 50 of known size, next to keeping what improves.

.venv/bin/python scripts/judge.py --runs FOLDER               train what is missing, then write docs/judge/evidence.json
.venv/bin/python scripts/judge.py --runs FOLDER --minutes 20  stop after 20 minutes; the next call continues

FOLDER/runs.jsonl holds the results. The rules were fixed before the runs, and no seed is used twice:

- The base is a small network on digits, compared by its validation loss (and again by its accuracy, which has ties).
- A null change trains the same config with other seeds (160), renames the variables of a model (20), or reorders the
  overrides (20). Each has 10 pairs with base runs of its own.
- Candidates for changes of known size are measured on 10 pairs. Of those whose mean difference is at least one standard
  deviation of the differences, the 50 smallest are judged, each on new seeds, with at most 20 pairs, and as the first
  proposal against its base.
- Greedy keeps a change whose first run is better than the first run of the base.
- The promise is broken if, with the error rate 0.05, more than 13 of the 160 changes with other seeds get a verdict
  (5 % and two standard errors), if a renamed variable changes a metric, or if more than two of the 50 changes get a
  verdict in the wrong direction.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "judge" / "evidence.json"
PAIRS, NULLS, CHANGES = 10, {"other seeds": 160, "renamed variables": 20, "reordered keys": 20}, 50
BUDGET = 20  # pairs of a change with an effect, the default of `dlopt judge`
SMALLEST = 1.0  # standard deviations
FIRST = 5000  # proposals: the seeds of an earlier rule's evidence are below
RATE = 0.05
METRICS = ("val_loss", "val_accuracy")
BASE = [
    "model=mlp", "model.widths=[16]", "optimizer.lr=0.05", "epochs=3", "evaluate.every_epochs=3", "monitor=val_loss",
]  # fmt: skip
QUIET = [
    "tracking=[]", "log_every_steps=null", "evaluate.test=false", "checkpoint.every_epochs=null", "threads=1",
    "device=cpu",
]  # fmt: skip
CANDIDATES = [
    *(f"optimizer.lr={lr}" for lr in (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04,
                                      0.044, 0.056, 0.06, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)),
    *(f"model.widths=[{width}]" for width in (2, 3, 4, 5, 6, 8, 10, 12, 14, 18, 24, 32, 48, 64, 96, 128, 192, 256)),
    *(f"epochs={epochs} evaluate.every_epochs={epochs}" for epochs in (1, 2, 4, 5, 6, 8, 10)),
    *(f"data.batch_size={size}" for size in (16, 32, 48, 64, 96, 112, 144, 192, 256, 384, 512)),
    *(f"optimizer.momentum={momentum}" for momentum in (0.0, 0.3, 0.5, 0.7, 0.8, 0.88, 0.92, 0.95, 0.98)),
    *(f"optimizer.weight_decay={decay}" for decay in (0.003, 0.01, 0.03, 0.1, 0.3)),
    *(f"model.activation={name}" for name in ("tanh", "sigmoid", "gelu", "silu", "softplus", "identity")),
    *(f"optimizer=adam optimizer.lr={lr}" for lr in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
    *(f"schedule={name}" for name in ("constant", "linear", "cosine", "one_cycle")),
    *(f"init={name}" for name in ("xavier_normal", "kaiming_normal", "orthogonal", "normal")),
    "model.dropout=0.1", "model.dropout=0.3", "model.dropout=0.5", "model.widths=[16,16]", "model.widths=[16,16,16]",
]  # fmt: skip
MODEL = """
from torch import nn

class Net{i}(nn.Module):
    def __init__(self, *, input_shape, classes):
        super().__init__()
        self.{a} = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], 16)
        self.{b} = nn.Linear(16, classes)

    def forward(self, {c}):
        {d} = self.{a}({c}.flatten(1)).relu()
        return self.{b}({d})
"""


class Runs:
    """Trains each run once, in this process, and keeps its results in FOLDER/runs.jsonl."""

    def __init__(self, folder: Path, minutes: float) -> None:
        from dlopt.config.compose import Composer

        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._end = folder / "runs.jsonl", time.monotonic() + 60 * minutes
        lines = map(json.loads, self._file.read_text().splitlines()) if self._file.exists() else ()
        self._known: dict[str, dict[str, Any]] = {line["run"]: line for line in lines}
        self._composer = Composer()

    def result(self, overrides: Sequence[str], seed: int) -> dict[str, Any]:
        """Returns the metrics of a run and the text of all its evaluations."""
        name = " ".join([*overrides, f"seed={seed}"])
        if name not in self._known:
            if time.monotonic() > self._end:
                sys.exit(f"{len(self._known)} runs so far; the same command continues")
            self._known[name] = {"run": name, **self._train([*overrides, f"seed={seed}"])}
            with self._file.open("a") as file:
                file.write(json.dumps(self._known[name]) + "\n")
        return self._known[name]

    def _train(self, overrides: Sequence[str]) -> dict[str, Any]:
        from dlopt.config.plan import plan
        from dlopt.run.record import describe
        from dlopt.run.runner import exit_code
        from dlopt.tracking.metrics import read_metrics
        from dlopt.training.progress import TrainingRun

        base = BASE if overrides[0][:6] != "model=" else [each for each in BASE if each[:5] != "model"]
        words = [*base, *QUIET, *overrides]
        job = plan(self._composer.with_words(*words), words)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            describe(folder, job.saved, job.typed, job.choices)
            exit_code(TrainingRun(job.run_config, folder, None, job.choices), console=False, may_diverge=True)
            history = read_metrics(folder)
        last = history[-1] if history else {}
        computed = ("train_loss", *METRICS)
        return {metric: last.get(metric) for metric in METRICS} | {
            "history": repr([[line.get(key) for key in computed] for line in history])
        }

    def differences(
        self, base: Sequence[str], change: Sequence[str], seeds: Sequence[tuple[int, int]], metric: str
    ) -> list[float]:
        """Returns gains, positive for the better run; seeds: of the run of the base and of the change."""
        return [gain(self.result(base, a), self.result(change, b), metric) for a, b in seeds]


def gain(base: dict[str, Any], change: dict[str, Any], metric: str) -> float:
    sign = -1 if metric == "val_loss" else 1
    worst = -math.inf
    a, b = (worst if each[metric] is None else sign * each[metric] for each in (base, change))
    return 0.0 if a == b else b - a


# -- changes


def paired(number: int, pairs: int = PAIRS, shift: int = 0) -> list[tuple[int, int]]:
    """Returns the seeds of proposal `number`; `shift`: of the change against the base."""
    first = 1000 * (FIRST + number)
    return [(first + i, first + i + shift) for i in range(pairs)]


def nulls(runs: Runs) -> Iterator[dict[str, Any]]:
    for number in range(1, NULLS["other seeds"] + 1):
        seeds = paired(number, shift=500)
        yield {"kind": "other seeds"} | {metric: rounded(runs.differences([], [], seeds, metric)) for metric in METRICS}
    for number in range(1, NULLS["renamed variables"] + 1):
        base, change = ([f"model=renamed.Net{i}", "allow_packages=[renamed]"] for i in (0, number))
        results = [[runs.result(each, seed) for seed, _ in paired(1000 + number)] for each in (base, change)]
        same = [a["history"] == b["history"] for a, b in zip(*results, strict=True)]
        yield {"kind": "renamed variables", "same": all(same)}
    from dlopt.config.compose import Composer
    from dlopt.config.plan import plan

    composer = Composer()
    for number in range(1, NULLS["reordered keys"] + 1):
        order = [*BASE[number % len(BASE) :], *BASE[: number % len(BASE)]]
        if number % 2:
            order.reverse()
        order.sort(key=lambda each: "." in each)  # a choice comes before its keys
        yield {"kind": "reordered keys", "same": plan(composer, BASE).saved == plan(composer, order).saved}


def changes(runs: Runs) -> Iterator[dict[str, Any]]:
    """Yields the smallest changes that are large enough, judged on other seeds than those that measure their sizes."""
    from dlopt.lab.judge.sequential import looks, rate_of

    sizes: dict[str, float] = {}
    for line in CANDIDATES:
        measured = runs.differences([], line.split(), paired(2000), "val_loss")
        if all(map(math.isfinite, measured)) and any(measured):  # does not diverge, and is not the base
            sizes[line] = statistics.fmean(measured) / statistics.stdev(measured)
    large = [line for line in CANDIDATES if abs(sizes.get(line, 0.0)) >= SMALLEST]
    for line in sorted(large, key=lambda line: abs(sizes[line]))[:CHANGES]:
        gains: list[float] = []
        for pair in paired(3000 + CANDIDATES.index(line), BUDGET):
            gains += runs.differences([], line.split(), [pair], "val_loss")
            look = list(looks(gains, rate_of(1, RATE)))[-1]
            if look.verdict != "undecided":
                break
        yield {"change": line, "size": round(sizes[line], 2), "val_loss": rounded(gains)}


def rounded(values: Sequence[float]) -> list[float | str]:
    return [float(f"{value:.6g}") if math.isfinite(value) else str(value) for value in values]


def write_models(folder: Path) -> None:
    """Writes models that differ in the names of their variables only, and makes them importable."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [("hidden", "output", "x", "h"), *((f"a{i}", f"b{i}", f"c{i}", f"d{i}") for i in range(1, 21))]
    models = [MODEL.format(i=i, a=a, b=b, c=c, d=d) for i, (a, b, c, d) in enumerate(names)]
    (folder / "renamed.py").write_text("".join(models))
    sys.path.insert(0, str(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    arguments = parser.parse_args()
    folder = arguments.runs.absolute()
    sys.path.insert(0, str(ROOT))
    write_models(folder)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    start, runs = time.process_time(), Runs(folder, arguments.minutes)
    evidence = {"base": BASE, "rate": RATE, "pairs": PAIRS, "budget": BUDGET}
    evidence |= {"changes": [*changes(runs)], "nulls": [*nulls(runs)]}
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    EVIDENCE.write_text(json.dumps(evidence, indent=None).replace('{"', '\n{"') + "\n")
    print(f"{(time.process_time() - start) / 60:.1f} minutes of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
